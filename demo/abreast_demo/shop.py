"""What both versions of the shop know and do alike: products, reviews, orders, prices."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from abreast.cache import Cache
from abreast_demo.data import Database, Row

RATES = {"EUR": Decimal(1), "USD": Decimal("1.0847"), "GBP": Decimal("0.8553"), "JPY": Decimal("163.27")}
WHOLE = frozenset({"JPY"})  # currencies without a smaller unit
CENT = Decimal("0.01")
KEPT = 20.0  # seconds


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

    def price_in(self, currency: str) -> Decimal:
        """The exact price, still to be rounded."""
        return self.price * RATES[currency]


@dataclass(frozen=True, slots=True)
class Stats:
    products: int
    in_stock: int
    average_cents: int
    median_cents: int


def rounded(amount: Decimal) -> Decimal:
    return amount.quantize(CENT, ROUND_HALF_UP)


class Shop:
    """Reads go service → cache → service → database → service."""

    def __init__(self, database_url: str, cache_url: str) -> None:
        self.database = Database(database_url)
        self.cache = Cache(cache_url, namespace="shop", form="1", ttl=KEPT)  # rows, which both read alike

    async def open(self) -> None:
        await self.database.open()

    async def close(self) -> None:
        await self.cache.aclose()
        await self.database.close()

    async def categories(self) -> list[Row]:
        return await self.cache.get("categories", lambda: self.database.rows("categories"))

    async def category(self, slug: str) -> list[Product]:
        rows = await self.cache.get(f"category:{slug}", lambda: self.database.rows("category", slug=slug))
        return [Product(**row) for row in rows]

    async def product(self, product: int) -> Product | None:
        rows = await self.cache.get(f"product:{product}", lambda: self.database.rows("product", id=product))
        return Product(**rows[0]) if rows else None

    async def reviews(self, product: int) -> list[Row]:
        return await self.cache.get(f"reviews:{product}", lambda: self.database.rows("reviews", id=product))

    async def related(self, product: int) -> set[int]:
        rows = await self.cache.get(f"related:{product}", lambda: self.database.rows("related", id=product))
        return {row["id"] for row in rows}

    async def stats(self) -> Stats:
        rows = await self.cache.get("stats", lambda: self.database.rows("stats"))
        return Stats(**rows[0])

    async def search(self, statement: str, pattern: str) -> list[Product]:
        """Not cached: users search for too many things."""
        return [Product(**row) for row in await self.database.rows(statement, pattern=pattern)]

    async def order(self, product: int, quantity: int) -> uuid.UUID:
        placed = uuid.uuid4()
        await self.database.write("order", id=placed, product=product, quantity=quantity)
        return placed
