"""Looks for endpoints that the new version answers more slowly, and writes them down as findings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict

import orjson

from abreast_sidecar.stats.cache import CacheLookups, MissIncrease, detect_extra_misses
from abreast_sidecar.stats.latency import MIN_WARM_PAIRS, Slowdown, Timing, detect_slowdown
from abreast_sidecar.store.database import Connection, load_statement

CounterValues = Mapping[str, int]


def continue_counters(
    base: CounterValues, previous: CounterValues, current: CounterValues, *, is_same_life: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """(base, sums): `base` is what former lives counted, `last` what the last known life had when it was last seen.

    With a new life all that was last seen becomes part of the base.
    """
    if not is_same_life:
        base = {name: base.get(name, 0) + previous.get(name, 0) for name in base.keys() | previous.keys()}
    return dict(base), {name: base.get(name, 0) + current.get(name, 0) for name in base.keys() | current.keys()}


def was_reset(previous: CounterValues, current: CounterValues) -> bool:
    """A counter only falls when its life is a new one."""
    return any(current.get(name, 0) < value for name, value in previous.items())


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


UNANSWERED_WINDOW_S = 3600  # seconds
MAX_UNANSWERED_PAIRS = 1000  # pairs of an endpoint, the newest
MIN_UNANSWERED_PAIRS = 10  # pairs without a capture of new
MIN_UNANSWERED_SHARE = 0.05  # of the endpoint's pairs


async def detect_unanswered(connection: Connection) -> int:
    """Return how many endpoints it is so for. The finding stays when it is no longer so, with when it was last."""
    parameters = {
        "window": UNANSWERED_WINDOW_S,
        "limit": MAX_UNANSWERED_PAIRS,
        "min_pairs": MIN_UNANSWERED_PAIRS,
        "share": MIN_UNANSWERED_SHARE,
    }
    async with connection.transaction():
        cursor = await connection.execute(load_statement("missing_findings_set"), parameters)
        await connection.execute(load_statement("findings_reopen"))
    return cursor.rowcount
