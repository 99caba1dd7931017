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


def median(intervals: tuple[QuantileInterval, ...]) -> QuantileInterval:
    return next(interval for interval in intervals if interval.share == 0.5)


@given(TIMES)
def test_split_cold_pairs_keeps_all_pairs(times: list[tuple[int, int, str]]) -> None:
    timings = [Timing(*time) for time in times]
    cold, warm = split_cold_pairs(timings)

    assert len(cold) + len(warm) == len(timings)
    for release in "ab":
        mine = [timing for timing in timings if timing.release == release]
        first = max(5, -(-len(mine) // 10))
        assert [timing for timing in cold if timing.release == release] == mine[:first]
        assert [timing for timing in warm if timing.release == release] == mine[first:]


@given(TIMES)
def test_paired_latency_intervals_contain_their_values(times: list[tuple[int, int, str]]) -> None:
    latency = measure_paired_latency([Timing(*time) for time in times], 0.95)

    for interval in (*latency.differences_us, *latency.ratios):
        assert interval.low is None or interval.low <= interval.value
        assert interval.high is None or interval.value <= interval.high


def test_paired_latency_differences_are_per_pair() -> None:
    """Both sides have the same percentiles, and new is slower in each pair but one."""
    times = [Timing(100 * number, 100 * ((number + 1) % 1000)) for number in range(1000)]
    latency = measure_paired_latency(times, 0.95)

    assert all(abs(side.old_us - side.new_us) <= 100 for side in latency.percentiles)
    assert median(latency.differences_us) == QuantileInterval(0.5, 100.0, 100.0, 100.0)
    assert median(latency.ratios).value > 1


def test_paired_latency_has_no_tail_interval_for_few_pairs() -> None:
    latency = measure_paired_latency([Timing(100, 100 + number) for number in range(20)], 0.95)

    assert [interval.high for interval in latency.differences_us if interval.share == 0.99] == [None]
    assert median(latency.differences_us).low is not None
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
