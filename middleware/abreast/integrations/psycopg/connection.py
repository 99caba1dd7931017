# Generated from connection_async.py by `make generate` (middleware/generate_sync.py). Do not edit.
"""psycopg connections and cursors for services that receive shadow requests.

A connection serves users or shadows, and no session changes sides. A shadow's connection rolls back all writes, even if
the code of the service commits:

- The session is not in autocommit mode, so psycopg begins a transaction before the first statement.
- `commit` sends no COMMIT. It sets a savepoint, and `rollback` returns to that savepoint.
- Each statement uses the extended protocol, which takes one statement at a time. A COMMIT can't hide behind another
  statement.
- A statement that begins with COMMIT or the like, or with an unknown keyword, raises `ShadowError`.
- Procedures and DO blocks can't commit inside a transaction, because Postgres rejects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import psycopg
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import Row

from abreast.context import CURRENT_CONTEXT, RequestContext, add_span
from abreast.effects import warn_if_request_outlived
from abreast.errors import ShadowError
from abreast.integrations.psycopg.shadow_sessions import (
    SHADOW_APPLICATION_NAME,
    LockWatchdog,
    get_watchdog,
    mark_invalid_if_interfered,
)
from abreast.integrations.psycopg.statement import (
    UNPARSED,
    PendingWrites,
    Statement,
    describe_write,
    describe_writes,
    get_query_text,
    parse_statement,
)

Mode = Literal["live", "rollback", "separate_database"]

SAVEPOINT = "savepoint abreast_unit"
SET_LIMITS_SQL = (
    "select set_config('lock_timeout', %s, true), set_config('idle_in_transaction_session_timeout', %s, true), "
    "set_config('application_name', %s, true)"
)
SHADOW_LOCK_TIMEOUT = "2s"  # longest wait of a shadow for a row that another transaction has locked
SHADOW_IDLE_TIMEOUT = "10s"  # longest wait of a user for the row of an idle shadow if the lock watchdog can't act
UNLOCK_SQL = "select pg_advisory_unlock_all()"
USED_OUTSIDE_REQUEST = "a shadow's connection can't be used outside its request; take a new connection from the pool"
IDLE, INTRANS, INERROR = TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR

if not hasattr(psycopg.Cursor, "_execute_send"):
    raise ImportError(
        f"abreast.integrations.psycopg can't roll back shadows on psycopg {psycopg.__version__}; install 3.2 or 3.3"
    )


class Connection(psycopg.Connection[Row]):
    """A connection that records writes. In a shadow request, `connect` returns one that is rolled back when it closes.

    A connection for users rejects the statements of shadow requests.
    """

    mode: ClassVar[Mode] = "live"

    def __init__(self, pgconn: PGconn, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        self.cursor_factory = Cursor
        self.server_cursor_factory = ServerCursor
        self.pending_writes = PendingWrites()
        self.request_context: RequestContext | None = None  # the request that took it from a pool
        self.in_shadow = False  # in use by a shadow request, so it is rolled back
        self.watchdog: LockWatchdog | None = None  # set by the first shadow request
        self._requested_autocommit = False
        self._original_autocommit = False
        self._in_transaction = False  # a transaction is open from the point of view of the service

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        if cls is Connection and CURRENT_CONTEXT.get().is_shadow:
            connection = ShadowConnection.connect(conninfo, **kwargs)
            connection.begin_shadow()
            return connection  # type: ignore[return-value]  # a subclass of this class
        return super().connect(conninfo, **kwargs)

    def begin_shadow(self) -> None:
        """Roll back every statement from now on when `end_shadow` is called."""
        if self.in_shadow:
            self.end_shadow()  # the previous shadow did not end in the usual way
        self._requested_autocommit = self._original_autocommit = self.autocommit
        if self.pgconn.transaction_status == INTRANS and not self.autocommit:  # a hook of the pool began it
            self._begin_transaction()
        elif self.pgconn.transaction_status == IDLE:
            super().set_autocommit(False)
        else:
            raise ShadowError(
                "a connection must be idle when a shadow request takes it; end its transaction before you return it"
            )
        self.in_shadow = True
        self.watchdog = self.watchdog or get_watchdog(self)
        self.watchdog.add(self)
        warn_if_request_outlived(CURRENT_CONTEXT.get(), "a write to Postgres")

    def end_shadow(self) -> None:
        """Roll back and leave shadow mode. If that fails, close the connection, and the server rolls back."""
        self.pending_writes.rollback_to()
        self.request_context = None
        if self.watchdog is not None:
            self.watchdog.remove(self)
        if not self.in_shadow or self.closed:
            return
        try:
            super().rollback()
            super().set_autocommit(True)
            psycopg.Cursor(self).execute(UNLOCK_SQL)
            super().set_autocommit(self._original_autocommit)
            self.in_shadow = self._in_transaction = False
        except BaseException:
            self.pgconn.finish()
            raise

    def ensure_transaction(self) -> None:
        """Begin the transaction of a shadow that will be rolled back, unless it is open."""
        if not self.in_shadow:
            return
        status = self.pgconn.transaction_status
        if status == IDLE:
            self._begin_transaction()
        elif status == INERROR and self._requested_autocommit and not self._num_transactions:
            self._execute_plain(f"rollback to {SAVEPOINT}")
        self._in_transaction = self._in_transaction or not self._requested_autocommit

    def _begin_transaction(self) -> None:
        self._execute_plain(
            SET_LIMITS_SQL, (SHADOW_LOCK_TIMEOUT, SHADOW_IDLE_TIMEOUT, SHADOW_APPLICATION_NAME)
        )  # psycopg begins the transaction
        self._execute_plain(SAVEPOINT)

    def _execute_plain(self, text: str, values: tuple[str, ...] | None = None) -> None:
        try:
            psycopg.Cursor(self).execute(text.encode(), values)
        except psycopg.Error as error:
            mark_invalid_if_interfered(self, error)
            raise

    if not TYPE_CHECKING:  # keeps the overloads of psycopg

        def cursor(self, *args: Any, **kwargs: Any) -> Any:
            cursor = super().cursor(*args, **kwargs)
            if not isinstance(cursor, Cursor | ServerCursor):
                raise ShadowError(
                    f"cursor_factory must be a cursor class of abreast.integrations.psycopg, got {type(cursor).__name__}"
                )
            return cursor

    def check_statement(self, query: Any) -> Statement:
        """Parse a statement. Raise ShadowError if a rollback could not undo it, or if it runs on the wrong connection."""
        context = CURRENT_CONTEXT.get()
        is_shadow = context.is_shadow
        if self.mode == "live" and not is_shadow and not context.is_captured:
            return UNPARSED  # neither rolled back nor recorded
        sql_statement = parse_statement(get_query_text(query, self))
        if self.mode == "live":
            if is_shadow:
                raise ShadowError(
                    "a shadow request can't use a connection that was opened for users; open the connection in the "
                    "request, or use a pool of abreast.integrations.psycopg_pool"
                )
        elif self.mode == "separate_database":
            if not is_shadow and sql_statement.is_write and self.request_context is not None:
                raise ShadowError(USED_OUTSIDE_REQUEST)
        elif not self.in_shadow:
            if sql_statement.is_write or sql_statement.is_transaction_control:
                raise ShadowError(f"a shadow's connection rejects {sql_statement.label} before its request begins")
        elif not is_shadow:
            raise ShadowError(USED_OUTSIDE_REQUEST)
        elif sql_statement.is_transaction_control or not sql_statement.is_known:
            raise ShadowError(
                f"a shadow request can't send {sql_statement.shape[:40]!r}, because it could not be rolled back; to end a "
                "transaction, use commit(), rollback() or transaction()"
            )
        return sql_statement

    @contextmanager
    def trace_statement(self, sql_statement: Statement, payload: dict[str, Any] | None) -> Iterator[None]:
        """Run one statement in the block: begin a transaction if needed, time the statement, and record its write."""
        self.ensure_transaction()
        context, started_ns, note = CURRENT_CONTEXT.get(), perf_counter_ns(), ""
        try:
            yield
        except psycopg.errors.SyntaxError as error:
            note = type(error).__name__
            if self.in_shadow and "multiple commands" in str(error):
                raise ShadowError(
                    "a shadow request can't send several statements in one string; send them one by one"
                ) from error
            raise
        except BaseException as error:
            note = type(error).__name__
            mark_invalid_if_interfered(self, error)
            raise
        finally:
            add_span(context, "database", sql_statement.label, started_ns, note)
        if payload is not None:
            self.pending_writes.add(sql_statement, payload)
        if sql_statement.is_transaction_control and sql_statement.keyword in {"rollback", "abort"}:
            self.pending_writes.rollback_to()
        self._commit_if_autocommit(is_write=sql_statement.is_write)

    def _commit_if_autocommit(self, *, is_write: bool) -> None:
        """Commit recorded writes if the service has no transaction open."""
        if not self.in_shadow:
            if self.pgconn.transaction_status == IDLE:
                self.pending_writes.commit()
        elif is_write and self._requested_autocommit and not self._num_transactions:
            self.commit()

    def commit(self) -> None:
        if not self.in_shadow or self._num_transactions:
            failed = self.pgconn.transaction_status == INERROR
            super().commit()  # raises inside a transaction block
            if failed:
                self.pending_writes.rollback_to()  # Postgres has rolled back
            self.pending_writes.commit()
            return
        status = self.pgconn.transaction_status
        if status == INTRANS:
            self._execute_plain(f"release {SAVEPOINT}")
            self._execute_plain(SAVEPOINT)
            self.pending_writes.commit()
        elif status == INERROR:
            self._execute_plain(f"rollback to {SAVEPOINT}")
        self.pending_writes.rollback_to()
        self._in_transaction = False

    def rollback(self) -> None:
        if not self.in_shadow or self._num_transactions:
            super().rollback()
        elif self.pgconn.transaction_status in {INTRANS, INERROR}:
            self._execute_plain(f"rollback to {SAVEPOINT}")
        self.pending_writes.rollback_to()
        self._in_transaction = False

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        is_outermost = not self._in_transaction and not self._num_transactions
        self.ensure_transaction()
        writes_savepoint = self.pending_writes.savepoint()
        try:
            with super().transaction(savepoint_name, force_rollback) as block:
                yield block
        except BaseException:
            self.pending_writes.rollback_to(writes_savepoint)
            raise
        if block.status != block.Status.COMMITTED:
            self.pending_writes.rollback_to(writes_savepoint)
        elif self.in_shadow and is_outermost:
            self.commit()
        if not self.in_shadow:
            self._commit_if_autocommit(is_write=False)

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        self.ensure_transaction()
        with super().pipeline() as pipeline:
            yield pipeline

    @property
    def autocommit(self) -> bool:
        return self._requested_autocommit if self.in_shadow else self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._set_autocommit(value)

    def set_autocommit(self, value: bool) -> None:
        if self.in_shadow:
            self._requested_autocommit = value
        else:
            super().set_autocommit(value)

    def set_isolation_level(self, value: IsolationLevel | None) -> None:
        if not self.in_shadow:  # the transaction of a shadow keeps the level with which it began
            super().set_isolation_level(value)

    def set_read_only(self, value: bool | None) -> None:
        if not self.in_shadow:
            super().set_read_only(value)

    def set_deferrable(self, value: bool | None) -> None:
        if not self.in_shadow:
            super().set_deferrable(value)

    def notifies(self, **kwargs: Any) -> Any:
        self._require_live("wait for notifications")
        return super().notifies(**kwargs)

    def tpc_begin(self, xid: Any) -> None:
        self._require_live("prepare a transaction")
        super().tpc_begin(xid)

    def tpc_commit(self, xid: Any = None) -> None:
        self._require_live("commit a prepared transaction")
        super().tpc_commit(xid)

    def tpc_rollback(self, xid: Any = None) -> None:
        self._require_live("roll back a prepared transaction")
        super().tpc_rollback(xid)

    def _require_live(self, action: str) -> None:
        if self.in_shadow or (self.mode == "live" and CURRENT_CONTEXT.get().is_shadow):
            raise ShadowError(f"a shadow request can't {action}, because a rollback would not undo it")


class UserConnection(Connection[Row]):
    """A connection for users, also if a shadow request opens it: a pool may grow while a shadow waits."""


class ShadowConnection(Connection[Row]):
    """A connection for shadows. It is rolled back when it is returned or closed."""

    mode = "rollback"


class ShadowDatabaseConnection(Connection[Row]):
    """A connection for shadows to a separate database, in which they commit."""

    mode = "separate_database"


CONNECTION_CLASSES: dict[Mode, type[Connection[Any]]] = {
    "live": UserConnection,
    "rollback": ShadowConnection,
    "separate_database": ShadowDatabaseConnection,
}


class Cursor(psycopg.Cursor[Row]):
    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(sql_statement, describe_write(sql_statement, params)):
            return super().execute(query, params, **kwargs)

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        connection, rows = _get_connection(self), list(params_seq)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(sql_statement, describe_writes(sql_statement, rows)):
            super().executemany(query, rows, returning=returning)

    def stream(self, query: Any, params: Any = None, **kwargs: Any) -> Iterator[Row]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(sql_statement, describe_write(sql_statement, params)):
            yield from super().stream(query, params, **kwargs)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **kwargs: Any) -> Iterator[psycopg.Copy]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(statement)
        payload = describe_write(sql_statement, params)
        with connection.trace_statement(sql_statement, payload):
            with super().copy(statement, params, **kwargs) as copy:
                yield copy
            if payload is not None:
                payload["rows"] = self.rowcount

    def _execute_send(self, query: Any, *, force_extended: bool = False, **kwargs: Any) -> None:
        """Send a shadow's statement with the extended protocol, which takes one statement at a time."""
        super()._execute_send(query, force_extended=force_extended or _get_connection(self).in_shadow, **kwargs)


class ServerCursor(psycopg.ServerCursor[Row]):
    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        with connection.trace_statement(connection.check_statement(query), None):
            return super().execute(query, params, **kwargs)


def _get_connection(cursor: Any) -> Connection[Any]:
    connection = cursor.connection
    if not isinstance(connection, Connection):
        raise ShadowError(
            f"a cursor of abreast.integrations.psycopg needs a connection of that module, got {type(connection).__name__}"
        )
    return connection
