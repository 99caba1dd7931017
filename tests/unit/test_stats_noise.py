"""Findings classified as real or noise from counts of new and of baseline copies."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import comb, exp, inf, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.noise import (
    DifferenceCounts,
    NoiseDecision,
    classify_differences,
    difference_evidence,
    estimate_baseline_pairs_needed,
)

ALPHA = 0.05
NOISY = [0.002, 0.003, 0.005, 0.01, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.49]  # rates
ALWAYS = 3  # places that differ in each comparison


def one(*counts: int) -> NoiseDecision:
    return classify_differences([DifferenceCounts(*counts)], ALPHA)[0]


def state(*counts: int) -> str:
    return one(*counts).state


@dataclass
class Place:
    """A value that is odd now and then, on either side: a comparison differs where one of two answers is odd."""

    rate: float
    differs: int = 0
    baseline: int = 0

    def odd(self) -> float:
        return (1 - sqrt(1 - 2 * self.rate)) / 2

    def go(self, requests: int, copies: int, dice: random.Random) -> None:
        """Simulate counts that depend on each other: both copies are compared with the same answers of old."""
        odd = self.odd()
        for request in range(requests):
            old = dice.random() < odd
            self.differs += old != (dice.random() < odd)
            if request < copies:
                self.baseline += old != (dice.random() < odd)


@dataclass
class Run:
    places: list[Place]
    compared: int = 0
    copies: int = 0

    def counts(self) -> list[DifferenceCounts]:
        noisy = [DifferenceCounts(self.compared, one.differs, self.copies, one.baseline) for one in self.places]
        return noisy + [DifferenceCounts(self.compared, self.compared, self.copies, self.copies)] * ALWAYS

    def go(self, requests: int, share: float, dice: random.Random) -> None:
        copies = sum(dice.random() < share for _ in range(requests))
        for place in self.places:
            place.go(requests, copies, dice)
        self.compared += requests
        self.copies += copies


def ever_real(share: float, dice: random.Random, *, requests: int = 20_000, looks: int = 20) -> bool:
    run = Run([Place(rate) for rate in NOISY])
    for _ in range(looks):
        run.go(requests // looks, share, dice)
        if any(decision.state == "real" for decision in classify_differences(run.counts(), ALPHA)):
            return True
    return False


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_noise_of_old_against_old_is_never_real(share: float) -> None:
    """6 runs of 20,000 requests and 15 noisy places; two false ones or more have a probability of 0.03."""
    dice = random.Random(5)

    assert sum(ever_real(share, dice) for _ in range(6)) <= 1


def test_noise_keeps_alpha_with_few_copies() -> None:
    dice = random.Random(8)
    runs = 40
    wrong = sum(ever_real(0.03, dice, requests=400, looks=10) for _ in range(runs))

    assert wrong <= runs * ALPHA + 3.1 * sqrt(runs * ALPHA * (1 - ALPHA))


def test_noise_is_recognised_after_20_000_requests() -> None:
    run = Run([Place(rate) for rate in NOISY])
    run.go(20_000, 0.1, random.Random(3))

    assert {decision.state for decision in classify_differences(run.counts(), ALPHA)} == {"noise"}


@pytest.mark.parametrize("copies", [2000, 1000, 200])
def test_real_defect_in_one_of_2_000_is_found_among_noise(copies: int) -> None:
    noisy = [DifferenceCounts(20_000, 20_000, copies, copies)] * 40 + [
        DifferenceCounts(20_000, 400, copies, copies // 50)
    ] * 40
    found = classify_differences([DifferenceCounts(20_000, 10, copies, 0), *noisy], ALPHA)

    assert found[0].state == "real"
    assert {one.state for one in found[1:]} == {"noise"}


def test_real_defect_on_a_noisy_place_is_found() -> None:
    assert state(20_000, 1000, 2000, 20) == "real"
    assert state(20_000, 20_000, 2000, 1000) == "real"


def test_real_needs_more_evidence_among_many_places() -> None:
    place, noisy = DifferenceCounts(20_000, 1000, 2000, 50), [DifferenceCounts(20_000, 400, 2000, 40)] * 100

    assert classify_differences([place], ALPHA)[0].state == "real"
    assert classify_differences([place, *noisy], ALPHA)[0].state == "undecided"


def test_undecided_is_a_noisy_place_with_some_evidence() -> None:
    assert state(20_000, 850, 2000, 50) == "noise"
    assert state(20_000, 950, 2000, 50) == "undecided"
    assert state(20_000, 1000, 2000, 50) == "real"


def test_undecided_states_the_copies_needed() -> None:
    found = one(20_000, 200, 100, 0)

    assert found.state == "undecided"
    assert found.baseline_pairs_needed is not None
    assert "more baseline copies" in found.reason
    assert state(20_000, 200, 100 + found.baseline_pairs_needed, 0) == "real"
    assert state(20_000, 200, 100 + found.baseline_pairs_needed, 9) == "noise"


def test_rare_finding_is_not_real_once_a_copy_differs() -> None:
    assert state(20_000, 10, 2000, 0) == "real"
    assert state(20_000, 10, 2000, 1) == "noise"


def test_real_survives_a_single_differing_copy() -> None:
    assert state(2000, 2000, 200, 1) == "real"


def test_noise_includes_always_and_never_differing_places() -> None:
    assert state(20_000, 20_000, 2000, 2000) == "noise"
    assert state(20_000, 0, 2000, 3) == "noise"
    assert state(20_000, 0, 2000, 0) == "noise"


def test_noise_includes_places_where_new_differs_more_rarely() -> None:
    assert state(20_000, 100, 2000, 100) == "noise"


def test_real_deterministic_place_needs_few_copies() -> None:
    assert state(40, 40, 4, 0) == "real"
    assert state(100, 30, 10, 0) == "undecided"
    assert state(300, 90, 30, 0) == "real"


class TestWithoutCopies:
    def test_one_direction_is_real(self) -> None:
        assert state(100, 12, 0, 0, 0, 12, 0) == "real"
        assert state(100, 12, 0, 0, 0, 0, 12) == "real"

    def test_both_directions_are_undecided_with_advice(self) -> None:
        found = one(100, 60, 0, 0, 0, 31, 29)

        assert found.state == "undecided"
        assert "send a share of the requests to old twice" in found.reason

    def test_noise_requires_an_explaining_shape(self) -> None:
        assert state(100, 100, 0, 0, 0, 50, 50) == "undecided"
        assert state(100, 100, 0, 0, 100, 100, 0) == "noise"

    def test_rate_below_the_least_noise_is_real(self) -> None:
        assert state(20_000, 8, 0, 0) == "real"

    def test_fair_coin_has_no_direction_at_any_look(self) -> None:
        dice = random.Random(2)
        wrong = sum(self.ever_leaning(dice) for _ in range(60))

        assert wrong <= 60 * ALPHA + 3.1 * sqrt(60 * ALPHA * (1 - ALPHA))

    def ever_leaning(self, dice: random.Random) -> bool:
        greater = 0
        for many in range(1, 151):
            greater += dice.random() < 0.5
            if state(2 * many, many, 0, 0, 0, greater, many - greater) == "real":
                return True
        return False


class TestExplainedByShape:
    def test_explained_differences_are_noise_without_contrary_copies(self) -> None:
        found = one(10, 10, 1, 0, 10)

        assert found.state == "noise"
        assert "shape" in found.reason

    def test_explained_place_is_real_if_copies_never_differ(self) -> None:
        """Another product's UUID has the shape of a fresh one."""
        assert state(1000, 1000, 100, 0, 1000) == "real"

    def test_unexplained_difference_is_not_covered_by_explained_ones(self) -> None:
        assert state(10, 10, 0, 0, 9) == "undecided"


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 10**5)).map(
            lambda t: DifferenceCounts(t[0] + t[1], t[1], t[2] + t[3], t[3])
        ),
        max_size=8,
    )
)
def test_classify_accepts_any_counts(places: list[DifferenceCounts]) -> None:
    found = classify_differences(places, ALPHA)

    assert len(found) == len(places)
    assert all(0 <= one.p_value <= 1 and one.reason for one in found)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 300))
def test_difference_evidence_grows_with_differences(differs: int, quiet: int, copies: int) -> None:
    compared = differs + quiet + 1
    fewer = DifferenceCounts(compared, differs, copies + 1, 0)
    more = DifferenceCounts(compared, differs + 1, copies + 1, 0)

    if differs > 0.05 * compared and difference_evidence(fewer) > 0:
        assert difference_evidence(more) >= difference_evidence(fewer) - 1e-9


@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 40))
def test_difference_evidence_falls_with_differing_copies(differs: int, quiet: int, copies: int) -> None:
    without = difference_evidence(DifferenceCounts(differs + quiet, differs, copies, 0))
    with_one = difference_evidence(DifferenceCounts(differs + quiet, differs, copies, 1))

    assert with_one <= max(without, 0.0) + 1e-9


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.002, 0.998))
def test_difference_evidence_has_a_mean_of_at_most_one(compared: int, copies: int, rate: float) -> None:
    mean = sum(
        chance(differs, compared, rate)
        * chance(odd, copies, rate)
        * (
            0.0
            if (log_e := difference_evidence(DifferenceCounts(compared, differs, copies, odd))) == -inf
            else exp(log_e)
        )
        for differs in range(compared + 1)
        for odd in range(copies + 1)
    )

    assert mean <= 1 + 1e-9


def chance(hits: int, n: int, rate: float) -> float:
    return comb(n, hits) * rate**hits * (1 - rate) ** (n - hits)


def test_copies_needed_is_none_if_no_number_suffices() -> None:
    assert estimate_baseline_pairs_needed(DifferenceCounts(10, 0, 5, 0), threshold=3.0) is None


def test_classify_of_no_places_is_empty() -> None:
    assert classify_differences([], ALPHA) == []


def test_few_differences_in_one_direction_are_real() -> None:
    """10 of 4,000, none among 1,200 copies: chance would have set some the other way."""
    leaning, balanced = (DifferenceCounts(4000, 10, 1200, 0, 0, 0, 10), DifferenceCounts(4000, 10, 1200, 0, 0, 5, 5))

    assert classify_differences([leaning], 0.01)[0].state == "real"
    assert classify_differences([balanced], 0.01)[0].state == "undecided"
    assert classify_differences([DifferenceCounts(4000, 10, 1200, 2, 0, 0, 10)], 0.01)[0].state == "noise"


def test_direction_of_many_differences_does_not_overflow() -> None:
    assert classify_differences([DifferenceCounts(10**6, 10**5, 10**5, 0, 0, 10**5, 0)], 0.01)[0].state == "real"


@pytest.mark.parametrize("rate", [0.002, 0.004, 0.008])
def test_rare_noise_without_direction_is_never_real(rate: float) -> None:
    dice = random.Random(11)
    assert not any(_ever_real_leaning(rate, dice) for _ in range(20))


def _ever_real_leaning(rate: float, dice: random.Random) -> bool:
    compared = differs = copies = baseline = greater = 0
    for _ in range(20):
        for _ in range(500):
            differ, copy = dice.random() < rate, dice.random() < 0.1
            compared, differs, copies = compared + 1, differs + differ, copies + copy
            greater += differ and dice.random() < 0.5
            baseline += copy and dice.random() < rate
        place = DifferenceCounts(compared, differs, copies, baseline, 0, greater, differs - greater)
        if classify_differences([place], 0.01)[0].state == "real":
            return True
    return False


def test_rare_noise_with_long_tails_waits_for_copies() -> None:
    """One of a thousand, in both directions, and the copies have not shown one yet."""
    found = classify_differences([DifferenceCounts(20_000, 20, 1000, 0, 0, 10, 10, is_rare=True)], ALPHA)[0]

    assert found.state == "undecided"
    assert classify_differences([DifferenceCounts(20_000, 20, 1000, 0, 0, 10, 10)], ALPHA)[0].state == "real"
    assert (
        classify_differences([DifferenceCounts(20_000, 2000, 1000, 0, 0, 1000, 1000, is_rare=True)], ALPHA)[0].state
        == "real"
    )
    assert (
        classify_differences([DifferenceCounts(20_000, 14, 2000, 0, 0, 0, 14, is_rare=True)], ALPHA)[0].state == "real"
    )  # one way
