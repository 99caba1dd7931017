"""Writes compared pairs to the ledger: each batch is one transaction, and a repeated batch counts once.

All writers take locks in the same order: the rules (shared), pairs by id, hourly counts, findings by id, examples, late
entries, outcome counts, endpoints by id, samples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from abreast_sidecar.compare.model import Difference
from abreast_sidecar.errors import LedgerError, RefusedError, StaleRulesError
from abreast_sidecar.store.catalogue import IdCache, ReleaseIds
from abreast_sidecar.store.counters import CounterDeltas, PairCounter, compute_baseline_marks, compute_marks, get_rule
from abreast_sidecar.store.database import load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import COMPARED_OUTCOMES, MAX_REASON_CHARS, PairRecord
from abreast_sidecar.store.samples import ExampleSelector, RepeatTracker, RequestSampler

WRITER_CONNECT_TIMEOUT_S = 5
WRITE_TIMEOUT_S = 60.0  # for a whole batch; the connection is closed then
MAX_DEAD_LETTERS = 1000  # per service
MAX_DEAD_LETTER_BYTES = 64 * 1024
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
    """A compared pair with its findings. `explained` has the findings that rules explain completely."""

    record: PairRecord
    columns: dict[str, Any]
    differences: DifferencesByFinding
    noise: DifferencesByFinding
    explained: DifferencesByFinding
    explained_noise: DifferencesByFinding

    @property
    def key(self) -> tuple[str, int]:
        return self.record.pair_id, self.record.day

    @property
    def findings(self) -> list[int]:
        return [*self.differences, *self.explained]


class PairWriter:
    """Writes through one connection, which it opens when needed. It keeps no session state, so a pooler may sit between."""

    def __init__(self, conninfo: str, *, examples_per_finding: int) -> None:
        self.conninfo = conninfo
        self._id_cache = IdCache()
        self._releases = ReleaseIds()
        self._examples = ExampleSelector(self._id_cache.examples, examples_per_finding)
        self._samples = RequestSampler()
        self._repeats = RepeatTracker()
        self._open_day_cache: set[int] = set()
        self._connection: AsyncConnection[TupleRow] | None = None
        self._id_cache_cleared_at = 0.0

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._id_cache.clear()
        self._releases.clear()
        self._samples.clear()
        self._repeats.clear()
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
            unique: dict[tuple[str, int], PairRecord] = {}
            for record in batch:  # the ledger takes one of each pair and day, and its counters must be of that one
                unique.setdefault((record.pair_id, record.day), record)
            records = list(unique.values())
            for day in sorted({record.day for record in records} - self._open_day_cache):
                await connection.execute(load_statement("day_open"), {"day": day})
                self._open_day_cache.add(day)
            await self._releases.load(connection, records)
            await self._id_cache.load(connection, records)
            return await self._commit(connection, [self._build_row(record) for record in records], rules_version)

    @contextlib.asynccontextmanager
    async def _map_errors(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                yield
        except psycopg.Error as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, psycopg.errors.CheckViolation) and not error.diag.constraint_name:
                self._open_day_cache.clear()
                raise DayDroppedError(f"the partition of a day is missing: {message}") from error
            if error.sqlstate and error.sqlstate.startswith(DATA_ERROR_CLASSES):
                raise RefusedError(f"postgres rejects a record: {message}") from error
            await self.close()
            raise LedgerError(f"the ledger can't be written: {message}") from error
        except TimeoutError as error:
            await self.close()
            raise LedgerError(f"postgres took more than {WRITE_TIMEOUT_S:g} s to write a batch") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RefusedError(f"a record can't be sent to postgres: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def _connect(self) -> AsyncConnection[TupleRow]:
        now = asyncio.get_running_loop().time()
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            self._connection = await AsyncConnection.connect(
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
        if not result.all_differences:  # nearly all pairs
            return PairRow(record, columns, {}, {}, {}, {})
        differences = ids.group_by_finding(endpoint, result.differences)
        noise = ids.group_by_finding(endpoint, result.noise)
        explained = ids.group_by_finding(endpoint, result.explained_differences, excluded=differences)
        explained_noise = ids.group_by_finding(endpoint, result.explained_noise, excluded=noise)
        columns["findings"] = list(differences)
        columns["baseline_findings"] = list(noise)
        if explained:
            columns |= {"explained": list(explained), "explained_by": list(map(get_rule, explained.values()))}
        if explained_noise:
            rules = list(map(get_rule, explained_noise.values()))
            columns |= {"baseline_explained": list(explained_noise), "baseline_explained_by": rules}
        return PairRow(record, columns, differences, noise, explained, explained_noise)

    async def _commit(
        self, connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow], rules_version: int | None
    ) -> int:
        async with connection.transaction():
            if rules_version is not None:
                await _lock_rules(connection, rules_version, pair_rows)
            for pair_row in pair_rows:
                if "findings" in pair_row.columns:
                    pair_row.columns["marks"] = self._compute_marks(pair_row)
            added = await _add_pairs(connection, pair_rows)
            deltas = CounterDeltas()
            for pair_row in added:
                self._count_pair(pair_row, deltas)
            await deltas.write_findings(connection)
            candidates = [(pair_row.record, pair_row.findings) for pair_row in added if pair_row.findings]
            examples = self._examples.select(candidates)
            replacements = self._examples.select_replacements(candidates)
            if replacements:
                await self._examples.evict(connection, replacements)
                examples = [*examples, *replacements]
            if examples:
                await connection.execute(load_statement("examples_add"), self._examples.build_parameters(examples))
            await _add_dead_letters(connection, added)
            await _count_late(connection, pair_rows, added)
            await deltas.write_outcomes(connection)
            await deltas.write_endpoints(connection)
            samples = self._samples.sample(
                (pair_row.record, pair_row.columns["endpoint_id"], list(pair_row.differences)) for pair_row in added
            )
            if samples:
                await connection.execute(load_statement("samples_add"), {"rows": to_json(samples).decode()})
        self._examples.mark_stored(examples)
        if replacements:
            await self._examples.reload(connection, replacements)
        return len(added)

    def _compute_marks(self, pair_row: PairRow) -> dict[str, int] | None:
        record = pair_row.record
        if record.repeat_marks is None:  # observe each pair once, even if its batch is written again
            record.repeat_marks = {
                finding: self._repeats.observe(finding, group[0]) for finding, group in pair_row.differences.items()
            }
        marks: Counter[int] = Counter(record.repeat_marks)
        for finding, group in (*pair_row.differences.items(), *pair_row.explained.items()):
            marks[finding] |= compute_marks(group, record.time_ms / 1000)
        for finding, group in (*pair_row.noise.items(), *pair_row.explained_noise.items()):
            marks[finding] |= compute_baseline_marks(group)
        return {str(finding): bits for finding, bits in marks.items() if bits} or None

    def _count_pair(self, pair_row: PairRow, deltas: CounterDeltas) -> None:
        record, result = pair_row.record, pair_row.record.result
        releases = self._releases.get_ids(record)
        deltas.outcomes[record.service, record.day, record.outcome] += 1
        is_compared = result.outcome in COMPARED_OUTCOMES
        if is_compared or result.baseline_compared:
            key = (pair_row.columns["endpoint_id"], *releases)
            deltas.add_endpoint(key, is_compared=is_compared, is_baseline_compared=result.baseline_compared)
        marks = pair_row.columns.get("marks") or {}
        counted: list[tuple[PairCounter, Mapping[int, Sequence[Difference]]]] = [
            ("count", pair_row.differences),
            ("count", pair_row.explained),
            ("baseline_count", pair_row.noise),
            ("baseline_count", pair_row.explained_noise),
        ]
        for counter, groups in counted:
            for finding, group in groups.items():
                counter_key = (get_rule(group), finding, *releases)
                finding_marks = marks.get(str(finding), 0)
                deltas.add_finding(counter, counter_key, finding_marks, impact=group[0].impact, time_ms=record.time_ms)


async def _lock_rules(connection: AsyncConnection[TupleRow], rules_version: int, pair_rows: Sequence[PairRow]) -> None:
    row = await (await connection.execute(load_statement("rules_version_hold"))).fetchone()
    if row is None or row[0] != rules_version:
        raise StaleRulesError(
            f"the batch was compared under version {rules_version} of the rules, and version {row and row[0]} is in force"
        )
    if rules_version:
        for pair_row in pair_rows:
            pair_row.columns["rules_version"] = rules_version


async def _add_pairs(connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow]) -> Sequence[PairRow]:
    """Insert the pairs, and return those that the ledger did not hold."""
    columns = to_json([pair_row.columns for pair_row in pair_rows]).decode()
    cursor = await connection.execute(load_statement("pairs_add"), {"rows": columns})
    if cursor.rowcount == len(pair_rows):
        return pair_rows
    added_keys = set(await cursor.fetchall())
    return [pair_row for pair_row in pair_rows if pair_row.key in added_keys]


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
    await connection.execute(load_statement("late_entries_add"), {"rows": to_json(late_counts).decode()})


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
        await connection.execute(load_statement("dead_letter_add"), parameters)
