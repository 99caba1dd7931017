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

from abreast_sidecar.compare import CompareOptions, RuleSet
from abreast_sidecar.rejudge import evidence, places
from abreast_sidecar.rejudge.counters import CounterKey, CounterMoves
from abreast_sidecar.rejudge.evidence import FindingIds
from abreast_sidecar.rejudge.places import Attribution, FindingRef
from abreast_sidecar.rejudge.settle import redistribute_dropped
from abreast_sidecar.rejudge.write import (
    fetch_row,
    fetch_rows,
    load_findings,
    mark_endpoints_due,
    write_counters,
)
from abreast_sidecar.store.clean import to_json
from abreast_sidecar.store.database import Connection, Row, load_statement
from abreast_sidecar.store.examples import encode_differences
from abreast_sidecar.store.judged import DAY_MS, PairRecord
from abreast_sidecar.store.releases import OTHER_RELEASE as OTHER_RELEASE
from abreast_sidecar.store.rules import parse_active_rules, parse_rule

REAPPLY_LOCK_KEY = 0x616272657007
REAPPLY_BATCH_PAIRS = 100  # pairs
LIST_TIMEOUT_S = 600  # seconds for listing all pairs that a change concerns
LATE_RULE_PREFIX = "judged before rule "  # the reason of a pair whose answers are not kept

ReleaseIds = Mapping[tuple[str, str, str], int]


class ActiveRules(NamedTuple):
    version: int
    rules: CompareOptions
    first_versions: Mapping[int, int]  # rule → version

    @property
    def declared(self) -> RuleSet:
        return self.rules.rule_set or RuleSet()


async def reapply_rules(
    connection: Connection,
    finding_ids: FindingIds,
    rules: CompareOptions,
    *,
    limit: int = REAPPLY_BATCH_PAIRS,
) -> bool:
    """Do one step; return whether one was done. `rules`: what is set apart from what people declared."""
    async with connection.transaction():
        if not (await fetch_row(connection, "lock_try", {"lock": REAPPLY_LOCK_KEY}))["locked"]:
            return False
        state = await fetch_row(connection, "reapply_state")
        active = await load_active_rules(connection, rules, state["version"])
        if state["pending"]:
            await _reapply_batch(connection, finding_ids, active, limit)
        elif state["queued_version"] > state["applied_version"]:
            await redistribute_dropped(
                connection, active.declared, active.first_versions, state["queued_version"]
            )
            await connection.execute(load_statement("reapply_finish"))
        elif state["version"] > state["queued_version"]:
            await _list_concerned_pairs(connection, state)
        else:
            return False
    return True


async def load_active_rules(connection: Connection, rules: CompareOptions, version: int) -> ActiveRules:
    rows = await fetch_rows(connection, "rules_in_force")
    declared = parse_active_rules(rows).rules
    first_versions = {row["id"]: row["begin_version"] for row in rows if row["id"] is not None}
    return ActiveRules(version, replace(rules, rule_set=declared), first_versions)


async def _list_concerned_pairs(connection: Connection, state: Row) -> None:
    rows = await fetch_rows(connection, "reapply_changed_rules", {"after": state["queued_version"]})
    rules = [(parse_rule(row["id"], row["definition"]), row["end_version"]) for row in rows]
    # One that paired elements leaves no trace where nothing was left for it to explain.
    concerning = [rule for rule, end_version in rules if end_version is None or rule.action == "keyed-by"]
    findings = await load_findings(connection) if concerning else {}
    finding_ids = [
        finding.id
        for finding in findings.values()
        if any(
            rule.applies_to(finding.service, finding.endpoint)
            and rule.may_match(finding.part, finding.path, finding.kind)
            for rule in concerning
        )
    ]
    ended_ids = [int(rule.name) for rule, end_version in rules if end_version is not None]
    await connection.execute(f"set local statement_timeout = '{LIST_TIMEOUT_S}s'".encode())
    await connection.execute(load_statement("reapply_enqueue"), {"findings": finding_ids, "rules": ended_ids})
    await connection.execute(load_statement("reapply_enqueued"), {"version": state["version"]})


async def _reapply_batch(
    connection: Connection, finding_ids: FindingIds, active: ActiveRules, limit: int
) -> None:
    rows = await fetch_rows(connection, "reapply_take", {"limit": limit})
    records = await asyncio.to_thread(evidence.reevaluate_rows, rows, active.rules)
    await finding_ids.load([item for item in records if item is not None])
    findings = await load_findings(
        connection, {item for row in rows for item in _list_attributed_findings(row)}
    )
    attributions = [
        places.attribute_by_row(row, active.declared, active.first_versions, findings)
        if record is None
        else evidence.attribute_findings(record, finding_ids.id_cache, row["drift"] or ())
        for row, record in zip(rows, records, strict=True)
    ]
    findings |= await load_findings(
        connection, {finding_id for item in attributions for finding_id in (*item.findings, *item.noise)}
    )
    await _write_pairs(connection, rows, records, attributions, active)
    endpoint_ids = await _correct_counters(connection, rows, attributions, findings)
    await _write_examples(connection, rows, records)
    await _move_tally(connection, rows, records)
    await mark_endpoints_due(connection, endpoint_ids)


def _list_attributed_findings(row: Row) -> Iterable[int]:
    attribution = places.read_attribution(row)
    return (*attribution.findings, *attribution.noise)


async def _correct_counters(
    connection: Connection,
    rows: Sequence[Row],
    attributions: Sequence[Attribution],
    findings: Mapping[int, FindingRef],
) -> set[int]:
    """The counters of findings and of rules. Return the endpoints of those."""
    await connection.execute(load_statement("findings_lock"), {"ids": list(findings)})
    counters = CounterMoves.from_rows(
        await fetch_rows(connection, "reapply_counters", {"ids": list(findings)})
    )
    labels = await fetch_rows(
        connection, "releases_read", {"services": list({row["service"] for row in rows})}
    )
    ids = {(row["service"], row["version"], row["label"]): row["id"] for row in labels}
    unknown_counts: dict[CounterKey, int] = {}
    for row, attribution in zip(rows, attributions, strict=True):
        releases = _find_release_ids(row, ids)
        previous = places.read_attribution(row)
        for name, old_rules, new_rules in (
            ("count", previous.findings, attribution.findings),
            ("baseline_count", previous.noise, attribution.noise),
        ):
            for finding in old_rules.keys() | new_rules.keys():
                counters.extend_span(finding, row["at"])
                origin, target = old_rules.get(finding), new_rules.get(finding)
                if origin != target:
                    counters.move_pairs(
                        name,
                        _make_counter_key(origin, finding, releases),
                        _make_counter_key(target, finding, releases),
                    )
        for finding, rule in attribution.late_rules.items():
            if not row["reason"]:
                counter_key = (rule, finding, *releases)
                unknown_counts[counter_key] = unknown_counts.get(counter_key, 0) + 1
    return await write_counters(connection, counters, findings, unknown_counts)


def _make_counter_key(rule: int | None, finding: int, releases: tuple[int, int]) -> CounterKey | None:
    return None if rule is None else (rule, finding, *releases)


def _find_release_ids(row: Row, ids: ReleaseIds) -> tuple[int, int]:
    def find_release(version: str) -> int:
        if row[f"{version}_us"] is None:
            return 0
        key = (row["service"], version, row[f"{version}_release"])
        return ids.get(key) or ids.get((row["service"], version, OTHER_RELEASE), 0)

    return find_release("old"), find_release("new")


async def _write_pairs(
    connection: Connection,
    rows: Sequence[Row],
    records: Sequence[PairRecord | None],
    attributions: Sequence[Attribution],
    active: ActiveRules,
) -> None:
    pairs = []
    for row, record, attribution in zip(rows, records, attributions, strict=True):
        columns = {
            **places.to_columns(attribution),
            "outcome": _resolve_outcome(row, record),
            "reason": _resolve_reason(row, attribution, active),
        }
        pairs.append(
            {
                **_make_pair_key(row),
                **columns,
                "rules_version": row["rules_version"] if record is None else active.version,
            }
        )
    await connection.execute(load_statement("reapply_pairs_set"), {"rows": to_json(pairs).decode()})


async def _write_examples(
    connection: Connection, rows: Sequence[Row], records: Sequence[PairRecord | None]
) -> None:
    examples = [
        {**_make_pair_key(row), "differences": orjson.loads(encode_differences(record))}
        for row, record in zip(rows, records, strict=True)
        if record is not None
    ]
    if examples:
        await connection.execute(load_statement("reapply_examples_set"), {"rows": to_json(examples).decode()})


async def _move_tally(
    connection: Connection, rows: Sequence[Row], records: Sequence[PairRecord | None]
) -> None:
    """Move pairs between outcomes in the tally."""
    tally: Counter[tuple[str, int, str]] = Counter()
    for row, record in zip(rows, records, strict=True):
        day = round(row["at"].timestamp() * 1000) // DAY_MS
        tally[row["service"], day, row["outcome"]] -= 1
        tally[row["service"], day, _resolve_outcome(row, record)] += 1
    names = ("service", "day", "outcome")
    parameters = [
        {**dict(zip(names, key, strict=True)), "pairs": pairs} for key, pairs in tally.items() if pairs
    ]
    if parameters:
        await connection.execute(load_statement("outcome_counts_add"), {"rows": to_json(parameters).decode()})


def _make_pair_key(row: Row) -> dict[str, str]:
    return {"day": row["day"].isoformat(), "id": row["id"]}


def _resolve_outcome(row: Row, record: PairRecord | None) -> str:
    outcome: str = row["outcome"] if record is None else record.outcome
    return outcome


def _resolve_reason(row: Row, attribution: Attribution, active: ActiveRules) -> str:
    """A pair says which rule came too late for it, as long as that rule holds."""
    reason: str = row["reason"]
    if reason.startswith(LATE_RULE_PREFIX):
        rule_id = reason.removeprefix(LATE_RULE_PREFIX)
        reason = reason if rule_id.isdecimal() and int(rule_id) in active.first_versions else ""
    if not reason and attribution.late_rules:
        return f"{LATE_RULE_PREFIX}{next(iter(attribution.late_rules.values()))}"
    return reason
