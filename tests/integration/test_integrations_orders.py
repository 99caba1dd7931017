"""Two versions of a service that writes: old on the psycopg pool, new on SQLAlchemy, each on a separate database."""

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
from abreast.integrations.psycopg_pool import AsyncConnectionPool
from abreast.integrations.sqlalchemy import protect
from abreast.middleware import App
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer
from support import eventually_async
from support_integrations import has_no_locks
from support_middleware import SERVICE, call, http_scope, marks
from support_pairs import outcomes, rows, run_worker

MAX_IN_FLIGHT = 8  # as many as connections for shadows, because a shadow fails after 5 s of waiting
MAX_NEW_QUANTITY = 10  # the planted difference: new writes at most this quantity
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
    shadow: str  # for shadows of new in the mode separate_database


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
        body = await request.json()
        async with pool.connection() as connection:
            await connection.execute(
                "insert into orders (id, quantity) values (%s, %s)", (body["id"], body["quantity"])
            )
        async with pool.connection() as connection:
            cursor = await connection.execute("select id from orders where id = %s", (body["id"],))
            row = await cursor.fetchone()
        return JSONResponse({"order": row and row[0]}, 201)

    return service(order, urls)


def new_service(engine: Any, urls: Urls) -> ParallelRunMiddleware:
    async def order(request: Request) -> Response:
        body = await request.json()
        async with AsyncSession(engine) as session:
            session.add(Order(id=body["id"], quantity=min(body["quantity"], MAX_NEW_QUANTITY)))
            await session.commit()
        async with AsyncSession(engine) as session:
            stored = await session.get(Order, body["id"])
        return JSONResponse({"order": stored and stored.id}, 201)

    return service(order, urls)


async def send(old: App, new: App, orders: int) -> None:
    """Send orders to old, and copies to new. Every tenth order is large."""
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def send_order(number: int) -> None:
        body = orjson.dumps({"id": number, "quantity": 50 if number % 10 == 0 else 1})
        pair = str(uuid.uuid4())
        async with slots:
            responses = await asyncio.gather(
                *[
                    call(app, http_scope("/orders", "POST", marks(pair, version=version, role=role)), [body])
                    for app, version, role in ((old, "old", "live"), (new, "new", "shadow"))
                ]
            )
        for messages, error in responses:
            assert (messages[0]["status"], error) == (201, None)
            assert orjson.loads(messages[1]["body"]) == {"order": number}, "the request reads its own write"

    await asyncio.gather(*[send_order(number) for number in range(orders)])
    await asyncio.gather(*CLEANUP_TASKS)


@pytest.mark.parametrize(
    ("orders", "separate_database"), [(300, False), (200, True)], ids=["rollback", "separate database"]
)
async def test_shadow_orders_are_stored_only_in_the_configured_database(
    urls: Urls, orders: int, separate_database: bool
) -> None:
    engine = create_async_engine(urls.new.replace("postgresql:", "postgresql+psycopg:"))
    shadow_url = urls.shadow.replace("postgresql:", "postgresql+psycopg:")
    protect(engine, shadow_url=shadow_url if separate_database else None, shadow_pool_size=MAX_IN_FLIGHT)
    settings = Settings(redis_url=urls.redis, postgres_url=urls.ledger, claim_idle=0.5, shutdown_timeout=5.0)
    async with AsyncConnectionPool(urls.old, min_size=8, open=False) as pool, run_worker(settings):
        old, new = old_service(pool, urls), new_service(engine, urls)
        await send(old, new, orders)
        await old.aclose()
        await new.aclose()

        async def is_compared() -> bool:
            return sum(outcomes(urls.ledger).values()) == orders

        await eventually_async(is_compared, description="all pairs are in the ledger")
        is_unlocked = has_no_locks(urls.new)
    await engine.dispose()

    assert rows(urls.old, "select count(*), sum(quantity) from orders") == [(orders, orders // 10 * (9 + 50))]
    assert rows(urls.new, "select count(*) from orders") == [(0,)]
    assert rows(urls.shadow, "select count(*) from orders") == [(orders if separate_database else 0,)]
    assert is_unlocked
    assert outcomes(urls.ledger) == {"match": orders // 10 * 9, "mismatch": orders // 10}
    assert rows(urls.ledger, "select part, path, kind, count, detail->>'old', detail->>'new' from abreast.finding") == [
        ("effect", "db.insert.orders.$.values.quantity", "changed", orders // 10, "50", "10")
    ]
