"""Maintenance of the streams in Redis: incomplete pairs and idle consumers."""

from __future__ import annotations

from redis.asyncio import Redis

from abreast.protocol.join import CONSUMER_GROUP, Keys
from abreast_sidecar.redis_client import load_script

EXPIRE_BATCH_PAIRS = 200  # Redis serves nobody else meanwhile
DELETE_CONSUMER_SCRIPT = load_script("delete_consumer")
EXPIRE_SCRIPT = load_script("expire_pairs")


async def delete_idle_consumers(client: Redis, keys: Keys, *, idle_s: float) -> int:
    """Delete consumers that were idle for `idle_s` seconds and have no pending entries; return how many."""
    deleted = 0
    for consumer in await client.xinfo_consumers(keys.ready, CONSUMER_GROUP):
        if consumer["pending"] == 0 and consumer["idle"] > idle_s * 1000:
            deleted += int(await DELETE_CONSUMER_SCRIPT.run(client, [keys.ready], [CONSUMER_GROUP, consumer["name"]]))
    return deleted


async def expire_incomplete_pairs(client: Redis, keys: Keys, *, max_pairs: int = 20_000) -> int:
    """Move overdue pairs of a shard to its stream; return how many. After `max_pairs` others may still be overdue."""
    expired = 0
    while expired < max_pairs:
        batch_count = await EXPIRE_SCRIPT.run(
            client, [keys.due, keys.ready, keys.joined, keys.stats], [keys.pair(""), EXPIRE_BATCH_PAIRS, CONSUMER_GROUP]
        )
        expired += int(batch_count)
        if batch_count < EXPIRE_BATCH_PAIRS:
            break
    return expired
