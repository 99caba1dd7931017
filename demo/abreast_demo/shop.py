"""Code that both versions of the shop share: data, prices, and middleware for tests and drills."""

from __future__ import annotations

import random
import signal
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from http import HTTPStatus
from importlib import resources
from typing import Any

from psycopg.rows import dict_row
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abreast.cache import Cache
from abreast.integrations.psycopg_pool import AsyncConnectionPool

SHOP_SERVICE = "shop"
RELEASE_BY_VERSION = {"old": "shop-1.8", "new": "shop-2.0"}
SEED_LOCK = 5_270_116  # advisory lock: processes of one version may start at the same time
MAX_CONNECTIONS = 8
CACHE_TTL_S = 20.0
CURRENCY_RATES = {"EUR": Decimal(1), "USD": Decimal("1.0847"), "GBP": Decimal("0.8553"), "JPY": Decimal("163.27")}
CURRENCIES_WITHOUT_MINOR_UNIT = frozenset({"JPY"})
CENT_QUANTUM = Decimal("0.01")
HEALTH_PATH = "/healthz"
SEARCH_ID_HEADER = "x-search-id"

ShopRow = dict[str, Any]


@cache
def load_statement(name: str) -> bytes:
    return (resources.files("abreast_demo") / "sql" / f"{name}.sql").read_bytes()


class ShopDatabase:
    """Named statements on a pool that rolls back what a shadow request writes."""

    def __init__(self, url: str) -> None:
        self.pool = AsyncConnectionPool(
            url, min_size=2, max_size=MAX_CONNECTIONS, open=False, kwargs={"autocommit": True, "row_factory": dict_row}
        )

    async def open(self) -> None:
        """Create the tables and the products, if they don't exist."""
        await self.pool.open(wait=True)
        async with self.pool.connection() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(%s)", (SEED_LOCK,))
            await connection.execute(load_statement("schema"))

    async def close(self) -> None:
        await self.pool.close()

    async def fetch_rows(self, name: str, **values: Any) -> list[ShopRow]:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(load_statement(name), values)
            return await cursor.fetchall()

    async def write(self, name: str, **values: Any) -> None:
        async with self.pool.connection() as connection:
            await connection.execute(load_statement(name), values)


@dataclass(frozen=True, slots=True)
class Product:
    id: int
    name: str
    category: str
    price_cents: int
    stock: int

    @property
    def price(self) -> Decimal:
        return Decimal(self.price_cents) / 100

    def convert_price(self, currency: str) -> Decimal:
        """Return the exact price, not rounded."""
        return self.price * CURRENCY_RATES[currency]


def summarise_product(product: Product) -> ShopRow:
    return {"id": product.id, "name": product.name, "price": float(product.price)}


@dataclass(frozen=True, slots=True)
class ShopStats:
    products: int
    in_stock: int
    average_cents: int
    median_cents: int


def round_to_cents(amount: Decimal) -> Decimal:
    return amount.quantize(CENT_QUANTUM, ROUND_HALF_UP)


class Shop:
    """The catalogue, read through the cache, and orders."""

    def __init__(self, database_url: str, cache_url: str) -> None:
        self.database = ShopDatabase(database_url)
        # It holds database rows, not answers, so both versions can share it.
        self.cache = Cache(cache_url, namespace="shop", schema_version="1", ttl=CACHE_TTL_S)

    async def open(self) -> None:
        await self.database.open()

    async def close(self) -> None:
        await self.cache.aclose()
        await self.database.close()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Be open while the app runs, as the state that `get_shop` returns."""
        await self.open()
        app.state.shop = self
        yield
        await self.close()

    async def list_categories(self) -> list[ShopRow]:
        return await self.cache.get("categories", lambda: self.database.fetch_rows("categories"))

    async def list_category_products(self, slug: str) -> list[Product]:
        rows = await self.cache.get(f"category:{slug}", lambda: self.database.fetch_rows("category", slug=slug))
        return [Product(**row) for row in rows]

    async def find_product(self, product_id: int) -> Product | None:
        rows = await self.cache.get(f"product:{product_id}", lambda: self.database.fetch_rows("product", id=product_id))
        return Product(**rows[0]) if rows else None

    async def list_reviews(self, product_id: int) -> list[ShopRow]:
        return await self.cache.get(f"reviews:{product_id}", lambda: self.database.fetch_rows("reviews", id=product_id))

    async def list_related_product_ids(self, product_id: int) -> set[int]:
        rows = await self.cache.get(f"related:{product_id}", lambda: self.database.fetch_rows("related", id=product_id))
        return {row["id"] for row in rows}

    async def get_stats(self) -> ShopStats:
        rows = await self.cache.get("stats", lambda: self.database.fetch_rows("stats"))
        return ShopStats(**rows[0])

    async def search_products(self, statement: str, pattern: str) -> list[Product]:
        """Search without the cache, because search words repeat too seldom."""
        return [Product(**row) for row in await self.database.fetch_rows(statement, pattern=pattern)]

    async def create_order(self, product_id: int, quantity: int) -> uuid.UUID:
        order_id = uuid.uuid4()
        await self.database.write("order", id=order_id, product=product_id, quantity=quantity)
        return order_id


async def handle_database_error(request: Request, error: Exception) -> Response:  # noqa: ARG001  # Starlette's signature
    return JSONResponse({"detail": "the database refused"}, HTTPStatus.INTERNAL_SERVER_ERROR)


class FaultMiddleware:
    """Answer every request with 500 after SIGUSR1, until SIGUSR2. Health checks still pass."""

    is_failing = False

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_failing and scope["type"] == "http" and scope["path"] != HEALTH_PATH:
            await JSONResponse({"detail": "failing because of a drill"}, 500)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @classmethod
    def install_signal_handlers(cls) -> None:
        def set_failing(number: int, _frame: object) -> None:
            cls.is_failing = number == signal.SIGUSR1

        signal.signal(signal.SIGUSR1, set_failing)
        signal.signal(signal.SIGUSR2, set_failing)


class RequestIdMiddleware:
    """Give each request an id that its mirrored copies do not share, unlike Envoy's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def current_timestamp() -> str:
    return datetime.now(UTC).isoformat()


def shuffle_members(members: Iterable[int]) -> list[int]:
    """Return the members in random order, as an unordered set may."""
    shuffled_members = list(members)
    random.shuffle(shuffled_members)
    return shuffled_members
