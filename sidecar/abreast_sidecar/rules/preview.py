"""What a rule would hide of what is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.rules.attribution import FindingRef, is_decidable, make_rule_scope
from abreast_sidecar.rules.reapply import fetch_rows, load_findings, recompare
from abreast_sidecar.store.database import Connection, Database, Row
from abreast_sidecar.store.rules import parse_active_rules

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
            if rule.applies_to(item.service, item.endpoint) and rule.may_match(item.part, item.path, item.kind)
        }
        pairs = await _count_pairs(connection, rule, candidates)
        active_rules = parse_active_rules(await fetch_rows(connection, "rules_in_force")).rules
        parameters = {"findings": list(pairs), "each": EXAMPLES_PER_FINDING, "limit": MAX_PREVIEW_EXAMPLES}
        examples = await fetch_rows(connection, "preview_examples", parameters)
    declared = RuleSet((*active_rules.rules, replace(rule, name=CANDIDATE_NAME)))
    example_counts = await asyncio.to_thread(_try_examples, examples, replace(rules, rule_set=declared), candidates)
    previews = [
        RulePreview(
            candidates[finding], count, is_decidable(rule, candidates[finding]), *example_counts.get(finding, (0, 0))
        )
        for finding, count in pairs.items()
    ]
    return sorted(
        (entry for entry in previews if entry.may_hide),
        key=lambda entry: (entry.finding.status != "confirmed", -entry.pairs, entry.finding.id),
    )


async def _count_pairs(connection: Connection, rule: Rule, findings: Mapping[int, FindingRef]) -> Counter[int]:
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
            (difference.part, difference.path, difference.kind) == location for difference in result.differences
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
    others = [entry for entry in previews if entry.finding.id != finding.id and entry.finding.status != "confirmed"]
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
