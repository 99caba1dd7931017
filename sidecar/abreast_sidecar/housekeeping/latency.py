"""Looks for endpoints that the new version answers more slowly, and writes them down as findings."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import orjson

from abreast_sidecar.compare.latency import MIN_WARM_PAIRS, Slowdown, Timing, detect_slowdown
from abreast_sidecar.store.database import Connection, load_statement

LATENCY_LOCK_KEY = 0x616272657005
DETECTION_WINDOW_S = 3600  # seconds
MAX_DETECTION_PAIRS = 1000  # pairs of an endpoint, the newest


def describe_slowdown(increase: Slowdown) -> str:
    return f"new takes {increase.ratio:.1f} times as long in the median of {increase.pairs} pairs: more than chance"


async def detect_slowdowns(connection: Connection) -> int:
    """Return how many endpoints are slower. A finding that no longer holds stays, with when it was last so."""
    async with connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": LATENCY_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return 0
        finding_count = 0
        parameters = {"window": DETECTION_WINDOW_S, "limit": MAX_DETECTION_PAIRS, "min_pairs": MIN_WARM_PAIRS}
        cursor = await connection.execute(load_statement("endpoint_times"), parameters)
        for row in await cursor.fetchall():
            columns = (row[name] for name in ("old_us", "new_us", "release", "baseline_us"))
            pairs = [Timing(*values) for values in zip(*columns, strict=True)]
            increase = detect_slowdown(pairs, awaits_copies=row["expects_baseline"])
            if increase is not None:
                detail = orjson.dumps(asdict(increase)).decode()
                finding = {
                    "endpoint": row["id"],
                    "pairs": increase.pairs,
                    "detail": detail,
                    "reason": describe_slowdown(increase),
                }
                await connection.execute(load_statement("latency_finding_set"), finding)
                finding_count += 1
            await asyncio.sleep(0)  # others on the loop have their turn
        await connection.execute(load_statement("findings_reopen"))
        return finding_count
