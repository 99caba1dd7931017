"""What a large ledger costs: python bench/growth.py [--millions 1 10 100].

Fills `pair` by one statement a million rows, over DAYS days, as a service of ENDPOINTS endpoints with FINDINGS findings
that a hundredth of the pairs show; then measures what a further pair costs (batches of 500, by the clock) and how long it
takes to sum up, to list findings and endpoints, and to judge, for the last hour, the last day and all that is kept;
and to find what few pairs have: a finding's pairs, those of a rare endpoint, times, slow endpoints.
`growth_wal_bytes` is what Postgres's log gets for each of the first 5,000 pairs after a checkpoint, of a day that is full, whole
pages included. Rows are put into tables without indexes and triggers, which are made again afterwards. 100 million rows take 28 GB
and 40 minutes: they are not part of `make bench`.
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

import psycopg
from pipeline import SERVICE, pairs
from rows import Row, row

from abreast.protocol.join import Keys
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.ingest.evaluate import evaluate_entry
from abreast_sidecar.ingest.stream import StreamEntry
from abreast_sidecar.jobs.detectors import detect_slowdowns
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PageRequest, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, PairRecord, Window
from abreast_sidecar.store.writer import PairWriter

DAYS = 10
ENDPOINTS, FINDINGS = 20, 50
SHOWN = 100  # every so many-th pair shows a finding
MILLION = 1_000_000
DAY = 86_400  # seconds
FILLED, QUICK = 1.0, 0.1  # millions, unless said
BATCH, BATCHES = 500, 20
ASKED = 5  # times

FILL = b"""
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, request, old_status, new_status, old_us, new_us,
                          old_release, new_release, findings)
select (at at time zone 'UTC')::date, id, at, 1 + n %% %(endpoints)s, case when shown then 'mismatch' else 'match' end,
       'old', '/products/' || n %% 1000, 200, 200, 2000 + n %% 700, 2100 + n %% 900, 'v1', 'v2',
       case when shown then array[1 + n / %(each)s %% %(findings)s] else '{}' end
from (
    select n, gen_random_uuid()::text as id, n %% %(each)s = 0 as shown,
           %(end)s::timestamptz - (1 - %(place)s - random() * %(part)s) * %(days)s * interval '1 day' as at
    from generate_series(%(first)s::bigint, %(first)s::bigint + %(many)s - 1) as n
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
    given = {"service": SERVICE, "endpoints": ENDPOINTS, "findings": FINDINGS}
    connection.execute(NAMES, given)
    connection.execute(OPEN, [DAYS])
    connection.execute(RARE_PAIR, {"service": SERVICE, "route": RARE, "days": DAYS})


def fill(connection: psycopg.Connection, first: int, over: int) -> None:
    """Pairs number `first` up to `over`, in the order of time, as they come."""
    end = datetime.now(UTC)
    with bare(connection):
        for number in range(first, over, MILLION):
            many = min(MILLION, over - number)
            given = {
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
            connection.execute(FILL, given)
            print(f"{number + many:,} rows", file=sys.stderr, flush=True)
    connection.execute("vacuum (analyze) abreast.pair")
    connection.execute("vacuum (analyze) abreast.hourly_count")


@contextlib.contextmanager
def bare(connection: psycopg.Connection) -> Iterator[None]:
    """Without what is kept up with every row; it is made anew at the end."""
    indexes = connection.execute(INDEXES).fetchall()
    constraints = connection.execute(CONSTRAINTS).fetchall()
    connection.execute("alter table abreast.pair disable trigger user")
    for name, _ in constraints:
        connection.execute(f"alter table abreast.pair drop constraint {name}")
    for name, _ in indexes:
        connection.execute(f"drop index abreast.{name}")
    yield
    for _, made in indexes:
        connection.execute(made.replace(" ON ONLY ", " ON "))
    for name, made in constraints:
        connection.execute(f"alter table abreast.pair add constraint {name} {made}")
    connection.execute("truncate abreast.hourly_count")
    connection.execute(SUMS)
    connection.execute("alter table abreast.pair enable trigger user")


def batches(at: float) -> Iterator[list[PairRecord]]:
    """Pairs of that moment."""
    rules = CompareOptions.with_ignored_headers(())
    made = pairs(BATCH * BATCHES, 1 / SHOWN)
    for number in range(BATCHES):
        batch = []
        for one in range(BATCH):
            (pair, _, _, old), (_, _, _, new) = next(made), next(made)
            entry = StreamEntry(
                Keys(SERVICE, 0), f"{round(at * 1000)}-{number * BATCH + one}", pair, "joined", (old, new), 0
            )
            batch.append(evaluate_entry(entry, rules))
        yield batch


async def write(url: str, at: float, many: int = BATCHES) -> list[float]:
    """µs a pair by the clock, of each batch."""
    ledger = PairWriter(url, examples_per_finding=3)
    took = []
    for batch in itertools.islice(batches(at), many):
        began = time.perf_counter()
        await ledger.write(batch)
        took.append((time.perf_counter() - began) / BATCH * 1e6)
    await ledger.close()
    return took[1:]  # the first connects, and learns the findings


async def ask(url: str) -> dict[str, list[float]]:
    """ms of each question."""
    database = Database(url)
    await database.open()
    queries, now = LedgerReader(database), datetime.now(UTC)
    windows = {
        "hour": Window(now - timedelta(hours=1), None),
        "day": Window(now - timedelta(days=1), None),
        "all": Window(),
    }
    found: dict[str, list[float]] = {}
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

            found[f"get_summary_{name}_ms"] = await timed(summary)
            found[f"list_findings_{name}_ms"] = await timed(findings)
            found[f"list_endpoints_{name}_ms"] = await timed(endpoints)
            found[f"get_verdict_{name}_ms"] = await timed(verdict)
        found |= await ask_for_few(database)
    finally:
        await database.close()
    return found


async def ask_for_few(database: Database) -> dict[str, list[float]]:
    """ms of each question about what few pairs have."""
    queries = LedgerReader(database)

    async def pairs_of_a_finding() -> object:
        return await queries.list_pairs(PairFilter(service=SERVICE, finding_id=FINDINGS), PageRequest(100, ""))

    async def pairs_of_a_rare_endpoint() -> object:
        found = await queries.list_pairs(PairFilter(service=SERVICE, route=RARE), PageRequest(100, ""))
        assert len(found.rows) == 1
        return found

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


async def timed(question: Callable[[], Awaitable[object]]) -> list[float]:
    took = []
    for _ in range(ASKED):
        began = time.perf_counter()
        await question()
        took.append((time.perf_counter() - began) * 1000)
    return took


def rows(millions: Sequence[float] = (), *, quick: bool = False) -> list[Row]:
    """`growth_rows` says of how many pairs the others are; where sizes are given, the names do."""
    found: list[Row] = []
    with PostgresServer(options=LOADING) as server, psycopg.connect(server.url(), autocommit=True) as connection:
        asyncio.run(migrate(server.url()))
        names(connection)
        filled = 0
        for wanted in millions or (QUICK if quick else FILLED,):
            fill(connection, filled, round(wanted * MILLION))
            filled = round(wanted * MILLION)
            label = f"growth_{wanted:g}m" if millions else "growth"
            found.append(row(f"{label}_rows", "pairs", [filled]))
            found += measured(server.url(), label, filled)
    return found


def logged(url: str) -> float:
    """Bytes of the log for a pair of a day that is full, just after a checkpoint: each page is written whole when it is changed
    for the first time.
    """
    yesterday = time.time() // DAY * DAY - 1
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(b"checkpoint")
        before = connection.execute(WRITTEN).fetchone() or (0,)
        asyncio.run(write(url, yesterday, BATCHES // 2))
        after = connection.execute(WRITTEN).fetchone() or (0,)
    return float(after[0] - before[0]) / BATCH / (BATCHES // 2)


def measured(url: str, label: str, filled: int) -> Iterator[Row]:
    yield row(f"{label}_write_us", "us", asyncio.run(write(url, time.time())))
    yield row(f"{label}_wal_bytes", "B", [logged(url)])
    for name, took in asyncio.run(ask(url)).items():
        yield row(f"{label}_{name}", "ms", took)
    with psycopg.connect(url) as connection:
        (size,) = connection.execute(SIZE).fetchone() or (0,)
    yield row(f"{label}_pair_bytes", "B", [float(size) / filled])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[])
    for each in rows(parser.parse_args().millions):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
