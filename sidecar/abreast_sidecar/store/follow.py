"""Follows channels of Postgres: what was told, and now and then in case it was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import psycopg
import structlog
from psycopg import AsyncConnection

from abreast_sidecar.errors import SidecarError
from abreast_sidecar.store.database import CONNECT_TIMEOUT

POLL = 5.0  # seconds; should a notification ever be missed
ANSWER = 10.0  # seconds that Postgres gets for one read
RETRY = 0.5  # seconds

Refreshes: TypeAlias = Mapping[str, Callable[[], Awaitable[None]]]  # by channel

log = structlog.get_logger(__name__)


async def follow(conninfo: str, refreshes: Refreshes, *, name: str) -> None:
    """Call a channel's refresh at every notification, and all of them at once and every POLL seconds, until cancelled.
    While Postgres is away it is tried again and again. `name` is what Postgres calls the connection.
    """
    lost = False
    while True:
        try:
            await _listen(conninfo, refreshes, name)
        except (psycopg.Error, SidecarError, OSError, TimeoutError) as error:
            if not lost:
                log.warning("changes by other sidecars are not seen now", by=name, error=str(error))
            lost = True
        await asyncio.sleep(RETRY)


async def _listen(conninfo: str, refreshes: Refreshes, name: str) -> None:
    connection = await AsyncConnection.connect(
        conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT, application_name=name
    )
    async with connection:
        for channel in refreshes:
            await connection.execute(f"listen {channel}".encode())
        told = set(refreshes)
        while True:
            async with asyncio.timeout(ANSWER):
                for channel in told:
                    await refreshes[channel]()
            heard = {one.channel async for one in connection.notifies(timeout=POLL, stop_after=1)}
            told = heard or set(refreshes)
