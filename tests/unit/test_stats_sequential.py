"""Rates that are tested repeatedly."""

from __future__ import annotations

import random
from math import exp, inf, log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.sequential import (
    JEFFREYS_PRIOR,
    Prior,
    confidence_interval,
    estimate_requests_above,
    estimate_requests_below,
    evidence_above,
    evidence_below,
    find_least,
    log_ratio,
    prior_above,
    prior_below,
)

ALPHA = 0.05
BAR = -log(ALPHA)
RUNS = 400
LOOKS = 1000

counts = st.integers(0, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
rates = st.floats(1e-6, 0.999)


def exceeds(successes: float, n: float, budget: float, alpha: float) -> bool:
    return evidence_above(successes, n, budget) >= -log(alpha)


def stays_under(successes: float, n: float, budget: float, alpha: float) -> bool:
    return evidence_below(successes, n, budget) >= -log(alpha)


def ever_above(rate: float, prior: Prior, bar: float, dice: random.Random) -> bool:
    """Return True if a run at the true rate ever reaches this evidence against that rate.

    It is evaluated after each success, where the evidence for a greater rate jumps, and sometimes between.
    """
    successes = 0
    for n in range(1, LOOKS + 1):
        hit = dice.random() < rate
        successes += hit
        if (hit or n % 20 == 0) and log_ratio(successes, n, rate, prior) >= bar:
            return True
    return False


def allowed(runs: int, alpha: float) -> float:
    """Return the number of wrong runs that all but one simulation in 1,000 stay below."""
    return runs * alpha + 3.1 * sqrt(runs * alpha * (1 - alpha))


@pytest.mark.parametrize("rate", [0.002, 0.05, 0.5])
def test_confidence_interval_covers_the_rate_at_every_look(rate: float) -> None:
    dice = random.Random(6)
    missed = sum(ever_above(rate, JEFFREYS_PRIOR, -log(ALPHA), dice) for _ in range(RUNS))

    assert missed <= allowed(RUNS, ALPHA)


@pytest.mark.parametrize("prior", [prior_above(0.01), prior_below(0.01)])
def test_budget_priors_keep_alpha_at_the_budget(prior: Prior) -> None:
    dice = random.Random(7)
    missed = sum(ever_above(0.01, prior, -log(ALPHA), dice) for _ in range(RUNS))

    assert missed <= allowed(RUNS, ALPHA)


def test_simulation_detects_an_interval_for_a_single_look() -> None:
    dice = random.Random(6)
    missed = sum(ever_outside_of_one_look(0.5, dice) for _ in range(RUNS))

    assert missed > 2 * allowed(RUNS, ALPHA)


def ever_outside_of_one_look(rate: float, dice: random.Random) -> bool:
    """Evaluate the usual interval of 1.96 standard errors after each result."""
    successes = 0
    for n in range(1, LOOKS + 1):
        successes += dice.random() < rate
        if n >= 30 and abs(successes - n * rate) > 1.96 * sqrt(n * rate * (1 - rate)):
            return True
    return False


@given(counts)
def test_confidence_interval_contains_the_share(case: tuple[int, int]) -> None:
    successes, n = case
    interval = confidence_interval(successes, n, ALPHA)

    assert 0 <= interval.low <= interval.high <= 1
    assert not n or interval.low <= successes / n <= interval.high


@given(counts)
def test_confidence_interval_widens_with_smaller_alpha(case: tuple[int, int]) -> None:
    wide, narrow = confidence_interval(*case, 0.001), confidence_interval(*case, 0.1)

    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@given(counts)
def test_confidence_interval_of_the_complement_is_mirrored(case: tuple[int, int]) -> None:
    successes, n = case
    interval, mirrored = confidence_interval(successes, n, ALPHA), confidence_interval(n - successes, n, ALPHA)

    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-9)
    assert interval.high == pytest.approx(1 - mirrored.low, abs=1e-9)


@given(counts, rates)
def test_confidence_interval_excludes_rejected_rates(case: tuple[int, int], rate: float) -> None:
    successes, n = case
    interval = confidence_interval(successes, n, ALPHA)
    rejected = n > 0 and log_ratio(successes, n, rate, JEFFREYS_PRIOR) > -log(ALPHA) + 1e-6

    assert not rejected or not interval.low < rate < interval.high


@given(counts, rates, rates)
def test_log_ratio_falls_towards_the_observed_share(case: tuple[int, int], first: float, second: float) -> None:
    """Because of this, the test of a budget can be one-sided."""
    low, high = sorted((first, second))
    successes, n = case
    prior = prior_above(high)

    if successes > high * n:
        slack = 1e-6 * (1 + abs(log_ratio(successes, n, high, prior)))
        assert log_ratio(successes, n, low, prior) >= log_ratio(successes, n, high, prior) - slack


@given(counts, rates)
def test_evidence_is_never_above_and_below_a_budget(case: tuple[int, int], budget: float) -> None:
    assert -inf in {evidence_above(*case, budget), evidence_below(*case, budget)}


def test_evidence_of_no_requests_is_none() -> None:
    assert confidence_interval(0, 0, ALPHA).low == 0
    assert confidence_interval(0, 0, ALPHA).high == 1
    assert not exceeds(0, 0, 0.001, ALPHA)
    assert not stays_under(0, 0, 0.001, ALPHA)


def test_evidence_above_finds_ten_of_20_000_at_a_share_of_alpha() -> None:
    assert exceeds(10, 20_000, 0.0001, ALPHA)
    assert exceeds(10, 20_000, 0.0001, ALPHA / 6)
    assert not exceeds(10, 20_000, 0.001, ALPHA)
    assert stays_under(10, 20_000, 0.01, ALPHA)


def test_evidence_above_needs_two_requests_of_a_broken_version() -> None:
    assert exceeds(2, 2, 0.001, ALPHA / 6 / 100)


@pytest.mark.parametrize(("successes", "n", "state"), [(0, 10**6, (False, False)), (1, 10**6, (True, False))])
def test_budget_of_zero_is_exceeded_by_one_request(successes: int, n: int, state: tuple[bool, bool]) -> None:
    assert (exceeds(successes, n, 0.0, ALPHA), stays_under(successes, n, 0.0, ALPHA)) == state


def test_budget_of_one_is_never_exceeded() -> None:
    assert not exceeds(100, 100, 1.0, ALPHA)


def test_evidence_below_of_no_mismatch_is_a_sixth_later_than_a_single_look() -> None:
    needed = estimate_requests_below(0.0, 0, 0.001, BAR)

    assert needed is not None
    assert needed < 1.2 * log(1 / ALPHA) / 0.001


@given(
    st.integers(0, 50).flatmap(lambda s: st.tuples(st.just(s), st.integers(s, 20_000))),
    st.sampled_from([0.0001, 0.001, 0.01, 0.3]),
)
def test_estimated_requests_are_exact(case: tuple[int, int], budget: float) -> None:
    successes, n = case
    rate = successes / n if n else 0.0
    estimate = estimate_requests_below(rate, n, budget, BAR)

    if estimate:
        assert stays_under(rate * (n + estimate), n + estimate, budget, ALPHA * (1 + 1e-9))
    assert estimate is not None or rate >= budget * 0.999


def test_estimated_requests_are_zero_or_none_at_the_ends() -> None:
    assert (
        estimate_requests_below(0.0005, 20_000, 0.0001, BAR),
        estimate_requests_above(0.0005, 20_000, 0.0001, BAR),
    ) == (None, 0)
    assert (estimate_requests_below(0.0, 20_000, 0.001, BAR), estimate_requests_above(0.0, 20_000, 0.001, BAR)) == (
        0,
        None,
    )


def test_find_least_is_none_beyond_the_maximum() -> None:
    assert find_least(lambda n: n >= 777) == 777
    assert find_least(lambda n: n >= 777, maximum=100) is None


def test_evidence_of_large_counts_is_precise() -> None:
    interval = confidence_interval(500_000_000, 1_000_000_000, ALPHA)

    assert exp(-1) > interval.high - interval.low > 0
    assert interval.high - interval.low < 0.0005
