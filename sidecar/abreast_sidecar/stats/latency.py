"""Is the new version slower? Decided from pairs of times of the same requests. Pure.

The test is a sign test that stays valid however often it is repeated. It is the likelihood ratio against "new is slower
in half of the pairs", mixed over all probabilities p of being slower,

    E = integral over p of 2^n p^s (1-p)^(n-s) = 2^n B(s+1, n-s+1)      s: pairs in which new was slower, n: without ties

E is a test martingale at p = 1/2. By Ville's inequality it ever exceeds 1/alpha with a probability of at most alpha,
however often it is evaluated while pairs arrive (J. Ville, Etude critique de la notion de collectif, 1939; H. Robbins,
Statistical methods related to the law of the iterated logarithm, Ann. Math. Statist. 41, 1970). E counts only if
s > n/2. There it is at most the mixture over p > 1/2, which has the same bound for every p below 1/2. The times may have
any distribution, but pairs should be independent. Skipping the first pairs makes the bound approximate.

A real but small difference is no finding: the median of the ratios and the median of the differences must be large too.

One of the two responses to a request is that of a copy. A copy alone can take longer or less: guards hold its writes
back, and the original request has warmed its caches. If old has received a copy as well, both copies are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from abreast_sidecar.stats.sequential import JEFFREYS_PRIOR, find_least, log_ratio

MIN_WARM_PAIRS = 30
MIN_SLOWDOWN_RATIO = 1.3  # median of new/old
MIN_SLOWDOWN_US = 5000.0  # median of new - old
DETECTOR_ALPHA = 0.001  # per endpoint, over its whole life
COLD_PAIR_SHARE = 0.1  # the first pairs of each release: caches, pools and compilers are cold
MIN_COLD_PAIRS = 5
MIN_SLOWER_US = 500  # verdict and guard ignore smaller differences: the event loop, a warmer cache
MIN_BASELINE_PAIRS = 20  # with fewer, pairs are compared whatever their roles
VERSION_QUANTILES = (0.5, 0.9, 0.95, 0.99)
PAIRED_QUANTILES = (0.1, 0.5, 0.9, 0.99)


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one request in both versions, in µs. `release` identifies the code of both.

    `baseline_us` is the time of old's copy of the request, if there is one.
    """

    old_us: int
    new_us: int
    release: str = ""
    baseline_us: int | None = None


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Percentiles over `pairs`. `ratio` is the median of new/old."""

    old_p50_us: int
    new_p50_us: int
    old_p99_us: int
    new_p99_us: int
    ratio: float
    pairs: int


def detect_slowdown(timings: Sequence[Timing], *, awaits_copies: bool = False) -> Slowdown | None:
    """Return the slowdown if new is significantly and noticeably slower. `timings` are in order of arrival.

    `awaits_copies`: decide nothing until there are enough baseline copies.
    """
    _, warm_timings = split_cold_pairs(timings)
    sample = select_like_for_like(warm_timings)
    if len(warm_timings) < MIN_WARM_PAIRS or (awaits_copies and sample is warm_timings):
        return None
    ratio = median((timing.new_us + 1) / (timing.old_us + 1) for timing in sample)
    difference = median(timing.new_us - timing.old_us for timing in sample)
    if ratio < MIN_SLOWDOWN_RATIO or difference < MIN_SLOWDOWN_US or log_evidence(sample) < -math.log(DETECTOR_ALPHA):
        return None
    old, new = sorted(timing.old_us for timing in sample), sorted(timing.new_us for timing in sample)
    return Slowdown(
        old_p50_us=percentile(old, 0.5),
        new_p50_us=percentile(new, 0.5),
        old_p99_us=percentile(old, 0.99),
        new_p99_us=percentile(new, 0.99),
        ratio=round(ratio, 3),
        pairs=len(sample),
    )


def select_like_for_like(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Return pairs of two copies if there are enough of them, else all pairs."""
    copies = [
        Timing(timing.baseline_us, timing.new_us, timing.release, timing.baseline_us)
        for timing in timings
        if timing.baseline_us is not None
    ]
    return copies if len(copies) >= MIN_BASELINE_PAIRS else timings


def log_evidence(timings: Iterable[Timing]) -> float:
    """Return log E, -inf if new was slower in at most half of the pairs."""
    slower = faster = 0
    for timing in timings:
        slower += timing.new_us > timing.old_us
        faster += timing.new_us < timing.old_us
    if slower <= faster:
        return -math.inf
    n = slower + faster
    return n * math.log(2) + math.lgamma(slower + 1) + math.lgamma(faster + 1) - math.lgamma(n + 2)


def percentile(ordered: Sequence[Number], share: float) -> Number:
    """Return the value at the nearest rank. `ordered` is sorted and not empty."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


@dataclass(frozen=True, slots=True)
class VersionPercentiles:
    share: float
    old_us: int
    new_us: int


@dataclass(frozen=True, slots=True)
class QuantileInterval:
    """`low` and `high` are None if there are too few pairs."""

    share: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairedLatency:
    """`copies` is the number of pairs of two copies, if differences and ratios are from these; 0 if from all pairs."""

    pairs: int
    percentiles: tuple[VersionPercentiles, ...] = ()
    differences_us: tuple[QuantileInterval, ...] = ()
    ratios: tuple[QuantileInterval, ...] = ()
    copies: int = 0


def split_cold_pairs(timings: Sequence[Timing]) -> tuple[list[Timing], list[Timing]]:
    """Return cold and warm pairs: the first pairs of each release are cold. `timings` are in order of arrival."""
    pair_counts = Counter(timing.release for timing in timings)
    cold_pairs_left = {
        release: max(MIN_COLD_PAIRS, math.ceil(pair_count * COLD_PAIR_SHARE))
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
            VersionPercentiles(share, percentile(old, share), percentile(new, share)) for share in VERSION_QUANTILES
        ),
        differences_us=tuple(_make_quantile_interval(differences, share, *bounds[share]) for share in PAIRED_QUANTILES),
        ratios=tuple(_make_quantile_interval(ratios, share, *bounds[share]) for share in PAIRED_QUANTILES),
        copies=0 if sample is timings else len(sample),
    )


def _make_quantile_interval(ordered: Sequence[float], share: float, low: int, high: int) -> QuantileInterval:
    return QuantileInterval(
        share,
        percentile(ordered, share),
        ordered[low - 1] if low >= 1 else None,
        ordered[high] if high < len(ordered) else None,
    )


def find_quantile_ranks(n: int, share: float, alpha: float) -> tuple[int, int]:
    """Return the least and the greatest number of the `n` values that may lie below the quantile."""
    threshold = -math.log(alpha)

    def is_refuted(below: int) -> bool:
        return log_ratio(below, n, share, JEFFREYS_PRIOR) >= threshold

    middle = round(n * share)
    steps_down = find_least(lambda step: step > middle or is_refuted(middle - step), maximum=n + 1)
    steps_up = find_least(lambda step: step > n - middle or is_refuted(middle + step), maximum=n + 1)
    return middle - (steps_down or 0) + 1, middle + (steps_up or 0) - 1
