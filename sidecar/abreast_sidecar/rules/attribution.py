"""Decides which rule explains each stored finding of a pair, from the stored captures or from the row alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from abreast_sidecar.compare.model import Difference, RenderedValues
from abreast_sidecar.compare.pair import INTERNAL_SERVER_ERROR
from abreast_sidecar.compare.rules import Rule, RuleScope, RuleSet
from abreast_sidecar.store.catalogue import OTHER_PATH, IdCache
from abreast_sidecar.store.counters import BET_MARKS, NO_RULE, REPEAT_MARKS, compute_marks, get_rule
from abreast_sidecar.store.database import Row
from abreast_sidecar.store.records import PairRecord


@dataclass(frozen=True, slots=True)
class FindingRef:
    """The columns of a finding that rules look at."""

    id: int
    endpoint_id: int
    part: str
    path: str
    kind: str
    impact: str
    status: str
    service: str
    method: str
    route: str

    @property
    def endpoint(self) -> str:
        return f"{self.method} {self.route}"

    def is_affected_by(self, rule: Rule) -> bool:
        """Tell whether the rule can explain or avoid such a difference, whatever its values are."""
        return rule.applies_to(self.service, self.endpoint) and rule.may_match(self.part, self.path, self.kind)

    @property
    def difference(self) -> Difference:
        return Difference(self.part, self.path, self.kind, self.impact, RenderedValues("", None, None))  # type: ignore[arg-type]  # text columns


@dataclass(frozen=True, slots=True)
class Attribution:
    """The rule that explains each finding of a pair, or NO_RULE. `noise` is for old against old."""

    findings: Mapping[int, int]
    noise: Mapping[int, int]
    marks: Mapping[int, int]  # by finding
    late_rules: Mapping[int, int] = field(default_factory=dict)  # finding → a later rule that needs the lost values

    @classmethod
    def from_row(cls, row: Row) -> Attribution:
        """Read what a row of `pair` stores."""
        mappings = [
            dict.fromkeys(row[unexplained], NO_RULE)
            | dict(zip(row[explained] or (), row[f"{explained}_by"] or (), strict=True))
            for unexplained, explained in (("findings", "explained"), ("baseline_findings", "baseline_explained"))
        ]
        return cls(mappings[0], mappings[1], {int(key): marks for key, marks in (row["marks"] or {}).items()})

    def to_columns(self) -> dict[str, object]:
        """Return the columns of `pair`."""
        columns: dict[str, object] = {"marks": {str(finding): marks for finding, marks in self.marks.items()} or None}
        for prefix, mapping in (("", self.findings), ("baseline_", self.noise)):
            explained = {finding: rule for finding, rule in mapping.items() if rule}
            columns[f"{prefix}findings"] = [finding for finding, rule in mapping.items() if not rule]
            columns[f"{prefix}explained"] = list(explained) or None
            columns[f"{prefix}explained_by"] = list(explained.values()) or None
        return columns


def make_rule_scope(row: Row) -> RuleScope:
    old_status, new_status = (
        0 if code is None else code or INTERNAL_SERVER_ERROR for code in (row["old_status"], row["new_status"])
    )
    endpoint = f"{row['method']} {row['route']}"
    return RuleScope(row["service"], endpoint, row["old_release"], row["new_release"], (old_status, new_status))


def find_explaining_rule(rules: Iterable[Rule], finding: FindingRef) -> int:
    """Return the first rule that explains the finding whatever its values are, or NO_RULE."""
    difference = finding.difference
    for rule in rules:
        is_in_scope = rule.applies_to(finding.service, finding.endpoint)
        if is_in_scope and is_decidable(rule, finding) and rule.explains(difference):
            return int(rule.name)
    return NO_RULE


def is_decidable(rule: Rule, finding: FindingRef) -> bool:
    """Check whether the rule applies or not regardless of values. Paths above an endpoint's limit share one finding."""
    return rule.is_value_independent and not (finding.path == OTHER_PATH and rule.path)


def attribute_record(record: PairRecord, id_cache: IdCache, row: Row) -> Attribution:
    """Attribute a pair that was compared again under the current rules. Findings that are drift of state stay drift.

    The repeats of values and the bets are kept, because they depend on the pairs before this one.
    """
    stored = Attribution.from_row(row)
    marks = Counter({finding: bits & (REPEAT_MARKS | BET_MARKS) for finding, bits in stored.marks.items()})
    endpoint, result, drifted = id_cache.get_endpoint(record.endpoint), record.result, set(row["drift"] or ())

    def group(unexplained: Iterable[Difference], explained: Iterable[Difference]) -> dict[int, list[Difference]]:
        groups = id_cache.group_by_finding(endpoint, unexplained, excluded=drifted)
        return groups | id_cache.group_by_finding(endpoint, explained, excluded=drifted | groups.keys())

    findings = group(result.differences, result.explained_differences)
    noise = group(result.noise, result.explained_noise)
    copies_writes = id_cache.copies_writes(record.service)
    for finding in findings.keys() | noise.keys():
        groups = findings.get(finding, ()), noise.get(finding, ())
        bits = compute_marks(result, *groups, record.time_ms / 1000, copies_writes=copies_writes)
        marks[finding] |= bits & ~BET_MARKS
    return Attribution(
        {finding: get_rule(differences) for finding, differences in findings.items()},
        {finding: get_rule(differences) for finding, differences in noise.items()},
        {finding: bits for finding, bits in marks.items() if bits},
    )


def attribute_row(
    row: Row, rules: RuleSet, first_versions: Mapping[int, int], findings: Mapping[int, FindingRef]
) -> Attribution:
    """Attribute a pair whose captures are not stored. A rule that needs values keeps what it explains while in force.

    `first_versions`: the version of the rules with which each rule began.
    """
    stored = Attribution.from_row(row)
    rules_in_scope = rules.for_scope(make_rule_scope(row)).rules
    active_ids = {int(rule.name) for rule in rules_in_scope}
    newer_rules = [
        rule for rule in rules_in_scope if first_versions.get(int(rule.name), 0) > (row["rules_version"] or 0)
    ]

    def attribute(mapping: Mapping[int, int]) -> dict[int, int]:
        return {
            finding: rule
            if rule in active_ids or finding not in findings
            else find_explaining_rule(rules_in_scope, findings[finding])
            for finding, rule in mapping.items()
        }

    attributed = attribute(stored.findings)
    late_rules: dict[int, int] = {}
    for finding in (findings[item] for item, rule in attributed.items() if rule == NO_RULE and item in findings):
        for rule in newer_rules:
            if not is_decidable(rule, finding) and rule.may_match(finding.part, finding.path, finding.kind):
                late_rules.setdefault(finding.id, int(rule.name))
    return Attribution(attributed, attribute(stored.noise), stored.marks, late_rules)
