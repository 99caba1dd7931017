"""Previews which stored findings a rule would hide."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.rules.attribution import FindingRef, is_decidable, make_rule_scope
from abreast_sidecar.rules.reapply import load_findings, recompare
from abreast_sidecar.store.database import Database, Row, fetch_rows
from abreast_sidecar.store.rules import parse_active_rules

EXAMPLES_PER_FINDING = 5
MAX_PREVIEW_EXAMPLES = 300
CANDIDATE_NAME = "0"  # the name of a rule that has no id yet


@dataclass(frozen=True, slots=True)
class RulePreview:
    """The effect of a rule on one finding."""

    finding: FindingRef
    pairs: int  # stored pairs in the rule's scope that show the finding
    is_exact: bool  # the rule hides all of these pairs
    examples: int = 0
    hidden_examples: int = 0

    @property
    def may_hide(self) -> bool:
        """Check that the rule hides a pair, or that no stored example proves otherwise."""
        return self.pairs > 0 and (self.is_exact or self.hidden_examples > 0 or not self.examples)


async def preview_rule(database: Database, options: CompareOptions, rule: Rule) -> list[RulePreview]:
    """List the findings that a rule may hide: confirmed ones first, then the most frequent. `options` has no rules."""
    async with database.connection() as connection:
        findings = await load_findings(connection)
        candidates = {finding.id: finding for finding in findings.values() if finding.is_affected_by(rule)}
        pairs: Counter[int] = Counter()
        for row in await fetch_rows(connection, "preview_counts", {"findings": list(candidates)}):
            finding = candidates[row["finding"]]
            endpoint = {"service": finding.service, "method": finding.method, "route": finding.route}
            if rule.applies(make_rule_scope({**row, **endpoint})):
                pairs[finding.id] += row["pairs"]
        active_rules = parse_active_rules(await fetch_rows(connection, "rules_in_force")).rules
        parameters = {"findings": list(pairs), "each": EXAMPLES_PER_FINDING, "limit": MAX_PREVIEW_EXAMPLES}
        examples = await fetch_rows(connection, "preview_examples", parameters)
    extended = replace(options, rule_set=RuleSet((*active_rules.rules, replace(rule, name=CANDIDATE_NAME))))
    example_counts = await asyncio.to_thread(_count_hidden_examples, examples, extended, candidates)
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


def _count_hidden_examples(
    examples: Sequence[Row], options: CompareOptions, findings: Mapping[int, FindingRef]
) -> dict[int, tuple[int, int]]:
    """Return the number of examples of each finding, and how many of them the rules in `options` hide."""
    example_counts: dict[int, tuple[int, int]] = {}
    for row in examples:
        finding = findings[row["finding_id"]]
        result = recompare(row["captures"], options, finding.method, finding.route)
        if result is None:
            continue
        place = finding.part, finding.path, finding.kind
        is_hidden = all(difference.place != place for difference in result.differences)
        total, hidden_count = example_counts.get(finding.id, (0, 0))
        example_counts[finding.id] = (total + 1, hidden_count + is_hidden)
    return example_counts


def list_objections(previews: Sequence[RulePreview], rule: Rule, finding: FindingRef | None) -> list[str]:
    """Describe the effects of a rule beyond its finding, the gravest first."""
    texts = [
        f"it would hide finding {entry.finding.id}, which is confirmed: {describe_finding(entry.finding)}"
        for entry in previews
        if entry.finding.status == "confirmed"
    ]
    if finding is None:
        return texts
    texts += [
        f"it would also hide finding {entry.finding.id} ({entry.pairs} pairs): {describe_finding(entry.finding)}"
        for entry in previews
        if entry.finding.id != finding.id and entry.finding.status != "confirmed"
    ]
    # The fields in which the rule is broader than its finding, even if no stored pair shows it.
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
    """Fill fields that the rule leaves empty from the finding. Tolerances and orders imply their kind."""
    is_unrestricted = rule.part is None and not rule.path and not rule.status
    kind = rule.kind or (finding.kind if rule.action in {"ignore", "expect"} and is_unrestricted else None)
    return replace(
        rule,
        service=rule.service or finding.service,
        endpoint=rule.endpoint or finding.endpoint,
        part=rule.part or finding.part,  # type: ignore[arg-type]  # a text column
        path=rule.path or (finding.path if is_unrestricted else ""),
        kind=kind,  # type: ignore[arg-type]  # a text column
    )
