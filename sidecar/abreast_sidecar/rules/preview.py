"""What a rule would hide of what is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from abreast_sidecar.compare.model import CompareOptions, Difference
from abreast_sidecar.compare.rules import Rule, RuleScope, RuleSet
from abreast_sidecar.rules.reapply import fetch_rows, load_findings, recompare
from abreast_sidecar.store.catalogue import OTHER_PATH
from abreast_sidecar.store.database import Connection, Database, Row
from abreast_sidecar.store.rules import parse_active_rules

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
    statuses = tuple(
        0 if code is None else code or NO_ANSWER_STATUS for code in (row["old_status"], row["new_status"])
    )
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
            if finding not in findings or (
                rule and any(candidate.name == str(rule) for candidate in applicable)
            ):
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


EXAMPLES_PER_FINDING = 5  # of a finding
MAX_PREVIEW_EXAMPLES = 300
CANDIDATE_NAME = "0"  # the name of a rule that has no id yet


@dataclass(frozen=True, slots=True)
class RulePreview:
    """What a rule would do to one finding. `pairs` are within its limits; all of them are hidden where it is `exact`."""

    finding: FindingRef
    pairs: int
    is_exact: bool
    examples: int = 0
    hidden_examples: int = 0  # of the examples

    @property
    def may_hide(self) -> bool:
        """Whether it hides some pair, or nothing kept says that it does not."""
        return self.pairs > 0 and (self.is_exact or self.hidden_examples > 0 or not self.examples)


async def preview_rule(database: Database, rules: CompareOptions, rule: Rule) -> list[RulePreview]:
    """Findings that somebody confirmed first, then the most frequent. `rules`: what is set apart from rules."""
    async with database.connection() as connection:
        findings = await load_findings(connection)
        candidates = {
            item.id: item
            for item in findings.values()
            if rule.applies_to(item.service, item.endpoint)
            and rule.may_match(item.part, item.path, item.kind)
        }
        pairs = await _count_pairs(connection, rule, candidates)
        active_rules = parse_active_rules(await fetch_rows(connection, "rules_in_force")).rules
        parameters = {"findings": list(pairs), "each": EXAMPLES_PER_FINDING, "limit": MAX_PREVIEW_EXAMPLES}
        examples = await fetch_rows(connection, "preview_examples", parameters)
    declared = RuleSet((*active_rules.rules, replace(rule, name=CANDIDATE_NAME)))
    example_counts = await asyncio.to_thread(
        _try_examples, examples, replace(rules, rule_set=declared), candidates
    )
    previews = [
        RulePreview(
            candidates[finding],
            count,
            is_decidable(rule, candidates[finding]),
            *example_counts.get(finding, (0, 0)),
        )
        for finding, count in pairs.items()
    ]
    return sorted(
        (entry for entry in previews if entry.may_hide),
        key=lambda entry: (entry.finding.status != "confirmed", -entry.pairs, entry.finding.id),
    )


async def _count_pairs(
    connection: Connection, rule: Rule, findings: Mapping[int, FindingRef]
) -> Counter[int]:
    counts: Counter[int] = Counter()
    for row in await fetch_rows(connection, "preview_counts", {"findings": list(findings)}):
        finding = findings[row["finding"]]
        endpoint = {"service": finding.service, "method": finding.method, "route": finding.route}
        if rule.applies(make_rule_scope({**row, **endpoint})):
            counts[finding.id] += row["pairs"]
    return counts


def _try_examples(
    examples: Sequence[Row], rules: CompareOptions, findings: Mapping[int, FindingRef]
) -> dict[int, tuple[int, int]]:
    """Per finding its examples, and how many of them the candidate would hide."""
    example_counts: dict[int, tuple[int, int]] = {}
    for row in examples:
        result = recompare(row["captures"], rules)
        if result is None:
            continue
        finding = findings[row["finding_id"]]
        location = (finding.part, finding.path, finding.kind)
        is_left = any(
            (difference.part, difference.path, difference.kind) == location
            for difference in result.differences
        )
        total, hidden_count = example_counts.get(finding.id, (0, 0))
        example_counts[finding.id] = (total + 1, hidden_count + (not is_left))
    return example_counts


def list_objections(previews: Sequence[RulePreview], rule: Rule, finding: FindingRef | None) -> list[str]:
    """What speaks against the rule, for people; the gravest first."""
    texts = [
        f"it would hide finding {entry.finding.id}, which somebody confirmed: {describe_finding(entry.finding)}"
        for entry in previews
        if entry.finding.status == "confirmed"
    ]
    if finding is None:
        return texts
    others = [
        entry for entry in previews if entry.finding.id != finding.id and entry.finding.status != "confirmed"
    ]
    texts += [
        f"it would also hide finding {entry.finding.id} ({entry.pairs} pairs): {describe_finding(entry.finding)}"
        for entry in others
    ]
    return texts + _list_broader_scopes(rule, finding)


def _list_broader_scopes(rule: Rule, finding: FindingRef) -> list[str]:
    """Where it reaches beyond its finding, also if nothing was seen there yet."""
    texts = []
    for name, rule_value, finding_value in (
        ("service", rule.service, finding.service),
        ("endpoint", rule.endpoint, finding.endpoint),
    ):
        if rule_value != finding_value:
            texts.append(f"it also covers other {name}s: finding {finding.id} needs {name} {finding_value!r}")
    if finding.path and rule.path.lower() != finding.path.lower():
        texts.append(f"it also covers other paths: finding {finding.id} needs {finding.path!r}")
    return texts


def describe_finding(finding: FindingRef) -> str:
    return f"{finding.endpoint}  {finding.part} {finding.path} {finding.kind}".replace("  ", " ")


def narrow_to_finding(rule: Rule, finding: FindingRef) -> Rule:
    """With what it leaves out taken from the finding. Kinds of a tolerance and of orders go without saying."""
    is_unrestricted = rule.part is None and not rule.path and not rule.status
    kind = rule.kind or (finding.kind if rule.action in {"ignore", "expect"} and is_unrestricted else None)
    return replace(
        rule,
        service=rule.service or finding.service,
        endpoint=rule.endpoint or finding.endpoint,
        part=rule.part or finding.part,  # type: ignore[arg-type]  # the ledger's words
        path=rule.path or (finding.path if is_unrestricted else ""),
        kind=kind,  # type: ignore[arg-type]  # the ledger's words
    )
