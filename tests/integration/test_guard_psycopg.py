"""psycopg's guard on a real Postgres: what a shadow writes is seen by itself, recorded, and gone afterwards."""

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
from abreast.integrations.psycopg.pool import AsyncConnectionPool, ConnectionPool
from support_guards import effects, handled, inside, nothing_is_held, rows
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
    how = {"autocommit": request.param}
    async with AsyncConnectionPool(table, min_size=1, open=False, kwargs=how) as made:
        yield made


async def test_a_user_writes_and_it_stays_and_is_recorded(pool: AsyncConnectionPool, table: str) -> None:
    async with handled("live") as made, pool.connection() as connection:
        await connection.execute(INSERT, (1, 10))

    assert rows(table) == [1]
    shape = "insert into placed (id, quantity) values (?, ?)"
    assert effects(made) == [("db.insert.placed", "", {"statement": shape, "values": {"id": 1, "quantity": 10}})]


async def test_a_shadow_reads_what_it_wrote_and_nothing_stays(pool: AsyncConnectionPool, table: str) -> None:
    """Over several connections of the pool, one after the other, each of which commits."""
    async with handled() as made:
        for number in (1, 2):
            async with pool.connection() as connection:
                await connection.execute(INSERT, (number, 10))
                await connection.commit()
        async with pool.connection() as connection:
            cursor = await connection.execute("select count(*) from placed")
            seen = await cursor.fetchone()

    assert seen == (2,)
    assert rows(table) == []
    assert [kind for kind, _, _ in effects(made)] == ["db.insert.placed"] * 2
    assert nothing_is_held(table)


async def test_the_next_shadow_sees_nothing_of_it(pool: AsyncConnectionPool) -> None:
    for _ in range(3):
        async with handled(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))  # a second one would be a duplicate


async def test_users_never_get_a_shadows_session_nor_wait_for_one(pool: AsyncConnectionPool, table: str) -> None:
    async with handled(), pool.connection() as held:
        await held.execute(INSERT, (1, 10))
        with inside("live"):
            async with pool.connection() as users:
                await users.execute(INSERT, (2, 10))
        assert users.info.backend_pid != held.info.backend_pid

    assert rows(table) == [2]


async def test_a_rollback_undoes_what_was_not_committed_and_no_more(pool: AsyncConnectionPool) -> None:
    async with handled() as made, pool.connection() as connection:
        await connection.set_autocommit(False)
        await connection.execute(INSERT, (1, 10))
        await connection.commit()
        await connection.execute(INSERT, (2, 10))
        await connection.rollback()
        cursor = await connection.execute("select id from placed")
        seen = await cursor.fetchall()

    assert seen == [(1,)]
    assert [payload["values"]["id"] for _, _, payload in effects(made)] == [1]


async def test_what_was_not_committed_is_undone_when_the_connection_is_given_back(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handled():
        connection = await pool.getconn()
        await connection.execute(INSERT, (1, 10))
        await pool.putconn(connection)
        async with pool.connection() as another:
            cursor = await another.execute("select id from placed")
            assert await cursor.fetchall() == []


async def test_a_block_that_fails_is_undone_alone(pool: AsyncConnectionPool, table: str) -> None:
    async with handled() as made, pool.connection() as connection:
        async with connection.transaction():
            await connection.execute(INSERT, (1, 10))
        with pytest.raises(psycopg.errors.UniqueViolation):  # noqa: PT012  # the block is what is tested
            async with connection.transaction():
                await connection.execute(INSERT, (2, 10))
                await connection.execute(INSERT, (1, 10))
        async with connection.transaction(force_rollback=True):
            await connection.execute(INSERT, (3, 10))
        cursor = await connection.execute("select id from placed")
        seen = await cursor.fetchall()

    assert seen == [(1,)]
    assert [payload["values"]["id"] for _, _, payload in effects(made)] == [1]
    assert rows(table) == []


async def test_an_error_in_autocommit_takes_nothing_along(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False, kwargs={"autocommit": True}) as pool:
        async with handled(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            with pytest.raises(psycopg.errors.UniqueViolation):
                await connection.execute(INSERT, (1, 10))
            cursor = await connection.execute("select id from placed")
            assert await cursor.fetchall() == [(1,)]

    assert rows(table) == []


ENDINGS: tuple[Any, ...] = (
    "commit",
    " ; COMMIT",
    "-- well\rcommit",
    "-- well\ncommit",
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


async def test_what_would_end_the_transaction_is_refused(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handled(), pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            for statement in ENDINGS:
                with pytest.raises(ShadowError):
                    await connection.execute(statement)
                assert rows(table) == [], statement


@pytest.mark.parametrize("way", ["execute", "stream", "copy", "many", "server", "pipeline", "block", "tpc"])
async def test_no_way_leads_around_it(table: str, way: str) -> None:
    hidden = f"{INSERT.replace('%s', '2')}; commit"
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handled():
        async with pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
            with pytest.raises((ShadowError, psycopg.Error)):
                await around(connection, way, hidden)

    assert rows(table) == []


async def around(connection: AsyncConnection[Any], way: str, hidden: str) -> None:
    cursor = connection.cursor()
    if way == "execute":
        await cursor.execute(hidden)
    elif way == "stream":
        _ = [row async for row in cursor.stream(hidden)]
    elif way == "copy":
        async with cursor.copy(f"copy placed from stdin; {hidden}"):
            pass
    elif way == "many":
        await cursor.executemany(hidden, [()])
    elif way == "server":
        async with connection.cursor("mine") as server:
            await server.execute(f"select 1; {hidden}")
    elif way == "pipeline":
        async with connection.pipeline():
            await cursor.execute("commit")
    elif way == "block":
        await cursor.execute("do $$ begin insert into placed values (3, 1); commit; end $$")
    else:
        await connection.tpc_begin("mine")


async def test_what_could_not_be_taken_back_is_refused(pool: AsyncConnectionPool) -> None:
    """Before anything else was asked, when Postgres would allow it."""
    async with handled(), pool.connection() as connection:
        for way in (
            lambda: connection.tpc_begin("mine"),
            lambda: connection.tpc_commit("mine"),
            lambda: connection.tpc_rollback("mine"),
            lambda: anext(connection.notifies(timeout=0)),
        ):
            with pytest.raises(ShadowError, match="it could not be taken back"):
                await way()


async def test_the_transaction_stays_as_it_began(pool: AsyncConnectionPool) -> None:
    async with handled(), pool.connection() as connection:
        await connection.execute(INSERT, (1, 10))
        await connection.commit()
        await connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await connection.set_read_only(True)
        await connection.set_deferrable(True)
        await connection.execute(INSERT, (2, 10))

        assert (connection.isolation_level, connection.read_only, connection.deferrable) == (None, None, None)


async def test_many_rows_copies_and_tables_are_gone_too(pool: AsyncConnectionPool, table: str) -> None:
    async with handled() as made, pool.connection() as connection, connection.transaction():
        cursor = connection.cursor()
        await cursor.executemany(INSERT, [(number, 1) for number in range(3)])
        async with cursor.copy("copy placed (id, quantity) from stdin") as copying:
            await copying.write_row((8, 1))
        await cursor.execute("create table another (id integer)")
        async with connection.cursor("mine") as server:
            await server.execute("select id from placed order by id")
            seen = [row async for row in server]

    assert seen == [(0,), (1,), (2,), (8,)]
    assert rows(table) == []
    found = effects(made)
    assert [kind for kind, _, _ in found] == ["db.insert.placed", "db.copy.placed", "db.create"]
    assert found[0][2]["rows"] == 3
    assert found[1][2]["rows"] == 1
    assert rows(table, b"select count(*) from pg_tables where tablename = 'another'") == [0]


async def test_a_notification_of_a_shadow_is_never_sent(pool: AsyncConnectionPool, table: str) -> None:
    listener = await psycopg.AsyncConnection.connect(table, autocommit=True)
    async with listener:
        await listener.execute("listen orders")
        async with handled(), pool.connection() as connection:
            await connection.execute("notify orders, 'a shadow'")
        await listener.execute("notify orders, 'a user'")
        heard = [one.payload async for one in listener.notifies(timeout=5, stop_after=1)]

    assert heard == ["a user"]


async def test_what_a_rollback_cannot_undo_is_as_the_docs_say(table: str) -> None:
    """A sequence has gone on. Session locks are given back all the same."""
    with psycopg.connect(table) as connection:
        connection.execute("create sequence numbers")
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handled(), pool.connection() as connection:
            await connection.execute("select nextval('numbers')")
            await connection.execute("select pg_advisory_lock(7)")

        assert rows(table, b"select last_value from numbers where is_called") == [1]
        assert rows(table, b"select nextval('numbers')") == [2]
        assert nothing_is_held(table)


async def test_a_shadow_waits_for_a_users_row_for_a_bounded_time_only(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast.integrations.psycopg.connection_async.SHADOW_LOCK_TIMEOUT", "50ms")
    with psycopg.connect(table) as user:
        user.execute(INSERT, (1, 10))
        async with AsyncConnectionPool(table, min_size=1, open=False) as pool, handled():
            with pytest.raises(psycopg.errors.LockNotAvailable):
                async with pool.connection() as connection:
                    await connection.execute(INSERT, (1, 20))


async def test_two_at_once_are_two_transactions_and_both_are_undone(pool: AsyncConnectionPool, table: str) -> None:
    async with handled(), pool.connection() as one, pool.connection() as other:
        await one.execute(INSERT, (1, 10))
        await other.execute(INSERT, (2, 10))

    assert rows(table) == []
    assert nothing_is_held(table)


async def test_a_task_that_goes_on_after_the_end_is_undone_as_well(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        over = asyncio.Event()

        async def later() -> None:
            async with pool.connection() as before:
                await before.execute(INSERT, (1, 10))
                await over.wait()
                await before.execute(INSERT, (2, 10))
            async with pool.connection() as after:
                await after.execute(INSERT, (3, 10))

        async with handled():
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
        over.set()
        await task

        assert rows(table) == []
        assert nothing_is_held(table)


async def test_when_all_shadow_connections_are_taken_only_shadows_fail(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, shadow_max_size=1, open=False) as pool:
        async with handled(), pool.connection():
            async with handled() as second:
                with pytest.raises(PoolTimeout):
                    await pool.getconn(timeout=0.1)
                assert second.invalid_reason
            with inside("live"):
                async with pool.connection() as connection:
                    await connection.execute(INSERT, (1, 10))

    assert rows(table) == [1]


async def test_a_session_left_open_is_undone(table: str) -> None:
    """Never given back; the pool closes it at its end."""
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        async with handled():
            left = await pool.getconn()
            await left.execute(INSERT, (1, 10))
            await left.commit()
        await pool.putconn(left)

    assert rows(table) == []


async def test_a_users_connection_takes_nothing_from_a_shadow(table: str) -> None:
    connection = await AsyncConnection.connect(table)
    async with connection:
        with inside():
            with pytest.raises(ShadowError, match="opened for users"):
                await connection.execute(INSERT, (1, 10))
            with pytest.raises(ShadowError):
                await connection.tpc_begin("mine")
            with pytest.raises(ShadowError, match="opened for users"):
                _ = [row async for row in connection.cursor().stream(f"{INSERT} returning id", (1, 10))]
            async with connection.cursor("mine") as server:
                with pytest.raises(ShadowError, match="opened for users"):
                    await server.execute("select 1")

    assert rows(table) == []


async def test_a_shadows_connection_takes_nothing_from_a_user(table: str) -> None:
    """Or it would be lost."""
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:
        with inside() as made:
            left = await pool.getconn()
        with inside("live"), pytest.raises(ShadowError, match="outside its request"):
            await left.execute(INSERT, (1, 10))
        await pool.putconn(left)
        run_cleanups(made)
        await asyncio.gather(*CLEANUP_TASKS)


async def test_a_connection_opened_in_a_shadow_request_is_undone_when_it_closes(table: str) -> None:
    async with handled(), await AsyncConnection.connect(table) as connection:
        await connection.execute(INSERT, (1, 10))
        await connection.commit()

    assert rows(table) == []


async def test_a_database_of_its_own_keeps_what_a_shadow_writes(
    table: str, postgres_server: Any, postgres_url: str
) -> None:
    own = "shadow_" + postgres_url.rpartition("/")[2].partition("?")[0]
    with psycopg.connect(table, autocommit=True) as admin:
        admin.execute(f"create database {own}".encode())
    other = postgres_server.url(own)
    try:
        with psycopg.connect(other) as connection:
            connection.execute("create table placed (id integer primary key, quantity integer not null)")
        async with AsyncConnectionPool(table, min_size=1, shadow_conninfo=other, open=False) as pool:
            async with handled() as made, pool.connection() as connection_:
                await connection_.execute(INSERT, (1, 10))

        assert (rows(table), rows(other)) == ([], [1])
        assert [kind for kind, _, _ in effects(made)] == ["db.insert.placed"]
    finally:
        with psycopg.connect(table, autocommit=True) as admin:
            admin.execute(f"drop database {own} with (force)".encode())


async def test_without_asyncio_it_is_the_same(table: str) -> None:
    def endpoint() -> Any:
        with plain.connection() as connection:
            connection.execute(INSERT, (1, 10))
        with plain.connection() as connection, connection.transaction():
            connection.cursor().executemany(INSERT, [(2, 1), (3, 1)])
            with pytest.raises(ShadowError):
                connection.execute("commit")
            return connection.execute("select count(*) from placed").fetchone()

    with ConnectionPool(table, min_size=1, open=False) as plain:
        async with handled() as made:
            assert await asyncio.to_thread(endpoint) == (3,)
        with inside("live"), plain.connection() as users:
            users.execute(INSERT, (9, 10))

        assert rows(table) == [9]
        assert nothing_is_held(table)
    assert [kind for kind, _, _ in effects(made)] == ["db.insert.placed"] * 2
    with inside(), Connection.connect(table) as alone:
        alone.execute(INSERT, (4, 10))
    assert rows(table) == [9]


async def test_a_class_of_the_users_own_cant_take_the_guards_place(table: str) -> None:
    with pytest.raises(SettingError):
        AsyncConnectionPool(table, connection_class=psycopg.AsyncConnection, open=False)
    async with handled():
        made = await AsyncConnection.connect(table, cursor_factory=psycopg.AsyncClientCursor)
        async with made:
            with pytest.raises(ShadowError, match="cursor"):
                made.cursor()


async def test_background_tasks_are_in_the_transaction_and_undone_with_it(table: str, redis_url: str) -> None:
    """Through the middleware, as a request of a real service."""
    seen: list[Any] = []
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def order(_request: Request) -> Response:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
            return Response(background=BackgroundTask(later))

        async def later() -> None:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (2, 10))
                cursor = await connection.execute("select id from placed order by id")
                seen.extend(await cursor.fetchall())

        app = Starlette(routes=[Route("/", order, methods=["POST"])])
        capture = await captured(app, redis_url, sampled("/", "POST", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)

        assert seen == [(1,), (2,)]
        assert rows(table) == []
        assert nothing_is_held(table)
    assert [one["kind"] for one in capture.effects] == ["db.insert.placed"] * 2


async def test_a_request_that_raises_leaves_nothing(table: str, redis_url: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, open=False) as pool:

        async def order(_request: Request) -> Response:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
            raise KeyError

        app = ParallelRunMiddleware(Starlette(routes=[Route("/", order)]), service="shop", redis_url=redis_url)
        _, raised = await call(app, sampled("/", version="new", role="shadow"))
        await asyncio.gather(*CLEANUP_TASKS)
        await app.aclose()

        assert isinstance(raised, KeyError)
        assert nothing_is_held(table)


async def test_a_request_that_is_cancelled_leaves_nothing(table: str) -> None:
    async with AsyncConnectionPool(table, min_size=1, shadow_max_size=1, open=False, timeout=5) as pool:
        writing = asyncio.Event()

        async def endpoint() -> None:
            async with pool.connection() as connection:
                await connection.execute(INSERT, (1, 10))
                writing.set()
                await connection.execute("select pg_sleep(60)")

        async with handled():
            task = asyncio.create_task(endpoint())
            await writing.wait()
            task.cancel()
            await asyncio.wait([task])
        async with handled(), pool.connection() as connection:  # there is a connection again
            await connection.execute(INSERT, (1, 10))

        assert rows(table) == []
        assert nothing_is_held(table)


async def test_a_pool_that_a_shadow_opened_serves_users(table: str) -> None:
    """Whose connections are made, and made ready, by tasks that the pool began then."""

    async def ready(connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute("set search_path = public")
        await connection.commit()

    pool = AsyncConnectionPool(table, min_size=1, open=False, configure=ready)
    async with handled():
        await pool.open(wait=True)
        async with pool.connection() as connection:
            await connection.execute(INSERT, (1, 10))
    async with pool.connection() as connection:
        await connection.execute(INSERT, (2, 10))
    await pool.close()

    assert rows(table) == [2]
