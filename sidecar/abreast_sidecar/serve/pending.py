"""How many pairs wait in Redis."""

from __future__ import annotations

import redis.asyncio as aioredis
import structlog
from redis.exceptions import RedisError

from abreast_sidecar.read import list_shards

log = structlog.get_logger(__name__)


class PairBacklog:
    def __init__(self, client: aioredis.Redis) -> None:
        self.client = client

    async def count(self, service: str) -> int | None:
        """Pairs that wait for a copy or for a worker; None while Redis can't be reached."""
        try:
            waiting = 0
            for keys in [keys for keys in await list_shards(self.client) if keys.service == service]:
                waiting += await self.client.zcard(keys.due) + await self.client.xlen(keys.ready)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("redis does not tell how many pairs wait", error=str(error))
            return None
        return waiting
