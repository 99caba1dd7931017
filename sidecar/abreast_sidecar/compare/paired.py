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

from abreast_sidecar.compare.latency import COLD_PAIRS, COLD_SHARE, Timing, fair, percentile
from abreast_sidecar.compare.sequence import ANYWHERE, least, log_ratio

SIDES = (0.5, 0.9, 0.95, 0.99)
SHARES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Side:
    share: float
    old_us: int
    new_us: int


@dataclass(frozen=True, slots=True)
class Quantile:
    """`low` and `high` are None where there are too few pairs to say."""

    share: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Paired:
    """`copies`: so many pairs the differences and ratios are of, both answers being copies; 0 where they are of all pairs."""

    pairs: int
    sides: tuple[Side, ...] = ()
    differences_us: tuple[Quantile, ...] = ()
    ratios: tuple[Quantile, ...] = ()
    copies: int = 0


def split(timings: Sequence[Timing]) -> tuple[list[Timing], list[Timing]]:
    """Cold and warm, of pairs in the order of their arrival: the first of each release are cold."""
    times: dict[str, int] = {}
    for one in timings:
        times[one.release] = times.get(one.release, 0) + 1
    left = {release: max(COLD_PAIRS, -int(-many * COLD_SHARE // 1)) for release, many in times.items()}
    cold: list[Timing] = []
    warm: list[Timing] = []
    for one in timings:
        left[one.release] -= 1
        (warm if left[one.release] < 0 else cold).append(one)
    return cold, warm


def paired(timings: Sequence[Timing], confidence: float) -> Paired:
    if not timings:
        return Paired(0)
    old, new = sorted(one.old_us for one in timings), sorted(one.new_us for one in timings)
    beside = fair(timings)
    differences = sorted(float(one.new_us - one.old_us) for one in beside)
    ratios = sorted((one.new_us + 1) / (one.old_us + 1) for one in beside)
    bounds = {share: ranks(len(beside), share, 1 - confidence) for share in SHARES}
    return Paired(
        pairs=len(timings),
        sides=tuple(Side(share, percentile(old, share), percentile(new, share)) for share in SIDES),
        differences_us=tuple(_quantile(differences, share, *bounds[share]) for share in SHARES),
        ratios=tuple(_quantile(ratios, share, *bounds[share]) for share in SHARES),
        copies=0 if beside is timings else len(beside),
    )


def _quantile(ordered: Sequence[float], share: float, low: int, high: int) -> Quantile:
    place = max(0, -int(-len(ordered) * share // 1) - 1)
    return Quantile(
        share,
        ordered[place],
        ordered[low - 1] if low >= 1 else None,
        ordered[high] if high < len(ordered) else None,
    )


def ranks(n: int, share: float, alpha: float) -> tuple[int, int]:
    """The fewest and the most of `n` values that may lie below the quantile."""
    bar = -log(alpha)

    def refuted(below: int) -> bool:
        return log_ratio(below, n, share, ANYWHERE) >= bar

    middle = round(n * share)
    down = least(lambda step: step > middle or refuted(middle - step), most=n + 1)
    up = least(lambda step: step > n - middle or refuted(middle + step), most=n + 1)
    return middle - (down or 0) + 1, middle + (up or 0) - 1
