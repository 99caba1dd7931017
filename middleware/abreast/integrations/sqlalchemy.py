"""SQLAlchemy 2 on psycopg 3 for a service that is shadowed: what a shadow request writes is recorded and rolled back.

    engine = create_async_engine("postgresql+psycopg://...")
    protect(engine)

Sessions and connections are used as before. Those of shadow requests come from a small pool of their own, and stay in
one transaction until the request is over. See docs/database.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
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
    Mode,
)
from abreast.integrations.psycopg.lock_watchdog import mark_invalid
from abreast.integrations.psycopg.pool import (
    MAX_WAITERS_PER_CONNECTION,
    SHADOW_CONNECTION_TIMEOUT_S,
    SHADOW_POOL_SIZE,
    PinnedConnections,
)

CONNECT_MODE: ContextVar[Mode] = ContextVar("abreast connection", default="live")
ASYNC_CONNECTION_CLASSES: dict[Mode, type[AsyncConnection[Any]]] = {
    "live": AsyncUserConnection,
    "rolled back": AsyncShadowConnection,
    "separate_database": AsyncShadowDatabaseConnection,
}
SYNC_CONNECTION_CLASSES: dict[Mode, type[Connection[Any]]] = {
    "live": UserConnection,
    "rolled back": ShadowConnection,
    "separate_database": ShadowDatabaseConnection,
}


def protect(
    engine: Engine | AsyncEngine, *, shadow_url: str | URL | None = None, shadow_pool_size: int = SHADOW_POOL_SIZE
) -> None:
    """Call it once, before the engine is used. `shadow_url` names a database for shadows alone, in which they commit."""
    target = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    if (target.dialect.name, target.dialect.driver) not in {("postgresql", "psycopg"), ("postgresql", "psycopg_async")}:
        raise SettingError(
            f"abreast.integrations.sqlalchemy protects postgresql+psycopg:// (psycopg 3), not {target.dialect.name}+"
            f"{target.dialect.driver}://"
        )
    mode: Mode = "rolled back" if shadow_url is None else "separate_database"
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
            return SYNC_CONNECTION_CLASSES[mode].connect(*cargs, **cparams)
        cparams["async_creator_fn"] = ASYNC_CONNECTION_CLASSES[mode].connect
        return None  # SQLAlchemy goes on with it

    return connect


def _install_shadow_pool(engine: Engine, mode: Mode, size: int) -> None:
    """Shadows' connections from a pool of their own, whoever asks the engine's pool: sessions, options, raw ones."""
    pool = engine.pool
    pool_class = AsyncShadowPool if engine.dialect.is_async else ShadowPool
    shadow_pool = pool_class(
        pool._creator,  # noqa: SLF001  # as Pool.recreate does
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
        """Where a shadow has lost its session, users keep theirs."""
        invalidate_in_pool = invalidate_shadow if getattr(connection, "_pool", None) is shadow_pool else invalidate_user
        invalidate_in_pool(connection, *args, **kwargs)

    def connect() -> PoolProxiedConnection:
        return shadow_pool.connect_shadow() if CURRENT_CONTEXT.get().is_shadow else connect_user()

    def dispose() -> None:
        shadow_pool.dispose()
        type(pool).dispose(pool)

    pool.connect = connect  # type: ignore[method-assign]  # of this pool
    pool.dispose = dispose  # type: ignore[method-assign]
    pool._invalidate = invalidate  # type: ignore[method-assign]  # noqa: SLF001


@event.listens_for(Session, "after_begin")
def _register_session_cleanup(
    session: Session, transaction: SessionTransaction, connection: sqlalchemy.Connection
) -> None:
    """A session that a shadow leaves open may be a user's next: a global one, or of a thread. It ends with the shadow."""
    cleanups = CURRENT_CONTEXT.get().cleanups
    driver = connection.connection.driver_connection
    if cleanups is not None and getattr(driver, "mode", "live") != "live":
        cleanups.insert(
            0,
            partial(_close_session, session, _find_root_transaction(transaction), isinstance(driver, AsyncConnection)),
        )


def _find_root_transaction(transaction: SessionTransaction) -> SessionTransaction:
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


async def _close_session(session: Session, transaction: SessionTransaction, in_greenlet: bool) -> None:
    if session.get_transaction() is transaction:  # and not one that somebody else has begun
        await (greenlet_spawn(session.close) if in_greenlet else asyncio.to_thread(session.close))


@contextmanager
def _use_connect_mode(mode: Mode) -> Iterator[None]:
    token = CONNECT_MODE.set(mode)
    try:
        yield
    finally:
        CONNECT_MODE.reset(token)


class ShadowPool(QueuePool):
    mode: Mode = "rolled back"
    waiters_per_connection = MAX_WAITERS_PER_CONNECTION

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pinned: PinnedConnections[ConnectionPoolEntry] = PinnedConnections(self._return_records)
        self._waiter_slots = threading.BoundedSemaphore(self.size() * self.waiters_per_connection)

    def connect_shadow(self) -> PoolProxiedConnection:
        """A connection that this request writes to, rolled back at its end."""
        with _use_connect_mode(self.mode):
            connection = self.connect()
        driver = connection.driver_connection
        if not isinstance(driver, Connection | AsyncConnection) or driver.mode != self.mode:
            connection.invalidate()
            raise ShadowError("an engine with a creator of its own can't be protected")
        if self.mode == "rolled back" and not driver.in_shadow:
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
        """Where threads wait, not in all of them: users need some."""
        if not self._waiter_slots.acquire(blocking=False):
            raise PoolTimeout("too many shadow requests wait for a connection")
        try:
            return super()._do_get()
        finally:
            self._waiter_slots.release()

    def _invalidate(
        self, connection: PoolProxiedConnection, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        """Only this one: the others are in the middle of their requests."""
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        if driver is not None and driver.in_shadow and not driver.closed:
            if self._pinned.release(driver.request_context, record):
                return
            try:
                self._end_shadow(driver)
            except BaseException:  # noqa: BLE001  # outside a greenlet, or it can't be rolled back: the server does it
                driver.pgconn.finish()
        super()._do_return_conn(record)

    async def _return_records(self, records: list[ConnectionPoolEntry]) -> None:
        for record in records:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                await self._roll_back(record)
            super()._do_return_conn(record)

    async def _roll_back(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        await asyncio.to_thread(driver.end_shadow)


class AsyncShadowPool(ShadowPool, AsyncAdaptedQueuePool):
    waiters_per_connection = 1000  # tasks that wait take nothing from users

    def _begin_shadow(self, driver: Any) -> None:
        await_only(driver.begin_shadow())

    def _end_shadow(self, driver: Any) -> None:
        rollback = driver.end_shadow()
        try:
            await_only(rollback)
        finally:
            rollback.close()  # where it was not awaited

    async def _roll_back(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        await driver.end_shadow()
