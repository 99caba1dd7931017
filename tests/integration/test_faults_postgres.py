"""Whatever Postgres does under load: every pair has one row in the end, and none counts twice."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from support import eventually_async
from support_load import Load, complete, empty, loading, stopped
from support_pairs import pair_of, query_value, rows, run_worker, send

pytestmark = pytest.mark.postgres

PAIRS = 300
AWAY = 10  # seconds


@contextmanager
def server(*options: str) -> Iterator[PostgresServer]:
    """One that a test may stop or fill."""
    binaries = os.environ.get("ABREAST_TEST_POSTGRES")
    with PostgresServer(binaries=Path(binaries) if binaries else None, options=options) as started:
        yield started


def settings(redis_url: str, postgres: PostgresServer) -> Settings:
    return Settings(redis_url=redis_url, postgres_url=postgres.url(), batch_size=20, claim_idle=0.5)


def processes(postgres: PostgresServer) -> list[int]:
    assert postgres.process is not None
    parent = postgres.process.pid
    return [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]


def end_workers(url: str) -> None:
    """End the connections of workers, so that they have to reconnect."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname is not null"
        )


async def some_rows(url: str) -> None:
    async def some() -> bool:
        return bool(query_value(url, "select count(*) from abreast.pair"))

    await eventually_async(some, description="the first rows")


async def test_frozen_postgres_loses_nothing(redis_url: str) -> None:
    load = Load(redis_url)
    with server() as postgres:
        await migrate(postgres.url())
        async with run_worker(settings(redis_url, postgres)), loading(load, PAIRS):
            await some_rows(postgres.url())
            with ExitStack() as stack:
                for pid in processes(postgres):
                    stack.enter_context(stopped(pid))
                await asyncio.sleep(AWAY)  # the fault itself
        async with run_worker(settings(redis_url, postgres)):
            await complete(postgres.url(), load)
            await empty(redis_url)


async def test_killed_postgres_loses_nothing(redis_url: str) -> None:
    load = Load(redis_url)
    with server("synchronous_commit=on") as postgres:
        await migrate(postgres.url())
        async with run_worker(settings(redis_url, postgres)), loading(load, PAIRS):
            for _ in range(2):
                await some_rows(postgres.url())
                assert postgres.process is not None
                postgres.process.popen.send_signal(signal.SIGQUIT)
                await asyncio.to_thread(postgres.process.popen.wait)
                postgres.start()
        async with run_worker(settings(redis_url, postgres)):
            await complete(postgres.url(), load)


async def test_postgres_without_free_connections_loses_nothing(redis_url: str) -> None:
    load = Load(redis_url)
    with server("max_connections=8", "superuser_reserved_connections=0", "max_wal_senders=0") as postgres:
        await migrate(postgres.url())
        async with run_worker(settings(redis_url, postgres)) as worker, loading(load, PAIRS):
            await some_rows(postgres.url())
            end_workers(postgres.url())
            with ExitStack() as connections:
                with pytest.raises(psycopg.OperationalError, match="too many clients"):
                    take_all(connections, postgres.url())
                await eventually_async(waits_for_postgres(worker), description="the worker waits")
        async with run_worker(settings(redis_url, postgres)):
            await complete(postgres.url(), load)


def take_all(connections: ExitStack, url: str) -> NoReturn:
    while True:
        connections.enter_context(psycopg.connect(url))


def waits_for_postgres(worker: Worker) -> Callable[[], Awaitable[bool]]:
    async def waits() -> bool:
        return worker._postgres.is_active

    return waits


async def test_postgres_with_full_disk_loses_nothing(redis_url: str) -> None:
    """No file may grow: of what a full disk does, this takes no root. Room comes from deleting."""
    load = Load(redis_url)
    with server("autovacuum=off") as postgres:
        await migrate(postgres.url())
        url = postgres.url()
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("select abreast.open_day((clock_timestamp() at time zone 'UTC')::date)")
            fill(admin, rows=9600, size=1700)  # more than a segment of the log has, which must go on
        limit = query_value(url, "select greatest(max(pg_relation_size(oid)), 16 * 1024 * 1024) from pg_class")
        postgres.stop()
        with no_file_above(int(limit)):
            postgres.start()
        with psycopg.connect(url, autocommit=True) as admin:
            for number in (500, 1):  # the room that is left
                with pytest.raises(psycopg.Error, match="could not extend"):
                    fill_up(admin, number)
        async with run_worker(settings(redis_url, postgres)) as worker, loading(load, PAIRS):
            await eventually_async(waits_for_postgres(worker), description="the worker waits")
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute("delete from abreast.pair where outcome = 'filler'")
                admin.execute("vacuum (truncate false) abreast.pair")
        async with run_worker(settings(redis_url, postgres)):
            await complete(url, load)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(admin: psycopg.Connection[Any], rows: int, size: int) -> None:
    admin.execute(
        "insert into abreast.pair (day, id, at, endpoint_id, outcome, reason)"
        " select (clock_timestamp() at time zone 'UTC')::date, gen_random_uuid(), now(), 0, 'filler',"
        " repeat('x', %s::integer) from generate_series(1, %s)",
        (size, rows),
    )


def fill_up(admin: psycopg.Connection[Any], rows: int) -> None:
    for _ in range(20_000):
        fill(admin, rows, 0)


async def test_deadlock_victims_write_their_batch_again(redis_url: str) -> None:
    """Someone locks an endpoint and then a finding: the order that no worker has."""
    load = Load(redis_url)
    with server("deadlock_timeout=1s") as postgres:  # a session looks once: the other lock must be asked for until then
        await migrate(postgres.url())
        url = postgres.url()
        async with run_worker(settings(redis_url, postgres)), loading(load, PAIRS):
            await some_rows(url)
            for _ in range(3):
                await asyncio.to_thread(lock_the_other_way, url)
        async with run_worker(settings(redis_url, postgres)):
            await complete(url, load)
        assert int(rows(url, "select sum(deadlocks) from pg_stat_database")[0][0]) > 0


def lock_the_other_way(url: str) -> None:
    with psycopg.connect(url) as other:
        other.execute("set local deadlock_timeout = '20s'")  # so that it is the worker that gives up
        other.execute("select from abreast.endpoint for update")
        waiting = "select count(*) from pg_locks where not granted"
        with psycopg.connect(url, autocommit=True) as look:
            for _ in range(500):
                if look.execute(waiting).fetchone() != (0,):
                    break
                look.execute("select pg_sleep(0.01)")
        other.execute("select from abreast.finding for update")


async def test_serialisation_failures_are_retried(redis_url: str) -> None:
    load = Load(redis_url)
    with server("default_transaction_isolation=repeatable read") as postgres:
        await migrate(postgres.url())
        small = settings(redis_url, postgres)
        async with run_worker(small, "one"), run_worker(small, "two"), run_worker(small, "three"):
            for number in range(60):  # at once, so that all three have something to write
                send(redis_url, pair_of({"n": 1}, {"n": number % 2}))
            async with loading(load, PAIRS):
                pass
            await empty(redis_url)

        assert query_value(postgres.url(), "select count(*) from abreast.pair") == PAIRS + 60
        assert query_value(postgres.url(), "select sum(pairs) from abreast.outcome_count") == PAIRS + 60


async def test_pool_replaces_connections_that_the_server_has_closed(postgres_url: str) -> None:
    async with Database(postgres_url) as database:
        before = await database.fetch_all("clock")
        with psycopg.connect(postgres_url, autocommit=True) as admin:
            closed = admin.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = 'abreast'"
                " and datname = current_database()"
            ).fetchall()
        after = await database.fetch_all("clock")

    assert len(before) == len(after) == 1
    assert closed
