"""psycopg's connections, for a service that is shadowed; without asyncio. Otherwise as psycopg_async.

A connection is for users, or for shadows: no session ever changes sides. What makes sure that a shadow's is rolled
back, however the code goes on:

- psycopg begins a transaction before the first statement, since the session is not in autocommit mode;
- `commit` sends no COMMIT, it only makes sure that a later `rollback` goes no further back than here;
- each statement goes by the extended protocol, in which Postgres takes one statement at a time, so that none can hide
  behind another; and one that begins with COMMIT or the like, or with a word that is not known, is refused;
- procedures and DO blocks can't commit inside a transaction: Postgres refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import psycopg
from psycopg import IsolationLevel, sql
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import Row

from abreast.context import CURRENT_CONTEXT, RequestContext, add_span
from abreast.effects import warn_if_request_outlived
from abreast.errors import ShadowError
from abreast.integrations.psycopg.lock_watchdog import (
    SHADOW_APPLICATION_NAME,
    LockWatchdog,
    get_watchdog,
    mark_invalid_if_interfered,
)
from abreast.integrations.psycopg.statement import (
    UNPARSED,
    PendingWrites,
    Statement,
    parse_statement,
    payload_for_many,
    payload_for_one,
)

Mode = Literal["live", "rolled back", "separate_database"]

SAVEPOINT = "savepoint abreast_unit"
SET_LIMITS_SQL = (
    "select set_config('lock_timeout', %s, true), set_config('idle_in_transaction_session_timeout', %s, true), "
    "set_config('application_name', %s, true)"
)
SHADOW_LOCK_TIMEOUT = "2s"  # what a shadow waits for a row that a user's transaction holds
SHADOW_IDLE_TIMEOUT = "10s"  # what users may have to wait for a forgotten shadow's row where nobody can watch
UNLOCK_SQL = "select pg_advisory_unlock_all()"
IDLE, INTRANS, INERROR = TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR

if not hasattr(psycopg.Cursor, "_execute_send"):  # one that is not known can't be held
    raise ImportError(f"abreast.integrations.psycopg does not know psycopg {psycopg.__version__}; it knows 3.2 and 3.3")


class Connection(psycopg.Connection[Row]):
    """psycopg's, for users' requests: it records what is written, and takes no statement of a shadow request."""

    mode: ClassVar[Mode] = "live"

    def __init__(self, pgconn: PGconn, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        self.cursor_factory = Cursor
        self.server_cursor_factory = ServerCursor
        self.pending_writes = PendingWrites()
        self.request_context: RequestContext | None = None  # that of the pool's user
        self.in_shadow = False  # by a shadow request, which is rolled back
        self.watchdog: LockWatchdog | None = None  # since it was first held
        self._requested_autocommit = False
        self._original_autocommit = False
        self._in_transaction = False  # for the code, a transaction is open

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """In a shadow request: a connection that is rolled back when it is closed."""
        if cls is Connection and CURRENT_CONTEXT.get().is_shadow:
            connection = ShadowConnection.connect(conninfo, **kwargs)
            connection.begin_shadow()
            return connection  # type: ignore[return-value]  # it is one
        return super().connect(conninfo, **kwargs)

    def begin_shadow(self) -> None:
        """From now on all is rolled back at `give_up`, whatever the code says."""
        if self.in_shadow:
            self.end_shadow()  # it came back another way
        self._requested_autocommit = self._original_autocommit = self.autocommit
        if self.pgconn.transaction_status == INTRANS and not self.autocommit:  # a pool's hook has set something
            self._begin_transaction()
        elif self.pgconn.transaction_status == IDLE:
            super().set_autocommit(False)
        else:
            raise ShadowError("a connection must be idle when a shadow request gets it")
        self.in_shadow = True
        self.watchdog = self.watchdog or get_watchdog(self)
        self.watchdog.add(self)
        warn_if_request_outlived(CURRENT_CONTEXT.get(), "what is written to Postgres")

    def end_shadow(self) -> None:
        """Roll back for good. What can't be is closed, and rolled back by the server."""
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
        """Whatever comes next is in the transaction that will be rolled back."""
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

    if not TYPE_CHECKING:  # psycopg's many signatures stay

        def cursor(self, *given: Any, **how: Any) -> Any:
            made = super().cursor(*given, **how)
            if not isinstance(made, Cursor | ServerCursor):
                raise ShadowError(
                    f"a {type(made).__name__} can't be guarded: cursor_factory must be left alone, or be a subclass of "
                    "abreast.integrations.psycopg's cursors"
                )
            return made

    def check_statement(self, query: Any) -> Statement:
        """Raise ShadowError for what could last though a shadow asks for it."""
        context = CURRENT_CONTEXT.get()
        is_shadow = context.is_shadow
        if self.mode == "live" and not is_shadow and not context.is_captured:
            return UNPARSED  # nothing is to be held or recorded
        sql_statement = parse_statement(_get_query_text(self, query))
        if self.mode == "live":
            if is_shadow:
                raise ShadowError(
                    "a shadow request uses a connection that was opened for users; open it in the request, or take it "
                    "from a pool of abreast.integrations.psycopg"
                )
        elif self.mode == "separate_database":
            if not is_shadow and sql_statement.is_write and self.request_context is not None:
                raise ShadowError("a shadow's connection is used outside its request")
        elif self.in_shadow:
            self._check_shadow_statement(sql_statement, is_shadow=is_shadow)
        elif sql_statement.is_write or sql_statement.is_transaction_control:
            raise ShadowError(f"a shadow's connection is not held yet, so it takes no {sql_statement.label}")
        return sql_statement

    def _check_shadow_statement(self, sql_statement: Statement, *, is_shadow: bool) -> None:
        if not is_shadow:
            raise ShadowError("a shadow's connection is used outside its request")
        if sql_statement.is_transaction_control:
            raise ShadowError(
                f"a shadow request can't send {sql_statement.shape[:40]!r} by itself: use commit(), rollback() or transaction()"
            )
        if not sql_statement.is_known:
            raise ShadowError(
                f"a shadow request can't send {sql_statement.shape[:40]!r}: nobody knows how to take it back"
            )

    @contextmanager
    def trace_statement(self, sql_statement: Statement, payload: dict[str, Any] | None) -> Iterator[None]:
        """Around one statement."""
        self.ensure_transaction()
        context, started_ns, note = CURRENT_CONTEXT.get(), perf_counter_ns(), ""
        try:
            yield
        except psycopg.errors.SyntaxError as error:
            note = type(error).__name__
            if self.in_shadow and "multiple commands" in str(error):
                raise ShadowError("a shadow request can send one statement at a time") from error
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
        """What was written is for good where the code is in no transaction."""
        if not self.in_shadow:
            if self.pgconn.transaction_status == IDLE:
                self.pending_writes.commit()
        elif is_write and self._requested_autocommit and not self._num_transactions:
            self.commit()

    def commit(self) -> None:
        if not self.in_shadow or self._num_transactions:
            failed = self.pgconn.transaction_status == INERROR
            super().commit()  # which refuses it inside a transaction block
            if failed:
                self.pending_writes.rollback_to()  # Postgres rolled back
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
        if not self.in_shadow:  # a shadow has one transaction, at the level of its beginning
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
            raise ShadowError(f"a shadow request can't {action}: it could not be taken back")


class UserConnection(Connection[Row]):
    """For users' requests, whoever has it opened: a pool may grow while a shadow request waits."""


class ShadowConnection(Connection[Row]):
    """For shadow requests: rolled back when it is given up or closed."""

    mode = "rolled back"


class ShadowDatabaseConnection(Connection[Row]):
    """For shadow requests that have a database of their own: what they commit stays there."""

    mode = "separate_database"


class Cursor(psycopg.Cursor[Row]):
    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(
            sql_statement, payload_for_one(sql_statement, params) if sql_statement.is_write else None
        ):
            return super().execute(query, params, **kwargs)

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        connection, rows = _get_connection(self), list(params_seq)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(
            sql_statement, payload_for_many(sql_statement, rows) if sql_statement.is_write else None
        ):
            super().executemany(query, rows, returning=returning)

    def stream(self, query: Any, params: Any = None, **kwargs: Any) -> Iterator[Row]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(
            sql_statement, payload_for_one(sql_statement, params) if sql_statement.is_write else None
        ):
            yield from super().stream(query, params, **kwargs)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **kwargs: Any) -> Iterator[psycopg.Copy]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(statement)
        payload = payload_for_one(sql_statement, params) if sql_statement.is_write else None
        with connection.trace_statement(sql_statement, payload):
            with super().copy(statement, params, **kwargs) as copy:
                yield copy
            if payload is not None:
                payload["rows"] = self.rowcount

    def _execute_send(self, query: Any, *, force_extended: bool = False, **kwargs: Any) -> None:
        """A shadow's statements by the extended protocol, which takes one at a time."""
        super()._execute_send(query, force_extended=force_extended or _get_connection(self).in_shadow, **kwargs)


class ServerCursor(psycopg.ServerCursor[Row]):
    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        with connection.trace_statement(sql_statement, None):
            return super().execute(query, params, **kwargs)


def _get_connection(cursor: Any) -> Connection[Any]:
    connection = cursor.connection
    if not isinstance(connection, Connection):
        raise ShadowError("a cursor of abreast.integrations.psycopg belongs to one of its connections")
    return connection


def _get_query_text(connection: Any, query: Any) -> str:
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, sql.Composable):
        return query.as_string(connection)
    return "?".join(getattr(query, "strings", ("(unknown)",)))  # a template string
