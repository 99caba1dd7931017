"""Quantiles of new-old and new/old with confidence intervals."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.latency import (
    PairedLatency,
    QuantileInterval,
    Timing,
    find_quantile_ranks,
    measure_paired_latency,
    split_cold_pairs,
)

TIMES = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7), st.sampled_from(["a", "b"])), max_size=200)


def median(found: tuple[QuantileInterval, ...]) -> QuantileInterval:
    return next(one for one in found if one.share == 0.5)


@given(TIMES)
def test_split_cold_pairs_keeps_all_pairs(times: list[tuple[int, int, str]]) -> None:
    given_ = [Timing(*one) for one in times]
    cold, warm = split_cold_pairs(given_)

    assert len(cold) + len(warm) == len(given_)
    for release in "ab":
        mine = [one for one in given_ if one.release == release]
        first = max(5, -(-len(mine) // 10))
        assert [one for one in cold if one.release == release] == mine[:first]
        assert [one for one in warm if one.release == release] == mine[first:]


@given(TIMES)
def test_paired_latency_intervals_contain_their_values(times: list[tuple[int, int, str]]) -> None:
    found = measure_paired_latency([Timing(*one) for one in times], 0.95)

    for one in (*found.differences_us, *found.ratios):
        assert one.low is None or one.low <= one.value
        assert one.high is None or one.value <= one.high


def test_paired_latency_differences_are_per_pair() -> None:
    """Both sides have the same percentiles, and new is slower in each pair but one."""
    times = [Timing(100 * number, 100 * ((number + 1) % 1000)) for number in range(1000)]
    found = measure_paired_latency(times, 0.95)

    assert all(abs(side.old_us - side.new_us) <= 100 for side in found.percentiles)
    assert median(found.differences_us) == QuantileInterval(0.5, 100.0, 100.0, 100.0)
    assert median(found.ratios).value > 1


def test_paired_latency_has_no_tail_interval_for_few_pairs() -> None:
    found = measure_paired_latency([Timing(100, 100 + number) for number in range(20)], 0.95)

    assert [one.high for one in found.differences_us if one.share == 0.99] == [None]
    assert median(found.differences_us).low is not None
    assert measure_paired_latency([], 0.95) == PairedLatency(0)


def test_paired_latency_interval_covers_the_median_at_every_look() -> None:
    """50 runs, 20 looks each: at 90% more than 11 runs that ever miss have a probability of 0.01."""
    dice, missed = random.Random(4), 0
    for _ in range(50):
        below, never = 0, True
        for n in range(1, 2001):
            below += dice.random() < 0.5
            if n % 100 == 0:
                low, high = find_quantile_ranks(n, 0.5, 0.1)
                never = never and low <= below <= high
        missed += not never

    assert missed <= 11
