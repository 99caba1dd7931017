"""Writes judged pairs into the ledger: a batch is one transaction, and a batch that comes twice counts once.

Order of locks, the same for all who write: the rules (shared), pairs by id, their sums, findings by id, examples, late
entries, tallies, endpoints by id, samples.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from abreast_sidecar.compare import Difference
from abreast_sidecar.errors import LedgerError, RefusedError, StaleRulesError
from abreast_sidecar.store.catalogue import Catalogue, Endpoint
from abreast_sidecar.store.clean import clean, json_text
from abreast_sidecar.store.database import statement
from abreast_sidecar.store.examples import Examples
from abreast_sidecar.store.judged import REASON_LIMIT, Judged
from abreast_sidecar.store.releases import Releases
from abreast_sidecar.store.repeats import Repeats
from abreast_sidecar.store.rollup import Hidden, Rollup
from abreast_sidecar.store.samples import Samples, parameters

CONNECT_TIMEOUT = 5  # seconds
WRITE_TIMEOUT = 60.0  # seconds for a whole batch; then the connection is given up
POISON_KEPT = 1000  # entries of one service
POISON_SIZE = 64 * 1024  # bytes of an entry
FORGET_AFTER = 600.0  # seconds; retention may have made room for examples
DATA_CLASSES = ("22", "23", "54")  # SQLSTATE: the data, a constraint, a limit of the program
KEEPALIVE: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms
}


class DayGoneError(LedgerError):
    """No partition takes the record's day any more. Trying again opens it."""


class Record(Struct, frozen=True, gc=False):
    """A judged pair with the ids of what it shows."""

    judged: Judged
    row: dict[str, Any]
    differences: dict[int, list[Difference]]
    noise: dict[int, list[Difference]]
    hidden: Hidden
    hidden_noise: Hidden

    @property
    def findings(self) -> list[int]:
        """All that it is an example of."""
        return [*self.differences, *self.hidden]


class Ledger:
    """One connection, opened when it is needed. No state of the session is used, so a pooler may stand between."""

    def __init__(self, conninfo: str, *, examples_per_finding: int) -> None:
        self.conninfo = conninfo
        self._catalogue = Catalogue()
        self._releases = Releases()
        self._examples = Examples(self._catalogue.examples, examples_per_finding)
        self._samples = Samples()
        self._repeats = Repeats()
        self._days: set[int] = set()
        self._connection: AsyncConnection[TupleRow] | None = None
        self._learned = 0.0

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._catalogue.clear()
        self._releases.clear()
        self._samples.clear()
        self._repeats.clear()
        self._days.clear()
        if connection is not None:
            await connection.close()

    async def write(self, batch: Sequence[Judged], *, rules: int | None = None) -> int:
        """Commit the batch; return how many of it were new. `rules`: the version of the rules that it was judged by.

        Raise StaleRulesError when that is not the one that holds, and nothing was committed. Raise RefusedError when
        Postgres is well and does not take the data, LedgerError for all that may pass by itself; then the batch can be
        given again, also when it had been committed after all.
        """
        try:
            return await self._write(batch, rules)
        except DayGoneError:  # retention dropped it meanwhile
            return await self._write(batch, rules)

    async def _write(self, batch: Sequence[Judged], rules: int | None) -> int:
        async with self._trouble():
            connection = await self._connected()
            unique = _unique(batch)
            await self._open_days(connection, unique)
            await self._releases.learn(connection, unique)
            await self._catalogue.learn(connection, unique)
            records = [self._record(judged) for judged in unique]
            return await self._commit(connection, records, rules)

    @contextlib.asynccontextmanager
    async def _trouble(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                yield
        except psycopg.Error as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, psycopg.errors.CheckViolation) and not error.diag.constraint_name:
                self._days.clear()
                raise DayGoneError(f"a day's partition is gone: {said}") from error
            if error.sqlstate and error.sqlstate.startswith(DATA_CLASSES):
                raise RefusedError(f"postgres refuses a record: {said}") from error
            await self.close()
            raise LedgerError(f"the ledger can't be written: {said}") from error
        except TimeoutError as error:
            await self.close()
            raise LedgerError(f"the ledger took more than {WRITE_TIMEOUT:g} s for a batch") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RefusedError(f"a record can't be sent to postgres: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def _connected(self) -> AsyncConnection[TupleRow]:
        now = asyncio.get_running_loop().time()
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            self._connection = await AsyncConnection.connect(
                make_conninfo(self.conninfo, **KEEPALIVE), autocommit=True, prepare_threshold=None
            )
            self._learned = now
        elif now - self._learned > FORGET_AFTER:
            self._catalogue.clear()
            self._learned = now
        return self._connection

    async def _open_days(self, connection: AsyncConnection[TupleRow], batch: Iterable[Judged]) -> None:
        """Those that were dropped stay closed, and take nothing."""
        for day in sorted({judged.day for judged in batch} - self._days):
            await connection.execute(statement("day_open"), {"day": day})
            self._days.add(day)

    def _record(self, judged: Judged) -> Record:
        endpoint = self._catalogue.endpoint(judged.endpoint)
        row = judged.row(endpoint.id)
        if not judged.judgement.shown:  # as nearly all
            return Record(judged, row, {}, {}, {}, {})
        differences = self._found(endpoint, judged.judgement.differences)
        noise = self._found(endpoint, judged.judgement.noise)
        if differences:
            row["findings"] = list(differences)
        if noise:
            row["baseline_findings"] = list(noise)
        hidden = self._hidden(endpoint, judged.judgement.explained, differences)
        hidden_noise = self._hidden(endpoint, judged.judgement.noise_explained, noise)
        row |= hidden_columns(hidden, hidden_noise)
        return Record(judged, row, differences, noise, hidden, hidden_noise)

    def _hidden(self, endpoint: Endpoint, explained: Iterable[Difference], left: Container[int]) -> Hidden:
        """By finding; without those of which something is left that no rule explains."""
        found = self._found(endpoint, explained)
        return {
            finding: (int(shown[0].explained_by), shown)
            for finding, shown in found.items()
            if finding not in left
        }

    def _found(self, endpoint: Endpoint, differences: Iterable[Difference]) -> dict[int, list[Difference]]:
        """By finding."""
        found: dict[int, list[Difference]] = {}
        for difference in differences:
            finding = self._catalogue.finding(endpoint, difference)
            if finding is not None:
                found.setdefault(finding, []).append(difference)
        return found

    async def _commit(
        self, connection: AsyncConnection[TupleRow], records: Sequence[Record], rules: int | None
    ) -> int:
        async with connection.transaction():
            if rules is not None:
                await _hold_rules(connection, rules, records)
            new = await _add_pairs(connection, records)
            rollup = Rollup(repeats=self._repeats)
            for record in new:
                releases = self._releases.of(record.judged)
                rollup.add(
                    record.judged, record.row["endpoint_id"], releases, record.differences, record.noise
                )
                rollup.hide(record.judged, releases, record.hidden, record.hidden_noise)
            if rollup.findings or rollup.rules:
                await _count_findings(connection, rollup)
            showing = [(one.judged, one.findings) for one in new if one.findings]
            chosen, smaller = self._examples.choose(showing), self._examples.smaller(showing)
            if smaller:
                await self._examples.make_room(connection, smaller)
                chosen = [*chosen, *smaller]
            if chosen:
                await connection.execute(statement("examples_add"), self._examples.parameters(chosen))
            await _add_poison(connection, new)
            await _count_late(connection, records, new)
            if new:
                given = json_text(rollup.tally()).decode()
                await connection.execute(statement("outcome_counts_add"), {"rows": given})
            if rollup.endpoints:
                await _count_endpoints(connection, rollup)
            sampled = self._samples.choose(
                (one.judged, one.row["endpoint_id"], list(one.differences)) for one in new
            )
            if sampled:
                await connection.execute(statement("samples_add"), parameters(sampled))
        self._examples.note(chosen)
        if smaller:
            await self._examples.look_again(connection, smaller)
        return len(new)


def hidden_columns(hidden: Hidden, noise: Hidden) -> dict[str, list[int]]:
    """Columns of `pair` for what rules explain, where they explain anything."""
    row: dict[str, list[int]] = {}
    if hidden:
        row |= {"explained": list(hidden), "explained_by": [rule for rule, _ in hidden.values()]}
    if noise:
        row |= {
            "baseline_explained": list(noise),
            "baseline_explained_by": [rule for rule, _ in noise.values()],
        }
    return row


def _unique(batch: Iterable[Judged]) -> list[Judged]:
    """The first of each pair and day: the ledger would take only one, and must not take another than is counted."""
    first: dict[tuple[str, int], Judged] = {}
    for judged in batch:
        first.setdefault((judged.pair, judged.day), judged)
    return list(first.values())


async def _hold_rules(connection: AsyncConnection[TupleRow], rules: int, records: Sequence[Record]) -> None:
    row = await (await connection.execute(statement("rules_version_hold"))).fetchone()
    if row is None or row[0] != rules:
        raise StaleRulesError(f"the rules are at version {row and row[0]}, the batch was judged by {rules}")
    if rules:
        for record in records:
            record.row["rules_version"] = rules


async def _add_pairs(connection: AsyncConnection[TupleRow], records: Sequence[Record]) -> Sequence[Record]:
    given = json_text([record.row for record in records]).decode()
    cursor = await connection.execute(statement("pairs_add"), {"rows": given})
    if cursor.rowcount == len(records):
        return records
    added = set(await cursor.fetchall())
    return [record for record in records if (record.judged.pair, record.judged.day) in added]


async def _count_late(
    connection: AsyncConnection[TupleRow], records: Sequence[Record], new: Sequence[Record]
) -> None:
    """Those of days that were dropped."""
    if len(new) == len(records):
        return
    added = {(record.judged.pair, record.judged.day) for record in new}
    counts = Counter(
        (record.judged.service, record.judged.day)
        for record in records
        if (record.judged.pair, record.judged.day) not in added
    )
    given = [{"service": service, "day": day, "entries": many} for (service, day), many in counts.items()]
    await connection.execute(statement("late_entries_add"), {"rows": json_text(given).decode()})


async def _count_findings(connection: AsyncConnection[TupleRow], rollup: Rollup) -> None:
    ids = {finding for finding, *_ in rollup.findings} | {finding for _, finding, *_ in rollup.rules}
    await connection.execute(statement("findings_lock"), {"ids": list(ids)})
    if rollup.findings:
        given = json_text(list(rollup.findings.values())).decode()
        await connection.execute(statement("findings_count"), {"rows": given})
    if rollup.rules:
        given = json_text(list(rollup.rules.values())).decode()
        await connection.execute(statement("rule_findings_count"), {"rows": given})


async def _count_endpoints(connection: AsyncConnection[TupleRow], rollup: Rollup) -> None:
    await connection.execute(
        statement("endpoints_lock"), {"ids": list({endpoint for endpoint, *_ in rollup.endpoints})}
    )
    given = json_text(list(rollup.endpoints.values())).decode()
    await connection.execute(statement("endpoints_count"), {"rows": given})


async def _add_poison(connection: AsyncConnection[TupleRow], records: Iterable[Record]) -> None:
    for judged in (record.judged for record in records if record.judged.poison is not None):
        parameters = {
            "ms": judged.at,
            "service": judged.service,
            "entry": judged.entry,
            "reason": clean(judged.judgement.reason, REASON_LIMIT),
            "content": (judged.poison or b"")[:POISON_SIZE],
            "limit": POISON_KEPT,
        }
        await connection.execute(statement("dead_letter_add"), parameters)
