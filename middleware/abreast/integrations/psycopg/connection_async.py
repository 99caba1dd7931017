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

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
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

if not hasattr(psycopg.AsyncCursor, "_execute_send"):
    raise ImportError(
        f"abreast.integrations.psycopg can't roll back shadows on psycopg {psycopg.__version__}; install 3.2 or 3.3"
    )


class AsyncConnection(psycopg.AsyncConnection[Row]):
    """A connection that records writes. In a shadow request, `connect` returns one that is rolled back when it closes.

    A connection for users rejects the statements of shadow requests.
    """

    mode: ClassVar[Mode] = "live"

    def __init__(self, pgconn: PGconn, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        self.cursor_factory = AsyncCursor
        self.server_cursor_factory = AsyncServerCursor
        self.pending_writes = PendingWrites()
        self.request_context: RequestContext | None = None  # the request that took it from a pool
        self.in_shadow = False  # in use by a shadow request, so it is rolled back
        self.watchdog: LockWatchdog | None = None  # set by the first shadow request
        self._requested_autocommit = False
        self._original_autocommit = False
        self._in_transaction = False  # a transaction is open from the point of view of the service

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        if cls is AsyncConnection and CURRENT_CONTEXT.get().is_shadow:
            connection = await AsyncShadowConnection.connect(conninfo, **kwargs)
            await connection.begin_shadow()
            return connection  # type: ignore[return-value]  # a subclass of this class
        return await super().connect(conninfo, **kwargs)

    async def begin_shadow(self) -> None:
        """Roll back every statement from now on when `end_shadow` is called."""
        if self.in_shadow:
            await self.end_shadow()  # the previous shadow did not end in the usual way
        self._requested_autocommit = self._original_autocommit = self.autocommit
        if self.pgconn.transaction_status == INTRANS and not self.autocommit:  # a hook of the pool began it
            await self._begin_transaction()
        elif self.pgconn.transaction_status == IDLE:
            await super().set_autocommit(False)
        else:
            raise ShadowError(
                "a connection must be idle when a shadow request takes it; end its transaction before you return it"
            )
        self.in_shadow = True
        self.watchdog = self.watchdog or get_watchdog(self)
        self.watchdog.add(self)
        warn_if_request_outlived(CURRENT_CONTEXT.get(), "a write to Postgres")

    async def end_shadow(self) -> None:
        """Roll back and leave shadow mode. If that fails, close the connection, and the server rolls back."""
        self.pending_writes.rollback_to()
        self.request_context = None
        if self.watchdog is not None:
            self.watchdog.remove(self)
        if not self.in_shadow or self.closed:
            return
        try:
            await super().rollback()
            await super().set_autocommit(True)
            await psycopg.AsyncCursor(self).execute(UNLOCK_SQL)
            await super().set_autocommit(self._original_autocommit)
            self.in_shadow = self._in_transaction = False
        except BaseException:
            self.pgconn.finish()
            raise

    async def ensure_transaction(self) -> None:
        """Begin the transaction of a shadow that will be rolled back, unless it is open."""
        if not self.in_shadow:
            return
        status = self.pgconn.transaction_status
        if status == IDLE:
            await self._begin_transaction()
        elif status == INERROR and self._requested_autocommit and not self._num_transactions:
            await self._execute_plain(f"rollback to {SAVEPOINT}")
        self._in_transaction = self._in_transaction or not self._requested_autocommit

    async def _begin_transaction(self) -> None:
        await self._execute_plain(
            SET_LIMITS_SQL, (SHADOW_LOCK_TIMEOUT, SHADOW_IDLE_TIMEOUT, SHADOW_APPLICATION_NAME)
        )  # psycopg begins the transaction
        await self._execute_plain(SAVEPOINT)

    async def _execute_plain(self, text: str, values: tuple[str, ...] | None = None) -> None:
        try:
            await psycopg.AsyncCursor(self).execute(text.encode(), values)
        except psycopg.Error as error:
            mark_invalid_if_interfered(self, error)
            raise

    if not TYPE_CHECKING:  # keeps the overloads of psycopg

        def cursor(self, *args: Any, **kwargs: Any) -> Any:
            cursor = super().cursor(*args, **kwargs)
            if not isinstance(cursor, AsyncCursor | AsyncServerCursor):
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

    @asynccontextmanager
    async def trace_statement(self, sql_statement: Statement, payload: dict[str, Any] | None) -> AsyncIterator[None]:
        """Run one statement in the block: begin a transaction if needed, time the statement, and record its write."""
        await self.ensure_transaction()
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
        await self._commit_if_autocommit(is_write=sql_statement.is_write)

    async def _commit_if_autocommit(self, *, is_write: bool) -> None:
        """Commit recorded writes if the service has no transaction open."""
        if not self.in_shadow:
            if self.pgconn.transaction_status == IDLE:
                self.pending_writes.commit()
        elif is_write and self._requested_autocommit and not self._num_transactions:
            await self.commit()

    async def commit(self) -> None:
        if not self.in_shadow or self._num_transactions:
            failed = self.pgconn.transaction_status == INERROR
            await super().commit()  # raises inside a transaction block
            if failed:
                self.pending_writes.rollback_to()  # Postgres has rolled back
            self.pending_writes.commit()
            return
        status = self.pgconn.transaction_status
        if status == INTRANS:
            await self._execute_plain(f"release {SAVEPOINT}")
            await self._execute_plain(SAVEPOINT)
            self.pending_writes.commit()
        elif status == INERROR:
            await self._execute_plain(f"rollback to {SAVEPOINT}")
        self.pending_writes.rollback_to()
        self._in_transaction = False

    async def rollback(self) -> None:
        if not self.in_shadow or self._num_transactions:
            await super().rollback()
        elif self.pgconn.transaction_status in {INTRANS, INERROR}:
            await self._execute_plain(f"rollback to {SAVEPOINT}")
        self.pending_writes.rollback_to()
        self._in_transaction = False

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        is_outermost = not self._in_transaction and not self._num_transactions
        await self.ensure_transaction()
        writes_savepoint = self.pending_writes.savepoint()
        try:
            async with super().transaction(savepoint_name, force_rollback) as block:
                yield block
        except BaseException:
            self.pending_writes.rollback_to(writes_savepoint)
            raise
        if block.status != block.Status.COMMITTED:
            self.pending_writes.rollback_to(writes_savepoint)
        elif self.in_shadow and is_outermost:
            await self.commit()
        if not self.in_shadow:
            await self._commit_if_autocommit(is_write=False)

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[psycopg.AsyncPipeline]:
        await self.ensure_transaction()
        async with super().pipeline() as pipeline:
            yield pipeline

    @property
    def autocommit(self) -> bool:
        return self._requested_autocommit if self.in_shadow else self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._set_autocommit(value)

    async def set_autocommit(self, value: bool) -> None:
        if self.in_shadow:
            self._requested_autocommit = value
        else:
            await super().set_autocommit(value)

    async def set_isolation_level(self, value: IsolationLevel | None) -> None:
        if not self.in_shadow:  # the transaction of a shadow keeps the level with which it began
            await super().set_isolation_level(value)

    async def set_read_only(self, value: bool | None) -> None:
        if not self.in_shadow:
            await super().set_read_only(value)

    async def set_deferrable(self, value: bool | None) -> None:
        if not self.in_shadow:
            await super().set_deferrable(value)

    def notifies(self, **kwargs: Any) -> Any:
        self._require_live("wait for notifications")
        return super().notifies(**kwargs)

    async def tpc_begin(self, xid: Any) -> None:
        self._require_live("prepare a transaction")
        await super().tpc_begin(xid)

    async def tpc_commit(self, xid: Any = None) -> None:
        self._require_live("commit a prepared transaction")
        await super().tpc_commit(xid)

    async def tpc_rollback(self, xid: Any = None) -> None:
        self._require_live("roll back a prepared transaction")
        await super().tpc_rollback(xid)

    def _require_live(self, action: str) -> None:
        if self.in_shadow or (self.mode == "live" and CURRENT_CONTEXT.get().is_shadow):
            raise ShadowError(f"a shadow request can't {action}, because a rollback would not undo it")


class AsyncUserConnection(AsyncConnection[Row]):
    """A connection for users, also if a shadow request opens it: a pool may grow while a shadow waits."""


class AsyncShadowConnection(AsyncConnection[Row]):
    """A connection for shadows. It is rolled back when it is returned or closed."""

    mode = "rollback"


class AsyncShadowDatabaseConnection(AsyncConnection[Row]):
    """A connection for shadows to a separate database, in which they commit."""

    mode = "separate_database"


ASYNC_CONNECTION_CLASSES: dict[Mode, type[AsyncConnection[Any]]] = {
    "live": AsyncUserConnection,
    "rollback": AsyncShadowConnection,
    "separate_database": AsyncShadowDatabaseConnection,
}


class AsyncCursor(psycopg.AsyncCursor[Row]):
    async def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        async with connection.trace_statement(sql_statement, describe_write(sql_statement, params)):
            return await super().execute(query, params, **kwargs)

    async def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        connection, rows = _get_connection(self), list(params_seq)
        sql_statement = connection.check_statement(query)
        async with connection.trace_statement(sql_statement, describe_writes(sql_statement, rows)):
            await super().executemany(query, rows, returning=returning)

    async def stream(self, query: Any, params: Any = None, **kwargs: Any) -> AsyncIterator[Row]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(query)
        async with connection.trace_statement(sql_statement, describe_write(sql_statement, params)):
            async for row in super().stream(query, params, **kwargs):
                yield row

    @asynccontextmanager
    async def copy(self, statement: Any, params: Any = None, **kwargs: Any) -> AsyncIterator[psycopg.AsyncCopy]:
        connection = _get_connection(self)
        sql_statement = connection.check_statement(statement)
        payload = describe_write(sql_statement, params)
        async with connection.trace_statement(sql_statement, payload):
            async with super().copy(statement, params, **kwargs) as copy:
                yield copy
            if payload is not None:
                payload["rows"] = self.rowcount

    def _execute_send(self, query: Any, *, force_extended: bool = False, **kwargs: Any) -> None:
        """Send a shadow's statement with the extended protocol, which takes one statement at a time."""
        super()._execute_send(query, force_extended=force_extended or _get_connection(self).in_shadow, **kwargs)


class AsyncServerCursor(psycopg.AsyncServerCursor[Row]):
    async def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Self:
        connection = _get_connection(self)
        async with connection.trace_statement(connection.check_statement(query), None):
            return await super().execute(query, params, **kwargs)


def _get_connection(cursor: Any) -> AsyncConnection[Any]:
    connection = cursor.connection
    if not isinstance(connection, AsyncConnection):
        raise ShadowError(
            f"a cursor of abreast.integrations.psycopg needs a connection of that module, got {type(connection).__name__}"
        )
    return connection
