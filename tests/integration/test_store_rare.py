"""Queries of one endpoint read few rows, however many pairs other endpoints have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from abreast_sidecar.jobs.detectors import detect_misses, detect_slowdowns, detect_unanswered
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader, PageRequest, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, Window
from support import eventually
from support_database import LedgerDatabase

pytestmark = [pytest.mark.postgres, pytest.mark.xdist_group("store_rare")]  # one worker fills the ledger

MANY = 60_000
RARE = 30
AGE = timedelta(minutes=2)  # of the oldest pair
FEW = 20_000  # rows: what reading the newest of both endpoints may take, several times over
ENDPOINTS = (
    "insert into abreast.endpoint (service, method, route) values ('shop', 'GET', '/often'), ('shop', 'GET', '/rare')"
)
FINDING = """
insert into abreast.finding (endpoint_id, part, path, kind, impact, count, state, first_seen, last_seen)
select id, 'body', '$.price', 'changed', 'value', 5, 'real', now(), now() from abreast.endpoint where route = '/rare'
"""
PAIRS = """
insert into abreast.pair (
    day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us, new_release, findings, waits_match
)
select (at at time zone 'UTC')::date, route || n, at, (select id from abreast.endpoint e where e.route = made.route), 'match',
       'old', 200, 200, 2000, 2100, case when route = '/often' and n > %(many)s - 100 then 'v1' else 'v2' end,
       case when route = '/rare' and n <= 5 then array(select id from abreast.finding) else '{}' end, true
from (
    select '/often' as route, n, %(now)s - n * interval '1 ms' as at from generate_series(1, %(many)s) as n
    union all
    select '/rare', n, %(now)s - interval '1 minute' - n * interval '1 second' from generate_series(1, %(rare)s) as n
) as made
order by at
"""
READ = """
select coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::bigint
from pg_stat_user_tables where relname like 'pair\\_2%'
"""
SESSIONS = "select pid from pg_stat_activity where datname = current_database()"


@pytest.fixture(scope="module")
def filled_url(module_database: LedgerDatabase) -> str:
    """Return the URL of a ledger that all tests of this module only read. All pairs are of one day, in one partition."""
    now = datetime.now(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    now = now if now - midnight > AGE else midnight - timedelta(seconds=1)
    with psycopg.connect(module_database.url, autocommit=True) as connection:
        connection.execute(ENDPOINTS)
        connection.execute(FINDING)
        connection.execute("select abreast.open_day(%s)", [now.date()])
        connection.execute("insert into abreast.release (service, version, label) values ('shop', 'new', 'v1')")
        connection.execute(PAIRS, {"now": now, "many": MANY, "rare": RARE})
        connection.execute("vacuum analyze abreast.pair")
    return module_database.url


@pytest.fixture
def count_read_rows(filled_url: str) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many rows of pairs were read so far."""
    with psycopg.connect(filled_url, autocommit=True) as connection:
        connection.execute("select pg_stat_force_next_flush()")
        (before,) = connection.execute(READ).fetchone() or (0,)
        sessions = set(connection.execute(SESSIONS).fetchall())

        def since() -> int:
            eventually(
                lambda: set(connection.execute(SESSIONS).fetchall()) <= sessions,
                description="the sessions of the query have ended",
            )
            (rows_read,) = connection.execute(READ).fetchone() or (0,)
            return int(rows_read - before)

        yield since


async def latency(database: Database) -> None:
    await read_timings(database, Endpoint("shop", "GET", "/rare"), Window())


async def pairs_of_an_endpoint(database: Database) -> None:
    page = await LedgerReader(database).list_pairs(
        PairFilter(service="shop", method="GET", route="/rare"), PageRequest(100)
    )
    assert len(page.rows) == RARE


async def pairs_of_a_finding(database: Database) -> None:
    page = await LedgerReader(database).list_pairs(PairFilter(service="shop", finding_id=1), PageRequest(100))
    assert len(page.rows) == 5


async def separating(database: Database) -> None:
    queries = LedgerReader(database)
    finding, _ = await queries.get_finding(1)
    await queries.find_common_feature(finding)


async def endpoints(database: Database) -> None:
    page = await LedgerReader(database).list_endpoints("shop", Window(), PageRequest(100))
    assert len(page.rows) == 2


async def a_verdict(database: Database) -> None:
    evidence = await LedgerReader(database).read_evidence("shop", Window(), 0.1, all_releases=True)
    assert {endpoint.times.timed for endpoint in evidence.endpoints} == {25, 5000}


async def a_verdict_of_a_release(database: Database) -> None:
    evidence = await LedgerReader(database).read_evidence("shop", Window(), 0.1, release="v1")
    assert [endpoint.times.timed for endpoint in evidence.endpoints] == [90]


async def slow_endpoints(database: Database) -> None:
    async with database.connection() as connection:
        await detect_slowdowns(connection)


async def cache_misses(database: Database) -> None:
    async with database.connection() as connection:
        await detect_misses(connection)


async def what_is_missing(database: Database) -> None:
    async with database.connection() as connection:
        await detect_unanswered(connection)


async def the_newest_pair(database: Database) -> None:
    assert await database.fetch_one("pair_newest_age", {"service": "shop", "sidecar_time": datetime.now(UTC)})


@pytest.mark.parametrize(
    "ask",
    [
        latency,
        pairs_of_an_endpoint,
        pairs_of_a_finding,
        separating,
        endpoints,
        a_verdict,
        a_verdict_of_a_release,
        slow_endpoints,
        cache_misses,
        what_is_missing,
        the_newest_pair,
    ],
)
async def test_queries_of_rare_endpoint_read_few_rows(
    filled_url: str, count_read_rows: Callable[[], int], ask: Callable[[Database], Awaitable[None]]
) -> None:
    database = Database(filled_url)
    await database.open()
    try:
        await ask(database)
    finally:
        await database.close()

    assert count_read_rows() < FEW
