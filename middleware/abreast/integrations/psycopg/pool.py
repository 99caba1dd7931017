# Generated from pool_async.py by `make generate` (middleware/generate_sync.py). Do not edit.
"""Connection pools for services that receive shadow requests. `abreast.integrations.psycopg_pool` describes them."""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg_pool

from abreast.context import CURRENT_CONTEXT
from abreast.errors import SettingError
from abreast.integrations.psycopg.connection import CONNECTION_CLASSES, Connection
from abreast.integrations.psycopg.shadow_sessions import (
    MAX_WAITERS_PER_CONNECTION,
    SHADOW_CONNECTION_TIMEOUT_S,
    SHADOW_POOL_SIZE,
    PinnedConnections,
    mark_invalid,
    run_in_empty_context,
)


class ConnectionPool(psycopg_pool.ConnectionPool[Connection[Any]]):
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
            "max_waiting": shadow_max_size * MAX_WAITERS_PER_CONNECTION,
            "open": False,
            "name": None,
            "timeout": SHADOW_CONNECTION_TIMEOUT_S,
        }
        self.shadow_pool = psycopg_pool.ConnectionPool(
            shadow_conninfo or conninfo,
            connection_class=CONNECTION_CLASSES["separate_database" if shadow_conninfo else "rollback"],
            **kwargs | shadow_options,
        )
        self._pinned: PinnedConnections[Connection[Any]] = PinnedConnections(self._return_shadow_connections)
        super().__init__(conninfo, connection_class=CONNECTION_CLASSES["live"], **kwargs)

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        run_in_empty_context(super().open, wait, timeout)

    def getconn(self, timeout: float | None = None) -> Connection[Any]:
        context = CURRENT_CONTEXT.get()
        if not context.is_shadow:
            return super().getconn(timeout)
        connection = self._pinned.acquire(context)
        if connection is not None:
            return connection
        if self.shadow_pool.closed:
            run_in_empty_context(self.shadow_pool.open)
        try:
            connection = self.shadow_pool.getconn(timeout)
        except (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests) as error:
            mark_invalid(error)
            raise
        connection.request_context = context
        if connection.mode == "rollback":
            try:
                connection.begin_shadow()
            except BaseException:
                self._return_shadow_connection(connection)
                raise
        return connection

    def putconn(self, conn: Connection[Any]) -> None:
        if conn.mode == "live":
            super().putconn(conn)
            return
        if conn.in_shadow and not conn.closed:
            try:
                conn.rollback()  # undo the statements since the last commit
            except BaseException:
                conn.pgconn.finish()  # its state is unknown, so the server rolls back
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
            with contextlib.suppress(Exception):  # end_shadow has closed it, so the server rolls back
                self._return_shadow_connection(connection)

    def close(self, timeout: float = 5.0) -> None:
        self.shadow_pool.close(timeout)
        super().close(timeout)
