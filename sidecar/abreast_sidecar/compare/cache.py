"""Whether the new version misses its cache more often, from pairs of counts of the same requests. Pure.

A miss is a load on the database, so misses are counted by request. The test is that of times, and may be looked at again
and again like it: see latency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abreast_sidecar.compare.latency import ALPHA, MIN_PAIRS, Timing, evidence, warm

MIN_RATIO = 1.5  # of misses; twice as many are found for certain
MIN_MORE = 0.02  # misses a request


@dataclass(frozen=True, slots=True)
class Counts:
    """One request answered by both versions; `release` names the code of both."""

    old_hits: int
    old_misses: int
    new_hits: int
    new_misses: int
    release: str = ""


@dataclass(frozen=True, slots=True)
class Misses:
    """Misses a request, and the part of all lookups that missed."""

    old: float
    new: float
    old_share: float
    new_share: float
    pairs: int


def more_misses(counts: Sequence[Counts]) -> Misses | None:
    """Judge pairs in the order of their arrival; None unless new surely misses more, and noticeably so."""
    judged = warm([Timing(one.old_misses, one.new_misses, one.release) for one in counts])
    if len(judged) < MIN_PAIRS:
        return None
    old = sum(one.old_us for one in judged) / len(judged)
    new = sum(one.new_us for one in judged) / len(judged)
    if new < MIN_RATIO * old or new - old < MIN_MORE or evidence(judged) < -math.log(ALPHA):
        return None
    return Misses(
        old=round(old, 3),
        new=round(new, 3),
        old_share=_share([(one.old_hits, one.old_misses) for one in counts]),
        new_share=_share([(one.new_hits, one.new_misses) for one in counts]),
        pairs=len(judged),
    )


def _share(counts: Sequence[tuple[int, int]]) -> float:
    missed, asked = sum(misses for _, misses in counts), sum(map(sum, counts))
    return round(missed / asked, 3) if asked else 0.0
