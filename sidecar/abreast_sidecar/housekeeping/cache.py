"""Looks for endpoints where the new version misses its cache more often, and writes them down as findings."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import orjson

from abreast_sidecar.compare.cache import Counts, Misses, more_misses
from abreast_sidecar.compare.latency import MIN_PAIRS
from abreast_sidecar.housekeeping.latency import MOST, WINDOW
from abreast_sidecar.store.database import Connection, statement

LOCK = 0x616272657008


def reason(found: Misses) -> str:
    return (
        f"new misses the cache {found.new:g} times a request, old {found.old:g} times, in {found.pairs} pairs: "
        "more than chance"
    )


async def find_misses(connection: Connection) -> int:
    """Return how many endpoints miss more. A finding that no longer holds stays, with when it was last so."""
    async with connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        found = 0
        parameters = {"window": WINDOW, "limit": MOST, "min_pairs": MIN_PAIRS}
        cursor = await connection.execute(statement("endpoint_cache_counts"), parameters)
        for row in await cursor.fetchall():
            names = ("old_hits", "old_misses", "new_hits", "new_misses", "release")
            counts = [Counts(*one) for one in zip(*(row[name] for name in names), strict=True)]
            more = more_misses(counts)
            if more is not None:
                given = {
                    "endpoint": row["id"],
                    "pairs": more.pairs,
                    "detail": orjson.dumps(asdict(more)).decode(),
                    "reason": reason(more),
                }
                await connection.execute(statement("cache_finding_set"), given)
                found += 1
            await asyncio.sleep(0)  # others on the loop have their turn
        return found
