"""Looks for endpoints where the new version misses its cache more often, and writes them down as findings."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import orjson

from abreast_sidecar.compare.cache import CacheLookups, MissIncrease, detect_extra_misses
from abreast_sidecar.compare.latency import MIN_WARM_PAIRS
from abreast_sidecar.housekeeping.latency import DETECTION_WINDOW_S, MAX_DETECTION_PAIRS
from abreast_sidecar.store.database import Connection, load_statement

CACHE_LOCK_KEY = 0x616272657008


def describe_misses(increase: MissIncrease) -> str:
    return (
        f"new misses the cache {increase.new:g} times a request, old {increase.old:g} times, in {increase.pairs} pairs: "
        "more than chance"
    )


async def detect_misses(connection: Connection) -> int:
    """Return how many endpoints miss more. A finding that no longer holds stays, with when it was last so."""
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": CACHE_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        finding_count = 0
        parameters = {"window": DETECTION_WINDOW_S, "limit": MAX_DETECTION_PAIRS, "min_pairs": MIN_WARM_PAIRS}
        cursor = await connection.execute(load_statement("endpoint_cache_counts"), parameters)
        for row in await cursor.fetchall():
            columns = ("old_hits", "old_misses", "new_hits", "new_misses", "release")
            counts = [CacheLookups(*values) for values in zip(*(row[name] for name in columns), strict=True)]
            increase = detect_extra_misses(counts)
            if increase is not None:
                finding = {
                    "endpoint": row["id"],
                    "pairs": increase.pairs,
                    "detail": orjson.dumps(asdict(increase)).decode(),
                    "reason": describe_misses(increase),
                }
                await connection.execute(load_statement("cache_finding_set"), finding)
                finding_count += 1
            await asyncio.sleep(0)  # others on the loop have their turn
        return finding_count
