"""What both versions of the shop know and do alike: products, reviews, orders, prices."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from abreast.cache import Cache
from abreast_demo.data import ShopDatabase, ShopRow

CURRENCY_RATES = {
    "EUR": Decimal(1),
    "USD": Decimal("1.0847"),
    "GBP": Decimal("0.8553"),
    "JPY": Decimal("163.27"),
}
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
        rows = await self.cache.get(
            f"category:{slug}", lambda: self.database.fetch_rows("category", slug=slug)
        )
        return [Product(**row) for row in rows]

    async def find_product(self, product_id: int) -> Product | None:
        rows = await self.cache.get(
            f"product:{product_id}", lambda: self.database.fetch_rows("product", id=product_id)
        )
        return Product(**rows[0]) if rows else None

    async def list_reviews(self, product_id: int) -> list[ShopRow]:
        return await self.cache.get(
            f"reviews:{product_id}", lambda: self.database.fetch_rows("reviews", id=product_id)
        )

    async def list_related_product_ids(self, product_id: int) -> set[int]:
        rows = await self.cache.get(
            f"related:{product_id}", lambda: self.database.fetch_rows("related", id=product_id)
        )
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
