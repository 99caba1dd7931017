"""Connections to the ledger, named queries from queries/*.sql, advisory locks, and text that Postgres accepts."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import re
import select
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from enum import IntEnum
from functools import cache, wraps
from importlib import resources
from typing import Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

import orjson
import psycopg
import structlog
from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction
from psycopg.abc import Params
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from abreast_sidecar.errors import LedgerError, SidecarError, first_line

MAX_POOL_CONNECTIONS = 16  # per sidecar
CONNECT_TIMEOUT_S = 3  # for one attempt
POOL_WAIT_S = 2.5  # per call while Postgres is away
STATEMENT_TIMEOUT_S = 20
SESSION_LIMITS = (
    f"set local statement_timeout = '{STATEMENT_TIMEOUT_S}s'; set local jit = off; set local timezone = 'UTC'"
)
PROBE_INTERVAL_S = 5.0  # without a notification, before a listener sends one to itself
PROBE_TIMEOUT_S = 0.5
REFRESH_TIMEOUT_S = 10.0  # for all reads after a notification
RECONNECT_DELAY_S = 0.5
QUERY_NAME = re.compile(rb"^-- name: (\w+)\n", re.MULTILINE)
NUL_PLACEHOLDER = "␀"  # for a zero byte, which text in Postgres can't hold
TRUNCATION_MARK = "…"
TRUNCATION_DIGEST_BYTES = 4

Connection = AsyncConnection[DictRow]
Row = dict[str, Any]
ChannelHandlers: TypeAlias = Mapping[str, Callable[[], Awaitable[None]]]  # channel → refresh

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")  # a row

log = structlog.get_logger(__name__)


@cache
def statements() -> Mapping[str, bytes]:
    """Read all named queries."""
    folder = resources.files("abreast_sidecar.store") / "queries"
    return parse_queries({file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(".sql")})


def parse_queries(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Split files into queries: each begins with a line `-- name: NAME`. Raise ValueError for a duplicate name."""
    queries: dict[str, bytes] = {}
    for file, text in sorted(files.items()):
        _, *parts = QUERY_NAME.split(text)
        for name, query in zip(parts[::2], parts[1::2], strict=True):
            if name.decode() in queries:
                raise ValueError(f"{file}: another query is named {name.decode()}")
            queries[name.decode()] = query.strip()
    return queries


def load_statement(name: str) -> bytes:
    """Return a query for psycopg. Raise KeyError for an unknown name."""
    return statements()[name]


class ClosingConnection(AsyncConnection[T]):
    """A connection whose failed attempts close their sockets at once.

    The error and the frame of an attempt refer to each other, so psycopg's sockets stay open until a garbage collection.
    """

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        try:
            return await super().connect(conninfo, **options)
        except psycopg.Error as error:
            error.__context__ = None
            raise error.with_traceback(None) from None


class LimitedConnection(ClosingConnection[DictRow]):
    """A connection that sets its limits in each transaction, including that of a single statement.

    A pooler in transaction mode takes no options, and may give the next transaction another session.
    """

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        is_outermost = self._is_idle
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if is_outermost:
                await super().execute(SESSION_LIMITS.encode())
            yield transaction

    async def execute(self, query: Any, params: Params | None = None, **options: Any) -> AsyncCursor[DictRow]:
        if not self._is_idle:
            return await super().execute(query, params, **options)
        async with self.transaction():
            return await super().execute(query, params, **options)

    @staticmethod
    async def check(connection: LimitedConnection) -> None:
        """Raise if the server has closed the connection: its socket is readable then. This costs no round trip."""
        poll = select.poll()
        poll.register(connection.pgconn.socket, select.POLLIN)
        while poll.poll(0):
            connection.pgconn.consume_input()

    @property
    def _is_idle(self) -> bool:
        return self.info.transaction_status == TransactionStatus.IDLE


class Database:
    """The connection pool of a process. It opens even while Postgres is away; calls then raise LedgerError after seconds."""

    def __init__(self, conninfo: str, *, max_connections: int = MAX_POOL_CONNECTIONS) -> None:
        self.conninfo = conninfo
        self._slots: asyncio.Semaphore | None = None
        self._slot_wait_s: float | None = None
        self._pool: AsyncConnectionPool[LimitedConnection] = AsyncConnectionPool(
            conninfo,
            min_size=1,
            max_size=max_connections,
            timeout=POOL_WAIT_S,
            reconnect_timeout=POOL_WAIT_S,
            kwargs={
                "row_factory": dict_row,
                "autocommit": True,
                "connect_timeout": CONNECT_TIMEOUT_S,
                "application_name": "abreast",
                "prepare_threshold": None,  # plans must see the filters
            },
            connection_class=LimitedConnection,
            check=LimitedConnection.check,
            open=False,
        )

    async def open(self) -> None:
        await self._pool.open(wait=False)

    async def close(self) -> None:
        await self._pool.close(timeout=2.0)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def limit(self, max_connections: int, *, wait_s: float | None = POOL_WAIT_S) -> Database:
        """Return a view of this pool that uses at most `max_connections`, so that other callers always find one.

        A call waits for `wait_s` seconds at most (None: no limit). Only the pool itself is opened and closed.
        """
        view = copy.copy(self)
        view._slots = asyncio.Semaphore(max_connections)  # noqa: SLF001  # a copy of this object
        view._slot_wait_s = wait_s  # noqa: SLF001
        return view

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection in autocommit mode. Raise LedgerError in place of the driver's errors."""
        with map_postgres_errors():
            async with self._reserve_slot(), self._pool.connection() as connection:
                yield connection

    @asynccontextmanager
    async def _reserve_slot(self) -> AsyncIterator[None]:
        if self._slots is None:
            yield
            return
        try:
            async with asyncio.timeout(self._slot_wait_s):
                await self._slots.acquire()
        except TimeoutError as error:
            raise LedgerError(f"all connections were busy for {self._slot_wait_s:g} s; try again") from error
        try:
            yield
        finally:
            self._slots.release()

    async def fetch_all(self, name: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        """Return the rows of a named query."""
        async with self.connection() as connection:
            return await fetch_rows(connection, name, parameters)

    async def execute(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Run a named statement without rows."""
        async with self.connection() as connection:
            await execute(connection, name, parameters)

    async def fetch_one(self, name: str, parameters: Mapping[str, Any] | None = None) -> Row | None:
        """Return the first row of a named query, or None."""
        return next(iter(await self.fetch_all(name, parameters)), None)

    async def fetch_row(self, name: str, parameters: Mapping[str, Any] | None = None) -> Row:
        """Return the only row of a named query."""
        (row,) = await self.fetch_all(name, parameters)
        return row


async def execute(
    connection: AsyncConnection[T], name: str, parameters: Mapping[str, Any] | None = None
) -> AsyncCursor[T]:
    """Run a named statement."""
    return await connection.execute(load_statement(name), parameters or {})


async def fetch_rows(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
    """Return the rows of a named query."""
    return await (await execute(connection, name, parameters)).fetchall()


async def fetch_row(connection: Connection, name: str, parameters: Mapping[str, Any] | None = None) -> Row:
    """Return the only row of a named query."""
    (row,) = await fetch_rows(connection, name, parameters)
    return row


class AdvisoryLock(IntEnum):
    """Keys of advisory locks, so that one process at a time does the work."""

    REPORTS = 0x616272657002
    RETENTION = 0x616272657004
    LATENCY = 0x616272657005
    NOISE = 0x616272657006
    REAPPLY = 0x616272657007  # for all changes of stored pairs
    CACHE = 0x616272657008
    EXAMPLES = 0x616272657009
    ENVOY = 0x61627265 << 32  # plus a hash of the admin address, so that no Envoy waits for another


async def try_lock(connection: Connection, key: int) -> bool:
    """Take an advisory lock until the transaction ends; return False if another process holds it."""
    return bool((await fetch_row(connection, "lock_try", {"lock": key}))["locked"])


def exclusive(
    key: AdvisoryLock, *, otherwise: R
) -> Callable[[Callable[Concatenate[Connection, P], Awaitable[R]]], Callable[Concatenate[Connection, P], Awaitable[R]]]:
    """Run a function in a transaction under an advisory lock; return `otherwise` if another process holds the lock."""

    def decorate(
        function: Callable[Concatenate[Connection, P], Awaitable[R]],
    ) -> Callable[Concatenate[Connection, P], Awaitable[R]]:
        @wraps(function)
        async def run(connection: Connection, /, *args: P.args, **kwargs: P.kwargs) -> R:
            async with connection.transaction():
                if not await try_lock(connection, key):
                    return otherwise
                return await function(connection, *args, **kwargs)

        return run

    return decorate


@contextmanager
def map_postgres_errors() -> Iterator[None]:
    """Turn psycopg's errors into LedgerError."""
    try:
        yield
    except psycopg.Error as error:
        raise LedgerError(_describe_error(error)) from error


def _describe_error(error: psycopg.Error) -> str:
    message = first_line(error)
    if isinstance(error, psycopg.errors.QueryCanceled):
        return (
            f"postgres took more than {STATEMENT_TIMEOUT_S} s for a query; request a shorter window, or one that begins on "
            "the hour"
        )
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
        return f"the ledger's tables are missing or old ({message}); run: abreast migrate"
    if isinstance(error, psycopg.OperationalError):
        return f"postgres can't be reached, check ABREAST_POSTGRES_URL and the server: {message}"
    return f"postgres rejects a statement: {message}"


def sanitise_text(text: str, max_chars: int) -> str:
    """Return text that Postgres can store. A text that is too long ends in its digest, so that different texts stay different."""
    if len(text) > max_chars:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=TRUNCATION_DIGEST_BYTES).hexdigest()
        text = text[: max_chars - len(digest) - 1] + TRUNCATION_MARK + digest
    if "\0" in text:
        text = text.replace("\0", NUL_PLACEHOLDER)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def to_json(records: Any) -> str:
    """Return JSON that `jsonb` accepts, from dicts, lists, strings and numbers."""
    try:
        text = orjson.dumps(records)
    except TypeError:  # a lone surrogate
        text = b"\\u0000"
    return (orjson.dumps(_sanitise_value(records)) if b"\\u0000" in text else text).decode()


def _sanitise_value(value: Any) -> Any:
    if isinstance(value, str):
        return sanitise_text(value, len(value))
    if isinstance(value, Mapping):
        return {_sanitise_value(name): _sanitise_value(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_sanitise_value(part) for part in value]
    return value


async def listen(
    conninfo: str, handlers: ChannelHandlers, *, name: str, probe_interval_s: float = PROBE_INTERVAL_S
) -> None:
    """Call the handler of a channel at each notification, until cancelled. Reconnect while Postgres is away.

    All handlers run after each connect, and after each probe that does not arrive: a pooler in transaction mode delivers
    no notifications. `name`: the application_name.
    """
    is_lost = False
    while True:
        try:
            await _listen_once(conninfo, handlers, name, probe_interval_s)
        except (psycopg.Error, SidecarError, OSError, TimeoutError) as error:
            if not is_lost:
                log.warning("changes by other sidecars can't be received", by=name, error=str(error))
            is_lost = True
        await asyncio.sleep(RECONNECT_DELAY_S)


async def _listen_once(conninfo: str, handlers: ChannelHandlers, name: str, probe_interval_s: float) -> None:
    probe_channel = f"abreast_probe_{uuid.uuid4().hex}"
    connection: Connection = await ClosingConnection.connect(
        conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=name
    )
    async with connection:
        for channel in (*handlers, probe_channel):
            await connection.execute(f"listen {channel}".encode())
        notified: set[str] = set()
        while True:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                for channel in notified & handlers.keys() if notified else handlers:
                    await handlers[channel]()
            notified = await _receive_notifications(connection, probe_interval_s)
            if not notified:
                async with asyncio.timeout(REFRESH_TIMEOUT_S):
                    await connection.execute(f"notify {probe_channel}".encode())
                    notified = await _receive_notifications(connection, PROBE_TIMEOUT_S)


async def _receive_notifications(connection: Connection, timeout_s: float) -> set[str]:
    """Return the channels of the next notifications, none after the timeout."""
    return {notification.channel async for notification in connection.notifies(timeout=timeout_s, stop_after=1)}
