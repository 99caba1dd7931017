"""Takes consumers of workers that are no more out of the groups."""

from __future__ import annotations

from redis.asyncio import Redis

from abreast.join import CONSUMER_GROUP, Keys
from abreast_sidecar.read.client import load_script

DELETE_CONSUMER_SCRIPT = load_script("forget")


async def delete_idle_consumers(client: Redis, keys: Keys, *, idle_s: float) -> int:
    """Those that did nothing for `idle` seconds and owe nothing; return how many."""
    deleted = 0
    for consumer in await client.xinfo_consumers(keys.ready, CONSUMER_GROUP):
        if consumer["pending"] == 0 and consumer["idle"] > idle_s * 1000:
            deleted += int(
                await DELETE_CONSUMER_SCRIPT.run(client, [keys.ready], [CONSUMER_GROUP, consumer["name"]])
            )
    return deleted
