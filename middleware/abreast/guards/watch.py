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

from abreast.context import CURRENT
from abreast.rescue import Rescue

SHADOW = "abreast shadow"  # application_name of a session while a shadow has it
PATIENCE = 0.05  # seconds that a shadow is left alone, and between two looks
LINGER = 5.0  # seconds without shadows until the session is closed
PAUSE = 1.0  # seconds after a look that failed
END = b"""
select pg_terminate_backend(shadow.pid)
from pg_stat_activity as waiting
cross join lateral unnest(pg_blocking_pids(waiting.pid)) as blocking (pid)
join pg_stat_activity as shadow on shadow.pid = blocking.pid and shadow.application_name = %(shadow)s
where waiting.application_name <> %(shadow)s
    and (waiting.wait_event_type = 'Lock' or waiting.query = '<insufficient privilege>')
"""
DISTURBED = (  # what others do to a session, and no code by itself
    errors.AdminShutdown,
    errors.DeadlockDetected,
    errors.IdleInTransactionSessionTimeout,
    errors.LockNotAvailable,
    errors.SerializationFailure,
)

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class Watch:
    """Of one database."""

    def __init__(self) -> None:
        self.where: dict[str, Any] = {}  # how to connect
        self._since: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rescue = Rescue()

    def begin(self, connection: Any) -> None:
        with self._lock:
            self._since[connection] = time.monotonic()
            if self._thread is None or not self._thread.is_alive():  # or it was left in a parent process
                self._thread = threading.Thread(target=self._run, name="abreast watch", daemon=True)
                self._thread.start()

    def over(self, connection: Any) -> None:
        with self._lock:
            self._since.pop(connection, None)

    def _run(self) -> None:
        session: psycopg.Connection[Any] | None = None
        last = time.monotonic()
        while True:
            time.sleep(PATIENCE)
            now = time.monotonic()
            with self._lock:
                since = min((at for each, at in self._since.items() if not each.closed), default=None)
                if since is None and now - last > LINGER:
                    self._thread = None
                    break
            if since is not None:
                last = now
                if now - since >= PATIENCE:
                    session = self._look(session)
        if session is not None:
            session.close()

    def _look(self, session: psycopg.Connection[Any] | None) -> psycopg.Connection[Any] | None:
        try:
            session = session or psycopg.connect(**self.where, autocommit=True, prepare_threshold=None)
            session.execute(END, {"shadow": SHADOW})
        except psycopg.Error as error:
            self._rescue("looking whether users wait for a shadow", error)
            if session is not None:
                session.close()
            time.sleep(PAUSE)
            return None
        return session


WATCHES: dict[tuple[str, int, str, str], Watch] = {}
MAKING = threading.Lock()


def watch(connection: AnyConnection) -> Watch:
    """The one of a connection's database."""
    info = connection.info
    with MAKING:
        found = WATCHES.setdefault((info.host, info.port, info.dbname, info.user), Watch())
    given = {option.keyword.decode(): (option.val or b"").decode() for option in connection.pgconn.info}
    given |= {"host": info.host, "hostaddr": info.hostaddr, "port": str(info.port)}  # of several the one
    given["application_name"] = "abreast watch"
    found.where = {name: value for name, value in given.items() if value}
    return found


def disturbed(connection: AnyConnection, error: BaseException) -> None:
    """Where others stood in a shadow's way, what comes of it says nothing of its code."""
    if isinstance(error, DISTURBED) or connection.closed:
        disturb(error)


def disturb(error: BaseException) -> None:
    request = CURRENT.get()
    if request.shadow:
        request.disturbed = f"a copy was disturbed in its database: {type(error).__name__}"
