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
from abreast_sidecar.store.database import CONNECT_TIMEOUT, Connection, statement, translated

LOCK = 0x616272657010
BEAT = 0.5  # seconds between two signs of life
IDLE = 4  # seconds without one, after which Postgres ends the session
ANSWER = 3.0  # seconds that Postgres gets for anything that is asked here
OPTIONS = (
    f"-c idle_session_timeout={IDLE}s -c idle_in_transaction_session_timeout={IDLE}s"
    f" -c statement_timeout={ANSWER:g}s -c lock_timeout={ANSWER:g}s -c jit=off -c timezone=UTC"
)


class SeatLostError(LedgerError):
    """Another may act by now; this one must not."""


class Seat:
    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.held = False
        self._connection: Connection | None = None
        self._one_at_a_time = asyncio.Lock()

    async def take(self) -> bool:
        """Whether it is held now. Raise LedgerError while Postgres can't be reached."""
        async with self._answering() as connection:
            cursor = await connection.execute(statement("leader_acquire"), {"lock": LOCK})
            row = await cursor.fetchone()
            self.held = bool(row and row["acquired"])
        return self.held

    async def beat(self) -> None:
        """Say a sign of life. Raise SeatLostError."""
        async with self._answering() as connection:
            await self._check(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Raise SeatLostError where it is lost before the commit: then nothing was done."""
        async with self._answering() as connection, connection.transaction():
            await self._check(connection)
            yield connection

    async def leave(self) -> None:
        self.held = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                await connection.close()

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[Connection]:
        """What goes wrong on this connection ends it, and the seat with it."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(ANSWER + CONNECT_TIMEOUT):
                    with translated():
                        yield await self._connected()
            except (LedgerError, TimeoutError, OSError) as error:
                lost = self.held
                await self.leave()
                if lost:
                    raise SeatLostError(f"the seat of the acting sidecar is lost: {error}") from error
                if isinstance(error, LedgerError):
                    raise
                raise LedgerError(f"postgres can't be reached: {error or 'no answer in time'}") from error
            except asyncio.CancelledError:
                await self.leave()  # in the midst of an answer
                raise

    async def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = await AsyncConnection.connect(
                self.conninfo,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT,
                prepare_threshold=None,
                options=OPTIONS,
                application_name="abreast steering",
                row_factory=dict_row,
            )
        return self._connection

    async def _check(self, connection: Connection) -> None:
        cursor = await connection.execute(statement("leader_check"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["is_leader"]:
            raise LedgerError(
                "the lock is not this connection's; ABREAST_POSTGRES_URL must not lead through a pooler of transactions"
            )
