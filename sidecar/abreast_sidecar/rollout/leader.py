"""The one seat of those who act by themselves: whoever holds a lock of Postgres's, on a connection of its own.

The lock is the session's, so it is free as soon as the session ends: when the process dies, when the connection is lost,
and when nothing was said on it for IDLE seconds, which is Postgres's own clock: a process that is frozen loses its seat
whatever it believes. All acts go through this very connection, so that one who has lost the seat can't act any more,
and finds out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from abreast_sidecar.errors import LedgerError
from abreast_sidecar.store.database import CONNECT_TIMEOUT_S, Connection, load_statement, map_postgres_errors

LEADER_LOCK_ID = 0x616272657010
LEADER_HEARTBEAT_S = 0.5  # seconds between two signs of life
LEADER_SESSION_TIMEOUT_S = 4  # seconds without one, after which Postgres ends the session
LEADER_STATEMENT_TIMEOUT_S = 3.0  # seconds that Postgres gets for anything that is asked here
LEADER_CONNECTION_OPTIONS = (
    f"-c idle_session_timeout={LEADER_SESSION_TIMEOUT_S}s -c idle_in_transaction_session_timeout={LEADER_SESSION_TIMEOUT_S}s"
    f" -c statement_timeout={LEADER_STATEMENT_TIMEOUT_S:g}s -c lock_timeout={LEADER_STATEMENT_TIMEOUT_S:g}s -c jit=off -c timezone=UTC"
)


class LeadershipLostError(LedgerError):
    """Another may act by now; this one must not."""


class LeaderLease:
    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.is_held = False
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()

    async def acquire(self) -> bool:
        """Whether it is held now. Raise LedgerError while Postgres can't be reached."""
        async with self._use_connection() as connection:
            cursor = await connection.execute(load_statement("leader_acquire"), {"lock": LEADER_LOCK_ID})
            row = await cursor.fetchone()
            self.is_held = bool(row and row["acquired"])
        return self.is_held

    async def heartbeat(self) -> None:
        """Say a sign of life. Raise SeatLostError."""
        async with self._use_connection() as connection:
            await self._check_lock(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Raise SeatLostError where it is lost before the commit: then nothing was done."""
        async with self._use_connection() as connection, connection.transaction():
            await self._check_lock(connection)
            yield connection

    async def release(self) -> None:
        self.is_held = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                await connection.close()

    @asynccontextmanager
    async def _use_connection(self) -> AsyncIterator[Connection]:
        """What goes wrong on this connection ends it, and the seat with it."""
        async with self._lock:
            try:
                async with asyncio.timeout(LEADER_STATEMENT_TIMEOUT_S + CONNECT_TIMEOUT_S):
                    with map_postgres_errors():
                        yield await self._connect()
            except (LedgerError, TimeoutError, OSError) as error:
                was_held = self.is_held
                await self.release()
                if was_held:
                    raise LeadershipLostError(f"the seat of the acting sidecar is lost: {error}") from error
                if isinstance(error, LedgerError):
                    raise
                raise LedgerError(f"postgres can't be reached: {error or 'no answer in time'}") from error
            except asyncio.CancelledError:
                await self.release()  # in the midst of an answer
                raise

    async def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = await AsyncConnection.connect(
                self.conninfo,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT_S,
                prepare_threshold=None,
                options=LEADER_CONNECTION_OPTIONS,
                application_name="abreast steering",
                row_factory=dict_row,
            )
        return self._connection

    async def _check_lock(self, connection: Connection) -> None:
        cursor = await connection.execute(load_statement("leader_check"), {"lock": LEADER_LOCK_ID})
        row = await cursor.fetchone()
        if not row or not row["is_leader"]:
            raise LedgerError(
                "the lock is not this connection's; ABREAST_POSTGRES_URL must not lead through a pooler of transactions"
            )
