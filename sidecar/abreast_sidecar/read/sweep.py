"""Turns pairs that waited too long into entries of the stream."""

from __future__ import annotations

from redis.asyncio import Redis

from abreast.join import CONSUMER_GROUP, Keys
from abreast_sidecar.read.client import load_script

EXPIRE_BATCH_PAIRS = 200  # pairs: Redis does nothing else meanwhile
EXPIRE_SCRIPT = load_script("sweep")


async def expire_incomplete_pairs(client: Redis, keys: Keys, *, max_pairs: int = 20_000) -> int:
    """Return how many were moved, which is `most` or a little more where others may still be due."""
    expired = 0
    while expired < max_pairs:
        batch_count = await EXPIRE_SCRIPT.run(
            client,
            [keys.due, keys.ready, keys.joined, keys.stats],
            [keys.pair(""), EXPIRE_BATCH_PAIRS, CONSUMER_GROUP],
        )
        expired += int(batch_count)
        if batch_count < EXPIRE_BATCH_PAIRS:
            break
    return expired
