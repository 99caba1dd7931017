from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import psycopg
import pytest
import redis
from msgspec import structs
from psycopg.types.json import Jsonb
from structlog.testing import capture_logs

from abreast.protocol.join import SERVICES_KEY, reports_key
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.jobs import reports
from abreast_sidecar.jobs.detectors import detect_slowdowns, detect_unanswered
from abreast_sidecar.jobs.reports import collect_envoy_counts, collect_reports
from abreast_sidecar.jobs.retention import conservative_now, drop_days, open_days, trim_examples
from abreast_sidecar.jobs.runner import JobRunner
from abreast_sidecar.redis_client import connect_redis
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import RedisServer
from abreast_sidecar.store.database import Connection, Database, execute
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import PairRecord, Window
from abreast_sidecar.store.writer import PairWriter
from support import eventually_async
from support_envoy import abreast
from support_pairs import SERVICE, difference, make_record, pair_of, query_value, ready, rows, run_worker, send
from support_upstream import Upstream, respond

pytestmark = pytest.mark.postgres

DAY = 86_400_000  # ms


@pytest.fixture
def url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
async def connection(url: str) -> AsyncIterator[Connection]:
    database = Database(url)
    await database.open()
    async with database.connection() as connection:
        yield connection
    await database.close()


async def test_shard_totals_continue_after_redis_lost_its_data(connection: Connection, url: str) -> None:
    for expected in (4, 8, 12):
        with RedisServer() as server:
            client = connect_redis(server.url)
            send(server.url, [*pair_of(), *pair_of()])
            await collect_reports(connection, client)
            await collect_reports(connection, client)
            await client.aclose()

        report = query_value(url, "select report from abreast.shard_report")
        assert (report["received"], report["joined"], report["ready"]) == (expected, expected // 2, 2)


async def test_process_reports_are_stored_and_deleted_when_stale(
    connection: Connection, redis_url: str, url: str
) -> None:
    with redis.Redis.from_url(redis_url) as sync:
        sync.hset(SERVICES_KEY, SERVICE, "1")
        reports = {"fresh": {"dropped": {"queue_bytes": 3}}, "stale": {"note": "a\0b"}}
        sync.hset(reports_key(SERVICE), mapping={name: orjson.dumps(report) for name, report in reports.items()})
        sync.hset(reports_key(SERVICE), "broken", b"{not json")
        client = connect_redis(redis_url)
        await collect_reports(connection, client)
        await connection.execute(
            "update abreast.process_report set seen = seen - interval '2 hours' where id = 'stale'"
        )
        await collect_reports(connection, client)
        await client.aclose()
        remaining = sync.hkeys(reports_key(SERVICE))

    stored = dict(rows(url, "select id, report from abreast.process_report"))
    assert stored["fresh"] == {"dropped": {"queue_bytes": 3}}
    assert set(stored) == {"fresh", "stale"}
    assert sorted(remaining) == [b"broken", b"fresh"]


async def test_reports_of_stopped_processes_are_folded(connection: Connection, url: str) -> None:
    database = Database(url)
    await database.open()
    for number in range(5):
        report = {"dropped": {"queue_bytes": 2, "odd": "x"}, "late_effects": 1}
        await connection.execute(
            "insert into abreast.process_report (id, service, seen, report) values (%s, %s, now() - %s * interval '1 day', %s)",
            (f"process {number}", SERVICE, number * 10, Jsonb(report)),
        )
        await connection.execute(
            "insert into abreast.envoy_report (node, service, seen, totals, last_reading)"
            " values (%s, %s, now() - %s * interval '1 day', %s, '{}')",
            (f"edge {number}", SERVICE, number * 10, Jsonb({"sampled": 7, "not_sent": 1, "unseen": 3})),
        )
        for stream in range(2):  # captures showed one of the three unseen requests in each
            await connection.execute(
                "insert into abreast.envoy_stream (service, stream, node, counted, highest, seen)"
                " values (%s, %s, %s, 2, 3, now() - %s * interval '1 day')",
                (SERVICE, f"{number}{stream}", f"edge {number}", 20 + number * 10),
            )
    totals = []
    for days in (36, 14, 14):
        await drop_days(connection, retention_days=days)
        (accounts,) = await LedgerReader(database).read_accounts(SERVICE)
        drops = {drop.reason: drop.count for drop in await LedgerReader(database).list_drops(SERVICE)}
        totals.append((drops, accounts.envoy_sampled, accounts.not_sent, accounts.uncertain))
    await database.close()

    assert totals == [({"queue_bytes": 10, "late_effects": 5}, 35, 5, 5)] * 3
    assert query_value(url, "select count(*) from abreast.process_report") == 3
    assert query_value(url, "select count(*) from abreast.envoy_report") == 3
    assert query_value(url, "select count(*) from abreast.envoy_stream") == 3


async def test_releases_without_pairs_are_folded(connection: Connection, url: str) -> None:
    now = int(time.time() * 1000)
    ledger = PairWriter(url, examples_per_finding=1)
    for age in (30, 29, 20, 1, 0):
        releases = ("old-1", f"new-{age}")
        await ledger.write(
            [make_record([difference()], noise=[difference()], at=now - age * DAY, releases=releases)] * 2
        )
        await ledger.write([make_record(at=now - age * DAY, releases=releases)])
    await ledger.close()
    findings = "select sum(count)::int, sum(baseline_count)::int from abreast.finding_release"
    endpoints = "select sum(compared)::int, sum(baseline_compared)::int from abreast.endpoint_release"
    before = rows(url, findings), rows(url, endpoints)
    await open_days(connection)
    for days in (25, 14):
        await drop_days(connection, retention_days=days)

        assert (rows(url, findings), rows(url, endpoints)) == before
    labels = "select label from abreast.finding_release join abreast.release on release.id = new_release order by 1"
    assert rows(url, labels) == [("new-0",), ("new-1",)]
    assert query_value(url, "select count(*) from abreast.finding_release") == 3
    assert query_value(url, "select count(*) from abreast.endpoint_release") == 3


async def test_drop_days_drops_old_days_with_their_data(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=3)
    now = int(time.time() * 1000)
    for age in (0, 3, 20):
        await ledger.write([make_record([difference()], at=now - age * DAY)])
    await ledger.close()
    await open_days(connection)
    dropped = await drop_days(connection, retention_days=14)

    assert dropped == 1
    assert query_value(url, "select count(*) from abreast.pair") == 2
    assert query_value(url, "select count(*) from abreast.finding_example") == 2
    assert query_value(url, "select count(*) from abreast.request_sample") == 4
    assert query_value(url, "select sum(pairs) from abreast.outcome_count") == 3
    assert query_value(url, "select count(*) from pg_inherits where inhparent = 'abreast.pair'::regclass") == 3


@pytest.mark.parametrize("apart", [dt.timedelta(days=400), -dt.timedelta(days=400)])
async def test_conservative_now_returns_the_earlier_clock(connection: Connection, apart: dt.timedelta) -> None:
    now = dt.datetime.now(dt.UTC)
    with capture_logs() as logs:
        result = await conservative_now(connection, now + apart)
        await conservative_now(connection)

    assert abs(result - min(now, now + apart)) < dt.timedelta(minutes=1)
    assert [entry["log_level"] for entry in logs] == ["warning"]


async def test_trim_examples_keeps_one_of_each_open_finding(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=3)
    for path in ("$.a", "$.b", "$.gone"):
        await ledger.write(
            [make_record([difference(path)], size=100 * (n + 1), blobs=(os.urandom(1000 * (n + 1)),)) for n in range(3)]
        )
    await ledger.close()
    with psycopg.connect(url) as admin:
        admin.execute("update abreast.finding set status = 'expected' where path = '$.gone'")

    assert await trim_examples(connection, max_bytes=100_000) == 0
    assert await trim_examples(connection, max_bytes=12_000) == 3  # three of 3,000 bytes
    sizes = "select octet_length(captures) / 1000 from abreast.example order by 1"
    assert [size for (size,) in rows(url, sizes)] == [1, 1, 1, 2, 2, 2]
    await asyncio.gather(*(trimmed(url, 0) for _ in range(2)))

    query = "select path, body_bytes from abreast.finding join abreast.finding_example on finding_id = id order by path"
    assert rows(url, query) == [("$.a", 2 * 102), ("$.b", 2 * 102)]


async def trimmed(url: str, most: int) -> None:
    database = Database(url)
    await database.open()
    async with database.connection() as connection:
        await trim_examples(connection, max_bytes=most)
    await database.close()


async def test_drop_days_by_size_never_drops_today(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=3)
    now = int(time.time() * 1000)
    for age in (0, 1, 2, 3):
        await ledger.write([make_record(at=now - age * DAY) for _ in range(50)])
    await ledger.close()
    await open_days(connection)
    sizes = "select pg_total_relation_size(inhrelid) from pg_inherits where inhparent = 'abreast.pair'::regclass"
    total = sum(size for (size,) in rows(url, sizes))
    dropped_days = [
        await drop_days(connection, retention_days=14, retention_bytes=limit) for limit in (total, total - 1)
    ]
    remaining_days = query_value(
        url, "select array_agg(distinct current_date - day order by current_date - day) from abreast.pair"
    )
    midnight = dt.datetime.now(dt.UTC).replace(hour=0, minute=0)
    pair_counts = [
        await drop_days(
            connection, retention_days=days, retention_bytes=1, now=midnight + dt.timedelta(minutes=minutes)
        )
        for days, minutes in ((0, 59), (14, 61))
    ]

    assert (dropped_days, remaining_days, pair_counts) == (
        [0, 1],
        [0, 1, 2],
        [1, 1],
    )  # the last minutes of yesterday may be on their way
    assert query_value(url, "select count(*) from abreast.pair") == 50
    assert query_value(url, "select sum(pairs) from abreast.outcome_count") == 200


async def test_detect_slowdowns_finds_only_slower_versions(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=3)
    await ledger.write(
        [timed(f"s{n}", "/slow", 20_000, 60_000 + n) for n in range(100)]
        + [timed(f"e{n}", "/equal", 20_000 + n % 7 * 100, 20_000 + n % 5 * 100) for n in range(100)]
    )
    await ledger.close()
    slowdowns = await detect_slowdowns(connection)
    await detect_slowdowns(connection)

    assert slowdowns == 1
    query = "select route, part, path, kind, count, detail from abreast.finding join abreast.endpoint on endpoint.id = endpoint_id"
    [(route, *key, count, detail)] = rows(url, query)
    assert (route, key, count) == ("/slow", ["latency", "", "slower"], 90)
    assert detail["old_p50_us"] == 20_000
    assert detail["ratio"] == pytest.approx(3.0, abs=0.01)


async def test_detect_slowdowns_separates_releases(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=3)
    await ledger.write([timed(f"s{n}", "/", 20_000, 60_000 + n, release="1") for n in range(100)])
    assert await detect_slowdowns(connection) == 1

    await ledger.write([timed(f"f{n}", "/", 20_000 + n, 20_000 + n, release="2") for n in range(100)])
    await ledger.close()
    assert await detect_slowdowns(connection) == 0


async def test_detect_slowdowns_compares_with_baseline_copies(connection: Connection, url: str) -> None:
    """Copies of cached requests are fast, and copies of other requests are as slow as before."""
    ledger = PairWriter(url, examples_per_finding=3)
    await ledger.write(
        [timed(f"c{n}", "/copies", 20_000, 60_000 + n, baseline_us=60_000 + n % 7) for n in range(100)]
        + [timed(f"f{n}", "/few", 20_000, 60_000 + n, baseline_us=60_000 if n >= 81 else None) for n in range(100)]
        + [timed(f"s{n}", "/slow", 20_000, 190_000 + n, baseline_us=60_000) for n in range(100)]
        + [
            timed(
                f"k{n}",
                "/kinds",
                40_000,
                1_000 + n if n % 3 else 40_000 + n,
                baseline_us=1_000 + n if n % 3 else 40_000 + n,
            )
            for n in range(300)
        ]
    )
    await ledger.close()

    assert await detect_slowdowns(connection) == 2
    query = "select route, detail->'ratio' from abreast.finding join abreast.endpoint on endpoint.id = endpoint_id order by 1"
    assert rows(url, query) == [("/few", pytest.approx(3, abs=0.01)), ("/slow", pytest.approx(3.17, abs=0.01))]


async def test_detect_slowdowns_waits_for_expected_copies(connection: Connection, url: str) -> None:
    await connection.execute(
        b"insert into abreast.traffic (service, new_share, sample_safe, sample_unsafe, baseline_share) "
        b"values ('shop', 0, 1000000, 0, 100000)"
    )
    ledger = PairWriter(url, examples_per_finding=3)
    await ledger.write(
        [timed(f"f{n}", "/few", 20_000, 60_000 + n, baseline_us=60_000 if n >= 90 else None) for n in range(100)]
        + [timed(f"e{n}", "/fast", 20_000, 20_000 + n, baseline_us=20_000) for n in range(100)]
    )
    assert await detect_slowdowns(connection) == 0
    assert (await count_timed(url))["GET /few"] == 0

    await ledger.write([timed(f"g{n}", "/few", 20_000, 200_000 + n, baseline_us=60_000) for n in range(100)])
    await ledger.close()
    assert await detect_slowdowns(connection) == 1
    assert (await count_timed(url))["GET /few"] > 0


async def test_detect_slowdowns_ignores_responses_without_a_release(connection: Connection, url: str) -> None:
    """Responses from outside of the middleware name no release, and are not the latest one."""
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([timed(f"s{n}", "/slow", 20_000, 60_000 + n) for n in range(100)])
    await ledger.write([timed(f"u{n}", "/slow", 20_000, 20_000 + n, release="") for n in range(5)])
    await ledger.close()

    assert await detect_slowdowns(connection) == 1


async def test_noise_job_reads_the_newest_release_with_a_label(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=1)
    for release in ("1", "2", ""):
        await ledger.write([make_record([difference()], releases=("old-1", release))])
    await ledger.close()

    cursor = await execute(connection, "noise_due", {"few": 10})

    assert [row["newest_label"] for row in await cursor.fetchall()] == ["2"]


async def count_timed(url: str) -> dict[str, int]:
    """Pairs whose times a verdict counts."""
    database = Database(url)
    await database.open()
    try:
        evidence = await LedgerReader(database).read_evidence("shop", Window(), 0.1, all_releases=True)
        return {endpoint.endpoint: endpoint.times.timed for endpoint in evidence.endpoints}
    finally:
        await database.close()


async def test_detect_unanswered_finds_endpoint_without_captures_of_new(connection: Connection, url: str) -> None:
    ledger = PairWriter(url, examples_per_finding=1)
    hanging = [make_record(route="/hangs", outcome="only_old") for _ in range(12)]
    lossy = [make_record(route="/lossy", outcome=outcome) for outcome in ("only_old", "only_new") for _ in range(12)]
    rare = [make_record(route="/rare", outcome="only_old" if n < 12 else "match") for n in range(400)]
    await ledger.write([*hanging, *lossy, *rare])
    await ledger.close()

    await count_copies(connection, unanswered=12)

    assert await detect_unanswered(connection) == 1
    assert await detect_unanswered(connection) == 1
    query = "select route, part, path, impact, state, count from abreast.finding join abreast.endpoint on endpoint.id = endpoint_id"
    assert rows(url, query) == [("/hangs", "error", "no capture", "breaking", "real", 12)]


async def count_copies(connection: Connection, **counts: int) -> None:
    """Add counts of Envoy."""
    parameters = {
        "service": SERVICE,
        "sampled": 0,
        "without_copy": 0,
        "unanswered": 0,
        "shed": 0,
        "not_sampled": 0,
        "not_query": 0,
        "seconds": 5.0,
    }
    await execute(connection, "envoy_count_add", parameters | counts)


@pytest.mark.parametrize(
    ("unanswered", "in_flight", "state"), [(12, 0, "real"), (9, 0, "undecided"), (30, 25, "undecided")]
)
async def test_detect_unanswered_is_real_only_by_envoys_count(
    connection: Connection, url: str, unanswered: int, in_flight: int, state: str
) -> None:
    """A copy that new answers later is no missing one, and one in flight may be answered yet."""
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([make_record(outcome="only_old") for _ in range(12)])
    await ledger.close()
    await count_copies(connection, sampled=12, unanswered=unanswered)
    await connection.execute(
        b"insert into abreast.envoy_report (node, service, seen, totals, last_reading) values ('edge', 'shop', now(), '{}', %s)",
        [Jsonb({"in_flight": in_flight})],
    )

    await detect_unanswered(connection)

    [(found, reason)] = rows(url, "select state, reason from abreast.finding")
    assert found == state
    assert ("late or lost" in reason) == (state == "undecided")


@pytest.mark.parametrize(("without_copy", "findings"), [(0, 1), (2, 1), (3, 0), (12, 0), (-5, 1)])
async def test_detect_unanswered_subtracts_copies_that_were_not_sent(
    connection: Connection, url: str, without_copy: int, findings: int
) -> None:
    """Two aborted pairs had no copy either."""
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write([make_record(outcome="only_old") for _ in range(12)])
    await ledger.write([make_record(outcome="aborted") for _ in range(2)])
    await ledger.close()
    await count_copies(connection, sampled=14, without_copy=without_copy + 2 * (without_copy > 0), unanswered=12)

    assert await detect_unanswered(connection) == findings


@pytest.mark.parametrize(
    ("method", "route", "source", "findings"),
    [
        ("GET", "/hangs", "", 1),
        ("POST", "/hangs", "", 1),
        ("POST", "/graphql query Search", "graphql", 1),
        ("POST", "/graphql", "path", 0),
    ],
)
async def test_detect_unanswered_subtracts_excluded_requests_only_where_a_rule_excludes(
    connection: Connection, url: str, method: str, route: str, source: str, findings: int
) -> None:
    """A service with mutations, which a rule of queries excludes, and an endpoint where new hangs."""
    ledger = PairWriter(url, examples_per_finding=1)
    records = [make_record(route="/graphql mutation AddToCart", outcome="only_old") for _ in range(30)]
    await ledger.write(records + [make_record(route=route, outcome="only_old") for _ in range(12)])
    await ledger.close()
    await connection.execute(
        b"update abreast.endpoint set method = 'POST', source = 'graphql' where route like '%mutation%'"
    )
    await connection.execute(
        b"update abreast.endpoint set method = %s, source = %s where route = %s", [method, source, route]
    )
    excluded = 30 if findings else 42
    await count_copies(connection, sampled=42, without_copy=excluded, not_query=excluded, unanswered=12)

    assert await detect_unanswered(connection) == findings


async def test_detect_unanswered_subtracts_excluded_requests_of_a_graphql_path_with_another_name(
    connection: Connection, url: str
) -> None:
    ledger = PairWriter(url, examples_per_finding=1)
    await ledger.write(
        [make_record(route="/api", outcome=outcome) for outcome in ("only_old", "match") for _ in range(12)]
    )
    await ledger.close()
    await connection.execute(b"update abreast.endpoint set method = 'POST', source = 'path'")
    await count_copies(connection, sampled=24, without_copy=12, not_query=12)

    assert await detect_unanswered(connection) == 0


def timed(
    pair: str, route: str, old_us: int, new_us: int, *, release: str = "new-1", baseline_us: int | None = None
) -> PairRecord:
    plain = make_record(pair=pair, route=route, releases=("old-1", release), baseline_compared=baseline_us is not None)
    result: ComparisonResult = plain.result
    assert result.old is not None
    assert result.new is not None
    old, new = structs.replace(result.old, total_us=old_us), structs.replace(result.new, total_us=new_us)
    changed_result = structs.replace(result, old=old, new=new)
    if baseline_us is not None:
        changed_result = structs.replace(
            changed_result, baseline=structs.replace(old, role="baseline", total_us=baseline_us)
        )
    return PairRecord(plain.service, plain.entry_id, plain.time_ms, plain.pair_id, changed_result, plain.blobs)


async def test_envoy_count_includes_failed_copies_once(connection: Connection, url: str) -> None:
    """Retried on old, left by its client, with a copy that nobody takes."""

    async def failing(_request: Any, writer: asyncio.StreamWriter) -> None:
        await respond(writer, b"bad", 503)

    async def slow(_request: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)
        await respond(writer, b"ok")

    async with abreast(new=Upstream(answer=failing), weight=1.0) as proxy:
        for _ in range(4):
            assert (await proxy.client.get("/retried")).status_code == 200
        await counts_to(connection, url, proxy.server.admin_url, 4)
    async with abreast(old=Upstream(answer=slow)) as proxy:
        for _ in range(3):
            with pytest.raises(httpx.TimeoutException):
                await proxy.client.get("/left", timeout=0.2)
        await counts_to(connection, url, proxy.server.admin_url, 4 + 3)
    async with abreast() as proxy:
        await proxy.new.stop()
        for _ in range(5):
            assert (await proxy.client.get("/no-copy")).status_code == 200
        await counts_to(connection, url, proxy.server.admin_url, 4 + 3 + 5)

    assert query_value(url, "select sum((totals->>'not_sent')::int) from abreast.envoy_report") == 5


async def counts_to(connection: Connection, url: str, address: str, expected: int) -> None:
    async def has_count() -> bool:
        await collect_envoy_counts(connection, address)
        return bool(query_value(url, "select sum((totals->>'sampled')::int) from abreast.envoy_report") == expected)

    await eventually_async(has_count, description=f"envoy's count is {expected}")


async def test_envoy_totals_continue_after_restart(connection: Connection, url: str) -> None:
    async with abreast() as proxy:
        for _ in range(5):
            await proxy.client.get("/x")
        await counts_to(connection, url, proxy.server.admin_url, 5)
        await asyncio.to_thread(proxy.server.stop)
        await asyncio.to_thread(proxy.server.start)
        await proxy.healthy("old")
        for _ in range(3):
            await proxy.client.get("/x")
        await counts_to(connection, url, proxy.server.admin_url, 8)
        await collect_envoy_counts(connection, proxy.server.admin_url)

    assert rows(url, "select (totals->>'sampled')::int from abreast.envoy_report") == [(8,)]


@pytest.mark.parametrize(
    "jump",
    [
        b"update abreast.envoy_report set seen = seen - interval '400 days'",
        b"update abreast.envoy_report set sidecar_seen = sidecar_seen - interval '400 days'",
    ],
)
async def test_envoy_totals_survive_clock_jump_before_sidecar_start(
    connection: Connection, url: str, monkeypatch: pytest.MonkeyPatch, jump: bytes
) -> None:
    async with abreast() as proxy:
        await proxy.client.get("/x")
        await counts_to(connection, url, proxy.server.admin_url, 1)
        await connection.execute(jump)
        monkeypatch.setattr(reports, "LAST_UPTIMES", {})
        await collect_envoy_counts(connection, proxy.server.admin_url)

    assert rows(url, "select (totals->>'sampled')::int from abreast.envoy_report") == [(1,)]


async def test_job_runners_in_parallel_count_nothing_twice(redis_url: str, url: str) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=url)
    async with keeping(settings), keeping(settings), run_worker(settings):
        for _ in range(20):
            send(redis_url, pair_of())
        await eventually_async(lambda: reported(url, 20), description="the report is written")

        assert await empty(redis_url)


@asynccontextmanager
async def keeping(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    async with Database(settings.postgres_url) as database:
        task = asyncio.create_task(JobRunner(settings, database).run(stop))
        try:
            yield task
        finally:
            stop.set()
            await task


async def reported(url: str, joined: int) -> bool:
    reports = rows(url, "select (report->>'joined')::int, (report->>'ready')::int from abreast.shard_report")
    return reports == [(joined, 0)]


async def empty(url: str) -> bool:
    return ready(url) == 0


async def test_job_runner_starts_and_stops_without_servers() -> None:
    settings = Settings(
        redis_url="redis://127.0.0.1:1", postgres_url="postgresql://127.0.0.1:1/x", envoy_admin=("127.0.0.1:1",)
    )
    async with keeping(settings) as housekeeping:
        await asyncio.sleep(0.5)
        assert not housekeeping.done()

    assert housekeeping.exception() is None
