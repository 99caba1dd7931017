"""What a rule would hide of what is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from abreast_sidecar.compare import Rule, Rules, RuleSet
from abreast_sidecar.rejudge.evidence import again
from abreast_sidecar.rejudge.places import Known, decides, subject
from abreast_sidecar.rejudge.write import known_findings, rows_of
from abreast_sidecar.store.database import Connection, Database, Row
from abreast_sidecar.store.rules import of_rows

EXAMPLES = 5  # of a finding
ALL_EXAMPLES = 300
CANDIDATE = "0"  # the name of a rule that has no id yet


@dataclass(frozen=True, slots=True)
class Hides:
    """What a rule would do to one finding. `pairs` are within its limits; all of them are hidden where it is `exact`."""

    known: Known
    pairs: int
    exact: bool
    examples: int = 0
    hidden: int = 0  # of the examples

    @property
    def certain(self) -> bool:
        """Whether it hides some pair, or nothing kept says that it does not."""
        return self.pairs > 0 and (self.exact or self.hidden > 0 or not self.examples)


async def preview(database: Database, rules: Rules, rule: Rule) -> list[Hides]:
    """Findings that somebody confirmed first, then the most frequent. `rules`: what is set apart from rules."""
    async with database.connection() as connection:
        findings = await known_findings(connection)
        concerned = {
            known.id: known
            for known in findings.values()
            if rule.applies_to(known.service, known.endpoint)
            and rule.touches(known.part, known.path, known.kind)
        }
        pairs = await _pairs(connection, rule, concerned)
        held = of_rows(await rows_of(connection, "rules_in_force")).rules
        wanted = {"findings": list(pairs), "each": EXAMPLES, "limit": ALL_EXAMPLES}
        examples = await rows_of(connection, "preview_examples", wanted)
    declared = RuleSet((*held.rules, replace(rule, name=CANDIDATE)))
    tried = await asyncio.to_thread(_tried, examples, replace(rules, declared=declared), concerned)
    made = [
        Hides(concerned[finding], count, decides(rule, concerned[finding]), *tried.get(finding, (0, 0)))
        for finding, count in pairs.items()
    ]
    return sorted(
        (one for one in made if one.certain),
        key=lambda one: (one.known.status != "confirmed", -one.pairs, one.known.id),
    )


async def _pairs(connection: Connection, rule: Rule, concerned: Mapping[int, Known]) -> Counter[int]:
    found: Counter[int] = Counter()
    for row in await rows_of(connection, "preview_counts", {"findings": list(concerned)}):
        known = concerned[row["finding"]]
        place = {"service": known.service, "method": known.method, "route": known.route}
        if rule.applies(subject({**row, **place})):
            found[known.id] += row["pairs"]
    return found


def _tried(
    examples: Sequence[Row], rules: Rules, concerned: Mapping[int, Known]
) -> dict[int, tuple[int, int]]:
    """Per finding its examples, and how many of them the candidate would hide."""
    found: dict[int, tuple[int, int]] = {}
    for row in examples:
        judgement = again(row["captures"], rules)
        if judgement is None:
            continue
        known = concerned[row["finding_id"]]
        place = (known.part, known.path, known.kind)
        left = any((one.part, one.path, one.kind) == place for one in judgement.differences)
        tried, hidden = found.get(known.id, (0, 0))
        found[known.id] = (tried + 1, hidden + (not left))
    return found


def objections(hides: Sequence[Hides], rule: Rule, made_for: Known | None) -> list[str]:
    """What speaks against the rule, for people; the gravest first."""
    found = [
        f"it would hide finding {one.known.id}, which somebody confirmed: {place(one.known)}"
        for one in hides
        if one.known.status == "confirmed"
    ]
    if made_for is None:
        return found
    others = [one for one in hides if one.known.id != made_for.id and one.known.status != "confirmed"]
    found += [
        f"it would also hide finding {one.known.id} ({one.pairs} pairs): {place(one.known)}" for one in others
    ]
    return found + _broader(rule, made_for)


def _broader(rule: Rule, made_for: Known) -> list[str]:
    """Where it reaches beyond its finding, also if nothing was seen there yet."""
    found = []
    for name, said, exact in (
        ("service", rule.service, made_for.service),
        ("endpoint", rule.endpoint, made_for.endpoint),
    ):
        if said != exact:
            found.append(f"it also covers other {name}s: finding {made_for.id} needs {name} {exact!r}")
    if made_for.path and rule.path.lower() != made_for.path.lower():
        found.append(f"it also covers other paths: finding {made_for.id} needs {made_for.path!r}")
    return found


def place(known: Known) -> str:
    return f"{known.endpoint}  {known.part} {known.path} {known.kind}".replace("  ", " ")


def fitted(rule: Rule, made_for: Known) -> Rule:
    """With what it leaves out taken from the finding. Kinds of a tolerance and of orders go without saying."""
    whole = rule.part is None and not rule.path and not rule.status
    kind = rule.kind or (made_for.kind if rule.action in {"ignore", "expect"} and whole else None)
    return replace(
        rule,
        service=rule.service or made_for.service,
        endpoint=rule.endpoint or made_for.endpoint,
        part=rule.part or made_for.part,  # type: ignore[arg-type]  # the ledger's words
        path=rule.path or (made_for.path if whole else ""),
        kind=kind,  # type: ignore[arg-type]  # the ledger's words
    )
