"""The SQLAlchemy integration on a real Postgres: async and sync engines, with and without sessions."""

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
from support_integrations import get_effects, handle_request, has_no_locks, in_request, query_rows

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


def to_psycopg_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
async def engine(table: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(to_psycopg_url(table))
    protect(engine)
    yield engine
    await engine.dispose()


@pytest.fixture
def sync_engine(table: str) -> Iterator[Engine]:
    engine = create_engine(to_psycopg_url(table))
    protect(engine)
    yield engine
    engine.dispose()


async def place(engine: AsyncEngine, number: int) -> None:
    async with AsyncSession(engine) as session:
        session.add(Placed(id=number, quantity=10))
        await session.commit()


async def count(engine: AsyncEngine) -> int:
    async with AsyncSession(engine) as session:
        return await session.scalar(select(func.count()).select_from(Placed)) or 0


async def test_user_write_is_committed_and_recorded(engine: AsyncEngine, table: str) -> None:
    async with handle_request("live") as context:
        await place(engine, 1)

    assert query_rows(table) == [1]
    shape = "insert into placed (id, quantity) values (?, ?)"
    assert get_effects(context) == [("db.insert.placed", "", {"statement": shape, "values": {"id": 1, "quantity": 10}})]


async def test_shadow_reads_its_writes_in_another_session_and_keeps_none(engine: AsyncEngine, table: str) -> None:
    async with handle_request() as context:
        await place(engine, 1)
        await place(engine, 2)
        visible_count = await count(engine)

    assert visible_count == 2
    assert query_rows(table) == []
    assert [kind for kind, _, _ in get_effects(context)] == ["db.insert.placed"] * 2
    assert has_no_locks(table)
    async with handle_request():
        await place(engine, 1)  # fails if the last shadow was not rolled back
    assert query_rows(table) == []


async def test_savepoints_and_rollbacks_work_in_a_shadow(engine: AsyncEngine, table: str) -> None:
    async with handle_request() as context, AsyncSession(engine) as session:
        session.add(Placed(id=1, quantity=10))
        await session.commit()
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(insert(Placed).values(id=1, quantity=20))
        session.add(Placed(id=2, quantity=10))
        await session.flush()
        await session.rollback()
        visible_ids = list(await session.scalars(select(Placed.id)))

    assert visible_ids == [1]
    assert query_rows(table) == []
    assert [payload["values"]["id"] for _, _, payload in get_effects(context)] == [1]


async def test_autocommit_of_a_shadow_is_rolled_back(engine: AsyncEngine, table: str) -> None:
    async with handle_request():
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.execute(insert(Placed).values(id=1, quantity=10))
        assert await count(engine) == 1

    assert query_rows(table) == []


async def test_bulk_insert_of_a_shadow_is_rolled_back(engine: AsyncEngine, table: str) -> None:
    async with handle_request():
        async with engine.begin() as connection:
            await connection.execute(insert(Placed), [{"id": n, "quantity": 1} for n in range(50)])
        assert await count(engine) == 50

    assert query_rows(table) == []


@pytest.mark.parametrize("statement", ["commit", "insert into placed values (2, 2); commit"])
async def test_statement_that_commits_is_rejected(engine: AsyncEngine, table: str, statement: str) -> None:
    async with handle_request(), engine.connect() as connection:
        with pytest.raises(ShadowError):
            await connection.execute(text(statement))

    assert query_rows(table) == []


async def test_full_shadow_pool_fails_shadows_but_not_users(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast.integrations.sqlalchemy.SHADOW_CONNECTION_TIMEOUT_S", 0.1)
    engine = create_async_engine(to_psycopg_url(table), pool_size=1, max_overflow=0)
    protect(engine, shadow_pool_size=1)
    async with handle_request(), engine.connect():
        async with handle_request() as second:
            with pytest.raises(PoolTimeout):
                await engine.connect()
            assert second.invalid_reason
        with in_request("live"):
            await place(engine, 1)
    await engine.dispose()

    assert query_rows(table) == [1]


async def test_session_that_outlives_its_shadow_is_rolled_back(engine: AsyncEngine, table: str) -> None:
    over = asyncio.Event()

    async def later() -> None:
        async with AsyncSession(engine) as session:
            session.add(Placed(id=1, quantity=10))
            await session.commit()
            await over.wait()
            session.add(Placed(id=2, quantity=10))
            await session.commit()

    async with handle_request():
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    over.set()
    await task

    assert query_rows(table) == []
    assert has_no_locks(table)


async def test_disposed_engine_still_rolls_back_shadows(engine: AsyncEngine, table: str) -> None:
    async with handle_request():
        await place(engine, 1)
    await engine.dispose()
    async with handle_request():
        await place(engine, 1)

    assert query_rows(table) == []


async def test_sync_engine_rolls_back_shadows(sync_engine: Engine, table: str) -> None:
    def endpoint() -> int:
        with Session(sync_engine) as session:
            session.add(Placed(id=1, quantity=10))
            session.commit()
        with Session(sync_engine) as session:
            return session.scalar(select(func.count()).select_from(Placed)) or 0

    async with handle_request() as context:
        assert await asyncio.to_thread(endpoint) == 1
    assert query_rows(table) == []
    assert [kind for kind, _, _ in get_effects(context)] == ["db.insert.placed"]
    assert has_no_locks(table)
    with in_request("live"):
        endpoint()
    assert query_rows(table) == [1]


async def test_separate_database_keeps_writes_of_a_shadow(table: str) -> None:
    """A schema of the same database stands in for the separate database."""
    with psycopg.connect(table) as connection:
        connection.execute("create schema own; create table own.placed (like placed)")
    engine = create_async_engine(to_psycopg_url(table))
    protect(engine, shadow_url=to_psycopg_url(table) + "?options=-csearch_path%3Down")
    async with handle_request():
        await place(engine, 1)
    await engine.dispose()

    assert query_rows(table) == []
    assert query_rows(table, b"select id from own.placed") == [1]


async def test_protect_rejects_other_drivers_and_custom_creators(table: str) -> None:
    with pytest.raises(SettingError, match="psycopg 3"):
        protect(create_engine("sqlite://"))
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(table))
    protect(engine)
    with in_request(), pytest.raises(ShadowError, match="creator"):
        engine.connect()
    engine.dispose()


async def test_engine_that_a_shadow_used_first_serves_users(table: str) -> None:
    engine = create_async_engine(to_psycopg_url(table), pool_pre_ping=True)
    protect(engine)
    async with handle_request():
        await place(engine, 1)
        assert await count(engine) == 1
    await place(engine, 2)
    await engine.dispose()

    assert query_rows(table) == [2]


async def test_session_left_open_by_a_shadow_serves_a_user(engine: AsyncEngine, table: str) -> None:
    session = AsyncSession(engine)
    async with handle_request():
        session.add(Placed(id=1, quantity=10))
        await session.flush()
    with in_request("live"):
        session.add(Placed(id=2, quantity=10))
        await session.commit()
    await session.close()

    assert query_rows(table) == [2]


async def test_scoped_session_serves_a_shadow_and_then_a_user(sync_engine: Engine, table: str) -> None:
    """The session of the thread is never removed."""
    sessions = scoped_session(sessionmaker(sync_engine))
    with ThreadPoolExecutor(1) as thread:

        def place_in_thread(number: int) -> None:
            sessions.add(Placed(id=number, quantity=10))
            sessions.flush()

        def run(call: Callable[[], None]) -> Awaitable[None]:
            return asyncio.get_running_loop().run_in_executor(thread, copy_context().run, call)

        async with handle_request():
            await run(partial(place_in_thread, 1))
        with in_request("live"):
            await run(partial(place_in_thread, 2))
            await run(sessions.commit)
        await run(sessions.remove)

    assert query_rows(table) == [2]


async def test_user_transaction_on_the_session_of_a_shadow_survives(engine: AsyncEngine, table: str) -> None:
    async with AsyncSession(engine) as session:
        async with handle_request():
            session.add(Placed(id=1, quantity=10))
            await session.commit()
            with in_request("live"):
                session.add(Placed(id=2, quantity=10))
                await session.flush()
        with in_request("live"):
            await session.commit()

    assert query_rows(table) == [2]
