"""The shop's database: one Postgres for each version."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from psycopg.rows import dict_row

from abreast.guards.psycopg_pool import AsyncConnectionPool

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
            url,
            min_size=2,
            max_size=MAX_CONNECTIONS,
            open=False,
            kwargs={"autocommit": True, "row_factory": dict_row},
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
