"""What a large ledger costs: python bench/growth.py [--millions 1 10 100].

Fills `pair` by one statement a million rows, over DAYS days, as a service of ENDPOINTS endpoints with FINDINGS findings
that a hundredth of the pairs show; then measures what a further pair costs (batches of 500, in CPU time of the server
and by the clock) and how long it takes to list findings and to sum up, for the last hour, the last day and all that is
kept. 100 million rows take about 45 GB and the better part of an hour to make: they are not part of `make bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import psycopg
from pipeline import SERVICE, pairs
from rows import Row, row

from abreast.join import Keys
from abreast_sidecar.compare import Rules
from abreast_sidecar.embedded import PostgresServer
from abreast_sidecar.judging import judged
from abreast_sidecar.read import Entry
from abreast_sidecar.store import Judged, Ledger, migrate
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.pages import Page
from abreast_sidecar.store.queries import FindingFilter, Queries
from abreast_sidecar.store.results import Window

DAYS = 10
ENDPOINTS, FINDINGS = 20, 50
SHOWN = 100  # every so many-th pair shows a finding
MILLION = 1_000_000
QUICK = (0.1,)  # millions
BATCH, BATCHES = 500, 20
ASKED = 3  # times

FILL = b"""
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, request, old_status, new_status, old_us, new_us,
                          old_release, new_release, findings)
select (at at time zone 'UTC')::date, id, at, 1 + n %% %(endpoints)s, case when shown then 'mismatch' else 'match' end,
       'old', '/products/' || n %% 1000, 200, 200, 2000 + n %% 700, 2100 + n %% 900, 'v1', 'v2',
       case when shown then array[1 + n / %(each)s %% %(findings)s] else '{}' end
from (
    select n, gen_random_uuid()::text as id, n %% %(each)s = 0 as shown,
           %(end)s::timestamptz - (random() * %(days)s * interval '1 day') as at
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
OPEN = b"select abreast.open_day((now() at time zone 'UTC')::date - n) from generate_series(-1, %s + 1) as n"


def names(connection: psycopg.Connection) -> None:
    connection.execute("alter table abreast.finding drop constraint finding_endpoint_id_fkey")
    given = {"service": SERVICE, "endpoints": ENDPOINTS, "findings": FINDINGS}
    connection.execute(NAMES, given)
    connection.execute(OPEN, [DAYS])


def fill(connection: psycopg.Connection, first: int, over: int) -> None:
    """Pairs number `first` up to `over`."""
    end = datetime.now(UTC)
    for number in range(first, over, MILLION):
        given = {
            "first": number,
            "many": min(MILLION, over - number),
            "end": end,
            "days": DAYS,
            "each": SHOWN,
            "endpoints": ENDPOINTS,
            "findings": FINDINGS,
        }
        connection.execute(FILL, given)
    connection.execute("vacuum (analyze) abreast.pair")
    connection.execute("vacuum (analyze) abreast.hour")


def batches() -> Iterator[list[Judged]]:
    rules = Rules.ignoring(())
    at = int(time.time() * 1000)
    made = pairs(BATCH * BATCHES, 1 / SHOWN)
    for number in range(BATCHES):
        batch = []
        for one in range(BATCH):
            (pair, _, _, old), (_, _, _, new) = next(made), next(made)
            entry = Entry(Keys(SERVICE, 0), f"{at}-{number * BATCH + one}", pair, "joined", (old, new), 0)
            batch.append(judged(entry, rules))
        yield batch


async def write(url: str) -> list[float]:
    """µs a pair by the clock, of each batch."""
    ledger = Ledger(url, examples_per_finding=3)
    took = []
    for batch in batches():
        began = time.perf_counter()
        await ledger.write(batch)
        took.append((time.perf_counter() - began) / BATCH * 1e6)
    await ledger.close()
    return took[1:]  # the first connects, and learns the findings


async def ask(url: str) -> dict[str, list[float]]:
    """ms of each question."""
    database = Database(url)
    await database.open()
    queries, now = Queries(database), datetime.now(UTC)
    windows = {
        "hour": Window(now - timedelta(hours=1), None),
        "day": Window(now - timedelta(days=1), None),
        "all": Window(),
    }
    found: dict[str, list[float]] = {}
    try:
        for name, window in windows.items():

            async def summary(window: Window = window) -> object:
                return await queries.summary(SERVICE, window)

            async def findings(window: Window = window) -> object:
                return await queries.findings(FindingFilter(service=SERVICE, window=window), Page(100, ""))

            found[f"get_summary_{name}_ms"] = await timed(summary)
            found[f"list_findings_{name}_ms"] = await timed(findings)
    finally:
        await database.close()
    return found


async def timed(question: Callable[[], Awaitable[object]]) -> list[float]:
    took = []
    for _ in range(ASKED):
        began = time.perf_counter()
        await question()
        took.append((time.perf_counter() - began) * 1000)
    return took


def rows(millions: Sequence[float] = (1,), *, quick: bool = False) -> list[Row]:
    found: list[Row] = []
    with PostgresServer() as server, psycopg.connect(server.url(), autocommit=True) as connection:
        asyncio.run(migrate(server.url()))
        names(connection)
        filled = 0
        for wanted in QUICK if quick else millions:
            fill(connection, filled, round(wanted * MILLION))
            filled = round(wanted * MILLION)
            found.append(row(f"growth_{wanted:g}m_write_us", "us", asyncio.run(write(server.url()))))
            found += [
                row(f"growth_{wanted:g}m_{name}", "ms", took)
                for name, took in asyncio.run(ask(server.url())).items()
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="+", default=[1])
    for each in rows(parser.parse_args().millions):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
