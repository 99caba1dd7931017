"""Connection pools for services that receive shadow requests. `abreast.integrations.psycopg_pool` describes them."""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg_pool

from abreast.context import CURRENT_CONTEXT
from abreast.errors import SettingError
from abreast.integrations.psycopg.connection_async import ASYNC_CONNECTION_CLASSES, AsyncConnection
from abreast.integrations.psycopg.shadow_sessions import (
    ASYNC_MAX_WAITERS_PER_CONNECTION,
    SHADOW_CONNECTION_TIMEOUT_S,
    SHADOW_POOL_SIZE,
    PinnedConnections,
    mark_invalid,
    run_in_empty_context_async,
)


class AsyncConnectionPool(psycopg_pool.AsyncConnectionPool[AsyncConnection[Any]]):
    """A pool for users, with a second one for shadows in `shadow_pool`.

    With `shadow_conninfo`, shadows use that database and commit there. `shadow_max_size` is the number of connections
    for shadows. All other arguments are those of psycopg_pool, except `connection_class`.
    """

    def __init__(
        self, conninfo: str = "", *, shadow_conninfo: str = "", shadow_max_size: int = SHADOW_POOL_SIZE, **kwargs: Any
    ) -> None:
        if "connection_class" in kwargs:
            raise SettingError(
                "connection_class of a pool can't be set, because abreast's class rolls back the writes of shadows; "
                "remove the argument"
            )
        shadow_options = {
            "min_size": 0,
            "max_size": shadow_max_size,
            "max_waiting": shadow_max_size * ASYNC_MAX_WAITERS_PER_CONNECTION,
            "open": False,
            "name": None,
            "timeout": SHADOW_CONNECTION_TIMEOUT_S,
        }
        self.shadow_pool = psycopg_pool.AsyncConnectionPool(
            shadow_conninfo or conninfo,
            connection_class=ASYNC_CONNECTION_CLASSES["separate_database" if shadow_conninfo else "rollback"],
            **kwargs | shadow_options,
        )
        self._pinned: PinnedConnections[AsyncConnection[Any]] = PinnedConnections(self._return_shadow_connections)
        super().__init__(conninfo, connection_class=ASYNC_CONNECTION_CLASSES["live"], **kwargs)

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        await run_in_empty_context_async(super().open, wait, timeout)

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[Any]:
        context = CURRENT_CONTEXT.get()
        if not context.is_shadow:
            return await super().getconn(timeout)
        connection = self._pinned.acquire(context)
        if connection is not None:
            return connection
        if self.shadow_pool.closed:
            await run_in_empty_context_async(self.shadow_pool.open)
        try:
            connection = await self.shadow_pool.getconn(timeout)
        except (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests) as error:
            mark_invalid(error)
            raise
        connection.request_context = context
        if connection.mode == "rollback":
            try:
                await connection.begin_shadow()
            except BaseException:
                await self._return_shadow_connection(connection)
                raise
        return connection

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        if conn.mode == "live":
            await super().putconn(conn)
            return
        if conn.in_shadow and not conn.closed:
            try:
                await conn.rollback()  # undo the statements since the last commit
            except BaseException:
                conn.pgconn.finish()  # its state is unknown, so the server rolls back
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
            with contextlib.suppress(Exception):  # end_shadow has closed it, so the server rolls back
                await self._return_shadow_connection(connection)

    async def close(self, timeout: float = 5.0) -> None:
        await self.shadow_pool.close(timeout)
        await super().close(timeout)
