from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.latency import (
    DETECTOR_ALPHA,
    MIN_WARM_PAIRS,
    TAILS,
    Load,
    SignCounts,
    Slowdown,
    Timing,
    block_evidence,
    count_blocks,
    count_times,
    detect_slowdown,
    do_waits_match,
    log_evidence,
    percentile,
    split_cold_pairs,
)

times = st.integers(0, 2**31 - 1)
timings = st.lists(st.builds(Timing, times, times, st.sampled_from(["a", "b"])), max_size=200)


def noisy(generator: random.Random, factor: float = 1.0) -> Timing:
    """Draw times with a heavy tail on both sides and a median of about 20 ms."""
    old, new = (20_000 * math.exp(generator.gauss(0, 0.6)) for _ in range(2))
    return Timing(int(old), int(new * factor))


@given(timings)
def test_slowdown_accepts_any_times(timings: list[Timing]) -> None:
    slower = detect_slowdown(timings)

    assert slower is None or (slower.pairs >= MIN_WARM_PAIRS and slower.ratio >= 1.3)


@given(timings)
def test_slowdown_is_never_found_in_both_directions(timings: list[Timing]) -> None:
    mirrored = [Timing(timing.new_us, timing.old_us, timing.release) for timing in timings]

    assert detect_slowdown(timings) is None or detect_slowdown(mirrored) is None


@given(timings)
def test_slowdown_is_none_for_equal_times(timings: list[Timing]) -> None:
    assert detect_slowdown([Timing(timing.old_us, timing.old_us, timing.release) for timing in timings]) is None


@given(timings, st.randoms(use_true_random=False))
def test_log_evidence_ignores_the_order(timings: list[Timing], generator: random.Random) -> None:
    shuffled = generator.sample(timings, len(timings))

    assert log_evidence(shuffled) == log_evidence(timings)


@given(st.integers(1, 300), st.integers(0, 300))
def test_log_evidence_grows_with_slower_pairs(slower: int, faster: int) -> None:
    def of(slow: int, fast: int) -> float:
        return log_evidence([Timing(1, 2)] * slow + [Timing(2, 1)] * fast)

    assert of(slower + 1, faster) >= of(slower, faster)


@given(st.lists(times, min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_a_value_at_the_nearest_rank(values: list[int], share: float) -> None:
    ordered = sorted(values)
    result = percentile(ordered, share)

    assert result in ordered
    assert sum(value <= result for value in ordered) >= share * len(ordered) - 1e-9


def test_slowdown_is_none_for_equal_distributions_at_every_look() -> None:
    """400 endpoints, looked at after every tenth pair up to 300."""
    generator = random.Random(20260101)
    alarms = 0
    for _ in range(400):
        timings: list[Timing] = []
        for _ in range(30):
            timings += [noisy(generator) for _ in range(10)]
            alarms += detect_slowdown(timings) is not None

    assert alarms == 0


def test_log_evidence_keeps_alpha_at_every_look() -> None:
    """Ever above 1/alpha in at most alpha of all endpoints, looked at after every pair: here with alpha = 0.05."""
    generator = random.Random(7)
    bound, crossed, endpoints = -math.log(0.05), 0, 400
    for _ in range(endpoints):
        timings: list[Timing] = []
        for _ in range(150):
            timings.append(noisy(generator))
            if log_evidence(timings) >= bound:
                crossed += 1
                break

    assert crossed / endpoints <= 0.05


def test_slowdown_of_factor_two_is_found() -> None:
    generator = random.Random(11)
    slowdown_count = sum(
        isinstance(detect_slowdown([noisy(generator, 2.0) for _ in range(120)]), Slowdown) for _ in range(100)
    )

    assert slowdown_count >= 95


def test_slowdown_excludes_small_differences() -> None:
    assert detect_slowdown([Timing(100_000, 120_000)] * 500) is None  # 20%
    assert detect_slowdown([Timing(1_000, 5_000)] * 500) is None  # 4 ms
    assert detect_slowdown([Timing(100_000, 140_000)] * 500) is not None


def test_slowdown_is_none_for_few_pairs() -> None:
    assert detect_slowdown([Timing(10_000, 90_000)] * 34) is None  # the first five are cold
    assert detect_slowdown([Timing(10_000, 90_000)] * 35) is not None


def test_split_cold_pairs_skips_the_start_of_each_release() -> None:
    first = [Timing(n, n, "one") for n in range(100)]
    second = [Timing(n, n, "two") for n in range(20)]

    assert split_cold_pairs([*first, *second])[1] == [*first[10:], *second[5:]]


def test_slowdown_percentiles_are_of_warm_pairs() -> None:
    cold = [Timing(10_000, 5_000_000)] * 10
    result = detect_slowdown([*cold, *([Timing(10_000, 20_000)] * 90)])

    assert result == Slowdown(10_000, 20_000, 10_000, 20_000, ratio=2.0, pairs=90)
    assert DETECTOR_ALPHA == 0.001


loads = st.builds(Load, st.none() | st.integers(0, 99), st.none() | st.integers(-(10**6), 10**7), times)


@given(loads, loads)
def test_waits_match_is_symmetric(one: Load, other: Load) -> None:
    assert do_waits_match(one, other) == do_waits_match(other, one)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (Load(4, 300, 20_000), Load(4, 300, 60_000), True),
        (Load(4, 300, 20_000), Load(5, 300, 20_000), False),
        (Load(20, 300, 20_000), Load(22, 300, 20_000), True),  # a tenth more
        (Load(20, 300, 20_000), Load(23, 300, 20_000), False),
        (Load(0, 300, 20_000), Load(0, 20_300, 90_000), True),  # less than the shorter response
        (Load(0, 300, 20_000), Load(0, 20_301, 90_000), False),
        (Load(0, -900, 200), Load(0, 4_100, 200), True),  # clocks differ by a few ms
        (Load(0, None, 200), Load(0, 100, 200), False),
        (Load(None, 100, 200), Load(None, 100, 200), False),
        (Load(4, 0, 20_000, by_envoy=True), Load(4, 0, 20_000, by_envoy=True), True),
        (Load(4, 0, 20_000, by_envoy=True), Load(4, 0, 20_000), False),
    ],
)
def test_waits_match_compares_requests_in_flight_and_waits(old: Load, new: Load, expected: bool) -> None:
    assert do_waits_match(old, new) == expected


def test_slowdown_ignores_pairs_with_different_waits() -> None:
    """Copies queue at new, whose code is the same."""
    idle = [Timing(20_000 + n % 7, 20_000 + n % 5) for n in range(50)]
    busy = [Timing(20_000, 400_000, waits_match=False) for _ in range(200)]
    mixed = [*busy[:100], *idle, *busy[100:]]

    assert detect_slowdown(mixed) is None
    assert detect_slowdown([timing._replace(waits_match=True) for timing in mixed]) is not None
    times = count_times(mixed, 0.1)
    assert (times.timed, times.slower, times.unmatched, times.queues) == (50, 0, 200, True)


@pytest.mark.parametrize(
    ("count", "blocks"), [(15, 15), (16, 16), (47, 47), (48, 16), (3887, 47), (3888, 16), (9000, 37)]
)
def test_count_blocks_grows_the_size_with_the_number(count: int, blocks: int) -> None:
    assert count_blocks([True] * count) == SignCounts(blocks, 0)


def test_count_blocks_gives_a_short_slowdown_few_signs() -> None:
    """Half of the pairs are slower, but all of them in a row."""
    signs = [True] * 2000 + [False] * 2000

    assert block_evidence(count_blocks(signs)) < 0


@given(st.lists(st.booleans(), max_size=600))
def test_count_blocks_of_opposite_signs_is_opposite(signs: list[bool]) -> None:
    counts = count_blocks(signs)

    assert count_blocks([not sign for sign in signs]) == SignCounts(counts.down, counts.up)


@pytest.mark.parametrize("kind", ["slowest percent", "random percent"])
def test_count_times_finds_slow_tail(kind: str) -> None:
    """The slowest percent of new's responses, or a random one, takes five times as long."""
    generator = random.Random(7)
    timings = [noisy(generator) for _ in range(20_000)]
    limit = percentile(sorted(timing.new_us for timing in timings), 0.99)
    slow = [
        timing._replace(new_us=timing.new_us * 5)
        if (timing.new_us > limit if kind == "slowest percent" else generator.random() < 0.01)
        else timing
        for timing in timings
    ]

    unchanged, changed = (count_times(each, 0.1) for each in (timings, slow))
    bound = math.log(2 * len(TAILS) / (0.05 * 0.25))
    assert max(map(block_evidence, unchanged.tails)) < bound <= max(map(block_evidence, changed.tails))
    assert block_evidence(changed.blocks) < 0, "the median does not show it"
