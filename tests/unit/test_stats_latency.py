from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.latency import (
    DETECTOR_ALPHA,
    MIN_WARM_PAIRS,
    Slowdown,
    Timing,
    detect_slowdown,
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
def test_slowdown_accepts_any_times(found: list[Timing]) -> None:
    slower = detect_slowdown(found)

    assert slower is None or (slower.pairs >= MIN_WARM_PAIRS and slower.ratio >= 1.3)


@given(timings)
def test_slowdown_is_never_found_in_both_directions(found: list[Timing]) -> None:
    mirrored = [Timing(one.new_us, one.old_us, one.release) for one in found]

    assert detect_slowdown(found) is None or detect_slowdown(mirrored) is None


@given(timings)
def test_slowdown_is_none_for_equal_times(found: list[Timing]) -> None:
    assert detect_slowdown([Timing(one.old_us, one.old_us, one.release) for one in found]) is None


@given(timings, st.randoms(use_true_random=False))
def test_log_evidence_ignores_the_order(found: list[Timing], generator: random.Random) -> None:
    shuffled = generator.sample(found, len(found))

    assert log_evidence(shuffled) == log_evidence(found)


@given(st.integers(1, 300), st.integers(0, 300))
def test_log_evidence_grows_with_slower_pairs(slower: int, faster: int) -> None:
    def of(slow: int, fast: int) -> float:
        return log_evidence([Timing(1, 2)] * slow + [Timing(2, 1)] * fast)

    assert of(slower + 1, faster) >= of(slower, faster)


@given(st.lists(times, min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_a_value_at_the_nearest_rank(values: list[int], share: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)

    assert found in ordered
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-9


def test_slowdown_is_none_for_equal_distributions_at_every_look() -> None:
    """400 endpoints, looked at after every tenth pair up to 300."""
    generator = random.Random(20260101)
    alarms = 0
    for _ in range(400):
        seen: list[Timing] = []
        for _ in range(30):
            seen += [noisy(generator) for _ in range(10)]
            alarms += detect_slowdown(seen) is not None

    assert alarms == 0


def test_log_evidence_keeps_alpha_at_every_look() -> None:
    """Ever above 1/alpha in at most alpha of all endpoints, looked at after every pair: here with alpha = 0.05."""
    generator = random.Random(7)
    bound, crossed, endpoints = -math.log(0.05), 0, 400
    for _ in range(endpoints):
        seen: list[Timing] = []
        for _ in range(150):
            seen.append(noisy(generator))
            if log_evidence(seen) >= bound:
                crossed += 1
                break

    assert crossed / endpoints <= 0.05


def test_slowdown_of_factor_two_is_found() -> None:
    generator = random.Random(11)
    found = sum(isinstance(detect_slowdown([noisy(generator, 2.0) for _ in range(120)]), Slowdown) for _ in range(100))

    assert found >= 95


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
    found = detect_slowdown([*cold, *([Timing(10_000, 20_000)] * 90)])

    assert found == Slowdown(10_000, 20_000, 10_000, 20_000, ratio=2.0, pairs=90)
    assert DETECTOR_ALPHA == 0.001
