"""The sessions of shadows: their connections between two uses in a request, and the locks that users wait for.

The transaction of a shadow stays open until the end of its request. A user's statement may need one of its rows in the
meantime. While a shadow is open for longer than `CHECK_INTERVAL_S`, a thread checks for waiting users on a dedicated
connection. It acts long before the deadlock detection of Postgres (after a second), which could choose the user.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

import psycopg
from psycopg import errors

from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.errors import ErrorReporter

C = TypeVar("C")

SHADOW_POOL_SIZE = 4  # connections for shadows per pool
SHADOW_CONNECTION_TIMEOUT_S = 5.0  # longest wait of a shadow for one of them
MAX_WAITERS_PER_CONNECTION = 2  # shadows that wait in threads, which users need too
ASYNC_MAX_WAITERS_PER_CONNECTION = 1000  # shadows that wait in tasks, which cost users nothing
SHADOW_APPLICATION_NAME = "abreast shadow"  # application_name of a session while a shadow uses it
WATCHDOG_APPLICATION_NAME = "abreast watch"
CHECK_INTERVAL_S = 0.05  # between two checks, and before the first check of a shadow
MAX_IDLE_S = 5.0  # without shadows, until the watchdog closes its session
RETRY_DELAY_S = 1.0  # after a check that failed
TERMINATE_BLOCKERS_SQL = b"""
select pg_terminate_backend(shadow.pid)
from pg_stat_activity as waiting
cross join lateral unnest(pg_blocking_pids(waiting.pid)) as blocking (pid)
join pg_stat_activity as shadow on shadow.pid = blocking.pid and shadow.application_name = %(shadow)s
where waiting.application_name <> %(shadow)s
    and (waiting.wait_event_type = 'Lock' or waiting.query = '<insufficient privilege>')
"""
INTERFERENCE_ERRORS = (  # raised because of other sessions, not because of a fault in the code
    errors.AdminShutdown,
    errors.DeadlockDetected,
    errors.IdleInTransactionSessionTimeout,
    errors.LockNotAvailable,
    errors.SerializationFailure,
)

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class PinnedConnections(Generic[C]):
    """The connections of one pool that shadow requests returned and may take again. Thread-safe.

    `on_request_end` receives the idle connections of a request that is over. A plain function runs in a thread.
    """

    def __init__(self, on_request_end: Callable[[list[C]], object]) -> None:
        self._on_request_end = on_request_end
        self._idle: dict[int, list[C]] = {}
        self._lock = threading.Lock()

    def acquire(self, context: RequestContext) -> C | None:
        """Return the connection that this request released last, if any."""
        with self._lock:
            idle = self._idle.get(id(context))
            return idle.pop() if idle else None

    def release(self, context: RequestContext | None, connection: C) -> bool:
        """Keep the connection for its request. Return False if the request is over or its end would go unnoticed."""
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
        if inspect.iscoroutinefunction(self._on_request_end):
            await self._on_request_end(idle)
        else:
            await asyncio.to_thread(self._on_request_end, idle)


async def run_in_empty_context_async(func: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    """Open a pool outside of the request: its tasks outlive the request, and must not count as a shadow's."""
    await asyncio.get_running_loop().create_task(func(*args), context=Context())


def run_in_empty_context(func: Callable[..., None], *args: Any) -> None:
    """Open a pool outside of the request, as `run_in_empty_context_async` does."""
    Context().run(func, *args)


class LockWatchdog:
    """The watchdog of one database, with one thread and one session."""

    def __init__(self) -> None:
        self.connect_params: dict[str, Any] = {}
        self._started_at: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._report_error = ErrorReporter()

    def add(self, connection: Any) -> None:
        with self._lock:
            self._started_at[connection] = time.monotonic()
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads
                self._thread = threading.Thread(target=self._run, name=WATCHDOG_APPLICATION_NAME, daemon=True)
                self._thread.start()

    def remove(self, connection: Any) -> None:
        with self._lock:
            self._started_at.pop(connection, None)

    def _run(self) -> None:
        session: psycopg.Connection[Any] | None = None
        last_busy = time.monotonic()
        while True:
            time.sleep(CHECK_INTERVAL_S)
            now = time.monotonic()
            with self._lock:
                oldest_start = min(
                    (started_at for connection, started_at in self._started_at.items() if not connection.closed),
                    default=None,
                )
                if oldest_start is None and now - last_busy > MAX_IDLE_S:
                    self._thread = None
                    break
            if oldest_start is not None:
                last_busy = now
                if now - oldest_start >= CHECK_INTERVAL_S:
                    session = self._terminate_blockers(session)
        if session is not None:
            session.close()

    def _terminate_blockers(self, session: psycopg.Connection[Any] | None) -> psycopg.Connection[Any] | None:
        try:
            session = session or psycopg.connect(**self.connect_params, autocommit=True, prepare_threshold=None)
            session.execute(TERMINATE_BLOCKERS_SQL, {"shadow": SHADOW_APPLICATION_NAME})
        except psycopg.Error as error:
            self._report_error("the check for users who wait for a shadow", error)
            if session is not None:
                session.close()
            time.sleep(RETRY_DELAY_S)
            return None
        return session


_watchdogs: dict[tuple[str, int, str, str], LockWatchdog] = {}
_watchdogs_lock = threading.Lock()


def get_watchdog(connection: AnyConnection) -> LockWatchdog:
    """Return the watchdog for the database of a connection."""
    info = connection.info
    with _watchdogs_lock:
        watchdog = _watchdogs.setdefault((info.host, info.port, info.dbname, info.user), LockWatchdog())
    params = {option.keyword.decode(): (option.val or b"").decode() for option in connection.pgconn.info}
    # A connection string may list several hosts. The watchdog needs the one in use.
    params |= {"host": info.host, "hostaddr": info.hostaddr, "port": str(info.port)}
    params["application_name"] = WATCHDOG_APPLICATION_NAME
    watchdog.connect_params = {name: value for name, value in params.items() if value}
    return watchdog


def mark_invalid_if_interfered(connection: AnyConnection, error: BaseException) -> None:
    """Exclude the pair of a shadow from comparison if other sessions made its statement fail."""
    if isinstance(error, INTERFERENCE_ERRORS) or connection.closed:
        mark_invalid(error)


def mark_invalid(error: BaseException) -> None:
    """Exclude the pair of a shadow from comparison."""
    context = CURRENT_CONTEXT.get()
    if context.is_shadow:
        context.invalid_reason = f"other sessions interrupted the shadow in its database: {type(error).__name__}"
