"""Whether the new version is slower, from pairs of times of the same requests. Pure.

The test is a sign test that may be looked at again and again, as a ledger is. The likelihood ratio against "new is
slower in half of the pairs", mixed over all chances p of being slower,

    E = integral over p of 2^n p^s (1-p)^(n-s) = 2^n B(s+1, n-s+1)      s: pairs in which new was slower, n: without ties

is a test martingale at p = 1/2, so by Ville's inequality it ever exceeds 1/ALPHA with a probability of at most ALPHA,
however often one looks while pairs arrive (J. Ville, Etude critique de la notion de collectif, 1939; H. Robbins,
Statistical methods related to the law of the iterated logarithm, Ann. Math. Statist. 41, 1970). Where s > n/2, and only
there it counts, E is no more than the mixture over p > 1/2, which has the same bound for every p below 1/2. Times need
no distribution, but pairs should not hang on each other; leaving out first pairs makes the bound an approximate one.

A real but small difference is no finding: median of the ratios and of the differences must be large enough too.

Of two answers to one request one is a copy's, which may take longer or less by that alone: guards hold its writes back, the
request itself has warmed its caches. Where old has got a copy too, new's copy is judged beside that one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from statistics import median

from abreast_sidecar.stats.sequential import JEFFREYS_PRIOR, find_least, log_ratio

MIN_WARM_PAIRS = 30
MIN_SLOWDOWN_RATIO = 1.3  # of the median pair
MIN_SLOWDOWN_US = 5000.0  # of the median pair
DETECTOR_ALPHA = 0.001  # for one endpoint, over all its life
COLD_PAIR_SHARE = 0.1  # of the first pairs of each release: caches, pools and compilers are cold
MIN_COLD_PAIRS = 5  # at least
MIN_SLOWER_US = (
    500  # of a pair that a verdict or the guard counts as slower: less is the event loop's, or a warmer cache's
)
MIN_BASELINE_PAIRS = 20  # of old, or pairs are judged whatever their roles


@dataclass(frozen=True, slots=True)
class Timing:
    """One request answered by both versions, in µs; `release` names the code of both.

    `baseline_us` is what old took for a copy of it as well, beside answering the user.
    """

    old_us: int
    new_us: int
    release: str = ""
    baseline_us: int | None = None


@dataclass(frozen=True, slots=True)
class Slowdown:
    """`ratio` is new to old in the median pair, `pairs` is how many were judged."""

    old_p50_us: int
    new_p50_us: int
    old_p99_us: int
    new_p99_us: int
    ratio: float
    pairs: int


def detect_slowdown(timings: Sequence[Timing], *, awaits_copies: bool = False) -> Slowdown | None:
    """Judge pairs in the order of their arrival; None unless new is surely and noticeably slower, and while there are too
    few copies that are still to come.
    """
    warm_timings = skip_cold_pairs(timings)
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


def skip_cold_pairs(timings: Iterable[Timing]) -> list[Timing]:
    """Without the first pairs of each release."""
    by_release: dict[str, list[Timing]] = {}
    for timing in timings:
        by_release.setdefault(timing.release, []).append(timing)
    return [
        timing
        for group in by_release.values()
        for timing in group[max(MIN_COLD_PAIRS, math.ceil(len(group) * COLD_PAIR_SHARE)) :]
    ]


def select_like_for_like(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Two copies beside each other, where enough pairs have them; else all pairs as they are."""
    copies = [
        Timing(timing.baseline_us, timing.new_us, timing.release, timing.baseline_us)
        for timing in timings
        if timing.baseline_us is not None
    ]
    return copies if len(copies) >= MIN_BASELINE_PAIRS else timings


def log_evidence(timings: Iterable[Timing]) -> float:
    """The logarithm of E; below 0 where new was slower in half of the pairs or less."""
    slower = faster = 0
    for timing in timings:
        slower += timing.new_us > timing.old_us
        faster += timing.new_us < timing.old_us
    if slower <= faster:
        return -math.inf
    n = slower + faster
    return n * math.log(2) + math.lgamma(slower + 1) + math.lgamma(faster + 1) - math.lgamma(n + 2)


def percentile(ordered: Sequence[int], share: float) -> int:
    """Nearest rank, of at least one value."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


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
            VersionPercentiles(share, percentile(old, share), percentile(new, share)) for share in VERSION_QUANTILES
        ),
        differences_us=tuple(_make_quantile_interval(differences, share, *bounds[share]) for share in PAIRED_QUANTILES),
        ratios=tuple(_make_quantile_interval(ratios, share, *bounds[share]) for share in PAIRED_QUANTILES),
        copies=0 if sample is timings else len(sample),
    )


def _make_quantile_interval(ordered: Sequence[float], share: float, low: int, high: int) -> QuantileInterval:
    index = max(0, -int(-len(ordered) * share // 1) - 1)
    return QuantileInterval(
        share, ordered[index], ordered[low - 1] if low >= 1 else None, ordered[high] if high < len(ordered) else None
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
