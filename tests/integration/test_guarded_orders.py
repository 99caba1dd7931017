"""Two versions of a service that writes, each on a database of its own: one behind psycopg's pool, one on SQLAlchemy."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson
import psycopg
import pytest
from sqlalchemy import BigInteger
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from abreast import ParallelRunMiddleware
from abreast.context import CLEANUP_TASKS
from abreast.integrations.psycopg.pool import AsyncConnectionPool
from abreast.integrations.sqlalchemy import protect
from abreast.middleware import App
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer
from support import eventually_async
from support_guards import nothing_is_held
from support_middleware import SERVICE, call, http_scope, marks
from support_pairs import outcomes, rows, running

AT_ONCE = 8  # no more than shadows have connections: one that waits 5 s for one fails
MOST = 10  # the planted difference: new writes no more than these
TABLE = b"create table orders (id bigint primary key, quantity integer not null)"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    quantity: Mapped[int]


@dataclass(frozen=True)
class Urls:
    redis: str
    ledger: str
    old: str
    new: str
    spare: str  # for shadows of new, where they have a database of their own


@pytest.fixture
async def urls(redis_url: str, postgres_url: str, postgres_server: PostgresServer) -> AsyncIterator[Urls]:
    names = [f"orders_{uuid.uuid4().hex}" for _ in range(3)]
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        for name in names:
            admin.execute(f"create database {name}".encode())
            with psycopg.connect(postgres_server.url(name)) as connection:
                connection.execute(TABLE)
        yield Urls(redis_url, postgres_url, *map(postgres_server.url, names))
        for name in names:
            admin.execute(f"drop database {name} with (force)".encode())


def service(endpoint: Any, urls: Urls) -> ParallelRunMiddleware:
    app = Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    return ParallelRunMiddleware(app, service=SERVICE, redis_url=urls.redis)


def old_service(pool: AsyncConnectionPool, urls: Urls) -> ParallelRunMiddleware:
    async def order(request: Request) -> Response:
        wanted = await request.json()
        async with pool.connection() as connection:
            await connection.execute(
                "insert into orders (id, quantity) values (%s, %s)", (wanted["id"], wanted["quantity"])
            )
        async with pool.connection() as connection:
            cursor = await connection.execute("select id from orders where id = %s", (wanted["id"],))
            found = await cursor.fetchone()
        return JSONResponse({"order": found and found[0]}, 201)

    return service(order, urls)


def new_service(engine: Any, urls: Urls) -> ParallelRunMiddleware:
    async def order(request: Request) -> Response:
        wanted = await request.json()
        async with AsyncSession(engine) as session:
            session.add(Order(id=wanted["id"], quantity=min(wanted["quantity"], MOST)))
            await session.commit()
        async with AsyncSession(engine) as session:
            found = await session.get(Order, wanted["id"])
        return JSONResponse({"order": found and found.id}, 201)

    return service(order, urls)


async def send(old: App, new: App, orders: int) -> None:
    """As Envoy does: old answers, new gets a copy. Every tenth order is a large one."""
    bounded = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        body = orjson.dumps({"id": number, "quantity": 50 if number % 10 == 0 else 1})
        pair = str(uuid.uuid4())
        async with bounded:
            sent = await asyncio.gather(
                *[
                    call(app, http_scope("/orders", "POST", marks(pair, version=version, role=role)), [body])
                    for app, version, role in ((old, "old", "live"), (new, "new", "shadow"))
                ]
            )
        for messages, raised in sent:
            assert (messages[0]["status"], raised) == (201, None)
            assert orjson.loads(messages[1]["body"]) == {"order": number}, "it reads what it has written"

    await asyncio.gather(*[one(number) for number in range(orders)])
    await asyncio.gather(*CLEANUP_TASKS)


@pytest.mark.parametrize(
    ("orders", "separate_database"), [(300, False), (200, True)], ids=["rolled back", "a database of its own"]
)
async def test_shadowed_orders_are_where_the_setting_says(urls: Urls, orders: int, own: bool) -> None:
    engine = create_async_engine(urls.new.replace("postgresql:", "postgresql+psycopg:"))
    spare = urls.spare.replace("postgresql:", "postgresql+psycopg:")
    protect(engine, shadow_url=spare if own else None, shadow_pool_size=AT_ONCE)
    settings = Settings(redis_url=urls.redis, postgres_url=urls.ledger, claim_idle=0.5, shutdown_timeout=5.0)
    async with AsyncConnectionPool(urls.old, min_size=8, open=False) as pool, running(settings):
        old, new = old_service(pool, urls), new_service(engine, urls)
        await send(old, new, orders)
        await old.aclose()
        await new.aclose()

        async def judged() -> bool:
            return sum(outcomes(urls.ledger).values()) == orders

        await eventually_async(judged, what="all pairs are in the ledger")
        held = nothing_is_held(urls.new)
    await engine.dispose()

    assert rows(urls.old, "select count(*), sum(quantity) from orders") == [(orders, orders // 10 * (9 + 50))]
    assert rows(urls.new, "select count(*) from orders") == [(0,)]
    assert rows(urls.spare, "select count(*) from orders") == [(orders if own else 0,)]
    assert held
    assert outcomes(urls.ledger) == {"match": orders // 10 * 9, "mismatch": orders // 10}
    assert rows(urls.ledger, "select part, path, kind, count, detail->>'old', detail->>'new' from abreast.finding") == [
        ("effect", "db.insert.orders.$.values.quantity", "changed", orders // 10, "50", "10")
    ]
