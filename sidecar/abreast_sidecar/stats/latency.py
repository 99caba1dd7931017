"""Is the new version slower, or does it miss its cache more often? Decided from pairs of the same requests. Pure.

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

A request takes longer in a process that is busy with others, whatever its code. So times count only if the waits of both
responses match: as many requests in flight at the arrival, and as much time from Envoy to the app. Both conditions are
symmetric in the two versions, so they leave the sign test alone. PASS needs a match in half of the pairs.

Consecutive pairs share a machine, its neighbours and their load. For FAIL, pairs form blocks of equal size, and the sign
of a block is one observation: new was slower in most of its pairs. The size grows with the number of pairs, so that a
slowdown has to last. Each size has an equal part of the error probability.

Slow requests are rare, and the median does not show them. The sign test is repeated on pairs of which exactly one
response exceeds a threshold: old's median, p90, p99 and twice p99, over all earlier pairs. This tests stochastic order at
four points (M. Lindon, D. Sanden and V. Shirikian, Rapid regression detection in software deployments through sequential
testing, KDD 2022).

Each cache miss is a load on the database, so the rate of misses is per request, not per lookup. Its test is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

from abreast_sidecar.stats.sequential import JEFFREYS_PRIOR, Prior, find_least, log_ratio

MIN_WARM_PAIRS = 30
MIN_MATCHED_PAIRS = 20  # pairs whose waits match, for a finding
MIN_SLOWDOWN_RATIO = 1.3  # median of new/old
MIN_SLOWDOWN_US = 5000.0  # median of new - old
MIN_MISS_RATIO = 1.5  # new to old, in misses per request
MIN_EXTRA_MISSES = 0.02  # per request
DETECTOR_ALPHA = 0.001  # per endpoint, over its whole life
COLD_PAIR_SHARE = 0.1  # the first pairs of each release: caches, pools and compilers are cold
MIN_COLD_PAIRS = 5
MIN_SLOWER_US = 500  # verdict and guard ignore smaller differences: the event loop, a warmer cache
MIN_BASELINE_PAIRS = 20  # with fewer, pairs are compared whatever their roles
VERSION_QUANTILES = (0.5, 0.9, 0.95, 0.99)
PAIRED_QUANTILES = (0.1, 0.5, 0.9, 0.99)
MIN_WAIT_TOLERANCE_US = 5000  # for clocks that differ a little
IN_FLIGHT_TOLERANCE = 0.1  # share of the requests in flight
MIN_MATCHED_SHARE = 0.5  # pairs whose waits match, for PASS
MIN_BLOCKS = 16
BLOCK_SIZES = tuple(3**power for power in range(6))  # pairs; odd, so that each block has a sign
TAILS = (("p50", 0.5, 1), ("p90", 0.9, 1), ("p99", 0.99, 1), ("2 × p99", 0.99, 2))  # name, quantile of old, factor
MIN_TAIL_TIMES = 2  # expected above a threshold before it is used
THRESHOLD_STEPS = 1.5  # thresholds are computed again when the number of pairs has grown by this factor
UNIFORM_PRIOR = Prior(((1.0, 1.0),))

Number = TypeVar("Number", int, float)


class Timing(NamedTuple):  # cheap: a verdict makes millions
    """Times of one request in both versions, in µs. `release` identifies the code of both.

    `baseline_us` is the time of old's copy of the request, if there is one. `waits_match` compares new's response with
    old's, and `baseline_waits_match` with old's copy.
    """

    old_us: int
    new_us: int
    release: str = ""
    baseline_us: int | None = None
    waits_match: bool = True
    baseline_waits_match: bool = True


class Load(NamedTuple):
    """The load of a process when a request arrived. None: unknown."""

    in_flight: int | None  # other requests
    wait_us: int | None  # from Envoy to the app
    total_us: int  # from the arrival to the end of the response
    by_envoy: bool = False  # measured in Envoy, and not in the process


def are_equally_busy(one: Load, other: Load) -> bool:
    """Check whether as many other requests were in flight. An unknown number matches nothing, nor does one of elsewhere."""
    if one.by_envoy != other.by_envoy or one.in_flight is None or other.in_flight is None:
        return False
    return abs(one.in_flight - other.in_flight) <= IN_FLIGHT_TOLERANCE * max(one.in_flight, other.in_flight)


def do_waits_match(one: Load, other: Load) -> bool:
    """Check whether two responses to one request met the same load. An unknown load matches nothing."""
    if one.wait_us is None or other.wait_us is None or not are_equally_busy(one, other):
        return False
    return abs(one.wait_us - other.wait_us) <= max(min(one.total_us, other.total_us), MIN_WAIT_TOLERANCE_US)


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
    like_for_like = select_like_for_like(warm_timings)
    if len(warm_timings) < MIN_WARM_PAIRS or (awaits_copies and like_for_like is warm_timings):
        return None
    sample = [timing for timing in like_for_like if timing.waits_match]
    if len(sample) < MIN_MATCHED_PAIRS:
        return None
    ratio = median((timing.new_us + 1) / (timing.old_us + 1) for timing in sample)
    difference = median(timing.new_us - timing.old_us for timing in sample)
    if ratio < MIN_SLOWDOWN_RATIO or difference < MIN_SLOWDOWN_US or log_evidence(sample) < -math.log(DETECTOR_ALPHA):
        return None
    old, new = sorted(timing.old_us for timing in sample), sorted(timing.new_us for timing in sample)
    old_p50, old_p99, new_p50, new_p99 = (percentile(times, share) for times in (old, new) for share in (0.5, 0.99))
    return Slowdown(old_p50, new_p50, old_p99, new_p99, round(ratio, 3), len(sample))


def select_like_for_like(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Return pairs of two copies if there are enough of them, else all pairs."""
    copies = [
        Timing(timing.baseline_us, timing.new_us, timing.release, timing.baseline_us, timing.baseline_waits_match)
        for timing in timings
        if timing.baseline_us is not None
    ]
    return copies if len(copies) >= MIN_BASELINE_PAIRS else timings


def log_evidence(timings: Sequence[Timing]) -> float:
    """Return log E, -inf if new was slower in at most half of the pairs."""
    slower = sum(timing.new_us > timing.old_us for timing in timings)
    faster = sum(timing.new_us < timing.old_us for timing in timings)
    return sign_evidence(SignCounts(slower, faster))


class SignCounts(NamedTuple):
    up: int = 0
    down: int = 0


NO_SIGNS = SignCounts()


def sign_evidence(counts: SignCounts) -> float:
    """Return the log e-value against "up is at most as probable as down"; -inf if it was not more frequent."""
    if counts.up <= counts.down:
        return -math.inf
    return log_ratio(counts.up, counts.up + counts.down, 0.5, UNIFORM_PRIOR)


def count_blocks(signs: Sequence[bool]) -> SignCounts:
    """Return the signs of blocks of consecutive observations, without an incomplete last block."""
    if len(signs) < MIN_BLOCKS * BLOCK_SIZES[1]:  # most endpoints of a large service: blocks of one
        up = sum(signs)
        return SignCounts(up, len(signs) - up)
    size = max(size for size in BLOCK_SIZES if size * MIN_BLOCKS <= len(signs))
    starts = range(0, len(signs) - size + 1, size)
    up = sum(2 * sum(signs[start : start + size]) > size for start in starts)
    return SignCounts(up, len(starts) - up)


def block_evidence(counts: SignCounts) -> float:
    return sign_evidence(counts) - math.log(len(BLOCK_SIZES))


@dataclass(frozen=True, slots=True)
class TimeCounts:
    """Times of an endpoint or a service, as far as waits match."""

    timed: int = 0
    slower: int = 0  # part of `timed`: new was slower by more than the allowed share, and by MIN_SLOWER_US
    blocks: SignCounts = NO_SIGNS  # by blocks of `timed`
    tails: tuple[SignCounts, ...] = ()  # for each of TAILS: blocks in which new, or old, was alone above the threshold
    unmatched: int = 0  # pairs whose waits differ or are unknown; not part of `timed`

    @property
    def queues(self) -> bool:
        """Check whether the waits of most pairs differ."""
        return self.timed < MIN_MATCHED_SHARE * (self.timed + self.unmatched)


def describe_queues(times: TimeCounts) -> str:
    total = times.timed + times.unmatched
    return (
        f"copies queue: in {times.unmatched:,} of {total:,} pairs one version was busier than the other, or the load is"
        " unknown, so that times say nothing about the code; give the slower queue more processes, or lower the sampling:"
        " abreast traffic set"
    )


def count_times(timings: Sequence[Timing], max_slower: float) -> TimeCounts:
    """Count warm times that are like for like. `timings` are in order of arrival."""
    sample = [timing for timing in timings if timing.waits_match]
    slower = [timing.new_us - timing.old_us > max(timing.old_us * max_slower, MIN_SLOWER_US) for timing in sample]
    tails = tuple(count_blocks(_find_exceedances(sample, share, factor, max_slower)) for _, share, factor in TAILS)
    return TimeCounts(len(sample), sum(slower), count_blocks(slower), tails, len(timings) - len(sample))


def _find_exceedances(timings: Sequence[Timing], share: float, factor: float, max_slower: float) -> list[bool]:
    """Return for each pair with one response above the threshold whether it is new's, less the allowed share."""
    signs: list[bool] = []
    earlier: list[int] = []
    threshold, next_update = math.inf, math.ceil(MIN_TAIL_TIMES / (1 - share))
    for timing in timings:
        if len(earlier) == next_update:
            threshold = factor * percentile(sorted(earlier), share)
            next_update = math.ceil(next_update * THRESHOLD_STEPS)
        new_us = min(timing.new_us / (1 + max_slower), timing.new_us - MIN_SLOWER_US)
        if (new_us > threshold) != (timing.old_us > threshold):
            signs.append(new_us > threshold)
        earlier.append(timing.old_us)
    return signs


def percentile(ordered: Sequence[Number], share: float) -> Number:
    """Return the value at the nearest rank. `ordered` is sorted and not empty."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


@dataclass(frozen=True, slots=True)
class VersionPercentiles:
    """A percentile of both versions. Each limit is None if there are too few pairs."""

    share: float
    old_us: int
    new_us: int
    old_low_us: int | None = None
    old_high_us: int | None = None
    new_low_us: int | None = None
    new_high_us: int | None = None


@dataclass(frozen=True, slots=True)
class QuantileInterval:
    """`low` and `high` are None if there are too few pairs."""

    share: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairedLatency:
    """`copies` is the number of pairs of two copies, if differences and ratios are from these; 0 if from all pairs.

    Differences and ratios are of pairs whose waits match. `unmatched` counts the others.
    """

    pairs: int
    percentiles: tuple[VersionPercentiles, ...] = ()
    differences_us: tuple[QuantileInterval, ...] = ()
    ratios: tuple[QuantileInterval, ...] = ()
    copies: int = 0
    unmatched: int = 0


def split_cold_pairs(timings: Sequence[Timing]) -> tuple[list[Timing], list[Timing]]:
    """Return cold and warm pairs: the first pairs of each release are cold. `timings` are in order of arrival."""
    cold_pairs_left = {
        release: max(MIN_COLD_PAIRS, math.ceil(pair_count * COLD_PAIR_SHARE))
        for release, pair_count in Counter(timing.release for timing in timings).items()
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
    matched = [timing for timing in sample if timing.waits_match]
    differences = sorted(float(timing.new_us - timing.old_us) for timing in matched)
    ratios = sorted((timing.new_us + 1) / (timing.old_us + 1) for timing in matched)
    bounds = {share: find_quantile_ranks(len(matched), share, 1 - confidence) for share in PAIRED_QUANTILES if matched}
    return PairedLatency(
        pairs=len(timings),
        percentiles=tuple(_make_version_percentiles(old, new, share, 1 - confidence) for share in VERSION_QUANTILES),
        differences_us=tuple(_make_quantile_interval(differences, share, *ranks) for share, ranks in bounds.items()),
        ratios=tuple(_make_quantile_interval(ratios, share, *ranks) for share, ranks in bounds.items()),
        copies=0 if sample is timings else len(sample),
        unmatched=len(sample) - len(matched),
    )


def _make_version_percentiles(old: Sequence[int], new: Sequence[int], share: float, alpha: float) -> VersionPercentiles:
    """Return percentiles with a confidence band. Both sequences are sorted, and equally long."""
    low, high = find_quantile_ranks(len(old), share, alpha)
    limits = [
        limit
        for times in (old, new)
        for limit in (times[low - 1] if low >= 1 else None, times[high] if high < len(times) else None)
    ]
    return VersionPercentiles(share, percentile(old, share), percentile(new, share), *limits)


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
    shares = (
        _miss_share(sum(pair.old_hits for pair in lookups), sum(pair.old_misses for pair in lookups)),
        _miss_share(sum(pair.new_hits for pair in lookups), sum(pair.new_misses for pair in lookups)),
    )
    return MissIncrease(round(old, 3), round(new, 3), *shares, pairs=len(sample))


def _miss_share(hits: int, misses: int) -> float:
    return round(misses / (hits + misses), 3) if hits + misses else 0.0
