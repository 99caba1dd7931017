"""SQLAlchemy 2 on psycopg 3 for services that receive shadow requests: writes of a shadow are recorded and rolled back.

    engine = create_async_engine("postgresql+psycopg://...")
    protect(engine)

You use sessions and connections as before. Shadow requests take connections from a separate, small pool, and stay in
one transaction until the end of the request. See docs/database.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import sqlalchemy
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from abreast.context import CURRENT_CONTEXT
from abreast.errors import SettingError, ShadowError
from abreast.integrations.psycopg.connection import CONNECTION_CLASSES, Connection
from abreast.integrations.psycopg.connection_async import ASYNC_CONNECTION_CLASSES, AsyncConnection, Mode
from abreast.integrations.psycopg.shadow_sessions import (
    ASYNC_MAX_WAITERS_PER_CONNECTION,
    MAX_WAITERS_PER_CONNECTION,
    SHADOW_CONNECTION_TIMEOUT_S,
    SHADOW_POOL_SIZE,
    PinnedConnections,
    mark_invalid,
)

CONNECT_MODE: ContextVar[Mode] = ContextVar("abreast connection", default="live")


def protect(
    engine: Engine | AsyncEngine, *, shadow_url: str | URL | None = None, shadow_pool_size: int = SHADOW_POOL_SIZE
) -> None:
    """Make an engine safe to shadow. Call it once, before the engine connects.

    `shadow_url` is a separate database for shadows, in which they commit. `shadow_pool_size` is the number of
    connections for shadows. Raises `SettingError` for other drivers than psycopg 3.
    """
    target = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    if (target.dialect.name, target.dialect.driver) not in {("postgresql", "psycopg"), ("postgresql", "psycopg_async")}:
        raise SettingError(
            "the URL of a protected engine must begin with postgresql+psycopg:// (psycopg 3), got "
            f"{target.dialect.name}+{target.dialect.driver}://"
        )
    mode: Mode = "rollback" if shadow_url is None else "separate_database"
    event.listen(target, "do_connect", _make_connector(None if shadow_url is None else make_url(shadow_url)))
    _install_shadow_pool(target, mode, shadow_pool_size)
    event.listen(
        target, "engine_disposed", lambda disposed_engine: _install_shadow_pool(disposed_engine, mode, shadow_pool_size)
    )


def _make_connector(shadow_url: URL | None) -> Callable[..., Any]:
    def connect(dialect: Any, _record: Any, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        mode = CONNECT_MODE.get()
        if mode == "separate_database" and shadow_url is not None:
            connect_args, connect_params = dialect.create_connect_args(shadow_url)
            cargs[:] = connect_args
            cparams.update(connect_params)
        if not dialect.is_async:
            return CONNECTION_CLASSES[mode].connect(*cargs, **cparams)
        cparams["async_creator_fn"] = ASYNC_CONNECTION_CLASSES[mode].connect
        return None  # SQLAlchemy connects with these parameters

    return connect


def _install_shadow_pool(engine: Engine, mode: Mode, size: int) -> None:
    """Give shadows a separate pool on each way to connect: sessions, execution options and raw connections."""
    pool = engine.pool
    pool_class = AsyncShadowPool if engine.dialect.is_async else ShadowPool
    shadow_pool = pool_class(
        pool._creator,  # noqa: SLF001  # like Pool.recreate
        pool_size=size,
        max_overflow=0,
        timeout=SHADOW_CONNECTION_TIMEOUT_S,
        pre_ping=pool._pre_ping,  # noqa: SLF001
        dialect=engine.dialect,
        _dispatch=pool.dispatch,
    )
    shadow_pool.mode = mode
    connect_user, invalidate_user, invalidate_shadow = pool.connect, pool._invalidate, shadow_pool._invalidate  # noqa: SLF001

    def invalidate(connection: Any, *args: Any, **kwargs: Any) -> None:
        """Invalidate only the pool of the connection, so that users keep their sessions when a shadow loses its own."""
        invalidate_in_pool = invalidate_shadow if getattr(connection, "_pool", None) is shadow_pool else invalidate_user
        invalidate_in_pool(connection, *args, **kwargs)

    def connect() -> PoolProxiedConnection:
        return shadow_pool.connect_shadow() if CURRENT_CONTEXT.get().is_shadow else connect_user()

    def dispose() -> None:
        shadow_pool.dispose()
        type(pool).dispose(pool)

    pool.connect = connect  # type: ignore[method-assign]  # for this pool only
    pool.dispose = dispose  # type: ignore[method-assign]
    pool._invalidate = invalidate  # type: ignore[method-assign]  # noqa: SLF001


@event.listens_for(Session, "after_begin")
def _register_session_cleanup(
    session: Session, transaction: SessionTransaction, connection: sqlalchemy.Connection
) -> None:
    """Close the session at the end of the shadow: a global or thread-local session may serve a user next."""
    cleanups = CURRENT_CONTEXT.get().cleanups
    driver = connection.connection.driver_connection
    if cleanups is None or getattr(driver, "mode", "live") == "live":
        return
    root = transaction
    while root.parent is not None:
        root = root.parent

    async def close_session() -> None:
        if session.get_transaction() is root:  # otherwise another request has begun a transaction
            await (greenlet_spawn if isinstance(driver, AsyncConnection) else asyncio.to_thread)(session.close)

    cleanups.insert(0, close_session)


class ShadowPool(QueuePool):
    """The pool for shadows next to the pool of a protected engine."""

    mode: Mode = "rollback"
    waiters_per_connection = MAX_WAITERS_PER_CONNECTION

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pinned: PinnedConnections[ConnectionPoolEntry] = PinnedConnections(self._finish_request)
        self._waiter_slots = threading.BoundedSemaphore(self.size() * self.waiters_per_connection)

    def connect_shadow(self) -> PoolProxiedConnection:
        """Connect for the current shadow request. The connection is rolled back at the end of the request."""
        token = CONNECT_MODE.set(self.mode)
        try:
            connection = self.connect()
        finally:
            CONNECT_MODE.reset(token)
        driver = connection.driver_connection
        if not isinstance(driver, Connection | AsyncConnection) or driver.mode != self.mode:
            connection.invalidate()
            raise ShadowError(
                "a protected engine can't have a custom creator; pass connect_args to create_engine instead"
            )
        if self.mode == "rollback" and not driver.in_shadow:
            try:
                self._begin_shadow(driver)
            except BaseException:
                connection.invalidate()
                raise
            driver.request_context = CURRENT_CONTEXT.get()
        return connection

    def _begin_shadow(self, driver: Any) -> None:
        driver.begin_shadow()

    def _end_shadow(self, driver: Any) -> None:
        driver.end_shadow()

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._pinned.acquire(CURRENT_CONTEXT.get())
        if record is None:
            try:
                record = self._get_within_limit()
            except PoolTimeout as error:
                mark_invalid(error)
                raise
        driver: Any = record.driver_connection
        if driver is not None and driver.closed:
            record.invalidate()
        return record

    def _get_within_limit(self) -> ConnectionPoolEntry:
        if not self._waiter_slots.acquire(blocking=False):
            raise PoolTimeout("too many shadow requests wait for a connection; raise shadow_pool_size")
        try:
            return super()._do_get()
        finally:
            self._waiter_slots.release()

    def _invalidate(
        self, connection: PoolProxiedConnection, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        """Invalidate this connection only. Other shadows still use theirs."""
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        if driver is not None and driver.in_shadow and not driver.closed:
            if self._pinned.release(driver.request_context, record):
                return
            try:
                self._end_shadow(driver)
            except BaseException:  # noqa: BLE001  # for example outside of a greenlet; the server rolls back
                driver.pgconn.finish()
        super()._do_return_conn(record)

    def _return_records(self, records: list[ConnectionPoolEntry]) -> None:
        for record in records:
            with contextlib.suppress(Exception):  # end_shadow has closed it, so the server rolls back
                self._end_shadow(record.driver_connection)
            super()._do_return_conn(record)

    async def _finish_request(self, records: list[ConnectionPoolEntry]) -> None:
        await asyncio.to_thread(self._return_records, records)


class AsyncShadowPool(ShadowPool, AsyncAdaptedQueuePool):
    """The same for an async engine. SQLAlchemy calls it in a greenlet."""

    waiters_per_connection = ASYNC_MAX_WAITERS_PER_CONNECTION

    def _begin_shadow(self, driver: Any) -> None:
        await_only(driver.begin_shadow())

    def _end_shadow(self, driver: Any) -> None:
        rollback = driver.end_shadow()
        try:
            await_only(rollback)
        finally:
            rollback.close()  # avoids a warning if it could not be awaited

    async def _finish_request(self, records: list[ConnectionPoolEntry]) -> None:
        await greenlet_spawn(self._return_records, records)
