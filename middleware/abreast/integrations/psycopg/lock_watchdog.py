"""Ends a shadow's session when somebody else waits for what it has locked.

A shadow's transaction is open until its request is over, and a user's statement may need the same row meanwhile. So a
thread looks whether one does, by a session of its own, while any shadow of this process is older than a moment. It acts
long before Postgres looks for deadlocks (after a second), in which it might choose the user's session.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import psycopg
from psycopg import errors

from abreast.context import CURRENT_CONTEXT
from abreast.errors import ErrorReporter

SHADOW_APPLICATION_NAME = "abreast shadow"  # application_name of a session while a shadow has it
CHECK_INTERVAL_S = 0.05  # seconds that a shadow is left alone, and between two looks
IDLE_SESSION_S = 5.0  # seconds without shadows until the session is closed
RETRY_DELAY_S = 1.0  # seconds after a look that failed
TERMINATE_BLOCKERS_SQL = b"""
select pg_terminate_backend(shadow.pid)
from pg_stat_activity as waiting
cross join lateral unnest(pg_blocking_pids(waiting.pid)) as blocking (pid)
join pg_stat_activity as shadow on shadow.pid = blocking.pid and shadow.application_name = %(shadow)s
where waiting.application_name <> %(shadow)s
    and (waiting.wait_event_type = 'Lock' or waiting.query = '<insufficient privilege>')
"""
INTERFERENCE_ERRORS = (  # what others do to a session, and no code by itself
    errors.AdminShutdown,
    errors.DeadlockDetected,
    errors.IdleInTransactionSessionTimeout,
    errors.LockNotAvailable,
    errors.SerializationFailure,
)

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class LockWatchdog:
    """Of one database."""

    def __init__(self) -> None:
        self.connect_params: dict[str, Any] = {}  # how to connect
        self._started_at: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._report_error = ErrorReporter()

    def add(self, connection: Any) -> None:
        with self._lock:
            self._started_at[connection] = time.monotonic()
            if self._thread is None or not self._thread.is_alive():  # or it was left in a parent process
                self._thread = threading.Thread(target=self._run, name="abreast watch", daemon=True)
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
                if oldest_start is None and now - last_busy > IDLE_SESSION_S:
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
            self._report_error("looking whether users wait for a shadow", error)
            if session is not None:
                session.close()
            time.sleep(RETRY_DELAY_S)
            return None
        return session


WATCHDOGS: dict[tuple[str, int, str, str], LockWatchdog] = {}
WATCHDOGS_LOCK = threading.Lock()


def get_watchdog(connection: AnyConnection) -> LockWatchdog:
    """The one of a connection's database."""
    info = connection.info
    with WATCHDOGS_LOCK:
        watchdog = WATCHDOGS.setdefault((info.host, info.port, info.dbname, info.user), LockWatchdog())
    params = {option.keyword.decode(): (option.val or b"").decode() for option in connection.pgconn.info}
    params |= {"host": info.host, "hostaddr": info.hostaddr, "port": str(info.port)}  # of several the one
    params["application_name"] = "abreast watch"
    watchdog.connect_params = {name: value for name, value in params.items() if value}
    return watchdog


def mark_invalid_if_interfered(connection: AnyConnection, error: BaseException) -> None:
    """Where others stood in a shadow's way, what comes of it says nothing of its code."""
    if isinstance(error, INTERFERENCE_ERRORS) or connection.closed:
        mark_invalid(error)


def mark_invalid(error: BaseException) -> None:
    context = CURRENT_CONTEXT.get()
    if context.is_shadow:
        context.invalid_reason = f"a copy was disturbed in its database: {type(error).__name__}"
