"""A read-through cache that both versions share: it holds rows of the database, never answers."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from abreast_demo.data import Row

TIMEOUT = 0.25  # seconds; a shop without its cache is slow, not down
KEPT = 20  # seconds


class Cache:
    def __init__(self, url: str) -> None:
        self.redis = Redis.from_url(
            url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
        )

    async def through(self, key: str, load: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
        """The rows under this key, loaded and kept for next time where they are missing."""
        try:
            kept = await self.redis.get(key)
        except RedisError:
            return await load()
        if kept is not None:
            rows: list[Row] = orjson.loads(kept)
            return rows
        rows = await load()
        with contextlib.suppress(RedisError):  # the next request loads them again
            await self.redis.set(key, orjson.dumps(rows), ex=KEPT)
        return rows

    async def close(self) -> None:
        await self.redis.aclose()
