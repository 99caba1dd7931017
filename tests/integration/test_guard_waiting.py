"""What a shadow has locked in Postgres holds up no user for long, and fails none."""

# ruff: noqa: SIM117  # first the pool, then the request
from __future__ import annotations

import asyncio
import contextvars
import threading
import time
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
from abreast.integrations.psycopg import connection_async as psycopg_async
from abreast.integrations.psycopg import lock_watchdog as watch
from abreast.integrations.psycopg import pool as pins
from abreast.integrations.psycopg.pool import AsyncConnectionPool, ConnectionPool
from abreast.integrations.sqlalchemy import protect
from support import eventually, eventually_async
from support_guards import handled, inside, nothing_is_held, rows
from support_middleware import captured, sampled

pytestmark = pytest.mark.postgres

CHANGE = "update placed set quantity = quantity + 1 where id = "
LONG = 8.0  # seconds, on a busy machine; without a watch it would be at least ten


@pytest.fixture
def table(postgres_url: str) -> str:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
        connection.execute("insert into placed values (1, 0), (2, 0)")
        connection.execute("alter database " + connection.info.dbname + " set deadlock_timeout = '20s'")
    return postgres_url


def dialect(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


async def waited(doing: Any) -> float:
    since = time.monotonic()
    await doing
    return time.monotonic() - since


async def test_a_user_does_not_wait_for_a_shadow_that_goes_on(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handled() as shadow:
            async with pool.connection() as connection:
                await connection.execute(CHANGE + "1")

            async def user() -> None:
                with inside("live"):
                    async with pool.connection() as connection:
                        await connection.execute(CHANGE + "1")

            took = await asyncio.wait_for(waited(user()), LONG)
            with pytest.raises(psycopg.errors.AdminShutdown):
                async with pool.connection() as connection:
                    await connection.execute(CHANGE + "2")

    assert took < LONG
    assert rows(table, b"select quantity from placed order by id") == [1, 0]
    assert shadow.invalid_reason == "a copy was disturbed in its database: AdminShutdown"
    assert nothing_is_held(table)


async def test_in_a_deadlock_it_is_never_the_user_who_fails(table: str) -> None:
    about, locked = asyncio.Event(), asyncio.Event()
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def copy() -> None:
            async with handled(), pool.connection() as connection:
                await connection.execute(CHANGE + "1")
                locked.set()
                await about.wait()
                await connection.execute(CHANGE + "2")

        async def user() -> None:
            with inside("live"):
                async with pool.connection() as connection:
                    await connection.execute(CHANGE + "2")
                    await locked.wait()
                    about.set()
                    await connection.execute(CHANGE + "1")

        shadow = asyncio.create_task(copy())
        await asyncio.wait_for(user(), LONG)
        await asyncio.wait([shadow])

    assert isinstance(shadow.exception(), psycopg.errors.AdminShutdown)
    assert rows(table, b"select quantity from placed order by id") == [1, 1]


async def test_its_capture_says_that_it_was_disturbed(
    table: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its pair is not compared: what it answered is not what its code does."""
    monkeypatch.setattr(psycopg_async, "SHADOW_LOCK_TIMEOUT", "50ms")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def change(_request: Request) -> Response:
            try:
                async with pool.connection() as connection:
                    await connection.execute(CHANGE + "1")
            except psycopg.errors.LockNotAvailable:
                return Response(status_code=409)
            return Response()

        app = Starlette(routes=[Route("/", change)])
        with psycopg.connect(table) as user:
            user.execute(CHANGE.encode() + b"1")
            capture = await captured(app, redis_url, sampled("/", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)

    assert capture.answer.status == 409
    assert capture.invalid_reason == "a copy was disturbed in its database: LockNotAvailable"


async def test_a_shadow_that_is_ended_takes_no_session_of_users_along(table: str) -> None:
    engine = create_async_engine(dialect(table), pool_size=1)
    protect(engine)

    async def user(statement: str) -> int:
        with inside("live"):
            async with engine.begin() as connection:
                await connection.execute(text(statement))
                return int(await connection.scalar(text("select pg_backend_pid()")) or 0)

    async with handled() as shadow:
        before = await user("select 1")
        async with engine.begin() as connection:
            await connection.execute(text(CHANGE + "1"))
        after = await asyncio.wait_for(user(CHANGE + "1"), LONG)
        with pytest.raises(OperationalError):
            async with engine.begin() as connection:
                await connection.execute(text(CHANGE + "2"))
        async with engine.begin() as connection:  # a new transaction
            await connection.execute(text(CHANGE + "2"))
        with inside("live"):
            again = await user("select 1")
    await engine.dispose()

    assert before == after == again
    assert shadow.invalid_reason
    assert rows(table, b"select quantity from placed order by id") == [1, 0]


async def test_a_shadow_that_is_ended_takes_no_other_shadow_along(table: str) -> None:
    """SQLAlchemy would renew the whole pool, and the other would go on in a transaction without its own writes."""
    engine = create_async_engine(dialect(table), pool_size=1)
    protect(engine)

    async def change(number: int) -> None:
        async with engine.begin() as connection:
            await connection.execute(text(CHANGE + str(number)))

    async with handled() as one, handled():
        await change(2)
        others = contextvars.copy_context()
        CURRENT_CONTEXT.set(one)
        await change(1)
        with inside("live"):
            await asyncio.wait_for(change(1), LONG)
        with pytest.raises(OperationalError):
            await change(1)
        CURRENT_CONTEXT.set(others[CURRENT_CONTEXT])
        async with engine.begin() as connection:
            seen = await connection.scalar(text("select quantity from placed where id = 2"))
    await engine.dispose()

    assert seen == 1
    assert rows(table, b"select quantity from placed order by id") == [1, 0]


@contextmanager
def no_end() -> Iterator[None]:
    """A shadow request whose connections are given back at once."""
    with inside() as made:
        made.cleanups = None
        yield


def crowd(number: int, take: Callable[[], Any], failed: list[BaseException]) -> list[threading.Thread]:
    """Shadow requests in threads, each of which wants a connection."""

    def one() -> None:
        with no_end():
            try:
                take()
            except Exception as error:  # noqa: BLE001  # whatever they get is what is tested
                failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy"])
async def test_shadows_that_wait_for_a_connection_take_few_threads(table: str, kind: str) -> None:
    """Of 40 that serve an application's plain functions; users need some."""
    pool = ConnectionPool(table, min_size=1, shadow_max_size=1, open=True)
    engine = create_engine(dialect(table))
    protect(engine, shadow_pool_size=1)

    def take() -> None:
        if kind == "psycopg":
            with pool.connection():
                pass
        else:
            with engine.connect():
                pass

    failed: list[BaseException] = []
    with no_end(), pool.connection(), engine.connect():
        threads = crowd(10, take, failed)
        eventually(
            lambda: len(failed) >= 8,
            within=pins.SHADOW_CONNECTION_TIMEOUT_S - 1,
            what="all but two are sent away at once",
        )
    for thread in threads:
        thread.join()
    pool.close()
    engine.dispose()

    assert [isinstance(error, TooManyRequests | PoolTimeout) for error in failed] == [True] * 8


async def test_where_nobody_can_look_users_wait_for_a_bounded_time_only(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "TERMINATE_BLOCKERS_SQL", b"select 1")
    monkeypatch.setattr(psycopg_async, "SHADOW_IDLE_TIMEOUT", "300ms")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handled(), pool.connection() as connection:
            await connection.execute(CHANGE + "1")
            with inside("live"):
                async with pool.connection() as users:
                    await asyncio.wait_for(users.execute(CHANGE + "1"), 5)
            with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
                await connection.execute(CHANGE + "1")

    assert rows(table, b"select quantity from placed order by id") == [1, 0]


def test_of_several_hosts_it_is_the_one_of_the_shadow_that_is_watched(table: str) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(table)
    hosts = {"host": "127.0.0.1,localhost", "hostaddr": "127.0.0.1,127.0.0.1", "port": f"1,{parts['port']}"}
    with psycopg.connect(psycopg.conninfo.make_conninfo(table, **hosts)) as connection:
        where = watch.get_watchdog(connection).connect_params
    with psycopg.connect(**where) as session:
        found = session.info

        assert (found.host, str(found.port)) == ("localhost", parts["port"])
        assert (found.dbname, found.get_parameters()["application_name"]) == (parts["dbname"], "abreast watch")


async def test_a_database_that_cannot_be_watched_is_told_once(
    table: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "TERMINATE_BLOCKERS_SQL", b"select pg_terminate_backend(pid) from no_such_table")
    monkeypatch.setattr(watch, "RETRY_DELAY_S", 0.0)
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handled():
        async with pool.connection() as connection:
            await connection.execute("select 1")

        async def told() -> bool:
            return bool(caplog.records)

        await eventually_async(told, within=5, what="it is told")
        await asyncio.sleep(3 * watch.CHECK_INTERVAL_S)

    assert len([each for each in caplog.records if "whether users wait" in each.getMessage()]) == 1
