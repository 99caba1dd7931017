"""Which services and shards there are."""

from __future__ import annotations

import structlog
from redis.asyncio import Redis

from abreast.join import SERVICES, Keys

MOST_SHARDS = 1024  # of a service: a bound against nonsense in the hash

log = structlog.get_logger()


async def shards(client: Redis) -> list[Keys]:
    """All shards that services have named, and those of before that still have a stream."""
    found: list[Keys] = []
    named: dict[bytes, bytes] = await client.hgetall(SERVICES)  # type: ignore[assignment]  # responses are not decoded
    for raw, count in sorted(named.items()):
        service = raw.decode(errors="replace")
        try:
            number = min(int(count), MOST_SHARDS)
            found += [Keys(service, shard) for shard in range(number)]
        except ValueError as error:
            log.debug("a service in redis is skipped", service=service, reason=str(error))
            continue
        shard = number
        while shard < MOST_SHARDS and await client.exists(Keys(service, shard).ready):
            found.append(Keys(service, shard))
            shard += 1
    return found
