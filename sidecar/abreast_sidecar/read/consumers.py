"""Takes consumers of workers that are no more out of the groups."""

from __future__ import annotations

from redis.asyncio import Redis

from abreast.join import GROUP, Keys
from abreast_sidecar.read.client import script

FORGET = script("forget")


async def forget_consumers(client: Redis, keys: Keys, *, idle: float) -> int:
    """Those that did nothing for `idle` seconds and owe nothing; return how many."""
    forgotten = 0
    for consumer in await client.xinfo_consumers(keys.ready, GROUP):
        if consumer["pending"] == 0 and consumer["idle"] > idle * 1000:
            forgotten += int(await FORGET.run(client, [keys.ready], [GROUP, consumer["name"]]))
    return forgotten
