"""Writes compared pairs to the ledger: each batch is one transaction, and a repeated batch counts once.

All writers take locks in the same order: the rules (shared), pairs by id, hourly counts, findings by id, examples, late
entries, outcome counts, streams, endpoints by id, samples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from abreast_sidecar.compare.model import COMPARED_OUTCOMES, Difference
from abreast_sidecar.errors import LedgerError, RefusedError, StaleRulesError, first_line, locate_error
from abreast_sidecar.store.catalogue import IdCache, ReleaseIds
from abreast_sidecar.store.counters import (
    BET_MARKS,
    IMPACT_SEVERITY,
    CounterDeltas,
    PairCounter,
    compute_marks,
    get_rule,
)
from abreast_sidecar.store.database import ClosingConnection, execute, sanitise_text, to_json
from abreast_sidecar.store.records import MAX_REASON_CHARS, PairRecord
from abreast_sidecar.store.samples import (
    BetTracker,
    ExampleSelector,
    RepeatTracker,
    RequestSampler,
    identify_client,
    identify_leaver,
    list_bets,
    name_bet_place,
)

WRITER_CONNECT_TIMEOUT_S = 5
WRITE_TIMEOUT_S = 60.0  # for a whole batch; the connection is closed then
MAX_DEAD_LETTERS = 1000  # per service
MAX_DEAD_LETTER_BYTES = 64 * 1024
PAIRS_CHANNEL = "abreast_pairs"  # NOTIFY: the ledger has new pairs
PAIRS_NOTIFY_INTERVAL_S = 1.0  # less than aio.ACTIVITY_S, so that a batch without a notification wakes nobody too late
ID_CACHE_TTL_S = 600.0  # retention may delete examples meanwhile
DATA_ERROR_CLASSES = ("22", "23", "54")  # SQLSTATE: data exception, constraint violation, program limit exceeded
KEEPALIVE_OPTIONS: dict[str, Any] = {
    "connect_timeout": WRITER_CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms
}

DifferencesByFinding = dict[int, list[Difference]]


class DayDroppedError(LedgerError):
    """The partition of the record's day is gone. A second attempt opens it, or rejects the record."""


class PairRow(Struct, frozen=True, gc=False):
    """A compared pair with its findings."""

    record: PairRecord
    columns: dict[str, Any]
    unexplained: DifferencesByFinding = {}
    shown: DifferencesByFinding = {}  # old against new, also findings that rules explain completely
    shown_as_noise: DifferencesByFinding = {}  # old against old

    @property
    def key(self) -> tuple[str, int]:
        return self.record.pair_id, self.record.day


class PairWriter:
    """Writes through one connection, which it opens when needed. It keeps no session state, so a pooler may sit between."""

    def __init__(self, conninfo: str, *, examples_per_finding: int) -> None:
        self.conninfo = conninfo
        self._id_cache = IdCache()
        self._releases = ReleaseIds()
        self._examples = ExampleSelector(self._id_cache.examples, examples_per_finding)
        self._samples = RequestSampler()
        self._repeats = RepeatTracker()
        self._bets = BetTracker()
        self._open_day_cache: set[int] = set()
        self._connection: AsyncConnection[TupleRow] | None = None
        self._id_cache_cleared_at = 0.0
        self._notified_at = -PAIRS_NOTIFY_INTERVAL_S
        self._rules_version: int | None = None

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._id_cache.clear()
        self._releases.clear()
        self._samples.clear()
        self._repeats.clear()
        self._bets.clear()
        self._open_day_cache.clear()
        if connection is not None:
            await connection.close()

    async def write(self, records: Sequence[PairRecord], *, rules_version: int | None = None) -> int:
        """Commit a batch and return the number of new pairs. `rules_version`: the rules that the batch was compared under.

        Raise StaleRulesError if other rules are in force, RefusedError if Postgres rejects the data, and LedgerError for
        failures that may pass. A call that raises StaleRulesError or RefusedError commits nothing. After a
        LedgerError you can write the batch again, even if it was committed.
        """
        try:
            return await self._write(records, rules_version)
        except DayDroppedError:  # retention dropped it meanwhile
            return await self._write(records, rules_version)

    async def _write(self, batch: Sequence[PairRecord], rules_version: int | None) -> int:
        async with self._map_errors():
            connection = await self._connect()
            if rules_version != self._rules_version:  # endpoints may have merged
                self._id_cache.clear()
                self._rules_version = rules_version
            unique: dict[tuple[str, int], PairRecord] = {}
            late_records = [record for record in batch if record.result.outcome == "late"]
            for record in batch:  # the ledger takes one of each pair and day, and its counters must be of that one
                if record.result.outcome != "late":
                    unique.setdefault((record.pair_id, record.day), record)
            records = list(unique.values())
            for day in sorted({record.day for record in records} - self._open_day_cache):
                await execute(connection, "day_open", {"day": day})
                self._open_day_cache.add(day)
            await self._releases.load(connection, records)
            await self._id_cache.load(connection, records)
            pair_rows = [self._build_row(record) for record in records]
            return await self._commit(connection, pair_rows, late_records, rules_version)

    @contextlib.asynccontextmanager
    async def _map_errors(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                yield
        except psycopg.Error as error:
            message = first_line(error)
            if isinstance(error, psycopg.errors.CheckViolation) and not error.diag.constraint_name:
                self._open_day_cache.clear()
                raise DayDroppedError(f"the partition of a day is missing: {message}") from error
            if isinstance(error, psycopg.errors.ForeignKeyViolation):
                self._id_cache.clear()
                raise StaleRulesError("an endpoint of the batch was merged into another") from error
            if (error.sqlstate or "").startswith(DATA_ERROR_CLASSES) or isinstance(error, psycopg.DataError):
                # The message may contain captured values.
                raise RefusedError(f"postgres rejects a record: {type(error).__name__} {error.sqlstate}") from error
            await self.close()
            raise LedgerError(f"the ledger can't be written: {message}") from error
        except TimeoutError as error:
            await self.close()
            raise LedgerError(f"postgres took more than {WRITE_TIMEOUT_S:g} s to write a batch") from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RefusedError(f"a record can't be sent to postgres: {locate_error(error)}") from error
        except BaseException:
            await self.close()
            raise

    async def _connect(self) -> AsyncConnection[TupleRow]:
        now = asyncio.get_running_loop().time()
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            self._connection = await ClosingConnection.connect(
                make_conninfo(self.conninfo, **KEEPALIVE_OPTIONS), autocommit=True, prepare_threshold=None
            )
            self._id_cache_cleared_at = now
        elif now - self._id_cache_cleared_at > ID_CACHE_TTL_S:
            self._id_cache.clear()
            self._id_cache_cleared_at = now
        return self._connection

    def _build_row(self, record: PairRecord) -> PairRow:
        ids = self._id_cache
        endpoint = ids.get_endpoint(record.endpoint)
        columns = record.to_row(endpoint.id)
        result = record.result
        if (leaver := identify_leaver(record)) is not None:
            columns["left_by"] = leaver
        if not result.all_differences:  # nearly all pairs
            return PairRow(record, columns)
        differences = ids.group_by_finding(endpoint, result.differences)
        noise = ids.group_by_finding(endpoint, result.noise)
        explained = ids.group_by_finding(endpoint, result.explained_differences, excluded=differences)
        explained_noise = ids.group_by_finding(endpoint, result.explained_noise, excluded=noise)
        for prefix, groups, explained_groups in (("", differences, explained), ("baseline_", noise, explained_noise)):
            columns[f"{prefix}findings"] = list(groups)
            if explained_groups:
                columns[f"{prefix}explained"] = list(explained_groups)
                columns[f"{prefix}explained_by"] = list(map(get_rule, explained_groups.values()))
        return PairRow(record, columns, differences, differences | explained, noise | explained_noise)

    async def _commit(
        self,
        connection: AsyncConnection[TupleRow],
        pair_rows: Sequence[PairRow],
        late_records: Sequence[PairRecord],
        rules_version: int | None,
    ) -> int:
        async with connection.transaction():
            if rules_version is not None:
                await _lock_rules(connection, rules_version, pair_rows)
            bet_keys = await self._add_marks(connection, [row for row in pair_rows if "findings" in row.columns])
            added = await _add_pairs(connection, pair_rows)
            deltas = CounterDeltas()
            for pair_row in added:
                self._count_pair(pair_row, deltas)
            if late_records:
                await _mark_late(connection, late_records, deltas)
            await deltas.write_findings(connection)
            candidates = [(pair_row.record, list(pair_row.shown)) for pair_row in added if pair_row.shown]
            examples = self._examples.select(candidates)
            replacements = self._examples.select_replacements(candidates)
            if replacements:
                await self._examples.evict(connection, replacements)
                examples = [*examples, *replacements]
            if examples:
                await execute(connection, "examples_add", self._examples.build_parameters(examples))
            await _add_dead_letters(connection, added)
            await _count_late(connection, pair_rows, added)
            samples = self._samples.sample(
                (pair_row.record, pair_row.columns["endpoint_id"], list(pair_row.unexplained)) for pair_row in added
            )
            await deltas.write_pairs(connection, samples)
            now = asyncio.get_running_loop().time()
            is_notification_due = now - self._notified_at >= PAIRS_NOTIFY_INTERVAL_S
            if is_notification_due:
                await execute(connection, "pairs_notify")
        if is_notification_due:
            self._notified_at = now
        self._bets.remember(bet_keys)
        self._examples.mark_stored(examples)
        if replacements:
            await self._examples.reload(connection, replacements)
        return len(added)

    async def _add_marks(self, connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow]) -> set[int]:
        """Set the marks of the pairs, and write their bets. Return the keys of all bets."""
        pair_marks = [self._compute_marks(pair_row) for pair_row in pair_rows]
        pair_bets = [
            {
                finding: list_bets(self._name_place(pair_row, finding), marks, client, pair_row.record.time_ms)
                for finding, marks in marks_by_finding.items()
                if marks & BET_MARKS
            }
            for pair_row, marks_by_finding in zip(pair_rows, pair_marks, strict=True)
            for client in (identify_client(pair_row.record.result),)
        ]
        keys = {key for bets in pair_bets for bet_keys in bets.values() for key in bet_keys.values()}
        new_keys = await self._bets.add(connection, keys)
        for pair_row, marks_by_finding, bets in zip(pair_rows, pair_marks, pair_bets, strict=True):
            marks = dict(marks_by_finding)
            for finding, bet_keys in bets.items():
                for group, key in bet_keys.items():
                    if key in new_keys:
                        new_keys.discard(key)  # the next one of this batch does not count
                    else:
                        marks[finding] &= ~group
            pair_row.columns["marks"] = {str(finding): bits for finding, bits in marks.items() if bits} or None
        return keys

    def _name_place(self, pair_row: PairRow, finding: int) -> str:
        endpoint = self._id_cache.get_endpoint(pair_row.record.endpoint)
        difference = (pair_row.shown.get(finding) or pair_row.shown_as_noise[finding])[0]
        return name_bet_place(finding, difference, pool=endpoint.pool, compared=endpoint.compared)

    def _compute_marks(self, pair_row: PairRow) -> dict[int, int]:
        """Return the marks of each finding, with bets that may repeat others."""
        record, shown, noise = pair_row.record, pair_row.shown, pair_row.shown_as_noise
        copies_writes = self._id_cache.copies_writes(record.service)
        known = record.marks or {}  # of an earlier attempt to write the batch, maybe with other ids of findings
        record.marks = {finding: known[finding] for finding in shown.keys() | noise.keys() if finding in known}
        for finding in (shown.keys() | noise.keys()) - known.keys():
            groups = shown.get(finding, ()), noise.get(finding, ())
            marks = compute_marks(record.result, *groups, record.time_ms / 1000, copies_writes=copies_writes)
            if unexplained := pair_row.unexplained.get(finding):
                marks |= self._repeats.observe(finding, unexplained[0])
            record.marks[finding] = marks
        return record.marks

    def _count_pair(self, pair_row: PairRow, deltas: CounterDeltas) -> None:
        record, result = pair_row.record, pair_row.record.result
        releases = self._releases.get_ids(record)
        deltas.add_pair(record.service, record.day, record.outcome, record.pair_id)
        is_compared = result.outcome in COMPARED_OUTCOMES
        if is_compared or result.baseline_compared:
            key = (pair_row.columns["endpoint_id"], *releases)
            self._id_cache.get_endpoint(record.endpoint).compared += is_compared
            deltas.add_endpoint(key, is_compared=is_compared, is_baseline_compared=result.baseline_compared)
        marks = pair_row.columns.get("marks") or {}
        counted: tuple[tuple[PairCounter, DifferencesByFinding], ...] = (
            ("count", pair_row.shown),
            ("baseline_count", pair_row.shown_as_noise),
        )
        for counter, groups in counted:
            for finding, group in groups.items():
                counter_key = (get_rule(group), finding, *releases)
                finding_marks = marks.get(str(finding), 0)
                impact = max((difference.impact for difference in group), key=lambda name: IMPACT_SEVERITY[name])
                deltas.add_finding(counter, counter_key, finding_marks, impact=impact, time_ms=record.time_ms)


async def _lock_rules(connection: AsyncConnection[TupleRow], rules_version: int, pair_rows: Sequence[PairRow]) -> None:
    row = await (await execute(connection, "rules_version_hold")).fetchone()
    if row is None or row[0] != rules_version:
        raise StaleRulesError(
            f"the batch was compared under version {rules_version} of the rules, and version {row and row[0]} is in force"
        )
    if rules_version:
        for pair_row in pair_rows:
            pair_row.columns["rules_version"] = rules_version


async def _add_pairs(connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow]) -> Sequence[PairRow]:
    """Insert the pairs, and return those that the ledger did not hold."""
    columns = to_json([pair_row.columns for pair_row in pair_rows])
    cursor = await execute(connection, "pairs_add", {"rows": columns})
    if cursor.rowcount == len(pair_rows):
        return pair_rows
    added_keys = set(await cursor.fetchall())
    return [pair_row for pair_row in pair_rows if pair_row.key in added_keys]


async def _mark_late(
    connection: AsyncConnection[TupleRow], records: Sequence[PairRecord], deltas: CounterDeltas
) -> None:
    """Change the outcome of pairs whose missing capture arrived late. A repeated entry changes nothing."""
    marks = [
        {
            "id": record.pair_id,
            "service": record.service,
            "day": record.day,
            "outcome": "only_old" if record.result.new else "only_new",
            "reason": record.result.reason,
        }
        for record in records
    ]
    cursor = await execute(connection, "pairs_set_late", {"rows": to_json(marks)})
    for service, day, outcome in await cursor.fetchall():
        deltas.outcomes[service, day, outcome] -= 1
        deltas.outcomes[service, day, "late"] += 1


async def _count_late(
    connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow], added_rows: Sequence[PairRow]
) -> None:
    """Count the pairs of dropped days among those that were not added."""
    if len(added_rows) == len(pair_rows):
        return
    added_keys = {pair_row.key for pair_row in added_rows}
    counts = Counter(
        (pair_row.record.service, pair_row.record.day) for pair_row in pair_rows if pair_row.key not in added_keys
    )
    late_counts = [{"service": service, "day": day, "entries": count} for (service, day), count in counts.items()]
    await execute(connection, "late_entries_add", {"rows": to_json(late_counts)})


async def _add_dead_letters(connection: AsyncConnection[TupleRow], pair_rows: Iterable[PairRow]) -> None:
    for record in (pair_row.record for pair_row in pair_rows if pair_row.record.dead_letter is not None):
        parameters = {
            "ms": record.time_ms,
            "service": record.service,
            "entry": record.entry_id,
            "reason": sanitise_text(record.result.reason, MAX_REASON_CHARS),
            "content": (record.dead_letter or b"")[:MAX_DEAD_LETTER_BYTES],
            "limit": MAX_DEAD_LETTERS,
        }
        await execute(connection, "dead_letter_add", parameters)
