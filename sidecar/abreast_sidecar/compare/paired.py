"""How two versions' times of the same requests lie to each other: quantiles of new-old and new/old, with intervals.

An interval of a quantile is between two of the ordered values. At most `share` of the pairs lie below the true quantile, so
the number below it is a sum of draws at that rate, and the ranks at which the mixture of `sequence` does not refute the
rate hold the quantile: at any number of looks, whatever the distribution, with an error of at most 1 - confidence.
Percentiles of two versions can't be subtracted from each other; differences and ratios are of pairs, and of
two copies where there are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from abreast_sidecar.compare.latency import (
    COLD_PAIR_SHARE,
    MIN_COLD_PAIRS,
    Timing,
    percentile,
    select_like_for_like,
)
from abreast_sidecar.compare.sequence import JEFFREYS_PRIOR, find_least, log_ratio

VERSION_QUANTILES = (0.5, 0.9, 0.95, 0.99)
PAIRED_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class VersionPercentiles:
    share: float
    old_us: int
    new_us: int


@dataclass(frozen=True, slots=True)
class QuantileInterval:
    """`low` and `high` are None where there are too few pairs to say."""

    share: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairedLatency:
    """`copies`: so many pairs the differences and ratios are of, both answers being copies; 0 where they are of all pairs."""

    pairs: int
    percentiles: tuple[VersionPercentiles, ...] = ()
    differences_us: tuple[QuantileInterval, ...] = ()
    ratios: tuple[QuantileInterval, ...] = ()
    copies: int = 0


def split_cold_pairs(timings: Sequence[Timing]) -> tuple[list[Timing], list[Timing]]:
    """Cold and warm, of pairs in the order of their arrival: the first of each release are cold."""
    pair_counts: dict[str, int] = {}
    for timing in timings:
        pair_counts[timing.release] = pair_counts.get(timing.release, 0) + 1
    cold_pairs_left = {
        release: max(MIN_COLD_PAIRS, -int(-pair_count * COLD_PAIR_SHARE // 1))
        for release, pair_count in pair_counts.items()
    }
    cold_timings: list[Timing] = []
    warm_timings: list[Timing] = []
    for timing in timings:
        cold_pairs_left[timing.release] -= 1
        (warm_timings if cold_pairs_left[timing.release] < 0 else cold_timings).append(timing)
    return cold_timings, warm_timings


def measure_paired_latency(timings: Sequence[Timing], confidence: float) -> PairedLatency:
    if not timings:
        return PairedLatency(0)
    old, new = sorted(timing.old_us for timing in timings), sorted(timing.new_us for timing in timings)
    sample = select_like_for_like(timings)
    differences = sorted(float(timing.new_us - timing.old_us) for timing in sample)
    ratios = sorted((timing.new_us + 1) / (timing.old_us + 1) for timing in sample)
    bounds = {share: find_quantile_ranks(len(sample), share, 1 - confidence) for share in PAIRED_QUANTILES}
    return PairedLatency(
        pairs=len(timings),
        percentiles=tuple(
            VersionPercentiles(share, percentile(old, share), percentile(new, share))
            for share in VERSION_QUANTILES
        ),
        differences_us=tuple(
            _make_quantile_interval(differences, share, *bounds[share]) for share in PAIRED_QUANTILES
        ),
        ratios=tuple(_make_quantile_interval(ratios, share, *bounds[share]) for share in PAIRED_QUANTILES),
        copies=0 if sample is timings else len(sample),
    )


def _make_quantile_interval(ordered: Sequence[float], share: float, low: int, high: int) -> QuantileInterval:
    index = max(0, -int(-len(ordered) * share // 1) - 1)
    return QuantileInterval(
        share,
        ordered[index],
        ordered[low - 1] if low >= 1 else None,
        ordered[high] if high < len(ordered) else None,
    )


def find_quantile_ranks(n: int, share: float, alpha: float) -> tuple[int, int]:
    """The fewest and the most of `n` values that may lie below the quantile."""
    threshold = -log(alpha)

    def is_refuted(below: int) -> bool:
        return log_ratio(below, n, share, JEFFREYS_PRIOR) >= threshold

    middle = round(n * share)
    steps_down = find_least(lambda step: step > middle or is_refuted(middle - step), maximum=n + 1)
    steps_up = find_least(lambda step: step > n - middle or is_refuted(middle + step), maximum=n + 1)
    return middle - (steps_down or 0) + 1, middle + (steps_up or 0) - 1
