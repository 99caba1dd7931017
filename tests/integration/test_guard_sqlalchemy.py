"""SQLAlchemy's guard on a real Postgres, async and sync, with sessions and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from abreast.errors import SettingError, ShadowError
from abreast.integrations.sqlalchemy import protect
from support_guards import effects, handled, inside, nothing_is_held, rows

pytestmark = pytest.mark.postgres


class Base(DeclarativeBase):
    pass


class Placed(Base):
    __tablename__ = "placed"

    id: Mapped[int] = mapped_column(primary_key=True)
    quantity: Mapped[int]


@pytest.fixture
def table(postgres_url: str) -> str:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create table placed (id integer primary key, quantity integer not null)")
    return postgres_url


def dialect(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
async def engine(table: str) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(dialect(table))
    protect(made)
    yield made
    await made.dispose()


@pytest.fixture
def plain(table: str) -> Iterator[Engine]:
    made = create_engine(dialect(table))
    protect(made)
    yield made
    made.dispose()


async def place(engine: AsyncEngine, number: int) -> None:
    async with AsyncSession(engine) as session:
        session.add(Placed(id=number, quantity=10))
        await session.commit()


async def count(engine: AsyncEngine) -> int:
    async with AsyncSession(engine) as session:
        return await session.scalar(select(func.count()).select_from(Placed)) or 0


async def test_a_user_writes_and_it_stays_and_is_recorded(engine: AsyncEngine, table: str) -> None:
    async with handled("live") as made:
        await place(engine, 1)

    assert rows(table) == [1]
    shape = "insert into placed (id, quantity) values (?, ?)"
    assert effects(made) == [("db.insert.placed", "", {"statement": shape, "values": {"id": 1, "quantity": 10}})]


async def test_a_shadow_reads_what_it_wrote_in_another_session_and_nothing_stays(
    engine: AsyncEngine, table: str
) -> None:
    async with handled() as made:
        await place(engine, 1)
        await place(engine, 2)
        seen = await count(engine)

    assert seen == 2
    assert rows(table) == []
    assert [kind for kind, _, _ in effects(made)] == ["db.insert.placed"] * 2
    assert nothing_is_held(table)
    async with handled():
        await place(engine, 1)  # the next one sees nothing of it
    assert rows(table) == []


async def test_savepoints_and_rollbacks_work_as_for_users(engine: AsyncEngine, table: str) -> None:
    async with handled() as made, AsyncSession(engine) as session:
        session.add(Placed(id=1, quantity=10))
        await session.commit()
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(insert(Placed).values(id=1, quantity=20))
        session.add(Placed(id=2, quantity=10))
        await session.flush()
        await session.rollback()
        seen = list(await session.scalars(select(Placed.id)))

    assert seen == [1]
    assert rows(table) == []
    assert [payload["values"]["id"] for _, _, payload in effects(made)] == [1]


async def test_autocommit_commits_nothing(engine: AsyncEngine, table: str) -> None:
    async with handled():
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(insert(Placed).values(id=1, quantity=10))
        assert await count(engine) == 1

    assert rows(table) == []


async def test_many_rows_are_gone_too(engine: AsyncEngine, table: str) -> None:
    async with handled():
        async with engine.begin() as connection:
            await connection.execute(insert(Placed), [{"id": n, "quantity": 1} for n in range(50)])
        assert await count(engine) == 50

    assert rows(table) == []


@pytest.mark.parametrize("statement", ["commit", "insert into placed values (2, 2); commit"])
async def test_a_statement_cant_commit(engine: AsyncEngine, table: str, statement: str) -> None:
    async with handled(), engine.connect() as connection:
        with pytest.raises(ShadowError):
            await connection.execute(text(statement))

    assert rows(table) == []


async def test_users_have_connections_though_shadows_hold_all_of_theirs(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast.integrations.sqlalchemy.TIMEOUT", 0.1)
    engine = create_async_engine(dialect(table), pool_size=1, max_overflow=0)
    protect(engine, shadow_pool_size=1)
    async with handled(), engine.connect():
        async with handled() as second:
            with pytest.raises(PoolTimeout):
                await engine.connect()
            assert second.invalid_reason
        with inside("live"):
            await place(engine, 1)
    await engine.dispose()

    assert rows(table) == [1]


async def test_a_session_that_outlives_its_request_is_undone(engine: AsyncEngine, table: str) -> None:
    over = asyncio.Event()

    async def later() -> None:
        async with AsyncSession(engine) as session:
            session.add(Placed(id=1, quantity=10))
            await session.commit()
            await over.wait()
            session.add(Placed(id=2, quantity=10))
            await session.commit()

    async with handled():
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    over.set()
    await task

    assert rows(table) == []
    assert nothing_is_held(table)


async def test_it_holds_after_the_engine_was_disposed_of(engine: AsyncEngine, table: str) -> None:
    async with handled():
        await place(engine, 1)
    await engine.dispose()
    async with handled():
        await place(engine, 1)

    assert rows(table) == []


async def test_without_asyncio_it_is_the_same(plain: Engine, table: str) -> None:
    def endpoint() -> int:
        with Session(plain) as session:
            session.add(Placed(id=1, quantity=10))
            session.commit()
        with Session(plain) as session:
            return session.scalar(select(func.count()).select_from(Placed)) or 0

    async with handled() as made:
        assert await asyncio.to_thread(endpoint) == 1
    assert rows(table) == []
    assert [kind for kind, _, _ in effects(made)] == ["db.insert.placed"]
    assert nothing_is_held(table)
    with inside("live"):
        endpoint()
    assert rows(table) == [1]


async def test_a_database_of_its_own_keeps_what_a_shadow_writes(table: str) -> None:
    """Here a schema of the same database stands for it."""
    with psycopg.connect(table) as connection:
        connection.execute("create schema own; create table own.placed (like placed)")
    engine = create_async_engine(dialect(table))
    protect(engine, shadow_url=dialect(table) + "?options=-csearch_path%3Down")
    async with handled():
        await place(engine, 1)
    await engine.dispose()

    assert rows(table) == []
    assert rows(table, b"select id from own.placed") == [1]


async def test_what_is_not_known_is_not_protected_and_says_so(table: str) -> None:
    with pytest.raises(SettingError, match="psycopg 3"):
        protect(create_engine("sqlite://"))
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(table))
    protect(engine)
    with inside(), pytest.raises(ShadowError, match="creator"):
        engine.connect()
    engine.dispose()


async def test_an_engine_that_a_shadow_used_first_serves_users(table: str) -> None:
    engine = create_async_engine(dialect(table), pool_pre_ping=True)
    protect(engine)
    async with handled():
        await place(engine, 1)
        assert await count(engine) == 1
    await place(engine, 2)
    await engine.dispose()

    assert rows(table) == [2]


async def test_a_session_that_a_shadow_leaves_open_is_a_users_again(engine: AsyncEngine, table: str) -> None:
    session = AsyncSession(engine)
    async with handled():
        session.add(Placed(id=1, quantity=10))
        await session.flush()
    with inside("live"):
        session.add(Placed(id=2, quantity=10))
        await session.commit()
    await session.close()

    assert rows(table) == [2]


async def test_a_sessions_thread_serves_a_shadow_and_then_a_user(plain: Engine, table: str) -> None:
    """It is never removed, as with a framework that does it for others."""
    sessions = scoped_session(sessionmaker(plain))
    with ThreadPoolExecutor(1) as thread:

        def place_in_thread(number: int) -> None:
            sessions.add(Placed(id=number, quantity=10))
            sessions.flush()

        def run(call: Callable[[], None]) -> Awaitable[None]:
            return asyncio.get_running_loop().run_in_executor(thread, copy_context().run, call)

        async with handled():
            await run(partial(place_in_thread, 1))
        with inside("live"):
            await run(partial(place_in_thread, 2))
            await run(sessions.commit)
        await run(sessions.remove)

    assert rows(table) == [2]


async def test_what_a_user_has_begun_on_the_session_of_a_shadow_goes_on(engine: AsyncEngine, table: str) -> None:
    async with AsyncSession(engine) as session:
        async with handled():
            session.add(Placed(id=1, quantity=10))
            await session.commit()
            with inside("live"):
                session.add(Placed(id=2, quantity=10))
                await session.flush()
        with inside("live"):
            await session.commit()

    assert rows(table) == [2]
