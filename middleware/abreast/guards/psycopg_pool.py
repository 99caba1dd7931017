"""psycopg's pools for a service that is shadowed.

    from abreast.guards.psycopg_pool import AsyncConnectionPool  # instead of psycopg_pool's

Shadow requests get their connections from a small pool of their own: users never wait for one that a shadow holds, and
no session changes sides. Within a shadow request a connection that was given back is given out again, still in the
same transaction, so that it reads what it has written. All is rolled back when the request is over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from contextvars import Context
from typing import Any

import psycopg_pool

from abreast.context import CURRENT
from abreast.errors import SettingError
from abreast.guards.pins import SHADOWS, TIMEOUT, WAITING, Pins
from abreast.guards.psycopg_async import (
    AsyncConnection,
    AsyncOwnConnection,
    AsyncShadowConnection,
    AsyncUserConnection,
)
from abreast.guards.psycopg_sync import Connection, OwnConnection, ShadowConnection, UserConnection
from abreast.guards.watch import disturb


class AsyncConnectionPool(psycopg_pool.AsyncConnectionPool[AsyncConnection[Any]]):
    """`shadow_conninfo` names a database for shadows alone, in which they commit. Other arguments are psycopg_pool's."""

    def __init__(
        self, conninfo: str = "", *, shadow_conninfo: str = "", shadow_max_size: int = SHADOWS, **how: Any
    ) -> None:
        _no_class(how)
        kind: type[AsyncConnection[Any]] = AsyncOwnConnection if shadow_conninfo else AsyncShadowConnection
        self.shadows = psycopg_pool.AsyncConnectionPool(
            shadow_conninfo or conninfo, connection_class=kind, **_small(how, shadow_max_size)
        )
        self._pins: Pins[AsyncConnection[Any]] = Pins(self._end)
        super().__init__(conninfo, connection_class=AsyncUserConnection, **how)

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        await _apart(super().open(wait, timeout))

    async def getconn(self, timeout: float | None = None) -> AsyncConnection[Any]:
        request = CURRENT.get()
        if not request.shadow:
            return await super().getconn(timeout)
        connection = self._pins.take(request)
        if connection is None:
            if self.shadows.closed:
                await _apart(self.shadows.open())
            try:
                connection = await self.shadows.getconn(timeout)
            except psycopg_pool.PoolTimeout as error:
                disturb(error)
                raise
            connection.request = request
            if connection.mode == "rolled back":
                await self._held(connection)
        return connection

    async def _held(self, connection: AsyncConnection[Any]) -> None:
        try:
            await connection.hold()
        except BaseException:
            await self._give_back(connection)
            raise

    async def putconn(self, conn: AsyncConnection[Any]) -> None:
        if conn.mode == "live":
            await super().putconn(conn)
            return
        if conn.held and not conn.closed:
            try:
                await conn.rollback()  # what was not committed
            except BaseException:
                conn.pgconn.finish()  # it is in no state to go on with
                await self._give_back(conn)
                raise
        if not (conn.held and not conn.closed and self._pins.keep(conn.request, conn)):
            await self._give_back(conn)

    async def _give_back(self, connection: AsyncConnection[Any]) -> None:
        try:
            await connection.give_up()
        finally:
            await self.shadows.putconn(connection)

    async def _end(self, connections: list[AsyncConnection[Any]]) -> None:
        for connection in connections:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                await self._give_back(connection)

    async def close(self, timeout: float = 5.0) -> None:
        await self.shadows.close(timeout)
        await super().close(timeout)


class ConnectionPool(psycopg_pool.ConnectionPool[Connection[Any]]):
    """The same without asyncio, for endpoints that are plain functions."""

    def __init__(
        self, conninfo: str = "", *, shadow_conninfo: str = "", shadow_max_size: int = SHADOWS, **how: Any
    ) -> None:
        _no_class(how)
        kind: type[Connection[Any]] = OwnConnection if shadow_conninfo else ShadowConnection
        small = _small(how, shadow_max_size) | {"max_waiting": shadow_max_size * WAITING}
        self.shadows = psycopg_pool.ConnectionPool(
            shadow_conninfo or conninfo, connection_class=kind, **small
        )
        self._pins: Pins[Connection[Any]] = Pins(lambda left: asyncio.to_thread(self._end, left))
        super().__init__(conninfo, connection_class=UserConnection, **how)

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        request = CURRENT.get()
        if not request.shadow:
            return super().getconn(timeout)
        connection = self._pins.take(request)
        if connection is None:
            self.shadows.open()
            try:
                connection = self.shadows.getconn(timeout)
            except (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests) as error:
                disturb(error)
                raise
            connection.request = request
            if connection.mode == "rolled back":
                self._held(connection)
        return connection

    def _held(self, connection: Connection[Any]) -> None:
        try:
            connection.hold()
        except BaseException:
            self._give_back(connection)
            raise

    def putconn(self, conn: Connection[Any]) -> None:
        if conn.mode == "live":
            super().putconn(conn)
            return
        if conn.held and not conn.closed:
            try:
                conn.rollback()  # what was not committed
            except BaseException:
                conn.pgconn.finish()  # it is in no state to go on with
                self._give_back(conn)
                raise
        if not (conn.held and not conn.closed and self._pins.keep(conn.request, conn)):
            self._give_back(conn)

    def _give_back(self, connection: Connection[Any]) -> None:
        try:
            connection.give_up()
        finally:
            self.shadows.putconn(connection)

    def _end(self, connections: list[Connection[Any]]) -> None:
        for connection in connections:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                self._give_back(connection)

    def close(self, timeout: float = 5.0) -> None:
        self.shadows.close(timeout)
        super().close(timeout)


async def _apart(opening: Coroutine[Any, Any, None]) -> None:
    """In a context of its own: a pool's tasks live longer than the request that opened it, and are no shadow's."""
    await asyncio.get_running_loop().create_task(opening, context=Context())


def _small(how: dict[str, Any], size: int) -> dict[str, Any]:
    return {**how, "min_size": 0, "max_size": size, "open": False, "name": None, "timeout": TIMEOUT}


def _no_class(how: dict[str, Any]) -> None:
    if "connection_class" in how:
        raise SettingError("connection_class can't be set: a shadow's writes are held by abreast's own")
