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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

import orjson
import structlog
from psycopg import AsyncConnection

from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.rules import attribution as places
from abreast_sidecar.rules.attribution import NO_RULE, Attribution, FindingRef, find_explaining_rule
from abreast_sidecar.store.catalogue import OTHER_RELEASE, IdCache
from abreast_sidecar.store.database import (
    CONNECT_TIMEOUT_S,
    Connection,
    Row,
    load_statement,
    map_postgres_errors,
    to_json,
)
from abreast_sidecar.store.records import COMPARED_OUTCOMES, DAY_MS, PairRecord, read_captures
from abreast_sidecar.store.rules import parse_active_rules, parse_rule
from abreast_sidecar.store.samples import encode_differences

log = structlog.get_logger(__name__)


class FindingIds:
    """Ids of findings that were not seen before, made in transactions of their own."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self.id_cache = IdCache()

    async def load(self, records: Sequence[PairRecord]) -> None:
        if not records:
            return
        with map_postgres_errors():
            async with await AsyncConnection.connect(
                self._conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, prepare_threshold=None
            ) as connection:
                await self.id_cache.load(connection, records)


def reevaluate_row(row: Row, rules: CompareOptions) -> PairRecord | None:
    """None where the answers are not kept, or can't be held against each other by this code."""
    result = recompare(row["captures"], rules)
    if result is None or row["outcome"] not in COMPARED_OUTCOMES:
        return None
    return PairRecord(row["service"], "", round(row["at"].timestamp() * 1000), row["id"], result, ())


def recompare(captures: bytes | None, rules: CompareOptions) -> ComparisonResult | None:
    if captures is None:
        return None
    try:
        decoded_captures = read_captures(captures)
        result = compare_pair(decoded_captures, rules) if decoded_captures else None
    except Exception as error:  # noqa: BLE001  # one example must not stop the others
        log.warning("an example can't be judged again", error=str(error))
        return None
    return result if result is not None and result.outcome in COMPARED_OUTCOMES else None


def attribute_findings(record: PairRecord, id_cache: IdCache, drifted_findings: Collection[int] = ()) -> Attribution:
    """Of a pair whose findings the catalogue has learned; without those that asking again told to be drift."""
    endpoint = id_cache.endpoint(record.endpoint)

    def attribute(unexplained: Iterable[Difference], explained: Iterable[Difference]) -> dict[int, int]:
        rule_ids: dict[int, int] = {}
        for difference in [*unexplained, *explained]:
            finding = id_cache.finding(endpoint, difference)
            if finding is not None and finding not in drifted_findings:
                rule_ids.setdefault(finding, int(difference.explained_by) if difference.explained_by else NO_RULE)
        return rule_ids

    result = record.result
    return Attribution(
        attribute(result.differences, result.explained_differences), attribute(result.noise, result.explained_noise)
    )


def reevaluate_rows(rows: Sequence[Row], rules: CompareOptions) -> list[PairRecord | None]:
    return [reevaluate_row(row, rules) for row in rows]


VALUE_COUNTERS = ("shape_explained", "new_greater", "new_smaller")
MOVED_COUNTERS = ("count", "baseline_count", *VALUE_COUNTERS)

CounterKey = tuple[int, int, int, int]  # rule or NOBODY, finding, release of old, release of new


@dataclass(slots=True)
class CounterMoves:
    """`held` is what the ledger has; `changes` what is to be added to it."""

    stored_counts: dict[CounterKey, dict[str, int]]
    deltas: dict[CounterKey, dict[str, int]] = field(default_factory=dict)
    seen_spans: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> CounterMoves:
        key_columns = ("rule_id", "finding_id", "old_release", "new_release")
        return cls(
            {
                (row[key_columns[0]], row[key_columns[1]], row[key_columns[2]], row[key_columns[3]]): {
                    name: row[name] for name in MOVED_COUNTERS
                }
                for row in rows
            }
        )

    def move_pairs(self, name: str, origin: CounterKey | None, target: CounterKey | None, pairs: int = 1) -> None:
        """`name`: count, or baseline_count. None is where it is not counted at all."""
        amounts = {name: pairs}
        if name == "count" and origin is not None:
            current = self._current_counts(origin)
            total = max(current["count"], pairs)
            amounts |= {value: current[value] * pairs // total for value in VALUE_COUNTERS}
        for counter_key, sign in ((origin, -1), (target, 1)):
            if counter_key is not None:
                self._add(counter_key, {key: sign * value for key, value in amounts.items()})

    def move_counts(self, origin: CounterKey, target: CounterKey, counts: Mapping[str, int]) -> None:
        """All that is given."""
        self._add(origin, {name: -value for name, value in counts.items()})
        self._add(target, counts)

    def extend_span(self, finding: int, at: datetime) -> None:
        first, last = self.seen_spans.get(finding, (at, at))
        self.seen_spans[finding] = (min(first, at), max(last, at))

    def _current_counts(self, counter_key: CounterKey) -> dict[str, int]:
        stored, delta = self.stored_counts.get(counter_key, {}), self.deltas.get(counter_key, {})
        return {name: stored.get(name, 0) + delta.get(name, 0) for name in MOVED_COUNTERS}

    def _add(self, counter_key: CounterKey, amounts: Mapping[str, int]) -> None:
        delta = self.deltas.setdefault(counter_key, dict.fromkeys(MOVED_COUNTERS, 0))
        for name, value in amounts.items():
            delta[name] += value

    def build_finding_rows(self, findings: Mapping[int, FindingRef]) -> list[dict[str, object]]:
        """Parameters of the query findings_count."""
        rows = []
        for (rule, finding, old, new), delta in self.deltas.items():
            if rule == NO_RULE and finding in findings and any(delta.values()):
                row: dict[str, object] = {"id": finding, "old_release": old, "new_release": new, **delta}
                first, last = (round(moment.timestamp() * 1000) for moment in self.seen_spans[finding])
                rows.append({**row, "impact": findings[finding].impact, "first_ms": first, "last_ms": last})
        return rows

    def build_rule_rows(self, unknown_counts: Mapping[CounterKey, int]) -> list[dict[str, object]]:
        """Parameters of the query rule_findings_count."""
        counter_keys = {counter_key for counter_key in self.deltas if counter_key[0] != NO_RULE} | unknown_counts.keys()
        empty = dict.fromkeys(MOVED_COUNTERS, 0)
        return [
            {
                "rule_id": counter_key[0],
                "id": counter_key[1],
                "old_release": counter_key[2],
                "new_release": counter_key[3],
                **self.deltas.get(counter_key, empty),
                "unknown": unknown_counts.get(counter_key, 0),
            }
            for counter_key in counter_keys
        ]


async def fetch_rows(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    return await (await connection.execute(load_statement(name), parameters or {})).fetchall()


async def fetch_row(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> Row:
    (row,) = await fetch_rows(connection, name, parameters)
    return row


async def load_findings(connection: Connection, ids: Iterable[int] | None = None) -> dict[int, FindingRef]:
    rows = await fetch_rows(connection, "reapply_findings", {"ids": None if ids is None else list(ids)})
    return {row["id"]: FindingRef(**row) for row in rows}


async def write_counters(
    connection: Connection,
    counters: CounterMoves,
    findings: Mapping[int, FindingRef],
    unknown_counts: Mapping[CounterKey, int],
) -> set[int]:
    """The findings are locked. Return the endpoints of those that changed."""
    if rows := counters.build_finding_rows(findings):
        await connection.execute(load_statement("findings_count"), {"rows": to_json(rows).decode()})
    if rows := counters.build_rule_rows(unknown_counts):
        await connection.execute(load_statement("rule_findings_count"), {"rows": to_json(rows).decode()})
    return {findings[counter_key[1]].endpoint_id for counter_key in counters.deltas if counter_key[1] in findings}


async def mark_endpoints_due(connection: Connection, endpoints: Iterable[int]) -> None:
    """Their findings are told from noise anew."""
    ids = sorted(endpoints)
    await connection.execute(load_statement("endpoints_lock"), {"ids": ids})
    await connection.execute(load_statement("noise_reset"), {"ids": ids})


async def redistribute_dropped(
    connection: Connection, rules: RuleSet, first_versions: Mapping[int, int], listed_version: int
) -> None:
    """`listed`: the version for which all pairs were judged again. Rules that began later are not looked at."""
    active_rules = [
        rule for rule in rules.rules if first_versions[int(rule.name)] <= listed_version and not rule.status
    ]
    findings = await load_findings(connection)
    finding_ids = [finding.id for finding in findings.values() if _find_rule(active_rules, finding)]
    rows = await fetch_rows(connection, "reapply_totals", {"findings": finding_ids, "version": listed_version})
    ids = sorted({row["finding_id"] for row in rows})
    if not ids:
        return
    await connection.execute(load_statement("findings_lock"), {"ids": ids})
    # Read again under the locks: workers may have counted since.
    rows = await fetch_rows(connection, "reapply_totals", {"findings": finding_ids, "version": listed_version})
    counters = CounterMoves.from_rows(rows)
    for row in rows:
        if row["finding_id"] in findings:
            _redistribute_row(row, findings[row["finding_id"]], active_rules, counters)
    await mark_endpoints_due(connection, await write_counters(connection, counters, findings, {}))


def _redistribute_row(row: Row, finding: FindingRef, active_rules: Sequence[Rule], counters: CounterMoves) -> None:
    target = _find_rule([rule for rule in active_rules if rule.applies_to_release(row["new_label"])], finding)
    if target == row["rule_id"]:
        return
    key_suffix = (finding.id, row["old_release"], row["new_release"])
    counters.extend_span(finding.id, row["last_seen"])
    counters.move_counts(
        (row["rule_id"], *key_suffix), (target, *key_suffix), {name: row[name] for name in MOVED_COUNTERS}
    )


def _find_rule(rules: Iterable[Rule], finding: FindingRef) -> int:
    """NOBODY, or the rule that explains the finding in all answers of a release."""
    return find_explaining_rule([rule for rule in rules if rule.applies_to(finding.service, finding.endpoint)], finding)


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
    connection: Connection, finding_ids: FindingIds, rules: CompareOptions, *, limit: int = REAPPLY_BATCH_PAIRS
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
            await redistribute_dropped(connection, active.declared, active.first_versions, state["queued_version"])
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


async def _reapply_batch(connection: Connection, finding_ids: FindingIds, active: ActiveRules, limit: int) -> None:
    rows = await fetch_rows(connection, "reapply_take", {"limit": limit})
    records = await asyncio.to_thread(reevaluate_rows, rows, active.rules)
    await finding_ids.load([item for item in records if item is not None])
    findings = await load_findings(connection, {item for row in rows for item in _list_attributed_findings(row)})
    attributions = [
        places.attribute_by_row(row, active.declared, active.first_versions, findings)
        if record is None
        else attribute_findings(record, finding_ids.id_cache, row["drift"] or ())
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
    connection: Connection, rows: Sequence[Row], attributions: Sequence[Attribution], findings: Mapping[int, FindingRef]
) -> set[int]:
    """The counters of findings and of rules. Return the endpoints of those."""
    await connection.execute(load_statement("findings_lock"), {"ids": list(findings)})
    counters = CounterMoves.from_rows(await fetch_rows(connection, "reapply_counters", {"ids": list(findings)}))
    labels = await fetch_rows(connection, "releases_read", {"services": list({row["service"] for row in rows})})
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
                        name, _make_counter_key(origin, finding, releases), _make_counter_key(target, finding, releases)
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


async def _write_examples(connection: Connection, rows: Sequence[Row], records: Sequence[PairRecord | None]) -> None:
    examples = [
        {**_make_pair_key(row), "differences": orjson.loads(encode_differences(record))}
        for row, record in zip(rows, records, strict=True)
        if record is not None
    ]
    if examples:
        await connection.execute(load_statement("reapply_examples_set"), {"rows": to_json(examples).decode()})


async def _move_tally(connection: Connection, rows: Sequence[Row], records: Sequence[PairRecord | None]) -> None:
    """Move pairs between outcomes in the tally."""
    tally: Counter[tuple[str, int, str]] = Counter()
    for row, record in zip(rows, records, strict=True):
        day = round(row["at"].timestamp() * 1000) // DAY_MS
        tally[row["service"], day, row["outcome"]] -= 1
        tally[row["service"], day, _resolve_outcome(row, record)] += 1
    names = ("service", "day", "outcome")
    parameters = [{**dict(zip(names, key, strict=True)), "pairs": pairs} for key, pairs in tally.items() if pairs]
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
