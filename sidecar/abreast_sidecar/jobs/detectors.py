"""Detectors of findings that only many pairs show: slower responses, more cache misses, missing captures.

Each returns the number of endpoints that show the finding now. A finding that no longer holds stays in the ledger, with
the time when it last held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

import orjson

from abreast_sidecar.stats.latency import (
    MIN_WARM_PAIRS,
    CacheLookups,
    MissIncrease,
    Slowdown,
    detect_extra_misses,
    detect_slowdown,
)
from abreast_sidecar.store.database import AdvisoryLock, Connection, Row, exclusive, execute, fetch_rows
from abreast_sidecar.store.records import read_timing_arrays

DETECTION_WINDOW_S = 3600
MAX_DETECTION_PAIRS = 1000  # the newest of an endpoint
MIN_UNANSWERED_PAIRS = 10  # without a capture of new
MAX_JOIN_LAG_S = 30.0  # from a sampled request to the time of its incomplete pair
MIN_UNANSWERED_SHARE = 0.05  # share of the endpoint's pairs

T = TypeVar("T", Slowdown, MissIncrease)


@exclusive(AdvisoryLock.LATENCY, otherwise=0)
async def detect_slowdowns(connection: Connection) -> int:
    """Find endpoints where new is slower than old."""

    def detect(row: Row) -> Slowdown | None:
        return detect_slowdown(read_timing_arrays(row), awaits_copies=row["expects_baseline"])

    def describe(increase: Slowdown) -> str:
        return f"new takes {increase.ratio:.1f} times as long in the median of {increase.pairs} pairs: more than chance"

    return await _set_findings(connection, "endpoint_times", detect, ("latency", "", "slower"), describe)


@exclusive(AdvisoryLock.CACHE, otherwise=0)
async def detect_misses(connection: Connection) -> int:
    """Find endpoints where new has more cache misses than old."""

    def detect(row: Row) -> MissIncrease | None:
        columns = (row[name] for name in ("old_hits", "old_misses", "new_hits", "new_misses", "release"))
        return detect_extra_misses([CacheLookups(*values) for values in zip(*columns, strict=True)])

    def describe(increase: MissIncrease) -> str:
        return (
            f"new misses the cache {increase.new:g} times a request, old {increase.old:g} times, in {increase.pairs} "
            "pairs: more than chance"
        )

    return await _set_findings(connection, "endpoint_cache_counts", detect, ("cache", "misses", "changed"), describe)


async def detect_unanswered(connection: Connection) -> int:
    """Find endpoints where captures of new are missing, and hardly any of old.

    Copies that Envoy did not send explain missing captures. The finding is real if new did not answer by Envoy's count.
    """
    parameters = {
        "window": DETECTION_WINDOW_S,
        "limit": MAX_DETECTION_PAIRS,
        "min_pairs": MIN_UNANSWERED_PAIRS,
        "share": MIN_UNANSWERED_SHARE,
        "lag": MAX_JOIN_LAG_S,
    }
    async with connection.transaction():
        cursor = await execute(connection, "missing_findings_set", parameters)
        await execute(connection, "findings_reopen")
    return cursor.rowcount


async def _set_findings(
    connection: Connection,
    query: str,
    detect: Callable[[Row], T | None],
    location: tuple[str, str, str],
    describe: Callable[[T], str],
) -> int:
    """Store a finding at the location (part, path, kind) of each endpoint in which `detect` sees an increase."""
    finding_count = 0
    parameters = {"window": DETECTION_WINDOW_S, "limit": MAX_DETECTION_PAIRS, "min_pairs": MIN_WARM_PAIRS}
    for row in await fetch_rows(connection, query, parameters):
        increase = detect(row)
        if increase is not None:
            detail = orjson.dumps(asdict(increase)).decode()
            finding = {"endpoint": row["id"], "pairs": increase.pairs, "detail": detail, "reason": describe(increase)}
            finding |= dict(zip(("part", "path", "kind"), location, strict=True))
            await execute(connection, "detector_finding_set", finding)
            finding_count += 1
        await asyncio.sleep(0)  # let other tasks run
    await execute(connection, "findings_reopen")
    return finding_count
