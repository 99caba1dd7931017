"""psycopg's pools for a service that is shadowed.

    from abreast.integrations.psycopg.pool import AsyncConnectionPool  # instead of psycopg_pool's

Shadow requests get their connections from a small pool of their own: users never wait for one that a shadow holds, and
no session changes sides. Within a shadow request a connection that was given back is given out again, still in the
same transaction, so that it reads what it has written. All is rolled back when the request is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

import psycopg_pool

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.errors import SettingError
from abreast.integrations.psycopg.connection import (
    Connection,
    ShadowConnection,
    ShadowDatabaseConnection,
    UserConnection,
)
from abreast.integrations.psycopg.connection_async import (
    AsyncConnection,
    AsyncShadowConnection,
    AsyncShadowDatabaseConnection,
    AsyncUserConnection,
)
from abreast.integrations.psycopg.lock_watchdog import mark_invalid

C = TypeVar("C")

SHADOW_POOL_SIZE = 4  # connections of a pool for shadows
SHADOW_CONNECTION_TIMEOUT_S = 5.0  # seconds that a shadow waits for one of them
MAX_WAITERS_PER_CONNECTION = 2  # shadows for each connection that may wait in threads: users need threads too


class PinnedConnections(Generic[C]):
    """Of one pool. Requests' threads may come at once."""

    def __init__(self, on_request_end: Callable[[list[C]], Awaitable[object]]) -> None:
        self._on_request_end = on_request_end  # what is done with those of a request that is over
        self._idle: dict[int, list[C]] = {}
        self._lock = threading.Lock()

    def acquire(self, context: RequestContext) -> C | None:
        """One that this request uses no more; the last one, which has seen most."""
        with self._lock:
            idle = self._idle.get(id(context))
            return idle.pop() if idle else None

    def release(self, context: RequestContext | None, connection: C) -> bool:
        """False where nobody would tell the request's end, or it is over."""
        if context is None:
            return False
        with self._lock:
            cleanups = context.cleanups
            if id(context) not in self._idle:
                if cleanups is None:
                    return False
                self._idle[id(context)] = []
                cleanups.append(lambda: self._finish_request(context))
            self._idle[id(context)].append(connection)
        return True

    async def _finish_request(self, context: RequestContext) -> None:
        with self._lock:
            idle = self._idle.pop(id(context), [])
        await self._on_request_end(idle)


class AsyncConnectionPool(psycopg_pool.AsyncConnectionPool[AsyncConnection[Any]]):
    """`shadow_conninfo` names a database for shadows alone, in which they commit. Other arguments are psycopg_pool's."""

    def __init__(
        self, conninfo: str = "", *, shadow_conninfo: str = "", shadow_max_size: int = SHADOW_POOL_SIZE, **kwargs: Any
    ) -> None:
        _reject_connection_class(kwargs)
        shadow_class: type[AsyncConnection[Any]] = (
            AsyncShadowDatabaseConnection if shadow_conninfo else AsyncShadowConnection
        )
        self.shadow_pool = psycopg_pool.AsyncConnectionPool(
            shadow_conninfo or conninfo, connection_class=shadow_class, **_shadow_pool_options(kwargs, shadow_max_size)
        )
        self._pinned: PinnedConnections[AsyncConnection[Any]] = PinnedConnections(self._return_shadow_connections)
        super().__init__(conninfo, connection_class=AsyncUserConnection, **kwargs)

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        await _run_in_empty_context(super().open(wait, timeout))

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[Any]:
        context = CURRENT_CONTEXT.get()
        if not context.is_shadow:
            return await super().getconn(timeout)
        connection = self._pinned.acquire(context)
        if connection is None:
            if self.shadow_pool.closed:
                await _run_in_empty_context(self.shadow_pool.open())
            try:
                connection = await self.shadow_pool.getconn(timeout)
            except psycopg_pool.PoolTimeout as error:
                mark_invalid(error)
                raise
            connection.request_context = context
            if connection.mode == "rolled back":
                await self._begin_shadow(connection)
        return connection

    async def _begin_shadow(self, connection: AsyncConnection[Any]) -> None:
        try:
            await connection.begin_shadow()
        except BaseException:
            await self._return_shadow_connection(connection)
            raise

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        if conn.mode == "live":
            await super().putconn(conn)
            return
        if conn.in_shadow and not conn.closed:
            try:
                await conn.rollback()  # what was not committed
            except BaseException:
                conn.pgconn.finish()  # it is in no state to go on with
                await self._return_shadow_connection(conn)
                raise
        if not (conn.in_shadow and not conn.closed and self._pinned.release(conn.request_context, conn)):
            await self._return_shadow_connection(conn)

    async def _return_shadow_connection(self, connection: AsyncConnection[Any]) -> None:
        try:
            await connection.end_shadow()
        finally:
            await self.shadow_pool.putconn(connection)

    async def _return_shadow_connections(self, connections: list[AsyncConnection[Any]]) -> None:
        for connection in connections:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                await self._return_shadow_connection(connection)

    async def close(self, timeout: float = 5.0) -> None:
        await self.shadow_pool.close(timeout)
        await super().close(timeout)


class ConnectionPool(psycopg_pool.ConnectionPool[Connection[Any]]):
    """The same without asyncio, for endpoints that are plain functions."""

    def __init__(
        self, conninfo: str = "", *, shadow_conninfo: str = "", shadow_max_size: int = SHADOW_POOL_SIZE, **kwargs: Any
    ) -> None:
        _reject_connection_class(kwargs)
        shadow_class: type[Connection[Any]] = ShadowDatabaseConnection if shadow_conninfo else ShadowConnection
        shadow_options = _shadow_pool_options(kwargs, shadow_max_size) | {
            "max_waiting": shadow_max_size * MAX_WAITERS_PER_CONNECTION
        }
        self.shadow_pool = psycopg_pool.ConnectionPool(
            shadow_conninfo or conninfo, connection_class=shadow_class, **shadow_options
        )
        self._pinned: PinnedConnections[Connection[Any]] = PinnedConnections(
            lambda connections: asyncio.to_thread(self._return_shadow_connections, connections)
        )
        super().__init__(conninfo, connection_class=UserConnection, **kwargs)

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        context = CURRENT_CONTEXT.get()
        if not context.is_shadow:
            return super().getconn(timeout)
        connection = self._pinned.acquire(context)
        if connection is None:
            self.shadow_pool.open()
            try:
                connection = self.shadow_pool.getconn(timeout)
            except (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests) as error:
                mark_invalid(error)
                raise
            connection.request_context = context
            if connection.mode == "rolled back":
                self._begin_shadow(connection)
        return connection

    def _begin_shadow(self, connection: Connection[Any]) -> None:
        try:
            connection.begin_shadow()
        except BaseException:
            self._return_shadow_connection(connection)
            raise

    def putconn(self, conn: Connection[Any]) -> None:
        if conn.mode == "live":
            super().putconn(conn)
            return
        if conn.in_shadow and not conn.closed:
            try:
                conn.rollback()  # what was not committed
            except BaseException:
                conn.pgconn.finish()  # it is in no state to go on with
                self._return_shadow_connection(conn)
                raise
        if not (conn.in_shadow and not conn.closed and self._pinned.release(conn.request_context, conn)):
            self._return_shadow_connection(conn)

    def _return_shadow_connection(self, connection: Connection[Any]) -> None:
        try:
            connection.end_shadow()
        finally:
            self.shadow_pool.putconn(connection)

    def _return_shadow_connections(self, connections: list[Connection[Any]]) -> None:
        for connection in connections:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                self._return_shadow_connection(connection)

    def close(self, timeout: float = 5.0) -> None:
        self.shadow_pool.close(timeout)
        super().close(timeout)


async def _run_in_empty_context(opening: Coroutine[Any, Any, None]) -> None:
    """In a context of its own: a pool's tasks live longer than the request that opened it, and are no shadow's."""
    await asyncio.get_running_loop().create_task(opening, context=Context())


def _shadow_pool_options(kwargs: dict[str, Any], size: int) -> dict[str, Any]:
    return {
        **kwargs,
        "min_size": 0,
        "max_size": size,
        "open": False,
        "name": None,
        "timeout": SHADOW_CONNECTION_TIMEOUT_S,
    }


def _reject_connection_class(kwargs: dict[str, Any]) -> None:
    if "connection_class" in kwargs:
        raise SettingError("connection_class can't be set: a shadow's writes are held by abreast's own")
