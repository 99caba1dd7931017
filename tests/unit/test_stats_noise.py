"""Findings classified as real or noise from discordant triples: two copies and the live response."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import comb, exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.noise import (
    DifferenceCounts,
    NoiseDecision,
    NoisyPlace,
    OrderCounts,
    classify_differences,
    difference_evidence,
    estimate_baseline_pairs_needed,
    role_evidence,
)
from abreast_sidecar.stats.sequential import sign_evidence

ALPHA = 0.01
NOTHING = DifferenceCounts(0, 0, 0, 0)
LOOK_PAIRS = 50


def triples(other_only: int, same_only: int, **changes: int) -> DifferenceCounts:
    return replace(DifferenceCounts(1000, 200, 100, 10 + same_only, 0, other_only, same_only), **changes)


def classify(counts: DifferenceCounts) -> NoiseDecision:
    return classify_differences([counts], ALPHA)[0]


def test_difference_of_the_other_version_alone_is_real_after_nine_triples() -> None:
    assert classify(triples(8, 0, baseline_differing=0)).state == "undecided"
    assert classify(triples(9, 0, baseline_differing=0)).state == "real"


def test_equally_frequent_discordant_triples_are_noise() -> None:
    assert classify(triples(12, 10)).state == "noise"
    assert classify(triples(0, 20)).state == "noise"


def test_regression_at_a_noisy_place_is_real() -> None:
    assert classify(triples(60, 20)).state == "real"


def test_some_evidence_at_a_noisy_place_is_undecided() -> None:
    assert classify(triples(16, 4)).state == "undecided"


def test_real_needs_more_evidence_among_all_places_of_a_service() -> None:
    place = triples(10, 0)

    assert classify_differences([place], ALPHA)[0].state == "real"
    assert classify_differences([place], ALPHA, places=500)[0].state == "undecided"
    assert classify_differences([triples(19, 0)], ALPHA, places=500)[0].state == "real"


def test_undecided_states_the_copies_needed() -> None:
    counts = triples(3, 0, baseline_differing=0)
    decision = classify(counts)

    assert decision.state == "undecided"
    assert decision.baseline_pairs_needed == 30  # 6 more triples, if one of five requests shows the finding
    assert "about 30 more second copies" in decision.reason
    assert classify(replace(counts, other_only=9)).state == "real"


def test_copies_needed_is_none_if_no_number_suffices() -> None:
    assert estimate_baseline_pairs_needed(triples(0, 5000), threshold=5.0) is None


def test_noise_includes_places_that_differ_always() -> None:
    assert classify(DifferenceCounts(500, 500, 50, 50)).state == "noise"
    assert classify(DifferenceCounts(500, 0, 50, 3)).state == "noise"


class TestWithoutCopies:
    def test_one_direction_proves_nothing_in_one_role(self) -> None:
        decision = classify(DifferenceCounts(148, 148, 0, 0, copy_greater_of_new=148))

        assert decision.state == "undecided"
        assert "send second copies" in decision.reason

    def test_time_ordered_ids_are_never_real(self) -> None:
        """The copy has the greater value in both roles."""
        for weight in (0.0, 0.3, 1.0):
            dice = random.Random(3)
            counts = DifferenceCounts(0, 0, 0, 0)
            for _ in range(400):
                is_new_live = dice.random() < weight
                name = "copy_greater_of_old" if is_new_live else "copy_greater_of_new"
                counts = replace(
                    counts,
                    compared=counts.compared + 1,
                    differing=counts.differing + 1,
                    **{name: getattr(counts, name) + 1},
                )
                assert classify(counts).state == "undecided"

    def test_direction_that_follows_the_version_is_real(self) -> None:
        counts = DifferenceCounts(40, 20, 0, 0, copy_smaller_of_new=14, copy_greater_of_old=6)

        assert classify(counts).state == "real"
        assert classify(replace(counts, copy_smaller_of_new=20, copy_greater_of_old=0)).state == "undecided"

    def test_noise_requires_an_explaining_shape(self) -> None:
        assert classify(DifferenceCounts(20, 20, 0, 0)).state == "undecided"
        assert classify(DifferenceCounts(20, 20, 0, 0, explained=20)).state == "noise"
        assert classify(DifferenceCounts(20, 20, 0, 0, explained=19)).state == "undecided"


def test_explained_place_is_real_if_only_the_other_version_differs() -> None:
    """An endpoint that returns another object's id has values of the same shape."""
    assert classify(triples(12, 0, explained=200)).state == "real"


@given(st.integers(0, 14))
def test_sign_evidence_has_a_mean_of_at_most_one(triples: int) -> None:
    mean = sum(
        comb(triples, other) * 0.5**triples * exp(evidence)
        for other in range(triples + 1)
        if (evidence := sign_evidence(other, triples - other)) > -inf
    )

    assert mean <= 1 + 1e-9


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 0.99))
def test_role_evidence_has_a_mean_of_at_most_one(of_new: int, of_old: int, rate: float) -> None:
    def probability(hits: int, n: int) -> float:
        return comb(n, hits) * rate**hits * (1 - rate) ** (n - hits)

    mean = sum(
        probability(first, of_new)
        * probability(second, of_old)
        * exp(
            role_evidence(
                replace(
                    NOTHING,
                    copy_greater_of_new=first,
                    copy_smaller_of_new=of_new - first,
                    copy_greater_of_old=second,
                    copy_smaller_of_old=of_old - second,
                )
            )
        )
        for first in range(of_new + 1)
        for second in range(of_old + 1)
    )

    assert mean <= 1 + 1e-9


@given(st.lists(st.lists(st.integers(0, 1000), min_size=6, max_size=6), max_size=5))
def test_classify_accepts_any_counts(rows: list[list[int]]) -> None:
    places = [DifferenceCounts(1 + sum(row), row[0], row[1] + row[2], row[2], 0, row[3], row[4]) for row in rows]
    decisions = classify_differences([*places, *(OrderCounts(*row[:4]) for row in rows)], ALPHA)

    assert len(decisions) == 2 * len(rows)
    assert all(0 <= decision.p_value <= 1 for decision in decisions)


@given(st.integers(0, 300), st.integers(0, 300))
def test_difference_evidence_falls_with_differing_copies(other_only: int, same_only: int) -> None:
    evidence = difference_evidence(triples(other_only, same_only))

    assert difference_evidence(triples(other_only, same_only + 1)) <= evidence or evidence == -inf


@dataclass
class Stream:
    """Rates per pair at a point in time between 0 and 1."""

    event: Callable[[float], float]  # state moves, so that copies can differ from the live response
    share: Callable[[float], float] = lambda _: 0.1  # second copies
    visible: float = 1.0  # probability that one copy shows the event

    def ever_real(self, dice: random.Random, pairs: int = 6000) -> bool:
        compared = differing = copies = copies_differing = other_only = same_only = 0
        for number in range(pairs):
            time = number / pairs
            has_event = dice.random() < self.event(time)
            other = has_event and dice.random() < self.visible
            compared, differing = compared + 1, differing + other
            if dice.random() < self.share(time):
                same = has_event and dice.random() < self.visible
                copies, copies_differing = copies + 1, copies_differing + same
                other_only, same_only = other_only + (other and not same), same_only + (same and not other)
            if number % LOOK_PAIRS == 0:
                counts = DifferenceCounts(compared, differing, copies, copies_differing, 0, other_only, same_only)
                if classify(counts).state == "real":
                    return True
        return False


STREAMS = {
    "one-way noise of 0.3%": Stream(lambda _: 0.0033, visible=0.9),
    "one-way noise of 10%": Stream(lambda _: 0.11, visible=0.9),
    "noise that grows while copies get fewer": Stream(
        lambda time: 0.02 if time < 0.5 else 0.2, lambda time: 0.5 if time < 0.5 else 0.05, visible=0.5
    ),
    "noise that begins half way": Stream(lambda time: 0.1 if time > 0.5 else 0.0, visible=0.5),
}


@pytest.mark.parametrize("name", STREAMS)
def test_same_code_is_never_real(name: str) -> None:
    dice = random.Random(17)

    assert sum(STREAMS[name].ever_real(dice) for _ in range(25)) <= 1


@pytest.mark.parametrize(("regression", "noise"), [(0.02, 0.1), (0.1, 0.3), (0.3, 0.9)])
def test_bound_of_hidden_pairs_covers_the_regression(regression: float, noise: float) -> None:
    dice = random.Random(5)
    too_low = 0
    for _ in range(60):
        counts: dict[str, int] = dict.fromkeys(("differing", "baseline_differing", "other_only", "same_only"), 0)
        for number in range(2000):
            other = dice.random() < regression or dice.random() < noise
            counts["differing"] += other
            if number % 5 == 0:
                same = dice.random() < noise
                counts["baseline_differing"] += same
                counts["other_only"] += other and not same
                counts["same_only"] += same and not other
        place = NoisyPlace("GET /", "$.x", compared=2000, baseline_compared=400, **counts)
        too_low += place.bound_hidden_pairs(0.05) < regression * 2000

    assert too_low <= 6  # 60 runs of which 5% are 3, and 1.7 standard deviations


def test_bound_of_hidden_pairs_falls_with_second_copies() -> None:
    few, many = (
        NoisyPlace("GET /", "$.x", 10_000, 1000, copies, copies // 10, copies // 11, copies // 11).bound_hidden_pairs(
            0.05
        )
        for copies in (1000, 10_000)
    )

    assert 0 < many < few / 2 < 500
