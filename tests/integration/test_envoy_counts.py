"""Envoy's count of a window: what it sampled then, whatever it had sampled before."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

import psycopg
import pytest

from abreast_sidecar.jobs.envoy_counts import collect_envoy_counts
from abreast_sidecar.jobs.retention import drop_days
from abreast_sidecar.store.database import Connection, Database, load_statement
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import LedgerSummary, Window
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_envoy import Abreast, abreast
from support_pairs import SERVICE, judged, one

pytestmark = pytest.mark.postgres

HOUR = 3600.0  # seconds
DAY = 24 * HOUR


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[Database]:
    made = Database(postgres_url)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with database.connection() as made:
        yield made


def ago(seconds: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)


async def counted(connection: Connection, sampled: int, seconds: float, before: float = 0.0) -> None:
    """Envoy has counted so many over so many seconds, until so many seconds `before` now."""
    given = {"service": SERVICE, "sampled": sampled, "seconds": seconds}
    await connection.execute(load_statement("envoy_count_add"), given)
    await connection.execute(
        "update abreast.envoy_count set at = at - %s * interval '1 second' where at > now() - interval '1 day'",
        (before,),
    )
    await connection.execute(
        b"insert into abreast.envoy_report (node, service, seen, totals, last_reading)"
        b" select 'edge', service, now(), jsonb_build_object('sampled', sum(sampled)), '{}'"
        b" from abreast.envoy_count group by service"
        b" on conflict (node, service) do update set totals = excluded.totals"
    )


async def written(url: str, *seconds: float) -> None:
    """Rows of so many seconds ago."""
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([judged(at=round(ago(one).timestamp() * 1000)) for one in seconds])
    await ledger.close()


async def summary(database: Database, start: float | None, end: float | None = None) -> LedgerSummary:
    """From so many seconds ago until so many."""
    window = Window(None if start is None else ago(start), None if end is None else ago(end))
    return await LedgerReader(database).read_summary(SERVICE, window)


async def sampled(database: Database, start: float | None, end: float | None = None) -> int | None:
    return (await summary(database, start, end)).sampled


async def test_envoy_count_is_stored_at_its_time(database: Database, connection: Connection) -> None:
    async with abreast(service=SERVICE) as running:
        await ask(running, 5)
        await brought(database, connection, running, 5)
        await connection.execute("update abreast.envoy_count set at = at - interval '1 hour'")
        await ask(running, 3)
        await brought(database, connection, running, 8)

        assert await sampled(database, HOUR / 2) == 3
        assert await sampled(database, None, HOUR / 2) == 5
        assert await sampled(database, 2 * HOUR) == 8


async def ask(running: Abreast, many: int) -> None:
    for _ in range(many):
        await running.client.get("/x")


async def brought(database: Database, connection: Connection, running: Abreast, expected: int) -> None:
    async def all_of_them() -> bool:
        await collect_envoy_counts(connection, running.server.admin_url)
        return await sampled(database, None) == expected

    await eventually_async(all_of_them, what=f"envoy's count is {expected}")


async def test_envoy_count_is_spread_over_a_long_interval(database: Database, connection: Connection) -> None:
    await counted(connection, 1000, HOUR)

    half = await sampled(database, HOUR / 2)
    quarter = await sampled(database, HOUR / 2, HOUR / 4)

    assert half is not None
    assert quarter is not None
    assert await sampled(database, 2 * HOUR) == 1000
    assert abs(half - 500) <= 4
    assert abs(quarter - 250) <= 4


async def test_summary_window_misses_requests_sampled_in_it(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    await counted(connection, 100, 5, before=HOUR)
    await counted(connection, 3, 5)
    await written(postgres_url, 1, 2)

    last, former, all_time = (
        await summary(database, 60),
        await summary(database, None, HOUR / 2),
        await summary(database, None),
    )

    assert (last.pairs, last.sampled, last.unaccounted) == (2, 3, 1)
    assert (former.pairs, former.sampled, former.unaccounted) == (0, 100, 100)
    assert (all_time.pairs, all_time.sampled, all_time.unaccounted) == (2, 103, 101)


async def test_summary_window_misses_no_more_than_all_time(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    """A row is made a little later than Envoy counts, so one of these is beyond the window's edge."""
    await counted(connection, 3, 5, before=HOUR)
    await written(postgres_url, HOUR - 60, HOUR, HOUR)

    found = await summary(database, 2 * HOUR, HOUR - 30)

    assert (found.pairs, found.sampled, found.unaccounted) == (2, 2, 0)


async def test_envoy_count_of_unknown_time_may_belong_to_any_window(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    """A ledger from before times were written down."""
    await counted(connection, 10, 5)
    await connection.execute("delete from abreast.envoy_count")
    await written(postgres_url, 1, 2)

    found = await summary(database, 60)

    assert (found.sampled, found.unaccounted) == (10, 8)


async def test_envoy_count_is_folded_with_its_dropped_day(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    await counted(connection, 7, 5, before=20 * DAY)
    await counted(connection, 2, 5)
    await written(postgres_url, 20 * DAY, 1)
    await drop_days(connection, retention_days=14)

    assert one(postgres_url, "select sum(sampled)::int from abreast.envoy_count where isfinite(at)") == 2
    assert await sampled(database, 30 * DAY) == 2
    assert await sampled(database, None) == 9


async def test_summary_window_without_envoy_has_no_count(database: Database) -> None:
    found = await summary(database, 60)

    assert (found.sampled, found.unaccounted) == (None, None)


async def test_envoy_counts_of_one_service_are_added(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as other:
        given = {"service": SERVICE, "sampled": 5, "seconds": 3.0}
        other.execute(load_statement("envoy_count_add"), given)
    await counted(connection, 4, 3.0)

    assert await sampled(database, 60) == 9
