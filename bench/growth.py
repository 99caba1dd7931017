"""Measure the cost of a large ledger: python bench/growth.py [--millions 1 10 100].

The ledger holds pairs of one service over DAYS days, with ENDPOINTS endpoints and FINDINGS findings. One pair in SHOWN
shows a finding. One statement inserts a million rows, without indexes and triggers, which are created again afterwards.

- `growth_write_us` is the wall time to write a further pair, in batches of 500.
- `growth_get_*` and `growth_list_*` are the times of queries for the last hour, the last day and the whole ledger.
  `growth_list_pairs_of_*` and `growth_find_slow_ms` are times of queries that match few pairs.
- `growth_wal_bytes` is the size of Postgres's log per pair, for the first 5,000 pairs after a checkpoint on a full day.
  It includes whole pages.
- `lists_*` are times of a sidecar's responses for the ledger of tests/support_large_ledger.py, which has 10,002 findings
  at 1,000 endpoints. `lists_page_ms` is the overview page.

100 million rows take 28 GB and 40 minutes. They are not part of `make bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from pipeline import SERVICE, pairs
from rows import Row, row

from abreast.protocol.join import Keys
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.jobs.detectors import detect_slowdowns
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, PairRecord, Window
from abreast_sidecar.store.writer import PairWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support_large_ledger import fill as fill_large_ledger
from support_serve import Ledger, QuerySidecar, run_sidecar

DAYS = 10
ENDPOINTS, FINDINGS = 20, 50
SHOWN = 100  # one pair in so many shows a finding
MILLION = 1_000_000
DAY = 86_400  # seconds
FILLED, QUICK = 1.0, 0.1  # default size, in millions of pairs
BATCH, BATCHES = 500, 20
ASKED = 5  # runs of each query

FILL = b"""
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, request, old_status, new_status, old_us, new_us,
                          old_release, new_release, findings, waits_match)
select (at at time zone 'UTC')::date, id, at, 1 + n %% %(endpoints)s, case when shown then 'mismatch' else 'match' end,
       'old', '/products/' || n %% 1000, 200, 200, 2000 + n %% 700, 2100 + n %% 900, 'v1', 'v2',
       case when shown then array[1 + n / %(each)s %% %(findings)s] else '{}' end, true
from (
    select n, n %% %(each)s = 0 as shown, -- ids as those of Envoy, which grow
           '0d7c1e' || lpad(to_hex(n / 16777216), 2, '0') || '-0' || substr(hex, 1, 3) || '-8' || substr(hex, 4) || '-8000-'
               || substr(md5(n::text), 1, 12) as id,
           %(end)s::timestamptz - (1 - %(place)s - random() * %(part)s) * %(days)s * interval '1 day' as at
    from generate_series(%(first)s::bigint, %(first)s::bigint + %(many)s - 1) as n,
         lateral (select lpad(to_hex(n %% 16777216), 6, '0') as hex) as number
) as made
"""
NAMES = b"""
with made as (
    insert into abreast.endpoint (service, method, route)
    select %(service)s, 'GET', '/route/' || n from generate_series(1, %(endpoints)s) as n returning id
)
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, state, first_seen, last_seen)
select 1 + n %% %(endpoints)s, 'body', '$.field' || n, 'changed', 'value', 1, 'real', now(), now()
from generate_series(1, %(findings)s) as n
where (select count(*) from made) > 0
"""
INDEXES = b"""
select c.relname, pg_get_indexdef(i.indexrelid)
from pg_index i join pg_class c on c.oid = i.indexrelid
where i.indrelid = 'abreast.pair'::regclass and not i.indisprimary
"""
CONSTRAINTS = b"""
select conname, pg_get_constraintdef(oid) from pg_constraint where conrelid = 'abreast.pair'::regclass and contype = 'p'
"""
SUMS = b"do $$ begin execute abreast.hourly_count_statement('select 1 as sign, * from abreast.pair'); end $$"
LOADING = (
    "max_wal_size=4GB",
    "maintenance_work_mem=1GB",
    "shared_buffers=512MB",
    "autovacuum=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "full_page_writes=on",
)
WRITTEN = b"select pg_current_wal_insert_lsn() - '0/0'"
SIZE = b"select sum(pg_total_relation_size(relid)) from pg_partition_tree('abreast.pair')"
RARE = "/rare"  # the route of an endpoint with a single pair, on the first day
RARE_PAIR = b"""
with made as (
    insert into abreast.endpoint (service, method, route) values (%(service)s, 'GET', %(route)s) returning id
)
insert into abreast.pair (day, id, at, endpoint_id, outcome)
select (at at time zone 'UTC')::date, 'rare', at, id, 'match'
from made cross join (select now() - (%(days)s - 1) * interval '1 day' as at) as first
"""
OPEN = b"select abreast.open_day((now() at time zone 'UTC')::date - n) from generate_series(-1, %s + 1) as n"


def names(connection: psycopg.Connection) -> None:
    connection.execute("alter table abreast.finding drop constraint finding_endpoint_id_fkey")
    connection.execute(NAMES, {"service": SERVICE, "endpoints": ENDPOINTS, "findings": FINDINGS})
    connection.execute(OPEN, [DAYS])
    connection.execute(RARE_PAIR, {"service": SERVICE, "route": RARE, "days": DAYS})


def fill(connection: psycopg.Connection, first: int, over: int) -> None:
    """Insert the pairs from number `first` to `over`, exclusive, in the order of time."""
    end = datetime.now(UTC)
    with without_indexes(connection):
        for number in range(first, over, MILLION):
            many = min(MILLION, over - number)
            values = {
                "first": number,
                "many": many,
                "end": end,
                "place": (number - first) / (over - first),
                "part": many / (over - first),
                "days": DAYS,
                "each": SHOWN,
                "endpoints": ENDPOINTS,
                "findings": FINDINGS,
            }
            connection.execute(FILL, values)
            print(f"{number + many:,} rows", file=sys.stderr, flush=True)
    connection.execute("vacuum (analyze) abreast.pair")
    connection.execute("vacuum (analyze) abreast.hourly_count")


@contextlib.contextmanager
def without_indexes(connection: psycopg.Connection) -> Iterator[None]:
    """Drop indexes, constraints and triggers, and create them again at the end."""
    indexes = connection.execute(INDEXES).fetchall()
    constraints = connection.execute(CONSTRAINTS).fetchall()
    connection.execute("alter table abreast.pair disable trigger user")
    for name, _ in constraints:
        connection.execute(f"alter table abreast.pair drop constraint {name}")
    for name, _ in indexes:
        connection.execute(f"drop index abreast.{name}")
    yield
    for _, definition in indexes:
        connection.execute(definition.replace(" ON ONLY ", " ON "))
    for name, definition in constraints:
        connection.execute(f"alter table abreast.pair add constraint {name} {definition}")
    connection.execute("truncate abreast.hourly_count")
    connection.execute(SUMS)
    connection.execute("alter table abreast.pair enable trigger user")


def batches(at: float) -> Iterator[list[PairRecord]]:
    """Yield batches of pairs received at `at`, in seconds since the epoch."""
    rules = CompareOptions.with_ignored_headers(())
    captures = pairs(BATCH * BATCHES, 1 / SHOWN)
    for number in range(BATCHES):
        batch = []
        for position in range(BATCH):
            (pair, _, _, old), (_, _, _, new) = next(captures), next(captures)
            entry = StreamEntry(
                Keys(SERVICE, 0), f"{round(at * 1000)}-{number * BATCH + position}", pair, "joined", (old, new), 0
            )
            batch.append(evaluate_entry(entry, rules))
        yield batch


async def write(url: str, at: float, many: int = BATCHES) -> list[float]:
    """Return the wall time per pair in µs, one value per batch."""
    ledger = PairWriter(url, examples_per_finding=3)
    times_us = []
    for batch in itertools.islice(batches(at), many):
        began = time.perf_counter()
        await ledger.write(batch)
        times_us.append((time.perf_counter() - began) / BATCH * 1e6)
    await ledger.close()
    return times_us[1:]  # the first one connects, and loads the ids of findings


async def ask(url: str) -> dict[str, list[float]]:
    """Return the time of each query in ms."""
    database = Database(url)
    await database.open()
    queries, now = LedgerReader(database), datetime.now(UTC)
    windows = {
        "hour": Window(now - timedelta(hours=1), None),
        "day": Window(now - timedelta(days=1), None),
        "all": Window(),
    }
    times_ms: dict[str, list[float]] = {}
    try:
        for name, window in windows.items():

            async def summary(window: Window = window) -> object:
                return await queries.read_summary(SERVICE, window)

            async def findings(window: Window = window) -> object:
                return await queries.list_findings(FindingFilter(service=SERVICE, window=window), PageRequest(100, ""))

            async def endpoints(window: Window = window) -> object:
                return await queries.list_endpoints(SERVICE, window, PageRequest(100, ""))

            async def verdict(window: Window = window) -> object:
                return await queries.read_evidence(SERVICE, window, 0.1, all_releases=True)

            times_ms[f"get_summary_{name}_ms"] = await timed(summary)
            times_ms[f"list_findings_{name}_ms"] = await timed(findings)
            times_ms[f"list_endpoints_{name}_ms"] = await timed(endpoints)
            times_ms[f"get_verdict_{name}_ms"] = await timed(verdict)
        times_ms |= await ask_for_few(database)
    finally:
        await database.close()
    return times_ms


async def ask_for_few(database: Database) -> dict[str, list[float]]:
    """Return the time of each query that matches few pairs, in ms."""
    queries = LedgerReader(database)

    async def pairs_of_a_finding() -> object:
        return await queries.list_pairs(PairFilter(service=SERVICE, finding_id=FINDINGS), PageRequest(100, ""))

    async def pairs_of_a_rare_endpoint() -> object:
        page = await queries.list_pairs(PairFilter(service=SERVICE, route=RARE), PageRequest(100, ""))
        assert len(page.rows) == 1
        return page

    async def times() -> object:
        return await read_timings(database, Endpoint(SERVICE, "GET", "/route/1"), Window())

    async def slow_endpoints() -> object:
        async with database.connection() as connection:
            return await detect_slowdowns(connection)

    return {
        "list_pairs_of_finding_ms": await timed(pairs_of_a_finding),
        "list_pairs_of_rare_endpoint_ms": await timed(pairs_of_a_rare_endpoint),
        "get_latency_ms": await timed(times),
        "find_slow_ms": await timed(slow_endpoints),
    }


async def timed(query: Callable[[], Awaitable[object]]) -> list[float]:
    times_ms = []
    for _ in range(ASKED):
        began = time.perf_counter()
        await query()
        times_ms.append((time.perf_counter() - began) * 1000)
    return times_ms


def rows(millions: Sequence[float] = (), *, quick: bool = False) -> list[Row]:
    """Return the rows for each size. With `millions`, the size is part of the names, otherwise `growth_rows` has it."""
    results: list[Row] = []
    with PostgresServer(options=LOADING) as server, psycopg.connect(server.url(), autocommit=True) as connection:
        asyncio.run(migrate(server.url()))
        names(connection)
        filled = 0
        for size in millions or (QUICK if quick else FILLED,):
            fill(connection, filled, round(size * MILLION))
            filled = round(size * MILLION)
            label = f"growth_{size:g}m" if millions else "growth"
            results.append(row(f"{label}_rows", "pairs", [filled]))
            results += measure(server.url(), label, filled)
    return results + lists()


def lists() -> list[Row]:
    """Return the times of responses about many findings and endpoints."""
    with PostgresServer() as server, RedisServer() as redis:
        asyncio.run(migrate(server.url()))
        fill_large_ledger(Ledger(server.url()))
        return [row(f"lists_{name}_ms", "ms", times) for name, times in asyncio.run(call(redis, server)).items()]


async def call(redis: RedisServer, server: PostgresServer) -> dict[str, list[float]]:
    """Return the time of each call of a sidecar in ms."""
    async with run_sidecar(redis.url, server.url(), kind=QuerySidecar) as running:
        comparison, largest = running.comparison, 1000
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "verdict": lambda: comparison.GetVerdict(pb.GetVerdictRequest(service="shop")),
            "summary": lambda: comparison.GetSummary(pb.GetSummaryRequest(service="shop")),
            "causes": lambda: comparison.ListCauses(pb.ListCausesRequest(service="shop")),
            "findings": lambda: comparison.ListFindings(pb.ListFindingsRequest(service="shop", page_size=largest)),
            "endpoints": lambda: comparison.ListEndpoints(pb.ListEndpointsRequest(service="shop", page_size=largest)),
            "pairs": lambda: comparison.ListPairs(pb.ListPairsRequest(service="shop", page_size=largest)),
            "page": lambda: running.http.get("/", timeout=60.0),
        }
        return {name: await timed(function) for name, function in calls.items()}


def logged(url: str) -> float:
    """Return the bytes of Postgres's log per pair on a full day, just after a checkpoint.

    Postgres then logs each page whole when it changes for the first time.
    """
    yesterday = time.time() // DAY * DAY - 1
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(b"checkpoint")
        before = connection.execute(WRITTEN).fetchone() or (0,)
        asyncio.run(write(url, yesterday, BATCHES // 2))
        after = connection.execute(WRITTEN).fetchone() or (0,)
    return float(after[0] - before[0]) / BATCH / (BATCHES // 2)


def measure(url: str, label: str, filled: int) -> Iterator[Row]:
    yield row(f"{label}_write_us", "us", asyncio.run(write(url, time.time())))
    yield row(f"{label}_wal_bytes", "B", [logged(url)])
    for name, times_ms in asyncio.run(ask(url)).items():
        yield row(f"{label}_{name}", "ms", times_ms)
    with psycopg.connect(url) as connection:
        (size,) = connection.execute(SIZE).fetchone() or (0,)
    yield row(f"{label}_pair_bytes", "B", [float(size) / filled])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[])
    for result in rows(parser.parse_args().millions):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
