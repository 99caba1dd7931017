"""Reapplies changed rules to stored pairs.

The queue of pairs is filled in one transaction, together with the version of the rules that it is for. Small batches then
leave it, each in one transaction with everything that it corrects. So the work resumes after a crash, and each pair is
corrected once. One process works at a time. Workers can't commit under other rules while a batch is corrected, because
the batch holds the version of the rules.

Locks are taken in the order of the workers: the rules (shared), pairs and their hourly counts, findings by id, examples,
outcome counts, endpoints by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import orjson
import structlog
from psycopg.rows import TupleRow

from abreast_sidecar.compare.endpoints import ResolvedEndpoint
from abreast_sidecar.compare.model import COMPARED_OUTCOMES, ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions, RuleSet
from abreast_sidecar.rules.attribution import (
    Attribution,
    FindingRef,
    attribute_record,
    attribute_row,
    find_explaining_rule,
)
from abreast_sidecar.store.catalogue import NO_RELEASE, OTHER_RELEASE, IdCache
from abreast_sidecar.store.counters import CounterDeltas, PairCounter
from abreast_sidecar.store.database import (
    CONNECT_TIMEOUT_S,
    AdvisoryLock,
    ClosingConnection,
    Connection,
    Row,
    fetch_row,
    fetch_rows,
    load_statement,
    map_postgres_errors,
    to_json,
    try_lock,
)
from abreast_sidecar.store.records import DAY_MS, PairRecord, read_captures
from abreast_sidecar.store.rules import parse_active_rules, parse_rule
from abreast_sidecar.store.samples import encode_differences

REAPPLY_BATCH_PAIRS = 100
ENQUEUE_TIMEOUT_S = 600  # for the statement that finds all pairs that a change may concern
LATE_RULE_PREFIX = "judged before rule "  # the reason of a pair without stored captures

log = structlog.get_logger(__name__)


class FindingIds:
    """Creates findings that only the new rules reveal, in separate transactions."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self.id_cache = IdCache()

    async def load(self, records: Sequence[PairRecord]) -> None:
        if not records:
            return
        with map_postgres_errors():
            async with await ClosingConnection[TupleRow].connect(
                self._conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, prepare_threshold=None
            ) as connection:
                await self.id_cache.load(connection, records)


@dataclass(frozen=True, slots=True)
class ActiveRules:
    version: int
    options: CompareOptions
    first_versions: Mapping[int, int]  # rule → the version with which it began

    @property
    def rule_set(self) -> RuleSet:
        return self.options.rule_set or RuleSet()


async def reapply_rules(
    connection: Connection, finding_ids: FindingIds, options: CompareOptions, *, limit: int = REAPPLY_BATCH_PAIRS
) -> bool:
    """Take one step, and return False if there was none to take. `options`: how to compare, without rules."""
    async with connection.transaction():
        if not await try_lock(connection, AdvisoryLock.REAPPLY):
            return False
        state = await fetch_row(connection, "reapply_state")
        rows = await fetch_rows(connection, "rules_in_force")
        active = ActiveRules(
            state["version"],
            replace(options, rule_set=parse_active_rules(rows).rules),
            {row["id"]: row["begin_version"] for row in rows if row["id"] is not None},
        )
        if state["pending"]:
            await _reapply_batch(connection, finding_ids, active, limit)
        elif state["queued_version"] > state["applied_version"]:
            await redistribute_dropped(connection, active, state["queued_version"])
            await connection.execute(load_statement("reapply_finish"))
        elif state["version"] > state["queued_version"]:
            await _enqueue_pairs(connection, state)
        else:
            return False
    return True


async def load_findings(connection: Connection, ids: Iterable[int] | None = None) -> dict[int, FindingRef]:
    """Return findings of single pairs by id: the given ones, or all."""
    rows = await fetch_rows(connection, "reapply_findings", {"ids": None if ids is None else list(ids)})
    return {row["id"]: FindingRef(**row) for row in rows}


def recompare(captures: bytes | None, options: CompareOptions, method: str, route: str) -> ComparisonResult | None:
    """Compare stored captures again. Return None without captures, or if this version can't compare them.

    `method` and `route` are those of the stored pair, because the templates of endpoints may have changed.
    """
    if captures is None:
        return None
    try:
        decoded_captures = read_captures(captures)
        endpoint = ResolvedEndpoint(method, route, "")
        result = compare_pair(decoded_captures, options, endpoint=endpoint) if decoded_captures else None
    except Exception as error:  # noqa: BLE001  # one example must not stop the others
        log.warning("an example can't be compared again", error=str(error))
        return None
    return result if result is not None and result.outcome in COMPARED_OUTCOMES else None


async def mark_endpoints_due(connection: Connection, endpoints: Iterable[int]) -> None:
    """Make the noise job classify the findings of these endpoints again."""
    ids = sorted(endpoints)
    await connection.execute(load_statement("endpoints_lock"), {"ids": ids})
    await connection.execute(load_statement("noise_reset"), {"ids": ids})


async def redistribute_dropped(connection: Connection, active: ActiveRules, queued_version: int) -> None:
    """Move counts whose pairs retention has dropped, once the queue of `queued_version` is empty.

    Only rules that apply to all pairs of a release can move counts without pairs. Newer rules wait for their own queue.
    """
    rules = [
        rule
        for rule in active.rule_set.rules
        if active.first_versions[int(rule.name)] <= queued_version and not rule.status
    ]
    findings = await load_findings(connection)
    parameters = {
        "findings": [finding.id for finding in findings.values() if find_explaining_rule(rules, finding)],
        "version": queued_version,
    }
    if ids := sorted({row["finding_id"] for row in await fetch_rows(connection, "reapply_totals", parameters)}):
        await connection.execute(load_statement("findings_lock"), {"ids": ids})
        deltas = CounterDeltas()
        # Workers may have counted before the lock, so read again.
        for row in await fetch_rows(connection, "reapply_totals", parameters):
            if finding := findings.get(row["finding_id"]):
                rules_of_release = [rule for rule in rules if rule.applies_to_release(row["new_label"])]
                rule = find_explaining_rule(rules_of_release, finding)
                if rule != row["rule_id"]:
                    key = (finding.id, row["old_release"], row["new_release"])
                    time_ms = round(row["last_seen"].timestamp() * 1000)
                    deltas.move_finding((row["rule_id"], *key), (rule, *key), row, finding.impact, time_ms)
        changed_ids = await deltas.write_findings(connection)
        await mark_endpoints_due(connection, {findings[finding_id].endpoint_id for finding_id in changed_ids})


async def _enqueue_pairs(connection: Connection, state: Row) -> None:
    """Queue the pairs that are affected by rules that began or ended since the last run."""
    rows = await fetch_rows(connection, "reapply_changed_rules", {"after": state["queued_version"]})
    rules = [(parse_rule(row["id"], row["definition"]), row["end_version"]) for row in rows]
    # A keyed-by rule leaves no trace in a pair that it left without differences to explain.
    concerning = [rule for rule, end_version in rules if end_version is None or rule.action == "keyed-by"]
    findings = await load_findings(connection) if concerning else {}
    finding_ids = [
        finding.id for finding in findings.values() if any(finding.is_affected_by(rule) for rule in concerning)
    ]
    ended_ids = [int(rule.name) for rule, end_version in rules if end_version is not None]
    await connection.execute(f"set local statement_timeout = '{ENQUEUE_TIMEOUT_S}s'".encode())
    await connection.execute(load_statement("reapply_enqueue"), {"findings": finding_ids, "rules": ended_ids})
    await connection.execute(load_statement("reapply_enqueued"), {"version": state["version"]})


async def _reapply_batch(connection: Connection, finding_ids: FindingIds, active: ActiveRules, limit: int) -> None:
    rows = await fetch_rows(connection, "reapply_take", {"limit": limit})
    records = await asyncio.to_thread(_recompare_rows, rows, active.options)
    await finding_ids.load([record for record in records if record is not None])
    stored = [Attribution.from_row(row) for row in rows]
    findings = await load_findings(connection, _list_findings(stored))
    attributions = [
        attribute_row(row, active.rule_set, active.first_versions, findings)
        if record is None
        else attribute_record(record, finding_ids.id_cache, row)
        for row, record in zip(rows, records, strict=True)
    ]
    findings |= await load_findings(connection, _list_findings(attributions))
    labels = await fetch_rows(connection, "releases_read", {"services": list({row["service"] for row in rows})})
    release_ids = {(row["service"], row["version"], row["label"]): row["id"] for row in labels}
    pairs, examples, deltas = [], [], CounterDeltas()
    for row, record, before, after in zip(rows, records, stored, attributions, strict=True):
        outcome = row["outcome"] if record is None else record.outcome
        columns = {"outcome": outcome, "reason": _resolve_reason(row, after, active)}
        version = row["rules_version"] if record is None else active.version
        key = {"day": row["day"].isoformat(), "id": row["id"]}
        pairs.append({**key, **after.to_columns(), **columns, "rules_version": version})
        if record is not None:
            examples.append({**key, "differences": orjson.loads(encode_differences(record))})
        releases = _find_release(row, "old", release_ids), _find_release(row, "new", release_ids)
        _move_counts(row, before, after, findings, releases, deltas)
        day = _get_time_ms(row) // DAY_MS
        deltas.outcomes[row["service"], day, row["outcome"]] -= 1
        deltas.outcomes[row["service"], day, outcome] += 1
    await connection.execute(load_statement("reapply_pairs_set"), {"rows": to_json(pairs)})
    changed_ids = await deltas.write_findings(connection)
    if examples:
        await connection.execute(load_statement("reapply_examples_set"), {"rows": to_json(examples)})
    await deltas.write_pairs(connection)
    await mark_endpoints_due(connection, {findings[finding_id].endpoint_id for finding_id in changed_ids})


def _recompare_rows(rows: Sequence[Row], options: CompareOptions) -> list[PairRecord | None]:
    results = [
        recompare(row["captures"], options, row["method"], row["route"])
        if row["outcome"] in COMPARED_OUTCOMES
        else None
        for row in rows
    ]
    return [
        None if result is None else PairRecord(row["service"], "", _get_time_ms(row), row["id"], result, ())
        for row, result in zip(rows, results, strict=True)
    ]


def _list_findings(attributions: Iterable[Attribution]) -> set[int]:
    return {finding for attribution in attributions for finding in (*attribution.findings, *attribution.noise)}


def _move_counts(
    row: Row,
    before: Attribution,
    after: Attribution,
    findings: Mapping[int, FindingRef],
    releases: tuple[int, int],
    deltas: CounterDeltas,
) -> None:
    """Subtract what the pair counted under the former rules, and add what it counts now."""
    time_ms = _get_time_ms(row)
    moves: tuple[tuple[PairCounter, Mapping[int, int], Attribution, int], ...] = (
        ("count", before.findings, before, -1),
        ("baseline_count", before.noise, before, -1),
        ("count", after.findings, after, 1),
        ("baseline_count", after.noise, after, 1),
    )
    for counter, rules, attribution, sign in moves:
        for finding, rule in rules.items():
            if finding in findings:
                key, marks = (rule, finding, *releases), attribution.marks.get(finding, 0)
                deltas.add_finding(counter, key, marks, impact=findings[finding].impact, time_ms=time_ms, sign=sign)
    if not row["reason"]:
        for finding, rule in after.late_rules.items():
            deltas.get_finding((rule, finding, *releases), findings[finding].impact, time_ms)["unknown"] += 1


def _find_release(row: Row, version: str, ids: Mapping[tuple[str, str, str], int]) -> int:
    if row[f"{version}_us"] is None:
        return NO_RELEASE
    service, label = row["service"], row[f"{version}_release"]
    return ids.get((service, version, label)) or ids.get((service, version, OTHER_RELEASE), NO_RELEASE)


def _resolve_reason(row: Row, attribution: Attribution, active: ActiveRules) -> str:
    """Name the later rule that can't be applied to the pair, as long as that rule is in force."""
    reason: str = row["reason"]
    if reason.startswith(LATE_RULE_PREFIX):
        rule_id = reason.removeprefix(LATE_RULE_PREFIX)
        reason = reason if rule_id.isdecimal() and int(rule_id) in active.first_versions else ""
    if not reason and attribution.late_rules:
        return f"{LATE_RULE_PREFIX}{next(iter(attribution.late_rules.values()))}"
    return reason


def _get_time_ms(row: Row) -> int:
    at: datetime = row["at"]
    return round(at.timestamp() * 1000)
