"""The psycopg integration on a real Postgres: a shadow reads its own writes, and they are recorded and rolled back."""

# ruff: noqa: SIM117  # first the pool, then the request
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolTimeout
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from abreast import ParallelRunMiddleware
from abreast.context import CLEANUP_TASKS, run_cleanups
from abreast.errors import SettingError, ShadowError
from abreast.integrations.psycopg import AsyncConnection, Connection
from abreast.integrations.psycopg_pool import AsyncConnectionPool, ConnectionPool
from support import eventually_async
from support_integrations import get_effects, handle_request, has_no_locks, in_request, query_rows
from support_middleware import call, captured, sampled

pytestmark = pytest.mark.postgres

INSERT = "insert into placed (id, quantity) values (%s, %s)"


@pytest.fixture
def table(postgres_url: str) -> str:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
    return postgres_url


@pytest.fixture(params=[False, True], ids=["transactions", "autocommit"])
async def pool(table: str, request: pytest.FixtureRequest) -> AsyncIterator[AsyncConnectionPool]:
    kwargs = {"autocommit": request.param}
    async with AsyncConnectionPool(table, min_size=1, open=False, kwargs=kwargs) as pool:
        yield pool


async def test_user_write_is_committed_and_recorded(pool: AsyncConnectionPool, table: str) -> None:
    async with handle_request("live") as context, pool.connection() as connection:
        await connection.execute(INSERT, (1, 10))

    assert query_rows(table) == [1]
    shape = "insert into placed (id, quantity) values (?, ?)"
    assert get_effects(context) == [("db.insert.placed", "", {"statement": shape, "values": {"id": 1, "quantity": 10}})]


async def test_shadow_reads_its_writes_over_several_connections_and_keeps_none(
    pool: AsyncConnectionPool, table: str
) -> None:
    async with handle_request() as context:
        for number in (1, 2):
            async with pool.connection() as connection:
                await connection.execute(INSERT, (number, 10))
                await connection.commit()
        async with pool.connection() as connection:
            cursor = await connection.execute("select count(*) from placed")
            visible = await cursor.fetchone()

    assert visible == (2,)
    assert query_rows(table) == []
    assert [kind for kind, _, _ in get_effects(context)] == ["db.insert.placed"] * 2
    assert has_no_locks(table)


async def test_next_shadow_sees_no_writes_of_the_last_one(pool: AsyncConnectionPool) -> None:
    for _ in range(3):
        async with handle_request(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))  # fails if the last shadow was not rolled back


async def test_user_gets_another_session_than_the_shadow(pool: AsyncConnectionPool, table: str) -> None:
    async with handle_request(), pool.connection() as shadow:
        await shadow.execute(INSERT, (1, 10))
        with in_request("live"):
            async with pool.connection() as user:
                await user.execute(INSERT, (2, 10))
        assert user.info.backend_pid != shadow.info.backend_pid

    assert query_rows(table) == [2]


async def test_rollback_undoes_only_uncommitted_statements(pool: AsyncConnectionPool) -> None:
    async with handle_request() as context, pool.connection() as connection:
        await connection.set_autocommit(False)
        await connection.execute(INSERT, (1, 10))
        await connection.commit()
        await connection.execute(INSERT, (2, 10))
        await connection.rollback()
        cursor = await connection.execute("select id from placed")
        visible = await cursor.fetchall()

    assert visible == [(1,)]
    assert [payload["values"]["id"] for _, _, payload in get_effects(context)] == [1]


async def test_putconn_rolls_back_uncommitted_statements(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handle_request():
        connection = await pool.getconn()
        await connection.execute(INSERT, (1, 10))
        await pool.putconn(connection)
        async with pool.connection() as another:
            cursor = await another.execute("select id from placed")
            assert await cursor.fetchall() == []


async def test_failed_transaction_block_is_rolled_back_alone(pool: AsyncConnectionPool, table: str) -> None:
    async with handle_request() as context, pool.connection() as connection:
        async with connection.transaction():
            await connection.execute(INSERT, (1, 10))
        with pytest.raises(psycopg.errors.UniqueViolation):  # noqa: PT012  # the block is what is tested
            async with connection.transaction():
                await connection.execute(INSERT, (2, 10))
                await connection.execute(INSERT, (1, 10))
        async with connection.transaction(force_rollback=True):
            await connection.execute(INSERT, (3, 10))
        cursor = await connection.execute("select id from placed")
        visible = await cursor.fetchall()

    assert visible == [(1,)]
    assert [payload["values"]["id"] for _, _, payload in get_effects(context)] == [1]
    assert query_rows(table) == []


async def test_error_in_autocommit_keeps_earlier_statements(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False, kwargs={"autocommit": True}) as pool:
        async with handle_request(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            with pytest.raises(psycopg.errors.UniqueViolation):
                await connection.execute(INSERT, (1, 10))
            cursor = await connection.execute("select id from placed")
            assert await cursor.fetchall() == [(1,)]

    assert query_rows(table) == []


REJECTED_STATEMENTS: tuple[Any, ...] = (
    "commit",
    " ; COMMIT",
    "-- comment\rcommit",
    "-- comment\ncommit",
    "/* a */ commit",
    "/* a /* b */ select */ commit",
    "/* a /* b */ */ end",
    "end",
    "commit and chain",
    "rollback",
    "abort",
    "begin",
    "start transaction",
    "prepare transaction 'x'",
    "commit prepared 'x'",
    "listen orders",
    "gibberish",
    b"commit",
    psycopg.sql.SQL("commit"),
)


async def test_statement_that_ends_the_transaction_is_rejected(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handle_request(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            for statement in REJECTED_STATEMENTS:
                with pytest.raises(ShadowError):
                    await connection.execute(statement)
                assert query_rows(table) == [], statement


@pytest.mark.parametrize("path", ["execute", "stream", "copy", "many", "server", "pipeline", "block", "tpc"])
async def test_hidden_commit_is_rejected_on_every_path(table: str, path: str) -> None:
    statement = f"{INSERT.replace('%s', '2')}; commit"
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handle_request():
        async with pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            with pytest.raises((ShadowError, psycopg.Error)):
                await send_on_path(connection, path, statement)

    assert query_rows(table) == []


async def send_on_path(connection: AsyncConnection[Any], path: str, statement: str) -> None:
    cursor = connection.cursor()
    if path == "execute":
        await cursor.execute(statement)
    elif path == "stream":
        _ = [row async for row in cursor.stream(statement)]
    elif path == "copy":
        async with cursor.copy(f"copy placed from stdin; {statement}"):
            pass
    elif path == "many":
        await cursor.executemany(statement, [()])
    elif path == "server":
        async with connection.cursor("mine") as server:
            await server.execute(f"select 1; {statement}")
    elif path == "pipeline":
        async with connection.pipeline():
            await cursor.execute("commit")
    elif path == "block":
        await cursor.execute("do $$ begin insert into placed values (3, 1); commit; end $$")
    else:
        await connection.tpc_begin("mine")


async def test_two_phase_commit_and_listen_are_rejected(pool: AsyncConnectionPool) -> None:
    async with handle_request(), pool.connection() as connection:
        for call_method in (
            lambda: connection.tpc_begin("mine"),
            lambda: connection.tpc_commit("mine"),
            lambda: connection.tpc_rollback("mine"),
            lambda: anext(connection.notifies(timeout=0)),
        ):
            with pytest.raises(ShadowError, match="a rollback would not undo it"):
                await call_method()


async def test_shadow_transaction_keeps_isolation_level_and_mode(pool: AsyncConnectionPool) -> None:
    async with handle_request(), pool.connection() as connection:
        await connection.execute(INSERT, (1, 10))
        await connection.commit()
        await connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await connection.set_read_only(True)
        await connection.set_deferrable(True)
        await connection.execute(INSERT, (2, 10))

        assert (connection.isolation_level, connection.read_only, connection.deferrable) == (None, None, None)


async def test_executemany_copy_and_new_tables_are_rolled_back(pool: AsyncConnectionPool, table: str) -> None:
    async with handle_request() as context, pool.connection() as connection, connection.transaction():
        cursor = connection.cursor()
        await cursor.executemany(INSERT, [(number, 1) for number in range(3)])
        async with cursor.copy("copy placed (id, quantity) from stdin") as copy:
            await copy.write_row((8, 1))
        await cursor.execute("create table another (id integer)")
        async with connection.cursor("mine") as server:
            await server.execute("select id from placed order by id")
            visible = [row async for row in server]

    assert visible == [(0,), (1,), (2,), (8,)]
    assert query_rows(table) == []
    effects = get_effects(context)
    assert [kind for kind, _, _ in effects] == ["db.insert.placed", "db.copy.placed", "db.create"]
    assert effects[0][2]["rows"] == 3
    assert effects[1][2]["rows"] == 1
    assert query_rows(table, b"select count(*) from pg_tables where tablename = 'another'") == [0]


async def test_notify_of_a_shadow_is_never_sent(pool: AsyncConnectionPool, table: str) -> None:
    listener = await psycopg.AsyncConnection.connect(table, autocommit=True)
    async with listener:
        await listener.execute("listen orders")
        async with handle_request(), pool.connection() as connection:
            await connection.execute("notify orders, 'a shadow'")
        await listener.execute("notify orders, 'a user'")
        payloads = [notification.payload async for notification in listener.notifies(timeout=5, stop_after=1)]

    assert payloads == ["a user"]


async def test_sequence_advances_and_advisory_lock_is_released(table: str) -> None:
    with psycopg.connect(table) as connection:
        connection.execute("create sequence numbers")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handle_request(), pool.connection() as connection:
            await connection.execute("select nextval('numbers')")
            await connection.execute("select pg_advisory_lock(7)")

        assert query_rows(table, b"select last_value from numbers where is_called") == [1]
        assert query_rows(table, b"select nextval('numbers')") == [2]
        assert has_no_locks(table)


async def test_shadow_lock_timeout_bounds_the_wait_for_a_row(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast.integrations.psycopg.connection_async.SHADOW_LOCK_TIMEOUT", "50ms")
    with psycopg.connect(table) as user:
        user.execute(INSERT, (1, 10))
        async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handle_request():
            with pytest.raises(psycopg.errors.LockNotAvailable):
                async with pool.connection() as connection:
                    await connection.execute(INSERT, (1, 20))


async def test_two_connections_in_use_are_both_rolled_back(pool: AsyncConnectionPool, table: str) -> None:
    async with handle_request(), pool.connection() as connection, pool.connection() as other:
        await connection.execute(INSERT, (1, 10))
        await other.execute(INSERT, (2, 10))

    assert query_rows(table) == []
    assert has_no_locks(table)


async def test_task_that_outlives_its_shadow_is_rolled_back(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        over = asyncio.Event()

        async def later() -> None:
            async with pool.connection() as before:
                await before.execute(INSERT, (1, 10))
                await over.wait()
                await before.execute(INSERT, (2, 10))
            async with pool.connection() as after:
                await after.execute(INSERT, (3, 10))

        async with handle_request():
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        over.set()
        await task

        assert query_rows(table) == []
        assert has_no_locks(table)


async def test_full_shadow_pool_fails_shadows_but_not_users(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, shadow_max_size=1, open=False) as pool:
        async with handle_request(), pool.connection():
            async with handle_request() as second:
                with pytest.raises(PoolTimeout):
                    await pool.getconn(timeout=0.1)
                assert second.invalid_reason
            with in_request("live"):
                async with pool.connection() as connection:
                    await connection.execute(INSERT, (1, 10))

    assert query_rows(table) == [1]


async def test_connection_returned_after_the_request_is_rolled_back(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handle_request():
            leftover = await pool.getconn()
            await leftover.execute(INSERT, (1, 10))
            await leftover.commit()
        await pool.putconn(leftover)

    assert query_rows(table) == []


async def test_user_connection_rejects_statements_of_a_shadow(table: str) -> None:
    connection = await AsyncConnection.connect(table)
    async with connection:
        with in_request():
            with pytest.raises(ShadowError, match="opened for users"):
                await connection.execute(INSERT, (1, 10))
            with pytest.raises(ShadowError):
                await connection.tpc_begin("mine")
            with pytest.raises(ShadowError, match="opened for users"):
                _ = [row async for row in connection.cursor().stream(f"{INSERT} returning id", (1, 10))]
            async with connection.cursor("mine") as server:
                with pytest.raises(ShadowError, match="opened for users"):
                    await server.execute("select 1")

    assert query_rows(table) == []


async def test_shadow_connection_rejects_statements_of_a_user(table: str) -> None:
    """Otherwise the write of the user would be rolled back."""
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        with in_request() as context:
            leftover = await pool.getconn()
        with in_request("live"), pytest.raises(ShadowError, match="outside its request"):
            await leftover.execute(INSERT, (1, 10))
        await pool.putconn(leftover)
        run_cleanups(context)
        await asyncio.gather(*CLEANUP_TASKS)


async def test_connection_opened_in_a_shadow_is_rolled_back_on_close(table: str) -> None:
    async with handle_request(), await AsyncConnection.connect(table) as connection:
        await connection.execute(INSERT, (1, 10))
        await connection.commit()

    assert query_rows(table) == []


async def test_separate_database_keeps_writes_of_a_shadow(table: str, postgres_server: Any, postgres_url: str) -> None:
    own = "shadow_" + postgres_url.rpartition("/")[2].partition("?")[0]
    with psycopg.connect(table, autocommit=True) as admin:
        admin.execute(f"create database {own}".encode())
    other = postgres_server.url(own)
    try:
        with psycopg.connect(other) as connection:
            connection.execute("create table placed (id integer primary key, quantity integer not null)")
        async with AsyncConnectionPool(table, min_size=1, shadow_conninfo=other, open=False) as pool:
            async with handle_request() as context, pool.connection() as connection_:
                await connection_.execute(INSERT, (1, 10))

        assert (query_rows(table), query_rows(other)) == ([], [1])
        assert [kind for kind, _, _ in get_effects(context)] == ["db.insert.placed"]
    finally:
        with psycopg.connect(table, autocommit=True) as admin:
            admin.execute(f"drop database {own} with (force)".encode())


async def test_sync_pool_and_connection_roll_back_shadows(table: str) -> None:
    def endpoint() -> Any:
        with sync_pool.connection() as connection:
            connection.execute(INSERT, (1, 10))
        with sync_pool.connection() as connection, connection.transaction():
            connection.cursor().executemany(INSERT, [(2, 1), (3, 1)])
            with pytest.raises(ShadowError):
                connection.execute("commit")
            return connection.execute("select count(*) from placed").fetchone()

    with ConnectionPool(table, min_size=1, open=False) as sync_pool:
        async with handle_request() as context:
            assert await asyncio.to_thread(endpoint) == (3,)
        with in_request("live"), sync_pool.connection() as user:
            user.execute(INSERT, (9, 10))

        assert query_rows(table) == [9]
        assert has_no_locks(table)
    assert [kind for kind, _, _ in get_effects(context)] == ["db.insert.placed"] * 2
    with in_request(), Connection.connect(table) as alone:
        alone.execute(INSERT, (4, 10))
    assert query_rows(table) == [9]


async def test_custom_connection_or_cursor_class_is_rejected(table: str) -> None:
    with pytest.raises(SettingError):
        AsyncConnectionPool(table, connection_class=psycopg.AsyncConnection, open=False)
    async with handle_request():
        context = await AsyncConnection.connect(table, cursor_factory=psycopg.AsyncClientCursor)
        async with context:
            with pytest.raises(ShadowError, match="cursor"):
                context.cursor()


async def test_background_task_is_rolled_back_with_its_request(table: str, redis_url: str) -> None:
    visible_rows: list[Any] = []
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def order(_request: Request) -> Response:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
            return Response(background=BackgroundTask(later))

        async def later() -> None:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (2, 10))
                cursor = await connection.execute("select id from placed order by id")
                visible_rows.extend(await cursor.fetchall())

        app = Starlette(routes=[Route("/", order, methods=["POST"])])
        capture = await captured(app, redis_url, sampled("/", "POST", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)

        assert visible_rows == [(1,), (2,)]
        assert query_rows(table) == []
        assert has_no_locks(table)
    assert [effect["kind"] for effect in capture.effects] == ["db.insert.placed"] * 2


async def test_request_that_raises_is_rolled_back(table: str, redis_url: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def order(_request: Request) -> Response:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
            raise KeyError

        app = ParallelRunMiddleware(Starlette(routes=[Route("/", order)]), service="shop", redis_url=redis_url)
        _, error = await call(app, sampled("/", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)
        await app.aclose()

        assert isinstance(error, KeyError)
        assert has_no_locks(table)


async def test_cancelled_request_is_rolled_back_and_frees_its_connection(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, shadow_max_size=1, open=False, timeout=5) as pool:
        writing = asyncio.Event()

        async def endpoint() -> None:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
                writing.set()
                await connection.execute("select pg_sleep(20)")

        async with handle_request():
            task = asyncio.create_task(endpoint())
            await writing.wait()
            task.cancel()
            await asyncio.wait([task])
        async with handle_request(), pool.connection() as connection:  # the only connection is free again
            await connection.execute(INSERT, (2, 10))

        async def is_rolled_back() -> bool:
            return has_no_locks(table)

        await eventually_async(is_rolled_back, description="Postgres notices the cancellation")
        assert query_rows(table) == []


async def test_pool_opened_in_a_shadow_serves_users(table: str) -> None:
    """The tasks of the pool start in the shadow request, and also run `configure`."""

    async def configure(connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute("set search_path = public")
        await connection.commit()

    pool = AsyncConnectionPool(table, min_size=1, open=False, configure=configure)
    async with handle_request():
        await pool.open(wait=True)
        async with pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
    async with pool.connection() as connection:
        await connection.execute(INSERT, (2, 10))
    await pool.close()

    assert query_rows(table) == [2]
