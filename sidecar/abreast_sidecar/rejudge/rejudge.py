"""When the rules change, every stored pair that the change may concern is judged again.

What is to be done stands in the ledger: a list of pairs, made in one transaction with the version that it is for, then
taken off in small batches, each in one transaction with all that it corrects. So it goes on after a crash where it
stopped, and nothing is done twice. One process does it at a time. Workers that commit meanwhile have judged by the
rules that hold: those are held while a batch is corrected.

Order of locks, as in the workers: the rules (shared), pairs and their sums, findings by id, examples, tallies, endpoints
by id.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import orjson

from abreast_sidecar.compare import Rules, RuleSet
from abreast_sidecar.rejudge import evidence, places
from abreast_sidecar.rejudge.counters import Counters, Slot
from abreast_sidecar.rejudge.evidence import Learning
from abreast_sidecar.rejudge.places import Known, Places
from abreast_sidecar.rejudge.settle import settle
from abreast_sidecar.rejudge.write import known_findings, mark_due, one_of, rows_of, write_counters
from abreast_sidecar.store.clean import json_text
from abreast_sidecar.store.database import Connection, Row, statement
from abreast_sidecar.store.examples import differences_json
from abreast_sidecar.store.judged import DAY, Judged
from abreast_sidecar.store.releases import OTHER as OTHER_RELEASE
from abreast_sidecar.store.rules import named, of_rows

LOCK = 0x616272657007
BATCH = 100  # pairs
LIST_TIMEOUT = 600  # seconds for listing all pairs that a change concerns
BEFORE = "judged before rule "  # the reason of a pair whose answers are not kept

ReleaseIds = Mapping[tuple[str, str, str], int]


class InForce(NamedTuple):
    version: int
    rules: Rules
    began: Mapping[int, int]  # rule → version

    @property
    def declared(self) -> RuleSet:
        return self.rules.declared or RuleSet()


async def rejudge(connection: Connection, learning: Learning, rules: Rules, *, limit: int = BATCH) -> bool:
    """Do one step; return whether one was done. `rules`: what is set apart from what people declared."""
    async with connection.transaction():
        if not (await one_of(connection, "lock_try", {"lock": LOCK}))["locked"]:
            return False
        state = await one_of(connection, "reapply_state")
        held = await in_force(connection, rules, state["version"])
        if state["pending"]:
            await _batch(connection, learning, held, limit)
        elif state["queued_version"] > state["applied_version"]:
            await settle(connection, held.declared, held.began, state["queued_version"])
            await connection.execute(statement("reapply_finish"))
        elif state["version"] > state["queued_version"]:
            await _list(connection, state)
        else:
            return False
    return True


async def in_force(connection: Connection, rules: Rules, version: int) -> InForce:
    rows = await rows_of(connection, "rules_in_force")
    declared = of_rows(rows).rules
    began = {row["id"]: row["begin_version"] for row in rows if row["id"] is not None}
    return InForce(version, replace(rules, declared=declared), began)


async def _list(connection: Connection, state: Row) -> None:
    changed = await rows_of(connection, "reapply_changed_rules", {"after": state["queued_version"]})
    rules = [(named(row["id"], row["definition"]), row["end_version"]) for row in changed]
    # One that paired elements leaves no trace where nothing was left for it to explain.
    asked = [rule for rule, ended in rules if ended is None or rule.action == "keyed-by"]
    findings = await known_findings(connection) if asked else {}
    concerned = [
        known.id
        for known in findings.values()
        if any(
            rule.applies_to(known.service, known.endpoint)
            and rule.touches(known.part, known.path, known.kind)
            for rule in asked
        )
    ]
    gone = [int(rule.name) for rule, ended in rules if ended is not None]
    await connection.execute(f"set local statement_timeout = '{LIST_TIMEOUT}s'".encode())
    await connection.execute(statement("reapply_enqueue"), {"findings": concerned, "rules": gone})
    await connection.execute(statement("reapply_enqueued"), {"version": state["version"]})


async def _batch(connection: Connection, learning: Learning, held: InForce, limit: int) -> None:
    rows = await rows_of(connection, "reapply_take", {"limit": limit})
    again = await asyncio.to_thread(evidence.all_judged, rows, held.rules)
    await learning.learn([one for one in again if one is not None])
    found = await known_findings(connection, {one for row in rows for one in _ids(row)})
    after = [
        places.told(row, held.declared, held.began, found)
        if judged is None
        else evidence.places(judged, learning.catalogue, row["drift"] or ())
        for row, judged in zip(rows, again, strict=True)
    ]
    found |= await known_findings(connection, {f for one in after for f in (*one.findings, *one.noise)})
    await _write_pairs(connection, rows, again, after, held)
    changed = await _correct(connection, rows, after, found)
    await _write_examples(connection, rows, again)
    await _recount(connection, rows, again)
    await mark_due(connection, changed)


def _ids(row: Row) -> Iterable[int]:
    before = places.stored(row)
    return (*before.findings, *before.noise)


async def _correct(
    connection: Connection,
    rows: Sequence[Row],
    after: Sequence[Places],
    found: Mapping[int, Known],
) -> set[int]:
    """The counters of findings and of rules. Return the endpoints of those."""
    await connection.execute(statement("findings_lock"), {"ids": list(found)})
    counters = Counters.of(await rows_of(connection, "reapply_counters", {"ids": list(found)}))
    labels = await rows_of(connection, "releases_read", {"services": list({row["service"] for row in rows})})
    ids = {(row["service"], row["version"], row["label"]): row["id"] for row in labels}
    unknown: dict[Slot, int] = {}
    for row, now in zip(rows, after, strict=True):
        releases = _releases(row, ids)
        before = places.stored(row)
        for name, was, will in (
            ("count", before.findings, now.findings),
            ("baseline_count", before.noise, now.noise),
        ):
            for finding in was.keys() | will.keys():
                counters.note(finding, row["at"])
                origin, target = was.get(finding), will.get(finding)
                if origin != target:
                    counters.move(name, _slot(origin, finding, releases), _slot(target, finding, releases))
        for finding, rule in now.unknown.items():
            if not row["reason"]:
                slot = (rule, finding, *releases)
                unknown[slot] = unknown.get(slot, 0) + 1
    return await write_counters(connection, counters, found, unknown)


def _slot(rule: int | None, finding: int, releases: tuple[int, int]) -> Slot | None:
    return None if rule is None else (rule, finding, *releases)


def _releases(row: Row, ids: ReleaseIds) -> tuple[int, int]:
    def of(version: str) -> int:
        if row[f"{version}_us"] is None:
            return 0
        key = (row["service"], version, row[f"{version}_release"])
        return ids.get(key) or ids.get((row["service"], version, OTHER_RELEASE), 0)

    return of("old"), of("new")


async def _write_pairs(
    connection: Connection,
    rows: Sequence[Row],
    again: Sequence[Judged | None],
    after: Sequence[Places],
    held: InForce,
) -> None:
    pairs = []
    for row, judged, now in zip(rows, again, after, strict=True):
        columns = {**places.columns(now), "outcome": _outcome(row, judged), "reason": _reason(row, now, held)}
        pairs.append(
            {
                **_key(row),
                **columns,
                "rules_version": row["rules_version"] if judged is None else held.version,
            }
        )
    await connection.execute(statement("reapply_pairs_set"), {"rows": json_text(pairs).decode()})


async def _write_examples(
    connection: Connection, rows: Sequence[Row], again: Sequence[Judged | None]
) -> None:
    examples = [
        {**_key(row), "differences": orjson.loads(differences_json(judged))}
        for row, judged in zip(rows, again, strict=True)
        if judged is not None
    ]
    if examples:
        await connection.execute(statement("reapply_examples_set"), {"rows": json_text(examples).decode()})


async def _recount(connection: Connection, rows: Sequence[Row], again: Sequence[Judged | None]) -> None:
    """Move pairs between outcomes in the tally."""
    tally: Counter[tuple[str, int, str]] = Counter()
    for row, judged in zip(rows, again, strict=True):
        day = round(row["at"].timestamp() * 1000) // DAY
        tally[row["service"], day, row["outcome"]] -= 1
        tally[row["service"], day, _outcome(row, judged)] += 1
    names = ("service", "day", "outcome")
    given = [{**dict(zip(names, key, strict=True)), "pairs": pairs} for key, pairs in tally.items() if pairs]
    if given:
        await connection.execute(statement("outcome_counts_add"), {"rows": json_text(given).decode()})


def _key(row: Row) -> dict[str, str]:
    return {"day": row["day"].isoformat(), "id": row["id"]}


def _outcome(row: Row, judged: Judged | None) -> str:
    outcome: str = row["outcome"] if judged is None else judged.outcome
    return outcome


def _reason(row: Row, now: Places, held: InForce) -> str:
    """A pair says which rule came too late for it, as long as that rule holds."""
    reason: str = row["reason"]
    if reason.startswith(BEFORE):
        rule = reason.removeprefix(BEFORE)
        reason = reason if rule.isdecimal() and int(rule) in held.began else ""
    if not reason and now.unknown:
        return f"{BEFORE}{next(iter(now.unknown.values()))}"
    return reason
