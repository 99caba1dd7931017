"""Which services and shards there are."""

from __future__ import annotations

import structlog
from redis.asyncio import Redis

from abreast.join import SERVICES_KEY, Keys

MAX_SHARDS = 1024  # of a service: a bound against nonsense in the hash

log = structlog.get_logger()


async def list_shards(client: Redis) -> list[Keys]:
    """All shards that services have named, and those of before that still have a stream."""
    shard_keys: list[Keys] = []
    shard_counts: dict[bytes, bytes] = await client.hgetall(SERVICES_KEY)  # type: ignore[assignment]  # responses are not decoded
    for raw, count in sorted(shard_counts.items()):
        service = raw.decode(errors="replace")
        try:
            number = min(int(count), MAX_SHARDS)
            shard_keys += [Keys(service, shard) for shard in range(number)]
        except ValueError as error:
            log.debug("a service in redis is skipped", service=service, reason=str(error))
            continue
        shard = number
        while shard < MAX_SHARDS and await client.exists(Keys(service, shard).ready):
            shard_keys.append(Keys(service, shard))
            shard += 1
    return shard_keys
