"""What both versions of the shop know and do alike: products, reviews, orders, prices."""

from __future__ import annotations

import random
import signal
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib import resources
from typing import Any

from psycopg.rows import dict_row
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abreast.cache import Cache
from abreast.integrations.psycopg_pool import AsyncConnectionPool

SEED_LOCK = 5_270_116  # several processes of one version may start at once
MAX_CONNECTIONS = 8

ShopRow = dict[str, Any]


@cache
def load_statement(name: str) -> bytes:
    return (resources.files("abreast_demo") / "sql" / f"{name}.sql").read_bytes()


class ShopDatabase:
    """What a shadow request writes is rolled back at its end."""

    def __init__(self, url: str) -> None:
        self.pool = AsyncConnectionPool(
            url, min_size=2, max_size=MAX_CONNECTIONS, open=False, kwargs={"autocommit": True, "row_factory": dict_row}
        )

    async def open(self) -> None:
        """Create what is missing, and fill it with what every shop of this kind sells."""
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


CURRENCY_RATES = {"EUR": Decimal(1), "USD": Decimal("1.0847"), "GBP": Decimal("0.8553"), "JPY": Decimal("163.27")}
CURRENCIES_WITHOUT_MINOR_UNIT = frozenset({"JPY"})  # currencies without a smaller unit
CENT_QUANTUM = Decimal("0.01")
CACHE_TTL_S = 20.0  # seconds


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
        """The exact price, still to be rounded."""
        return self.price * CURRENCY_RATES[currency]


@dataclass(frozen=True, slots=True)
class ShopStats:
    products: int
    in_stock: int
    average_cents: int
    median_cents: int


def round_to_cents(amount: Decimal) -> Decimal:
    return amount.quantize(CENT_QUANTUM, ROUND_HALF_UP)


class Shop:
    """Reads go service → cache → service → database → service."""

    def __init__(self, database_url: str, cache_url: str) -> None:
        self.database = ShopDatabase(database_url)
        self.cache = Cache(
            cache_url, namespace="shop", schema_version="1", ttl=CACHE_TTL_S
        )  # rows, which both read alike

    async def open(self) -> None:
        await self.database.open()

    async def close(self) -> None:
        await self.cache.aclose()
        await self.database.close()

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
        """Not cached: users search for too many things."""
        return [Product(**row) for row in await self.database.fetch_rows(statement, pattern=pattern)]

    async def create_order(self, product_id: int, quantity: int) -> uuid.UUID:
        order_id = uuid.uuid4()
        await self.database.write("order", id=order_id, product=product_id, quantity=quantity)
        return order_id


HEALTH_PATH = "/healthz"


class FaultMiddleware:
    is_failing = False

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.is_failing and scope["type"] == "http" and scope["path"] != HEALTH_PATH:
            await JSONResponse({"detail": "out of order"}, 500)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @classmethod
    def install_signal_handlers(cls) -> None:
        def set_failing(number: int, _frame: object) -> None:
            cls.is_failing = number == signal.SIGUSR1

        signal.signal(signal.SIGUSR1, set_failing)
        signal.signal(signal.SIGUSR2, set_failing)


SHOP_SERVICE = "shop"
RELEASE_BY_VERSION = {"old": "shop-1.8", "new": "shop-2.0"}


SEARCH_ID_HEADER = "x-search-id"


class RequestIdMiddleware:
    """An id of the service's own, since that of Envoy is the same for all copies of a request."""

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
    """A set has no order, and here it shows."""
    shuffled_members = list(members)
    random.shuffle(shuffled_members)
    return shuffled_members
