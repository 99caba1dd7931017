"""Leader election by a session-level advisory lock on a dedicated connection.

Postgres frees the lock when the session ends: when the process dies, when the connection is lost, or after
LEADER_SESSION_TIMEOUT_S without a statement. The timeout runs on Postgres's clock, so a frozen process loses the
leadership too. All actions of the leader use this connection, so a former leader can't act, and it
notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg
from psycopg.rows import dict_row

from abreast_sidecar.errors import LedgerError
from abreast_sidecar.store.database import (
    CONNECT_TIMEOUT_S,
    ClosingConnection,
    Connection,
    load_statement,
    map_postgres_errors,
)

LEADER_LOCK_ID = 0x616272657010
LEADER_HEARTBEAT_S = 1.5
ELECTION_INTERVAL_S = 0.5
LEADER_SESSION_TIMEOUT_S = 4  # without a statement
LEADER_STATEMENT_TIMEOUT_S = 3.0
LEADER_CONNECTION_OPTIONS = (
    f"-c idle_session_timeout={LEADER_SESSION_TIMEOUT_S}s -c idle_in_transaction_session_timeout={LEADER_SESSION_TIMEOUT_S}s"
    f" -c statement_timeout={LEADER_STATEMENT_TIMEOUT_S:g}s -c lock_timeout={LEADER_STATEMENT_TIMEOUT_S:g}s -c jit=off -c timezone=UTC"
)


class LeadershipLostError(LedgerError):
    """Another sidecar may be the leader; this one must not act."""


class LeaderLease:
    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.is_held = False
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()

    async def acquire(self) -> bool:
        """Return True if this sidecar is the leader now. Raise LedgerError while Postgres is away."""
        async with self._use_connection() as connection:
            cursor = await connection.execute(load_statement("leader_acquire"), {"lock": LEADER_LOCK_ID})
            row = await cursor.fetchone()
            self.is_held = bool(row and row["acquired"])
        return self.is_held

    async def heartbeat(self) -> None:
        """Keep the session alive. Raise LeadershipLostError."""
        async with self._use_connection() as connection:
            await self._check_lock(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Open a transaction of the leader. Raise LeadershipLostError if nothing was committed for lack of the lock."""
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
        """Yield the connection. Any error on it closes it, which ends the leadership."""
        async with self._lock:
            try:
                async with asyncio.timeout(LEADER_STATEMENT_TIMEOUT_S + CONNECT_TIMEOUT_S):
                    with map_postgres_errors():
                        if self._connection is None:
                            self._connection = await ClosingConnection.connect(
                                self.conninfo,
                                autocommit=True,
                                connect_timeout=CONNECT_TIMEOUT_S,
                                prepare_threshold=None,
                                options=LEADER_CONNECTION_OPTIONS,
                                application_name="abreast leader",
                                row_factory=dict_row,
                            )
                        yield self._connection
            except (LedgerError, TimeoutError, OSError) as error:
                was_held = self.is_held
                await self.release()
                if was_held:
                    raise LeadershipLostError(f"leadership lost: {error}") from error
                if isinstance(error, LedgerError):
                    raise
                raise LedgerError(f"postgres can't be reached: {error or 'no answer in time'}") from error
            except asyncio.CancelledError:
                await self.release()  # its answer would be read as that of the next statement
                raise

    async def _check_lock(self, connection: Connection) -> None:
        cursor = await connection.execute(load_statement("leader_check"), {"lock": LEADER_LOCK_ID})
        row = await cursor.fetchone()
        if not row or not row["is_leader"]:
            raise LedgerError(
                "this connection does not hold the leader's lock; if ABREAST_POSTGRES_URL leads through a pooler in"
                " transaction mode, set ABREAST_POSTGRES_DIRECT_URL"
            )
