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

from abreast.context import CURRENT
from abreast.errors import SettingError, ShadowError
from abreast.guards.pins import SHADOWS, TIMEOUT, WAITING, Pins
from abreast.guards.psycopg_async import (
    AsyncConnection,
    AsyncOwnConnection,
    AsyncShadowConnection,
    AsyncUserConnection,
    Mode,
)
from abreast.guards.psycopg_sync import Connection, OwnConnection, ShadowConnection, UserConnection
from abreast.guards.watch import disturb

MAKING: ContextVar[Mode] = ContextVar("abreast connection", default="live")
ASYNC: dict[Mode, type[AsyncConnection[Any]]] = {
    "live": AsyncUserConnection,
    "rolled back": AsyncShadowConnection,
    "own": AsyncOwnConnection,
}
SYNC: dict[Mode, type[Connection[Any]]] = {
    "live": UserConnection,
    "rolled back": ShadowConnection,
    "own": OwnConnection,
}


def protect(
    engine: Engine | AsyncEngine, *, shadow_url: str | URL | None = None, shadow_pool_size: int = SHADOWS
) -> None:
    """Call it once, before the engine is used. `shadow_url` names a database for shadows alone, in which they commit."""
    target = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    if (target.dialect.name, target.dialect.driver) not in {
        ("postgresql", "psycopg"),
        ("postgresql", "psycopg_async"),
    }:
        raise SettingError(
            f"abreast.guards.sqlalchemy protects postgresql+psycopg:// (psycopg 3), not {target.dialect.name}+"
            f"{target.dialect.driver}://"
        )
    mode: Mode = "rolled back" if shadow_url is None else "own"
    event.listen(target, "do_connect", _connector(None if shadow_url is None else make_url(shadow_url)))
    _route(target, mode, shadow_pool_size)
    event.listen(target, "engine_disposed", lambda disposed: _route(disposed, mode, shadow_pool_size))


def _connector(own: URL | None) -> Callable[..., Any]:
    def connect(dialect: Any, _record: Any, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        mode = MAKING.get()
        if mode == "own" and own is not None:
            more, changed = dialect.create_connect_args(own)
            cargs[:] = more
            cparams.update(changed)
        if not dialect.is_async:
            return SYNC[mode].connect(*cargs, **cparams)
        cparams["async_creator_fn"] = ASYNC[mode].connect
        return None  # SQLAlchemy goes on with it

    return connect


def _route(engine: Engine, mode: Mode, size: int) -> None:
    """Shadows' connections from a pool of their own, whoever asks the engine's pool: sessions, options, raw ones."""
    pool = engine.pool
    kind = AsyncShadows if engine.dialect.is_async else Shadows
    shadows = kind(
        pool._creator,  # noqa: SLF001  # as Pool.recreate does
        pool_size=size,
        max_overflow=0,
        timeout=TIMEOUT,
        pre_ping=pool._pre_ping,  # noqa: SLF001
        dialect=engine.dialect,
        _dispatch=pool.dispatch,
    )
    shadows.mode = mode
    users, users_lost, shadows_lost = pool.connect, pool._invalidate, shadows._invalidate  # noqa: SLF001

    def invalidate(connection: Any, *given: Any, **how: Any) -> None:
        """Where a shadow has lost its session, users keep theirs."""
        lost = shadows_lost if getattr(connection, "_pool", None) is shadows else users_lost
        lost(connection, *given, **how)

    def connect() -> PoolProxiedConnection:
        return shadows.held() if CURRENT.get().shadow else users()

    def dispose() -> None:
        shadows.dispose()
        type(pool).dispose(pool)

    pool.connect = connect  # type: ignore[method-assign]  # of this pool
    pool.dispose = dispose  # type: ignore[method-assign]
    pool._invalidate = invalidate  # type: ignore[method-assign]  # noqa: SLF001


@event.listens_for(Session, "after_begin")
def _began(session: Session, transaction: SessionTransaction, connection: sqlalchemy.Connection) -> None:
    """A session that a shadow leaves open may be a user's next: a global one, or of a thread. It ends with the shadow."""
    ends = CURRENT.get().ends
    driver = connection.connection.driver_connection
    if ends is not None and getattr(driver, "mode", "live") != "live":
        ends.insert(0, partial(_close, session, _root(transaction), isinstance(driver, AsyncConnection)))


def _root(transaction: SessionTransaction) -> SessionTransaction:
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


async def _close(session: Session, left: SessionTransaction, in_greenlet: bool) -> None:
    if session.get_transaction() is left:  # and not one that somebody else has begun
        await (greenlet_spawn(session.close) if in_greenlet else asyncio.to_thread(session.close))


@contextmanager
def _making(mode: Mode) -> Iterator[None]:
    token = MAKING.set(mode)
    try:
        yield
    finally:
        MAKING.reset(token)


class Shadows(QueuePool):
    mode: Mode = "rolled back"
    waiting = WAITING

    def __init__(self, *given: Any, **how: Any) -> None:
        super().__init__(*given, **how)
        self._pins: Pins[ConnectionPoolEntry] = Pins(self._end)
        self._asking = threading.BoundedSemaphore(self.size() * self.waiting)

    def held(self) -> PoolProxiedConnection:
        """A connection that this request writes to, rolled back at its end."""
        with _making(self.mode):
            made = self.connect()
        driver = made.driver_connection
        if not isinstance(driver, Connection | AsyncConnection) or driver.mode != self.mode:
            made.invalidate()
            raise ShadowError("an engine with a creator of its own can't be protected")
        if self.mode == "rolled back" and not driver.held:
            try:
                self._hold(driver)
            except BaseException:
                made.invalidate()
                raise
            driver.request = CURRENT.get()
        return made

    def _hold(self, driver: Any) -> None:
        driver.hold()

    def _give_up(self, driver: Any) -> None:
        driver.give_up()

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._pins.take(CURRENT.get())
        if record is None:
            try:
                record = self._get()
            except PoolTimeout as error:
                disturb(error)
                raise
        driver: Any = record.driver_connection
        if driver is not None and driver.closed:
            record.invalidate()
        return record

    def _get(self) -> ConnectionPoolEntry:
        """Where threads wait, not in all of them: users need some."""
        if not self._asking.acquire(blocking=False):
            raise PoolTimeout("too many shadow requests wait for a connection")
        try:
            return super()._do_get()
        finally:
            self._asking.release()

    def _invalidate(
        self, connection: PoolProxiedConnection, exception: BaseException | None = None, _checkin: bool = True
    ) -> None:
        """Only this one: the others are in the middle of their requests."""
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        if driver is not None and driver.held and not driver.closed:
            if self._pins.keep(driver.request, record):
                return
            try:
                self._give_up(driver)
            except BaseException:  # noqa: BLE001  # outside a greenlet, or it can't be rolled back: the server does it
                driver.pgconn.finish()
        super()._do_return_conn(record)

    async def _end(self, records: list[ConnectionPoolEntry]) -> None:
        for record in records:
            with contextlib.suppress(Exception):  # then it is closed, and rolled back by the server
                await self._ended(record)
            super()._do_return_conn(record)

    async def _ended(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        await asyncio.to_thread(driver.give_up)


class AsyncShadows(Shadows, AsyncAdaptedQueuePool):
    waiting = 1000  # tasks that wait take nothing from users

    def _hold(self, driver: Any) -> None:
        await_only(driver.hold())

    def _give_up(self, driver: Any) -> None:
        rolling_back = driver.give_up()
        try:
            await_only(rolling_back)
        finally:
            rolling_back.close()  # where it was not awaited

    async def _ended(self, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        await driver.give_up()
