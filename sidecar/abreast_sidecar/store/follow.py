"""Follows channels of Postgres: what was told, and now and then in case it was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import psycopg
import structlog
from psycopg import AsyncConnection

from abreast_sidecar.errors import SidecarError
from abreast_sidecar.store.database import CONNECT_TIMEOUT_S

POLL_INTERVAL_S = 5.0  # seconds; should a notification ever be missed
REFRESH_TIMEOUT_S = 10.0  # seconds that Postgres gets for one read
RECONNECT_DELAY_S = 0.5  # seconds

ChannelHandlers: TypeAlias = Mapping[str, Callable[[], Awaitable[None]]]  # by channel

log = structlog.get_logger(__name__)


async def listen(conninfo: str, handlers: ChannelHandlers, *, name: str) -> None:
    """Call a channel's refresh at every notification, and all of them at once and every POLL seconds, until cancelled.
    While Postgres is away it is tried again and again. `name` is what Postgres calls the connection.
    """
    is_lost = False
    while True:
        try:
            await _listen_once(conninfo, handlers, name)
        except (psycopg.Error, SidecarError, OSError, TimeoutError) as error:
            if not is_lost:
                log.warning("changes by other sidecars are not seen now", by=name, error=str(error))
            is_lost = True
        await asyncio.sleep(RECONNECT_DELAY_S)


async def _listen_once(conninfo: str, handlers: ChannelHandlers, name: str) -> None:
    connection = await AsyncConnection.connect(
        conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=name
    )
    async with connection:
        for channel in handlers:
            await connection.execute(f"listen {channel}".encode())
        channels = set(handlers)
        while True:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                for channel in channels:
                    await handlers[channel]()
            notified = {
                notification.channel
                async for notification in connection.notifies(timeout=POLL_INTERVAL_S, stop_after=1)
            }
            channels = notified or set(handlers)
