"""Attribution of stored differences to the rules that explain them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.compare.rules import Rule, RuleScope, RuleSet
from abreast_sidecar.store.catalogue import OTHER_PATH
from abreast_sidecar.store.database import Row

NO_ANSWER_STATUS = 500  # what a client was told where no answer began


NO_RULE = 0  # in place of a rule: nothing explains it


@dataclass(frozen=True, slots=True)
class FindingRef:
    """A finding, as far as rules ask for it."""

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

    @property
    def difference(self) -> Difference:
        return Difference.from_text(self.part, self.path, "", self.kind, self.impact, None, None)  # type: ignore[arg-type]  # the ledger's words


@dataclass(frozen=True, slots=True)
class Attribution:
    """By finding the id of the rule that explains it, or NOBODY."""

    findings: Mapping[int, int]
    noise: Mapping[int, int]
    late_rules: Mapping[int, int] = field(default_factory=dict)  # finding → rule that came too late to tell


def read_attribution(row: Row) -> Attribution:
    return Attribution(
        _merge_explained(row["findings"], row["explained"], row["explained_by"]),
        _merge_explained(row["baseline_findings"], row["baseline_explained"], row["baseline_explained_by"]),
    )


def _merge_explained(
    unexplained: Iterable[int], explained: Sequence[int] | None, rules: Sequence[int] | None
) -> dict[int, int]:
    return dict.fromkeys(unexplained, NO_RULE) | dict(zip(explained or (), rules or (), strict=True))


def to_columns(attribution: Attribution) -> dict[str, list[int] | None]:
    explained = {finding: rule for finding, rule in attribution.findings.items() if rule}
    explained_noise = {finding: rule for finding, rule in attribution.noise.items() if rule}
    return {
        "findings": [finding for finding, rule in attribution.findings.items() if not rule],
        "explained": list(explained) or None,
        "explained_by": list(explained.values()) or None,
        "baseline_findings": [finding for finding, rule in attribution.noise.items() if not rule],
        "baseline_explained": list(explained_noise) or None,
        "baseline_explained_by": list(explained_noise.values()) or None,
    }


def make_rule_scope(row: Row) -> RuleScope:
    statuses = tuple(0 if code is None else code or NO_ANSWER_STATUS for code in (row["old_status"], row["new_status"]))
    return RuleScope(
        service=row["service"],
        endpoint=f"{row['method']} {row['route']}",
        old_release=row["old_release"],
        new_release=row["new_release"],
        statuses=(statuses[0], statuses[1]),
    )


def find_explaining_rule(rules: Iterable[Rule], finding: FindingRef) -> int:
    """The first rule that explains the finding whatever its values are."""
    for rule in rules:
        if is_decidable(rule, finding) and rule.explains(finding.difference):
            return int(rule.name)
    return NO_RULE


def is_decidable(rule: Rule, finding: FindingRef) -> bool:
    """Whether the row alone tells. Paths beyond an endpoint's limit are one finding, and not known any more."""
    return rule.is_value_independent and not (finding.path == OTHER_PATH and rule.path)


def attribute_by_row(
    row: Row, rules: RuleSet, first_versions: Mapping[int, int], findings: Mapping[int, FindingRef]
) -> Attribution:
    """What the row alone tells. What a rule explained whose values are not kept stays so while the rule holds."""
    attribution = read_attribution(row)
    applicable = rules.for_scope(make_rule_scope(row)).rules
    row_version = row["rules_version"] or 0
    late_rules = {}
    mappings = []
    for mapping in (attribution.findings, attribution.noise):
        rule_ids = {}
        for finding, rule in mapping.items():
            if finding not in findings or (rule and any(candidate.name == str(rule) for candidate in applicable)):
                rule_ids[finding] = rule
                continue
            rule_ids[finding] = find_explaining_rule(applicable, findings[finding])
            late_ids = [
                int(candidate.name)
                for candidate in applicable
                if first_versions.get(int(candidate.name), 0) > row_version and not is_decidable(candidate, findings[finding])
                and candidate.may_match(findings[finding].part, findings[finding].path, findings[finding].kind)
            ]  # fmt: skip
            if not rule_ids[finding] and late_ids and mapping is attribution.findings:
                late_rules[finding] = late_ids[0]
        mappings.append(rule_ids)
    return Attribution(mappings[0], mappings[1], late_rules)
