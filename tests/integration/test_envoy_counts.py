"""Envoy's count of a window: what it sampled then, whatever it had sampled before."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
from collections.abc import AsyncIterator

import psycopg
import pytest

from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.jobs.reports import collect_envoy_counts
from abreast_sidecar.jobs.retention import drop_days
from abreast_sidecar.store.database import Connection, Database, load_statement
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import LedgerSummary, Window
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_envoy import Abreast, abreast
from support_pairs import SERVICE, make_record, query_value

pytestmark = pytest.mark.postgres

HOUR = 3600.0  # seconds
DAY = 24 * HOUR


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(postgres_url)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with database.connection() as connection:
        yield connection


def ago(seconds: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds)


async def store_snapshot(connection: Connection, sampled: int, seconds: float, before: float = 0.0) -> None:
    """Envoy has counted so many over so many seconds, until so many seconds `before` now."""
    snapshot = {
        "service": SERVICE,
        "sampled": sampled,
        "without_copy": 0,
        "unanswered": 0,
        "shed": 0,
        "not_sampled": 0,
        "not_query": 0,
        "seconds": seconds,
    }
    await connection.execute(load_statement("envoy_count_add"), snapshot)
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


async def write_pairs(url: str, *seconds: float) -> None:
    """Rows of so many seconds ago."""
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([make_record(at=round(ago(age).timestamp() * 1000)) for age in seconds])
    await ledger.close()


async def summary(database: Database, start: float | None, end: float | None = None) -> LedgerSummary:
    """From so many seconds ago until so many."""
    window = Window(None if start is None else ago(start), None if end is None else ago(end))
    return await LedgerReader(database).read_summary(SERVICE, window)


async def sampled(database: Database, start: float | None, end: float | None = None) -> int | None:
    return (await summary(database, start, end)).sampled


async def test_envoy_count_is_stored_at_its_time(database: Database, connection: Connection) -> None:
    async with abreast(service=SERVICE) as proxy:
        await ask(proxy, 5)
        await brought(database, connection, proxy, 5)
        await connection.execute("update abreast.envoy_count set at = at - interval '1 hour'")
        await ask(proxy, 3)
        await brought(database, connection, proxy, 8)

        assert await sampled(database, HOUR / 2) == 3
        assert await sampled(database, None, HOUR / 2) == 5
        assert await sampled(database, 2 * HOUR) == 8


async def ask(proxy: Abreast, count: int) -> None:
    for _ in range(count):
        await proxy.client.get("/x")


async def brought(database: Database, connection: Connection, proxy: Abreast, expected: int) -> None:
    async def all_of_them() -> bool:
        await collect_envoy_counts(connection, proxy.server.admin_url)
        return await sampled(database, None) == expected

    await eventually_async(all_of_them, description=f"envoy's count is {expected}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_requests_that_envoy_forgets_hide_no_lost_captures(
    database: Database, connection: Connection, postgres_url: str, number: signal.Signals
) -> None:
    """Five lives of an Envoy: each samples 12 requests, of which 8 follow the last reading. Each loses 3 captures."""
    writer = PairWriter(postgres_url, examples_per_finding=1)
    async with abreast(service=SERVICE) as proxy:
        for life in range(5):
            if life:
                assert proxy.server.process is not None
                proxy.server.process.popen.send_signal(number)
                await asyncio.to_thread(proxy.server.process.popen.wait)
                await asyncio.to_thread(proxy.server.start)
            await ask(proxy, 4)
            await collect_envoy_counts(connection, proxy.server.admin_url)
            await ask(proxy, 8)
            pairs = [request.pair for request in proxy.old.received if request.role == "live"]
            lost = {pairs[1], pairs[5], pairs[9]}
            await writer.write([make_record(pair=pair) for pair in pairs if pair not in lost])
            proxy.old.received.clear()
        await collect_envoy_counts(connection, proxy.server.admin_url)
    await writer.close()
    result = await summary(database, None)

    assert (result.pairs, result.unaccounted) == (5 * 9, 5 * 3)
    placed = query_value(postgres_url, "select sum(sampled)::int from abreast.envoy_count")
    assert (placed, await sampled(database, HOUR)) == (60, 60)


async def test_requests_that_nobody_saw_are_uncertain_until_their_captures_arrive(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    """An Envoy samples 8 requests after its last reading, and is killed."""
    async with abreast(service=SERVICE) as proxy:
        await ask(proxy, 60)
        await brought(database, connection, proxy, 60)
        before = await summary(database, None)
        await ask(proxy, 8)
        assert proxy.server.process is not None
        proxy.server.process.popen.kill()
        await asyncio.to_thread(proxy.server.process.popen.wait)
        await asyncio.sleep(1.5)  # its successor starts after the last reading by more than a second
        await asyncio.to_thread(proxy.server.start)
        await collect_envoy_counts(connection, proxy.server.admin_url)
        unseen = await summary(database, None)
        await collect_envoy_counts(connection, proxy.server.admin_url)
        again = await summary(database, None)
        pairs = [request.pair for request in proxy.old.received if request.role == "live"]
        writer = PairWriter(postgres_url, examples_per_finding=1)
        await writer.write([make_record(pair=pair) for pair in pairs])
        await writer.close()
        await collect_envoy_counts(connection, proxy.server.admin_url)
        known = await summary(database, None)

    assert (before.accounts.uncertain, before.sampled, unseen.sampled, known.sampled) == (0, 60, 60, 68)
    assert again.accounts.uncertain == unseen.accounts.uncertain >= 3
    assert known.accounts.uncertain == max(0, unseen.accounts.uncertain - 8)


async def test_stream_that_is_full_is_followed_by_another(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "support_envoy.render_config",
        lambda settings: render_config(settings).replace("MAX_NUMBER = 0xffffff", "MAX_NUMBER = 2"),
    )
    async with abreast(service=SERVICE) as proxy:
        await ask(proxy, 9)
        await brought(database, connection, proxy, 9)
        ids = [request.pair for request in proxy.old.received if request.role == "live"]

    assert len(set(ids)) == 9
    assert {int(pair[10:13] + pair[15:18], 16) for pair in ids} == {1, 2}
    assert len({pair[:10] for pair in ids}) >= 5


async def test_pair_ids_have_62_random_bits() -> None:
    async with abreast() as proxy:
        await ask(proxy, 150)
        ids = [request.pair for request in proxy.old.received if request.role == "live"]

    numbers = [int(pair.replace("-", ""), 16) for pair in ids]
    changing = [bit for bit in range(64) if len({number >> bit & 1 for number in numbers}) == 2]
    assert len(changing) == 62
    assert {pair[14] for pair in ids} == {"8"}
    assert {pair[19] for pair in ids} <= set("89ab")


async def test_envoy_that_ended_before_its_first_reading_is_counted(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    stream = "0d7c1e3a-0000-8{0:03x}-8000-{0:012x}"
    writer = PairWriter(postgres_url, examples_per_finding=1)
    await writer.write([make_record(pair=stream.format(number)) for number in (1, 2, 0x10)])
    await writer.close()
    await connection.execute("update abreast.envoy_stream set seen = seen - interval '1 minute'")
    async with abreast(service=SERVICE) as proxy:
        await collect_envoy_counts(connection, proxy.server.admin_url)

    result = await summary(database, None)
    assert (result.sampled, result.unaccounted) == (16, 13)


async def test_captures_after_the_last_reading_of_a_former_envoy_are_counted(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    """The Envoy comes back at another admin address."""
    writer = PairWriter(postgres_url, examples_per_finding=1)
    async with abreast(service=SERVICE) as proxy:
        await ask(proxy, 2)
        await collect_envoy_counts(connection, proxy.server.admin_url)
        await ask(proxy, 5)
        pairs = [request.pair for request in proxy.old.received if request.role == "live"]
    await writer.write([make_record(pair=pair) for pair in pairs])
    await writer.close()
    await connection.execute("update abreast.envoy_report set seen = seen - interval '1 minute'")
    async with abreast(service=SERVICE) as proxy:
        await collect_envoy_counts(connection, proxy.server.admin_url)

    result = await summary(database, None)
    assert (result.sampled, result.unaccounted) == (7, 0)


async def test_envoy_count_is_spread_over_a_long_interval(database: Database, connection: Connection) -> None:
    await store_snapshot(connection, 1000, HOUR)

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
    await store_snapshot(connection, 100, 5, before=HOUR)
    await store_snapshot(connection, 3, 5)
    await write_pairs(postgres_url, 1, 2)

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
    await store_snapshot(connection, 3, 5, before=HOUR)
    await write_pairs(postgres_url, HOUR - 60, HOUR, HOUR)

    result = await summary(database, 2 * HOUR, HOUR - 30)

    assert (result.pairs, result.sampled, result.unaccounted) == (2, 2, 0)


async def test_envoy_count_of_unknown_time_may_belong_to_any_window(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    """A ledger from before times were written down."""
    await store_snapshot(connection, 10, 5)
    await connection.execute("delete from abreast.envoy_count")
    await write_pairs(postgres_url, 1, 2)

    result = await summary(database, 60)

    assert (result.sampled, result.unaccounted) == (10, 8)


async def test_envoy_count_is_folded_with_its_dropped_day(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    await store_snapshot(connection, 7, 5, before=20 * DAY)
    await store_snapshot(connection, 2, 5)
    await write_pairs(postgres_url, 20 * DAY, 1)
    await drop_days(connection, retention_days=14)

    assert query_value(postgres_url, "select sum(sampled)::int from abreast.envoy_count where isfinite(at)") == 2
    assert await sampled(database, 30 * DAY) == 2
    assert await sampled(database, None) == 9


async def test_summary_window_without_envoy_has_no_count(database: Database) -> None:
    result = await summary(database, 60)

    assert (result.sampled, result.unaccounted) == (None, None)


async def test_envoy_counts_of_one_service_are_added(
    database: Database, connection: Connection, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as other:
        snapshot = {
            "service": SERVICE,
            "sampled": 5,
            "without_copy": 0,
            "unanswered": 0,
            "shed": 0,
            "not_sampled": 0,
            "not_query": 0,
            "seconds": 3.0,
        }
        other.execute(load_statement("envoy_count_add"), snapshot)
    await store_snapshot(connection, 4, 3.0)

    assert await sampled(database, 60) == 9
