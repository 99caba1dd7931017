"""Turns pairs that waited too long into entries of the stream."""

from __future__ import annotations

from redis.asyncio import Redis

from abreast.join import GROUP, Keys
from abreast_sidecar.read.client import script

AT_ONCE = 200  # pairs: Redis does nothing else meanwhile
SWEEP = script("sweep")


async def sweep(client: Redis, keys: Keys, *, most: int = 20_000) -> int:
    """Return how many were moved, which is `most` or a little more where others may still be due."""
    moved = 0
    while moved < most:
        now = await SWEEP.run(
            client, [keys.due, keys.ready, keys.joined, keys.stats], [keys.pair(""), AT_ONCE, GROUP]
        )
        moved += int(now)
        if now < AT_ONCE:
            break
    return moved
