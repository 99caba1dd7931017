"""Writes judged pairs into the ledger: a batch is one transaction, and a batch that comes twice counts once.

Order of locks, the same for all who write: the rules (shared), pairs by id, their sums, findings by id, examples, late
entries, tallies, endpoints by id, samples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.volatile import get_direction, get_magnitude_shift, is_explained_by_shape
from abreast_sidecar.errors import LedgerError, RefusedError, StaleRulesError
from abreast_sidecar.store.catalogue import EndpointIds, IdCache, ReleaseIds
from abreast_sidecar.store.database import load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import COMPARED_OUTCOMES, MAX_REASON_CHARS, PairRecord
from abreast_sidecar.store.samples import ExampleSelector, RepeatTracker, RequestSampler, make_sample_parameters

IMPACT_SEVERITY = {"additive": 0, "value": 1, "breaking": 2}

CounterKey = tuple[int, int, int]  # finding or endpoint, release of old, release of new
ReleasePair = tuple[int, int]
DifferencesByFinding = Mapping[int, Sequence[Difference]]  # by finding
ExplainedByFinding = Mapping[int, tuple[int, Sequence[Difference]]]  # by finding, with the rule that explains it
RULE_COUNTERS = ("count", "baseline_count", "shape_explained", "new_greater", "new_smaller")


@dataclass(slots=True)
class CounterDeltas:
    """Parameters of the query findings_count by finding and releases, of endpoints_count by endpoint and releases, and
    pairs by service, day and outcome.
    """

    findings: dict[CounterKey, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[CounterKey, dict[str, int]] = field(default_factory=dict)
    outcomes: dict[tuple[str, int, str], int] = field(default_factory=dict)
    rules: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict)  # of rule_findings_count
    repeats: RepeatTracker = field(default_factory=RepeatTracker)

    def add_pair(
        self,
        record: PairRecord,
        endpoint_id: int,
        releases: ReleasePair,
        differences: DifferencesByFinding,
        noise: DifferencesByFinding,
    ) -> None:
        self._count_endpoint((endpoint_id, *releases), record.result)
        key = (record.service, record.day, record.outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        for finding, group in differences.items():
            counts = self._get_finding_counts((finding, *releases), group[0], record.time_ms)
            counts["count"] += 1
            sign = get_direction(group[0])
            counts["new_greater"] += sign > 0
            counts["new_smaller"] += sign < 0
            counts["shape_explained"] += is_explained_by_shape(group, record.time_ms / 1000)
            magnitude = get_magnitude_shift(group[0])
            counts["magnitude_up"] += magnitude > 0
            counts["magnitude_down"] += magnitude < 0
            for name, value in self.repeats.observe(finding, group[0])._asdict().items():
                counts[name] += value
        for finding, group in noise.items():
            counts = self._get_finding_counts((finding, *releases), group[0], record.time_ms)
            counts["baseline_count"] += 1
            magnitude = get_magnitude_shift(group[0])
            counts["baseline_magnitude_up"] += magnitude > 0
            counts["baseline_magnitude_down"] += magnitude < 0

    def add_explained(
        self,
        record: PairRecord,
        releases: ReleasePair,
        explained_differences: ExplainedByFinding,
        noise: ExplainedByFinding,
    ) -> None:
        """What rules explain counts for the rule, and not for the finding."""
        for finding, (rule, group) in explained_differences.items():
            counts = self._get_rule_counts(rule, (finding, *releases))
            sign = get_direction(group[0])
            counts["count"] += 1
            counts["new_greater"] += sign > 0
            counts["new_smaller"] += sign < 0
            counts["shape_explained"] += is_explained_by_shape(group, record.time_ms / 1000)
        for finding, (rule, _) in noise.items():
            self._get_rule_counts(rule, (finding, *releases))["baseline_count"] += 1

    def _get_rule_counts(self, rule: int, key: CounterKey) -> dict[str, int]:
        return self.rules.setdefault(
            (rule, *key), {"rule_id": rule, **_make_key_columns(key), **dict.fromkeys(RULE_COUNTERS, 0)}
        )

    def _count_endpoint(self, key: CounterKey, result: ComparisonResult) -> None:
        is_compared = result.outcome in COMPARED_OUTCOMES
        if is_compared or result.baseline_compared:
            counts = self.endpoints.get(key)
            if counts is None:
                counts = self.endpoints[key] = {**_make_key_columns(key), "compared": 0, "baseline_compared": 0}
            counts["compared"] += is_compared
            counts["baseline_compared"] += result.baseline_compared

    def _get_finding_counts(self, key: CounterKey, difference: Difference, time_ms: int) -> dict[str, Any]:
        counts = self.findings.get(key)
        if counts is None:
            counts = self.findings[key] = {
                **_make_key_columns(key),
                "count": 0,
                "baseline_count": 0,
                "shape_explained": 0,
                "new_greater": 0,
                "new_smaller": 0,
                "repeat_checks": 0,
                "old_repeats": 0,
                "new_repeats": 0,
                "magnitude_up": 0,
                "magnitude_down": 0,
                "baseline_magnitude_up": 0,
                "baseline_magnitude_down": 0,
                "impact": difference.impact,
                "first_ms": time_ms,
                "last_ms": time_ms,
            }
        if IMPACT_SEVERITY[difference.impact] > IMPACT_SEVERITY[counts["impact"]]:
            counts["impact"] = difference.impact
        counts["first_ms"] = min(counts["first_ms"], time_ms)
        counts["last_ms"] = max(counts["last_ms"], time_ms)
        return counts

    def build_tally_rows(self) -> list[dict[str, Any]]:
        return [
            {"service": service, "day": day, "outcome": outcome, "pairs": pairs}
            for (service, day, outcome), pairs in self.outcomes.items()
        ]


def _make_key_columns(key: CounterKey) -> dict[str, int]:
    return {"id": key[0], "old_release": key[1], "new_release": key[2]}


WRITER_CONNECT_TIMEOUT_S = 5  # seconds
WRITE_TIMEOUT_S = 60.0  # seconds for a whole batch; then the connection is given up
MAX_DEAD_LETTERS = 1000  # entries of one service
MAX_DEAD_LETTER_BYTES = 64 * 1024  # bytes of an entry
ID_CACHE_TTL_S = 600.0  # seconds; retention may have made room for examples
DATA_ERROR_CLASSES = ("22", "23", "54")  # SQLSTATE: the data, a constraint, a limit of the program
KEEPALIVE_OPTIONS: dict[str, Any] = {
    "connect_timeout": WRITER_CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms
}


class DayDroppedError(LedgerError):
    """No partition takes the record's day any more. Trying again opens it."""


class PairRow(Struct, frozen=True, gc=False):
    """A judged pair with the ids of what it shows."""

    record: PairRecord
    columns: dict[str, Any]
    differences: dict[int, list[Difference]]
    noise: dict[int, list[Difference]]
    explained: ExplainedByFinding
    explained_noise: ExplainedByFinding

    @property
    def findings(self) -> list[int]:
        """All that it is an example of."""
        return [*self.differences, *self.explained]


class PairWriter:
    """One connection, opened when it is needed. No state of the session is used, so a pooler may stand between."""

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
        """Commit the batch; return how many of it were new. `rules`: the version of the rules that it was judged by.

        Raise StaleRulesError when that is not the one that holds, and nothing was committed. Raise RefusedError when
        Postgres is well and does not take the data, LedgerError for all that may pass by itself; then the batch can be
        given again, also when it had been committed after all.
        """
        try:
            return await self._write(records, rules_version)
        except DayDroppedError:  # retention dropped it meanwhile
            return await self._write(records, rules_version)

    async def _write(self, batch: Sequence[PairRecord], rules_version: int | None) -> int:
        async with self._map_errors():
            connection = await self._connect()
            unique = _deduplicate(batch)
            await self._open_days(connection, unique)
            await self._releases.load(connection, unique)
            await self._id_cache.load(connection, unique)
            pair_rows = [self._build_row(record) for record in unique]
            return await self._commit(connection, pair_rows, rules_version)

    @contextlib.asynccontextmanager
    async def _map_errors(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                yield
        except psycopg.Error as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, psycopg.errors.CheckViolation) and not error.diag.constraint_name:
                self._open_day_cache.clear()
                raise DayDroppedError(f"a day's partition is gone: {message}") from error
            if error.sqlstate and error.sqlstate.startswith(DATA_ERROR_CLASSES):
                raise RefusedError(f"postgres refuses a record: {message}") from error
            await self.close()
            raise LedgerError(f"the ledger can't be written: {message}") from error
        except TimeoutError as error:
            await self.close()
            raise LedgerError(f"the ledger took more than {WRITE_TIMEOUT_S:g} s for a batch") from error
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

    async def _open_days(self, connection: AsyncConnection[TupleRow], records: Iterable[PairRecord]) -> None:
        """Those that were dropped stay closed, and take nothing."""
        for day in sorted({record.day for record in records} - self._open_day_cache):
            await connection.execute(load_statement("day_open"), {"day": day})
            self._open_day_cache.add(day)

    def _build_row(self, record: PairRecord) -> PairRow:
        endpoint = self._id_cache.endpoint(record.endpoint)
        columns = record.to_row(endpoint.id)
        if not record.result.all_differences:  # as nearly all
            return PairRow(record, columns, {}, {}, {}, {})
        differences = self._group_by_finding(endpoint, record.result.differences)
        noise = self._group_by_finding(endpoint, record.result.noise)
        if differences:
            columns["findings"] = list(differences)
        if noise:
            columns["baseline_findings"] = list(noise)
        explained = self._group_explained(endpoint, record.result.explained_differences, differences)
        explained_noise = self._group_explained(endpoint, record.result.explained_noise, noise)
        columns |= make_explained_columns(explained, explained_noise)
        return PairRow(record, columns, differences, noise, explained, explained_noise)

    def _group_explained(
        self, endpoint: EndpointIds, explained: Iterable[Difference], unexplained: Container[int]
    ) -> ExplainedByFinding:
        """By finding; without those of which something is left that no rule explains."""
        by_finding = self._group_by_finding(endpoint, explained)
        return {
            finding: (int(differences[0].explained_by), differences)
            for finding, differences in by_finding.items()
            if finding not in unexplained
        }

    def _group_by_finding(
        self, endpoint: EndpointIds, differences: Iterable[Difference]
    ) -> dict[int, list[Difference]]:
        """By finding."""
        by_finding: dict[int, list[Difference]] = {}
        for difference in differences:
            finding_id = self._id_cache.finding(endpoint, difference)
            if finding_id is not None:
                by_finding.setdefault(finding_id, []).append(difference)
        return by_finding

    async def _commit(
        self, connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow], rules_version: int | None
    ) -> int:
        async with connection.transaction():
            if rules_version is not None:
                await _lock_rules(connection, rules_version, pair_rows)
            added = await _add_pairs(connection, pair_rows)
            deltas = CounterDeltas(repeats=self._repeats)
            for pair_row in added:
                releases = self._releases.get_ids(pair_row.record)
                deltas.add_pair(
                    pair_row.record, pair_row.columns["endpoint_id"], releases, pair_row.differences, pair_row.noise
                )
                deltas.add_explained(pair_row.record, releases, pair_row.explained, pair_row.explained_noise)
            if deltas.findings or deltas.rules:
                await _count_findings(connection, deltas)
            candidates = [(item.record, item.findings) for item in added if item.findings]
            examples, replacements = (self._examples.select(candidates), self._examples.select_replacements(candidates))
            if replacements:
                await self._examples.evict(connection, replacements)
                examples = [*examples, *replacements]
            if examples:
                await connection.execute(load_statement("examples_add"), self._examples.build_parameters(examples))
            await _add_dead_letters(connection, added)
            await _count_late(connection, pair_rows, added)
            if added:
                tally = to_json(deltas.build_tally_rows()).decode()
                await connection.execute(load_statement("outcome_counts_add"), {"rows": tally})
            if deltas.endpoints:
                await _count_endpoints(connection, deltas)
            samples = self._samples.sample(
                (item.record, item.columns["endpoint_id"], list(item.differences)) for item in added
            )
            if samples:
                await connection.execute(load_statement("samples_add"), make_sample_parameters(samples))
        self._examples.mark_stored(examples)
        if replacements:
            await self._examples.reload(connection, replacements)
        return len(added)


def make_explained_columns(explained: ExplainedByFinding, noise: ExplainedByFinding) -> dict[str, list[int]]:
    """Columns of `pair` for what rules explain, where they explain anything."""
    columns: dict[str, list[int]] = {}
    if explained:
        columns |= {"explained": list(explained), "explained_by": [rule for rule, _ in explained.values()]}
    if noise:
        columns |= {"baseline_explained": list(noise), "baseline_explained_by": [rule for rule, _ in noise.values()]}
    return columns


def _deduplicate(records: Iterable[PairRecord]) -> list[PairRecord]:
    """The first of each pair and day: the ledger would take only one, and must not take another than is counted."""
    unique: dict[tuple[str, int], PairRecord] = {}
    for record in records:
        unique.setdefault((record.pair_id, record.day), record)
    return list(unique.values())


async def _lock_rules(connection: AsyncConnection[TupleRow], rules_version: int, pair_rows: Sequence[PairRow]) -> None:
    row = await (await connection.execute(load_statement("rules_version_hold"))).fetchone()
    if row is None or row[0] != rules_version:
        raise StaleRulesError(f"the rules are at version {row and row[0]}, the batch was judged by {rules_version}")
    if rules_version:
        for pair_row in pair_rows:
            pair_row.columns["rules_version"] = rules_version


async def _add_pairs(connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow]) -> Sequence[PairRow]:
    columns = to_json([pair_row.columns for pair_row in pair_rows]).decode()
    cursor = await connection.execute(load_statement("pairs_add"), {"rows": columns})
    if cursor.rowcount == len(pair_rows):
        return pair_rows
    added_keys = set(await cursor.fetchall())
    return [pair_row for pair_row in pair_rows if (pair_row.record.pair_id, pair_row.record.day) in added_keys]


async def _count_late(
    connection: AsyncConnection[TupleRow], pair_rows: Sequence[PairRow], added_rows: Sequence[PairRow]
) -> None:
    """Those of days that were dropped."""
    if len(added_rows) == len(pair_rows):
        return
    added_keys = {(pair_row.record.pair_id, pair_row.record.day) for pair_row in added_rows}
    counts = Counter(
        (pair_row.record.service, pair_row.record.day)
        for pair_row in pair_rows
        if (pair_row.record.pair_id, pair_row.record.day) not in added_keys
    )
    late_counts = [{"service": service, "day": day, "entries": count} for (service, day), count in counts.items()]
    await connection.execute(load_statement("late_entries_add"), {"rows": to_json(late_counts).decode()})


async def _count_findings(connection: AsyncConnection[TupleRow], deltas: CounterDeltas) -> None:
    ids = {finding for finding, *_ in deltas.findings} | {finding for _, finding, *_ in deltas.rules}
    await connection.execute(load_statement("findings_lock"), {"ids": list(ids)})
    if deltas.findings:
        parameters = to_json(list(deltas.findings.values())).decode()
        await connection.execute(load_statement("findings_count"), {"rows": parameters})
    if deltas.rules:
        parameters = to_json(list(deltas.rules.values())).decode()
        await connection.execute(load_statement("rule_findings_count"), {"rows": parameters})


async def _count_endpoints(connection: AsyncConnection[TupleRow], deltas: CounterDeltas) -> None:
    await connection.execute(
        load_statement("endpoints_lock"), {"ids": list({endpoint for endpoint, *_ in deltas.endpoints})}
    )
    parameters = to_json(list(deltas.endpoints.values())).decode()
    await connection.execute(load_statement("endpoints_count"), {"rows": parameters})


async def _add_dead_letters(connection: AsyncConnection[TupleRow], pair_rows: Iterable[PairRow]) -> None:
    for pair_record in (pair_row.record for pair_row in pair_rows if pair_row.record.dead_letter is not None):
        parameters = {
            "ms": pair_record.time_ms,
            "service": pair_record.service,
            "entry": pair_record.entry_id,
            "reason": sanitise_text(pair_record.result.reason, MAX_REASON_CHARS),
            "content": (pair_record.dead_letter or b"")[:MAX_DEAD_LETTER_BYTES],
            "limit": MAX_DEAD_LETTERS,
        }
        await connection.execute(load_statement("dead_letter_add"), parameters)
