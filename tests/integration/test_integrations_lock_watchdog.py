"""Locks of a shadow in Postgres delay a user only briefly, and never fail the statement of a user."""

# ruff: noqa: SIM117  # first the pool, then the request
from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg_pool import TooManyRequests
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from abreast.context import CLEANUP_TASKS, CURRENT_CONTEXT
from abreast.integrations.psycopg import connection_async, shadow_sessions
from abreast.integrations.psycopg_pool import AsyncConnectionPool, ConnectionPool
from abreast.integrations.sqlalchemy import protect
from support import eventually, eventually_async
from support_integrations import handle_request, has_no_locks, in_request, query_rows
from support_middleware import captured, sampled

pytestmark = pytest.mark.postgres

UPDATE = "update placed set quantity = quantity + 1 where id = "
MAX_WAIT_S = 8.0  # enough for a busy machine; without a watchdog, a user waits at least 10 s


@pytest.fixture
def table(postgres_url: str) -> str:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
        connection.execute("insert into placed values (1, 0), (2, 0)")
        connection.execute("alter database " + connection.info.dbname + " set deadlock_timeout = '20s'")
    return postgres_url


def to_psycopg_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


async def test_watchdog_terminates_a_shadow_that_blocks_a_user(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handle_request() as shadow:
            async with pool.connection() as connection:
                await connection.execute(UPDATE + "1")

            async def user() -> None:
                with in_request("live"):
                    async with pool.connection() as connection:
                        await connection.execute(UPDATE + "1")

            await asyncio.wait_for(user(), MAX_WAIT_S)
            with pytest.raises(psycopg.errors.AdminShutdown):
                async with pool.connection() as connection:
                    await connection.execute(UPDATE + "2")

    assert query_rows(table, b"select quantity from placed order by id") == [1, 0]
    assert shadow.invalid_reason == "other sessions interrupted the shadow in its database: AdminShutdown"
    assert has_no_locks(table)


async def test_deadlock_fails_the_shadow_and_not_the_user(table: str) -> None:
    is_user_ready, is_locked = asyncio.Event(), asyncio.Event()
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def copy() -> None:
            async with handle_request(), pool.connection() as connection:
                await connection.execute(UPDATE + "1")
                is_locked.set()
                await is_user_ready.wait()
                await connection.execute(UPDATE + "2")

        async def user() -> None:
            with in_request("live"):
                async with pool.connection() as connection:
                    await connection.execute(UPDATE + "2")
                    await is_locked.wait()
                    is_user_ready.set()
                    await connection.execute(UPDATE + "1")

        shadow = asyncio.create_task(copy())
        await asyncio.wait_for(user(), MAX_WAIT_S)
        await asyncio.wait([shadow])

    assert isinstance(shadow.exception(), psycopg.errors.AdminShutdown)
    assert query_rows(table, b"select quantity from placed order by id") == [1, 1]


async def test_capture_of_an_interrupted_shadow_has_a_reason(
    table: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair is not compared, because the response is not a result of the code."""
    monkeypatch.setattr(connection_async, "SHADOW_LOCK_TIMEOUT", "50ms")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def change(_request: Request) -> Response:
            try:
                async with pool.connection() as connection:
                    await connection.execute(UPDATE + "1")
            except psycopg.errors.LockNotAvailable:
                return Response(status_code=409)
            return Response()

        app = Starlette(routes=[Route("/", change)])
        with psycopg.connect(table) as user:
            user.execute(UPDATE.encode() + b"1")
            capture = await captured(app, redis_url, sampled("/", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)

    assert capture.answer.status == 409
    assert capture.invalid_reason == "other sessions interrupted the shadow in its database: LockNotAvailable"


async def test_terminated_shadow_keeps_sessions_of_users(table: str) -> None:
    engine = create_async_engine(to_psycopg_url(table), pool_size=1)
    protect(engine)

    async def user(statement: str) -> int:
        with in_request("live"):
            async with engine.begin() as connection:
                await connection.execute(text(statement))
                return int(await connection.scalar(text("select pg_backend_pid()")) or 0)

    async with handle_request() as shadow:
        before = await user("select 1")
        async with engine.begin() as connection:
            await connection.execute(text(UPDATE + "1"))
        after = await asyncio.wait_for(user(UPDATE + "1"), MAX_WAIT_S)
        with pytest.raises(OperationalError):
            async with engine.begin() as connection:
                await connection.execute(text(UPDATE + "2"))
        async with engine.begin() as connection:  # a new transaction
            await connection.execute(text(UPDATE + "2"))
        with in_request("live"):
            value = await user("select 1")
    await engine.dispose()

    assert before == after == value
    assert shadow.invalid_reason
    assert query_rows(table, b"select quantity from placed order by id") == [1, 0]


async def test_terminated_shadow_keeps_sessions_of_other_shadows(table: str) -> None:
    """Otherwise SQLAlchemy would replace the whole pool, and the other shadow would lose its writes."""
    engine = create_async_engine(to_psycopg_url(table), pool_size=1)
    protect(engine)

    async def change(number: int) -> None:
        async with engine.begin() as connection:
            await connection.execute(text(UPDATE + str(number)))

    async with handle_request() as first, handle_request():
        await change(2)
        second = contextvars.copy_context()
        CURRENT_CONTEXT.set(first)
        await change(1)
        with in_request("live"):
            await asyncio.wait_for(change(1), MAX_WAIT_S)
        with pytest.raises(OperationalError):
            await change(1)
        CURRENT_CONTEXT.set(second[CURRENT_CONTEXT])
        async with engine.begin() as connection:
            quantity = await connection.scalar(text("select quantity from placed where id = 2"))
    await engine.dispose()

    assert quantity == 1
    assert query_rows(table, b"select quantity from placed order by id") == [1, 0]


@contextmanager
def shadow_without_cleanups() -> Iterator[None]:
    """Enter a shadow request that returns connections to the pool at once."""
    with in_request() as context:
        context.cleanups = None
        yield


def start_shadows(count: int, connect: Callable[[], Any], errors: list[BaseException]) -> list[threading.Thread]:
    """Start shadow requests in threads. Each of them connects."""

    def run() -> None:
        with shadow_without_cleanups():
            try:
                connect()
            except Exception as error:  # noqa: BLE001  # the test checks the class
                errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy"])
async def test_sync_pool_limits_threads_that_wait_for_a_connection(table: str, kind: str) -> None:
    """Plain functions of the application share 40 threads, and users need some of them."""
    pool = ConnectionPool(table, min_size=1, shadow_max_size=1, open=True)
    engine = create_engine(to_psycopg_url(table))
    protect(engine, shadow_pool_size=1)

    def connect() -> None:
        if kind == "psycopg":
            with pool.connection():
                pass
        else:
            with engine.connect():
                pass

    errors: list[BaseException] = []
    with shadow_without_cleanups(), pool.connection(), engine.connect():
        threads = start_shadows(10, connect, errors)
        eventually(
            lambda: len(errors) >= 8,
            within=shadow_sessions.SHADOW_CONNECTION_TIMEOUT_S - 1,
            description="all but two fail at once",
        )
    for thread in threads:
        thread.join()
    pool.close()
    engine.dispose()

    assert [isinstance(error, TooManyRequests | PoolTimeout) for error in errors] == [True] * 8


async def test_idle_timeout_bounds_the_wait_without_a_watchdog(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_sessions, "TERMINATE_BLOCKERS_SQL", b"select 1")
    monkeypatch.setattr(connection_async, "SHADOW_IDLE_TIMEOUT", "300ms")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handle_request(), pool.connection() as connection:
            await connection.execute(UPDATE + "1")
            with in_request("live"):
                async with pool.connection() as user:
                    await asyncio.wait_for(user.execute(UPDATE + "1"), 5)
            with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
                await connection.execute(UPDATE + "1")

    assert query_rows(table, b"select quantity from placed order by id") == [1, 0]


def test_watchdog_connects_to_the_host_of_the_shadow(table: str) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(table)
    hosts = {"host": "127.0.0.1,localhost", "hostaddr": "127.0.0.1,127.0.0.1", "port": f"1,{parts['port']}"}
    with psycopg.connect(psycopg.conninfo.make_conninfo(table, **hosts)) as connection:
        params = shadow_sessions.get_watchdog(connection).connect_params
    with psycopg.connect(**params) as session:
        info = session.info

        assert (info.host, str(info.port)) == ("localhost", parts["port"])
        assert (info.dbname, info.get_parameters()["application_name"]) == (parts["dbname"], "abreast watch")


async def test_watchdog_that_fails_is_logged_once(
    table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        shadow_sessions, "TERMINATE_BLOCKERS_SQL", b"select pg_terminate_backend(pid) from no_such_table"
    )
    monkeypatch.setattr(shadow_sessions, "RETRY_DELAY_S", 0.0)
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handle_request():
        async with pool.connection() as connection:
            await connection.execute("select 1")

        def get_errors() -> list[logging.LogRecord]:  # the watchdogs of other databases may write to the same log
            return [entry for entry in caplog.records if entry.exc_info and "no_such_table" in str(entry.exc_info[1])]

        async def is_logged() -> bool:
            return bool(get_errors())

        await eventually_async(is_logged, within=15, description="the error is logged")
        await asyncio.sleep(3 * shadow_sessions.CHECK_INTERVAL_S)

    assert ["users who wait" in entry.getMessage() for entry in get_errors()] == [True]
