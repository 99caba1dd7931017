"""Connections to the ledger for everything but the worker, and the named queries in queries/*.sql."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import Any

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction
from psycopg.abc import Params
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from abreast_sidecar.errors import LedgerError

POOL_SIZE = 8
CONNECT_TIMEOUT = 3  # seconds, for one attempt
WAIT_FOR_CONNECTION = 2.5  # seconds that a call waits while Postgres is away
STATEMENT_TIMEOUT = 20  # seconds
LIMITS = (
    f"set local statement_timeout = '{STATEMENT_TIMEOUT}s'; set local jit = off; set local timezone = 'UTC'"
)

QUERY_NAME = re.compile(rb"^-- name: (\w+)\n", re.MULTILINE)

Connection = AsyncConnection[DictRow]
Row = dict[str, Any]


@cache
def statements() -> Mapping[str, bytes]:
    """Read all named queries."""
    folder = resources.files("abreast_sidecar.store") / "queries"
    return parse_queries(
        {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(".sql")}
    )


def parse_queries(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Split files into queries: each begins with a line `-- name: NAME`. Raise ValueError for a duplicate name."""
    queries: dict[str, bytes] = {}
    for file, text in sorted(files.items()):
        _, *parts = QUERY_NAME.split(text)
        for name, query in zip(parts[::2], parts[1::2], strict=True):
            if name.decode() in queries:
                raise ValueError(f"{file}: another query is named {name.decode()}")
            queries[name.decode()] = query.strip()
    return queries


def statement(name: str) -> bytes:
    """Return a query for psycopg. Raise KeyError for an unknown name."""
    return statements()[name]


class Limited(AsyncConnection[DictRow]):
    """Sets limits in each transaction: a pooler in transaction mode takes no options, and gives the next transaction
    another session. A single statement is a transaction of its own.
    """

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        outermost = self._idle
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if outermost:
                await super().execute(LIMITS.encode())
            yield transaction

    async def execute(self, query: Any, params: Params | None = None, **options: Any) -> AsyncCursor[DictRow]:
        if not self._idle:
            return await super().execute(query, params, **options)
        async with self.transaction():
            return await super().execute(query, params, **options)

    @staticmethod
    async def check(connection: Limited) -> None:
        """Whether it still works. Raise otherwise."""
        await AsyncConnection.execute(connection, "")

    @property
    def _idle(self) -> bool:
        return self.info.transaction_status == TransactionStatus.IDLE


class Database:
    """Opens at once, also where Postgres is away; calls then raise LedgerError after a few seconds."""

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self._pool: AsyncConnectionPool[Limited] = AsyncConnectionPool(
            conninfo,
            min_size=1,
            max_size=POOL_SIZE,
            timeout=WAIT_FOR_CONNECTION,
            reconnect_timeout=WAIT_FOR_CONNECTION,
            kwargs={
                "row_factory": dict_row,
                "autocommit": True,
                "connect_timeout": CONNECT_TIMEOUT,
                "application_name": "abreast",
                "prepare_threshold": None,  # plans must see the filters
            },
            connection_class=Limited,
            check=Limited.check,
            open=False,
        )

    async def open(self) -> None:
        await self._pool.open(wait=False)

    async def close(self) -> None:
        await self._pool.close(timeout=2.0)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit. Raise LedgerError in place of the driver's errors."""
        with translated():
            async with self._pool.connection() as connection:
                yield connection

    async def rows(self, name: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        """Return the rows of a named query."""
        async with self.connection() as connection:
            cursor = await connection.execute(statement(name), parameters or {})
            return await cursor.fetchall()

    async def execute(self, name: str, parameters: Mapping[str, Any]) -> None:
        """For statements without rows."""
        async with self.connection() as connection:
            await connection.execute(statement(name), parameters)

    async def one(self, name: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
        rows = await self.rows(name, parameters)
        return rows[0] if rows else None


class translated:  # noqa: N801  # used like a function
    """Turns psycopg's errors into LedgerError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, psycopg.Error):
            raise LedgerError(_message(error)) from error


def _message(error: psycopg.Error) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, psycopg.errors.QueryCanceled):
        return f"the ledger took more than {STATEMENT_TIMEOUT} s; ask for a shorter window, or one that begins with a full hour"
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
        return f"the ledger's tables are missing or old ({said}); run: abreast migrate"
    if isinstance(error, psycopg.OperationalError):
        return f"postgres can't be reached, check ABREAST_POSTGRES_URL and the server: {said}"
    return f"postgres refuses: {said}"
