"""Looks for endpoints that the new version answers more slowly, and writes them down as findings."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import orjson

from abreast_sidecar.compare.latency import MIN_PAIRS, Slowdown, Timing, slowdown
from abreast_sidecar.store.database import Connection, statement

LOCK = 0x616272657005
WINDOW = 3600  # seconds
MOST = 1000  # pairs of an endpoint, the newest


def reason(slower: Slowdown) -> str:
    return (
        f"new takes {slower.ratio:.1f} times as long in the median of {slower.pairs} pairs: more than chance"
    )


async def find_slow(connection: Connection) -> int:
    """Return how many endpoints are slower. A finding that no longer holds stays, with when it was last so."""
    async with connection.transaction():
        cursor = await connection.execute(statement("lock_try"), {"lock": LOCK})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        found = 0
        parameters = {"window": WINDOW, "limit": MOST, "min_pairs": MIN_PAIRS}
        cursor = await connection.execute(statement("endpoint_times"), parameters)
        for row in await cursor.fetchall():
            columns = (row[name] for name in ("old_us", "new_us", "release", "baseline_us"))
            pairs = [Timing(*one) for one in zip(*columns, strict=True)]
            slower = slowdown(pairs, copies_to_come=row["expects_baseline"])
            if slower is not None:
                detail = orjson.dumps(asdict(slower)).decode()
                given = {
                    "endpoint": row["id"],
                    "pairs": slower.pairs,
                    "detail": detail,
                    "reason": reason(slower),
                }
                await connection.execute(statement("latency_finding_set"), given)
                found += 1
            await asyncio.sleep(0)  # others on the loop have their turn
        await connection.execute(statement("findings_reopen"))
        return found
