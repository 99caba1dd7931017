"""Follows a channel of Postgres: what was told, and now and then in case it was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psycopg
import structlog
from psycopg import AsyncConnection

from abreast_sidecar.errors import SidecarError
from abreast_sidecar.store.database import CONNECT_TIMEOUT

POLL = 5.0  # seconds; should a notification ever be missed
ANSWER = 10.0  # seconds that Postgres gets for one read
RETRY = 0.5  # seconds

log = structlog.get_logger(__name__)


async def follow(conninfo: str, channel: str, refresh: Callable[[], Awaitable[None]], *, name: str) -> None:
    """Call `refresh` at once, at every notification and every POLL seconds, until cancelled. While Postgres is away it is
    tried again and again. `name` is what Postgres calls the connection.
    """
    lost = False
    while True:
        try:
            await _listen(conninfo, channel, refresh, name)
        except (psycopg.Error, SidecarError, OSError, TimeoutError) as error:
            if not lost:
                log.warning("changes by other sidecars are not seen now", channel=channel, error=str(error))
            lost = True
        await asyncio.sleep(RETRY)


async def _listen(conninfo: str, channel: str, refresh: Callable[[], Awaitable[None]], name: str) -> None:
    connection = await AsyncConnection.connect(
        conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT, application_name=name
    )
    async with connection:
        await connection.execute(f"listen {channel}".encode())
        while True:
            async with asyncio.timeout(ANSWER):
                await refresh()
            async for _ in connection.notifies(timeout=POLL, stop_after=1):
                pass
