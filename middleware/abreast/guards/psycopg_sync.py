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

from abreast.context import CURRENT, Current
from abreast.errors import ShadowError
from abreast.guards.statement import UNREAD, Statement, statement
from abreast.guards.watch import SHADOW, Watch, disturbed, watch
from abreast.guards.writes import Writes, of_many, of_one
from abreast.hops import went
from abreast.outlived import outlived

Mode = Literal["live", "rolled back", "own"]

UNIT = "savepoint abreast_unit"
LIMITS = (
    "select set_config('lock_timeout', %s, true), set_config('idle_in_transaction_session_timeout', %s, true), "
    "set_config('application_name', %s, true)"
)
LOCK_TIMEOUT = "2s"  # what a shadow waits for a row that a user's transaction holds
IDLE_TIMEOUT = "10s"  # what users may have to wait for a forgotten shadow's row where nobody can watch
UNLOCK = "select pg_advisory_unlock_all()"
IDLE, INTRANS, INERROR = TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR

if not hasattr(psycopg.Cursor, "_execute_send"):  # one that is not known can't be held
    raise ImportError(
        f"abreast.guards.psycopg does not know psycopg {psycopg.__version__}; it knows 3.2 and 3.3"
    )


class Connection(psycopg.Connection[Row]):
    """psycopg's, for users' requests: it records what is written, and takes no statement of a shadow request."""

    mode: ClassVar[Mode] = "live"

    def __init__(self, pgconn: PGconn, *how: Any, **more: Any) -> None:
        super().__init__(pgconn, *how, **more)
        self.cursor_factory = Cursor
        self.server_cursor_factory = ServerCursor
        self.writes = Writes()
        self.request: Current | None = None  # that of the pool's user
        self.held = False  # by a shadow request, which is rolled back
        self.watch: Watch | None = None  # since it was first held
        self._asked_autocommit = False
        self._given_autocommit = False
        self._unit = False  # for the code, a transaction is open

    @classmethod
    def connect(cls, conninfo: str = "", **how: Any) -> Self:
        """In a shadow request: a connection that is rolled back when it is closed."""
        if cls is Connection and CURRENT.get().shadow:
            made = ShadowConnection.connect(conninfo, **how)
            made.hold()
            return made  # type: ignore[return-value]  # it is one
        return super().connect(conninfo, **how)

    def hold(self) -> None:
        """From now on all is rolled back at `give_up`, whatever the code says."""
        if self.held:
            self.give_up()  # it came back another way
        self._asked_autocommit = self._given_autocommit = self.autocommit
        if (
            self.pgconn.transaction_status == INTRANS and not self.autocommit
        ):  # a pool's hook has set something
            self._begin()
        elif self.pgconn.transaction_status == IDLE:
            super().set_autocommit(False)
        else:
            raise ShadowError("a connection must be idle when a shadow request gets it")
        self.held = True
        self.watch = self.watch or watch(self)
        self.watch.begin(self)
        outlived(CURRENT.get(), "what is written to Postgres")

    def give_up(self) -> None:
        """Roll back for good. What can't be is closed, and rolled back by the server."""
        self.writes.cut()
        self.request = None
        if self.watch is not None:
            self.watch.over(self)
        if not self.held or self.closed:
            return
        try:
            super().rollback()
            super().set_autocommit(True)
            psycopg.Cursor(self).execute(UNLOCK)
            super().set_autocommit(self._given_autocommit)
            self.held = self._unit = False
        except BaseException:
            self.pgconn.finish()
            raise

    def ready(self) -> None:
        """Whatever comes next is in the transaction that will be rolled back."""
        if not self.held:
            return
        status = self.pgconn.transaction_status
        if status == IDLE:
            self._begin()
        elif status == INERROR and self._asked_autocommit and not self._num_transactions:
            self._plain(f"rollback to {UNIT}")
        self._unit = self._unit or not self._asked_autocommit

    def _begin(self) -> None:
        self._plain(LIMITS, (LOCK_TIMEOUT, IDLE_TIMEOUT, SHADOW))  # psycopg begins the transaction
        self._plain(UNIT)

    def _plain(self, text: str, values: tuple[str, ...] | None = None) -> None:
        try:
            psycopg.Cursor(self).execute(text.encode(), values)
        except psycopg.Error as error:
            disturbed(self, error)
            raise

    if not TYPE_CHECKING:  # psycopg's many signatures stay

        def cursor(self, *given: Any, **how: Any) -> Any:
            made = super().cursor(*given, **how)
            if not isinstance(made, Cursor | ServerCursor):
                raise ShadowError(
                    f"a {type(made).__name__} can't be guarded: cursor_factory must be left alone, or be a subclass of "
                    "abreast.guards.psycopg's cursors"
                )
            return made

    def look(self, query: Any) -> Statement:
        """Raise ShadowError for what could last though a shadow asks for it."""
        request = CURRENT.get()
        shadow = request.shadow
        if self.mode == "live" and not shadow and not request.recorded:
            return UNREAD  # nothing is to be held or recorded
        known = statement(_text(self, query))
        if self.mode == "live":
            if shadow:
                raise ShadowError(
                    "a shadow request uses a connection that was opened for users; open it in the request, or take it "
                    "from a pool of abreast.guards.psycopg"
                )
        elif self.mode == "own":
            if not shadow and known.writes and self.request is not None:
                raise ShadowError("a shadow's connection is used outside its request")
        elif self.held:
            self._look_held(known, shadow=shadow)
        elif known.writes or known.control:
            raise ShadowError(f"a shadow's connection is not held yet, so it takes no {known.said}")
        return known

    def _look_held(self, known: Statement, *, shadow: bool) -> None:
        if not shadow:
            raise ShadowError("a shadow's connection is used outside its request")
        if known.control:
            raise ShadowError(
                f"a shadow request can't send {known.shape[:40]!r} by itself: use commit(), rollback() or transaction()"
            )
        if not known.known:
            raise ShadowError(
                f"a shadow request can't send {known.shape[:40]!r}: nobody knows how to take it back"
            )

    @contextmanager
    def asked(self, known: Statement, payload: dict[str, Any] | None) -> Iterator[None]:
        """Around one statement."""
        self.ready()
        request, since, note = CURRENT.get(), perf_counter_ns(), ""
        try:
            yield
        except psycopg.errors.SyntaxError as error:
            note = type(error).__name__
            if self.held and "multiple commands" in str(error):
                raise ShadowError("a shadow request can send one statement at a time") from error
            raise
        except BaseException as error:
            note = type(error).__name__
            disturbed(self, error)
            raise
        finally:
            went(request, "database", known.said, since, note)
        if payload is not None:
            self.writes.add(known, payload)
        if known.control and known.word in {"rollback", "abort"}:
            self.writes.cut()
        self._settle(wrote=known.writes)

    def _settle(self, *, wrote: bool) -> None:
        """What was written is for good where the code is in no transaction."""
        if not self.held:
            if self.pgconn.transaction_status == IDLE:
                self.writes.flush()
        elif wrote and self._asked_autocommit and not self._num_transactions:
            self.commit()

    def commit(self) -> None:
        if not self.held or self._num_transactions:
            failed = self.pgconn.transaction_status == INERROR
            super().commit()  # which refuses it inside a transaction block
            if failed:
                self.writes.cut()  # Postgres rolled back
            self.writes.flush()
            return
        status = self.pgconn.transaction_status
        if status == INTRANS:
            self._plain(f"release {UNIT}")
            self._plain(UNIT)
            self.writes.flush()
        elif status == INERROR:
            self._plain(f"rollback to {UNIT}")
        self.writes.cut()
        self._unit = False

    def rollback(self) -> None:
        if not self.held or self._num_transactions:
            super().rollback()
        elif self.pgconn.transaction_status in {INTRANS, INERROR}:
            self._plain(f"rollback to {UNIT}")
        self.writes.cut()
        self._unit = False

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        outer = not self._unit and not self._num_transactions
        self.ready()
        mark = self.writes.mark()
        try:
            with super().transaction(savepoint_name, force_rollback) as block:
                yield block
        except BaseException:
            self.writes.cut(mark)
            raise
        if block.status != block.Status.COMMITTED:
            self.writes.cut(mark)
        elif self.held and outer:
            self.commit()
        if not self.held:
            self._settle(wrote=False)

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        self.ready()
        with super().pipeline() as pipeline:
            yield pipeline

    @property
    def autocommit(self) -> bool:
        return self._asked_autocommit if self.held else self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._set_autocommit(value)

    def set_autocommit(self, value: bool) -> None:
        if self.held:
            self._asked_autocommit = value
        else:
            super().set_autocommit(value)

    def set_isolation_level(self, value: IsolationLevel | None) -> None:
        if not self.held:  # a shadow has one transaction, at the level of its beginning
            super().set_isolation_level(value)

    def set_read_only(self, value: bool | None) -> None:
        if not self.held:
            super().set_read_only(value)

    def set_deferrable(self, value: bool | None) -> None:
        if not self.held:
            super().set_deferrable(value)

    def notifies(self, **how: Any) -> Any:
        self._only_live("wait for notifications")
        return super().notifies(**how)

    def tpc_begin(self, xid: Any) -> None:
        self._only_live("prepare a transaction")
        super().tpc_begin(xid)

    def tpc_commit(self, xid: Any = None) -> None:
        self._only_live("commit a prepared transaction")
        super().tpc_commit(xid)

    def tpc_rollback(self, xid: Any = None) -> None:
        self._only_live("roll back a prepared transaction")
        super().tpc_rollback(xid)

    def _only_live(self, what: str) -> None:
        if self.held or (self.mode == "live" and CURRENT.get().shadow):
            raise ShadowError(f"a shadow request can't {what}: it could not be taken back")


class UserConnection(Connection[Row]):
    """For users' requests, whoever has it opened: a pool may grow while a shadow request waits."""


class ShadowConnection(Connection[Row]):
    """For shadow requests: rolled back when it is given up or closed."""

    mode = "rolled back"


class OwnConnection(Connection[Row]):
    """For shadow requests that have a database of their own: what they commit stays there."""

    mode = "own"


class Cursor(psycopg.Cursor[Row]):
    def execute(self, query: Any, params: Any = None, **how: Any) -> Self:
        connection = _guarded(self)
        known = connection.look(query)
        with connection.asked(known, of_one(known, params) if known.writes else None):
            return super().execute(query, params, **how)

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        connection, rows = _guarded(self), list(params_seq)
        known = connection.look(query)
        with connection.asked(known, of_many(known, rows) if known.writes else None):
            super().executemany(query, rows, returning=returning)

    def stream(self, query: Any, params: Any = None, **how: Any) -> Iterator[Row]:
        connection = _guarded(self)
        known = connection.look(query)
        with connection.asked(known, of_one(known, params) if known.writes else None):
            yield from super().stream(query, params, **how)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **how: Any) -> Iterator[psycopg.Copy]:
        connection = _guarded(self)
        known = connection.look(statement)
        payload = of_one(known, params) if known.writes else None
        with connection.asked(known, payload):
            with super().copy(statement, params, **how) as copying:
                yield copying
            if payload is not None:
                payload["rows"] = self.rowcount

    def _execute_send(self, query: Any, *, force_extended: bool = False, **how: Any) -> None:
        """A shadow's statements by the extended protocol, which takes one at a time."""
        super()._execute_send(query, force_extended=force_extended or _guarded(self).held, **how)


class ServerCursor(psycopg.ServerCursor[Row]):
    def execute(self, query: Any, params: Any = None, **how: Any) -> Self:
        connection = _guarded(self)
        known = connection.look(query)
        with connection.asked(known, None):
            return super().execute(query, params, **how)


def _guarded(cursor: Any) -> Connection[Any]:
    connection = cursor.connection
    if not isinstance(connection, Connection):
        raise ShadowError("a cursor of abreast.guards.psycopg belongs to one of its connections")
    return connection


def _text(connection: Any, query: Any) -> str:
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, sql.Composable):
        return query.as_string(connection)
    return "?".join(getattr(query, "strings", ("(unknown)",)))  # a template string
