"""Rates under repeated looking."""

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
    """Whether a run at the true rate ever has so much evidence against that rate.

    Looks after each success, where evidence for a greater rate jumps, and now and then between.
    """
    successes = 0
    for n in range(1, LOOKS + 1):
        hit = dice.random() < rate
        successes += hit
        if (hit or n % 20 == 0) and log_ratio(successes, n, rate, prior) >= bar:
            return True
    return False


def allowed(runs: int, alpha: float) -> float:
    """Runs that may be wrong at most, but for one simulation in 1,000."""
    return runs * alpha + 3.1 * sqrt(runs * alpha * (1 - alpha))


@pytest.mark.parametrize("rate", [0.002, 0.05, 0.5])
def test_the_true_rate_stays_inside_at_every_look(rate: float) -> None:
    dice = random.Random(6)
    missed = sum(ever_above(rate, JEFFREYS_PRIOR, -log(ALPHA), dice) for _ in range(RUNS))

    assert missed <= allowed(RUNS, ALPHA)


@pytest.mark.parametrize("prior", [prior_above(0.01), prior_below(0.01)])
def test_priors_made_for_a_budget_keep_the_promise_at_the_budget(prior: Prior) -> None:
    dice = random.Random(7)
    missed = sum(ever_above(0.01, prior, -log(ALPHA), dice) for _ in range(RUNS))

    assert missed <= allowed(RUNS, ALPHA)


def test_the_simulation_would_notice_an_interval_that_is_made_for_one_look() -> None:
    dice = random.Random(6)
    missed = sum(ever_outside_of_one_look(0.5, dice) for _ in range(RUNS))

    assert missed > 2 * allowed(RUNS, ALPHA)


def ever_outside_of_one_look(rate: float, dice: random.Random) -> bool:
    """The usual interval of 1.96 standard errors, looked at after each result."""
    successes = 0
    for n in range(1, LOOKS + 1):
        successes += dice.random() < rate
        if n >= 30 and abs(successes - n * rate) > 1.96 * sqrt(n * rate * (1 - rate)):
            return True
    return False


@given(counts)
def test_the_interval_holds_the_share_and_is_ordered(case: tuple[int, int]) -> None:
    successes, n = case
    found = confidence_interval(successes, n, ALPHA)

    assert 0 <= found.low <= found.high <= 1
    assert not n or found.low <= successes / n <= found.high


@given(counts)
def test_a_smaller_error_probability_has_a_wider_interval(case: tuple[int, int]) -> None:
    wide, narrow = confidence_interval(*case, 0.001), confidence_interval(*case, 0.1)

    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@given(counts)
def test_the_interval_of_the_complement_is_the_mirror_image(case: tuple[int, int]) -> None:
    successes, n = case
    one, other = confidence_interval(successes, n, ALPHA), confidence_interval(n - successes, n, ALPHA)

    assert one.low == pytest.approx(1 - other.high, abs=1e-9)
    assert one.high == pytest.approx(1 - other.low, abs=1e-9)


@given(counts, rates)
def test_a_rate_outside_of_the_interval_is_one_that_is_rejected(case: tuple[int, int], rate: float) -> None:
    successes, n = case
    found = confidence_interval(successes, n, ALPHA)
    rejected = n > 0 and log_ratio(successes, n, rate, JEFFREYS_PRIOR) > -log(ALPHA) + 1e-6

    assert not rejected or not found.low < rate < found.high


@given(counts, rates, rates)
def test_what_exceeds_a_budget_exceeds_each_smaller_rate(case: tuple[int, int], one: float, other: float) -> None:
    """The argument that the test of a budget is one-sided: the ratio falls towards the observed share."""
    low, high = sorted((one, other))
    successes, n = case
    prior = prior_above(high)

    if successes > high * n:
        slack = 1e-6 * (1 + abs(log_ratio(successes, n, high, prior)))
        assert log_ratio(successes, n, low, prior) >= log_ratio(successes, n, high, prior) - slack


@given(counts, rates)
def test_nothing_is_above_and_below_a_budget(case: tuple[int, int], budget: float) -> None:
    assert -inf in {evidence_above(*case, budget), evidence_below(*case, budget)}


def test_no_request_says_nothing() -> None:
    assert confidence_interval(0, 0, ALPHA).low == 0
    assert confidence_interval(0, 0, ALPHA).high == 1
    assert not exceeds(0, 0, 0.001, ALPHA)
    assert not stays_under(0, 0, 0.001, ALPHA)


def test_ten_of_20_000_are_above_one_in_10_000_also_at_a_share_of_the_error_probability() -> None:
    assert exceeds(10, 20_000, 0.0001, ALPHA)
    assert exceeds(10, 20_000, 0.0001, ALPHA / 6)
    assert not exceeds(10, 20_000, 0.001, ALPHA)
    assert stays_under(10, 20_000, 0.01, ALPHA)


def test_what_is_plainly_broken_takes_two_requests() -> None:
    assert exceeds(2, 2, 0.001, ALPHA / 6 / 100)


@pytest.mark.parametrize(("successes", "n", "state"), [(0, 10**6, (False, False)), (1, 10**6, (True, False))])
def test_a_budget_of_nothing_is_never_kept_and_exceeded_by_one(
    successes: int, n: int, state: tuple[bool, bool]
) -> None:
    assert (exceeds(successes, n, 0.0, ALPHA), stays_under(successes, n, 0.0, ALPHA)) == state


def test_a_budget_of_everything_cannot_be_exceeded() -> None:
    assert not exceeds(100, 100, 1.0, ALPHA)


def test_no_mismatch_at_all_passes_a_sixth_later_than_by_one_look() -> None:
    needed = estimate_requests_below(0.0, 0, 0.001, BAR)

    assert needed is not None
    assert needed < 1.2 * log(1 / ALPHA) / 0.001


@given(
    st.integers(0, 50).flatmap(lambda s: st.tuples(st.just(s), st.integers(s, 20_000))),
    st.sampled_from([0.0001, 0.001, 0.01, 0.3]),
)
def test_so_many_more_requests_are_just_enough(case: tuple[int, int], budget: float) -> None:
    successes, n = case
    rate = successes / n if n else 0.0
    more = estimate_requests_below(rate, n, budget, BAR)

    if more:
        assert stays_under(rate * (n + more), n + more, budget, ALPHA * (1 + 1e-9))
    assert more is not None or rate >= budget * 0.999


def test_what_is_decided_needs_no_more_and_what_leans_the_other_way_never_comes() -> None:
    assert (
        estimate_requests_below(0.0005, 20_000, 0.0001, BAR),
        estimate_requests_above(0.0005, 20_000, 0.0001, BAR),
    ) == (None, 0)
    assert (estimate_requests_below(0.0, 20_000, 0.001, BAR), estimate_requests_above(0.0, 20_000, 0.001, BAR)) == (
        0,
        None,
    )


def test_the_least_number_is_none_beyond_the_bound() -> None:
    assert find_least(lambda n: n >= 777) == 777
    assert find_least(lambda n: n >= 777, maximum=100) is None


def test_large_counts_lose_no_precision_that_matters() -> None:
    found = confidence_interval(500_000_000, 1_000_000_000, ALPHA)

    assert exp(-1) > found.high - found.low > 0
    assert found.high - found.low < 0.0005
