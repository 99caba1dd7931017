"""Does the new version miss its cache more often? Decided from the counts of pairs of the same requests. Pure.

Each miss is a load on the database, so the rate is misses per request, not per lookup. The test is that of `latency`,
which stays valid however often it is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abreast_sidecar.stats.latency import DETECTOR_ALPHA, MIN_WARM_PAIRS, Timing, log_evidence, split_cold_pairs

MIN_MISS_RATIO = 1.5  # new to old, in misses per request
MIN_EXTRA_MISSES = 0.02  # per request


@dataclass(frozen=True, slots=True)
class CacheLookups:
    """One request that both versions answered. `release` identifies the code of both."""

    old_hits: int
    old_misses: int
    new_hits: int
    new_misses: int
    release: str = ""


@dataclass(frozen=True, slots=True)
class MissIncrease:
    """Misses per request, and the share of lookups that missed."""

    old: float
    new: float
    old_share: float
    new_share: float
    pairs: int


def detect_extra_misses(lookups: Sequence[CacheLookups]) -> MissIncrease | None:
    """Return the increase if new misses significantly and noticeably more. `lookups` are in order of arrival."""
    _, sample = split_cold_pairs([Timing(pair.old_misses, pair.new_misses, pair.release) for pair in lookups])
    if len(sample) < MIN_WARM_PAIRS:
        return None
    old = sum(pair.old_us for pair in sample) / len(sample)
    new = sum(pair.new_us for pair in sample) / len(sample)
    if new < MIN_MISS_RATIO * old or new - old < MIN_EXTRA_MISSES or log_evidence(sample) < -math.log(DETECTOR_ALPHA):
        return None
    return MissIncrease(
        old=round(old, 3),
        new=round(new, 3),
        old_share=_miss_share([(pair.old_hits, pair.old_misses) for pair in lookups]),
        new_share=_miss_share([(pair.new_hits, pair.new_misses) for pair in lookups]),
        pairs=len(sample),
    )


def _miss_share(counts: Sequence[tuple[int, int]]) -> float:
    miss_count, lookup_count = sum(misses for _, misses in counts), sum(map(sum, counts))
    return round(miss_count / lookup_count, 3) if lookup_count else 0.0
