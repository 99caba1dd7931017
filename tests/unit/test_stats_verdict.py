"""The verdict from plain counts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from math import log, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.latency import SignCounts, TimeCounts
from abreast_sidecar.stats.verdict import (
    Budget,
    Completeness,
    EndpointCounts,
    Reason,
    Verdict,
    count_surplus,
    decide_verdict,
)
from support_verdict import spread

ALL = Completeness(1000, 1000)
BUDGET = Budget()
TIGHT = Budget(max_mismatch=0.0001)


def pairs(n: int, endpoint: str = "GET /", **fields: Any) -> EndpointCounts:
    """Pairs in which nothing is wrong, but for what is given."""
    clean = EndpointCounts(
        endpoint=endpoint,
        old_requests=n,
        new_requests=n,
        compared=n,
        mismatches=0,
        undecided=0,
        new_errors=0,
        old_errors=0,
        times=spread(n, n // 4),
    )
    return replace(clean, **fields)


def reason(verdict: Verdict, subject: str, endpoint: str = "") -> Reason:
    return next(item for item in verdict.reasons if item.subject == subject and item.endpoint == endpoint)


def get_verdict(*endpoints: EndpointCounts, budget: Budget = BUDGET, ledger: Completeness = ALL) -> Verdict:
    return decide_verdict(endpoints, ledger, budget)


class TestPass:
    def test_verdict_of_equal_versions_is_pass_with_enough_pairs(self) -> None:
        verdict = get_verdict(pairs(10_000, "a"), pairs(10_000, "b"))

        assert (verdict.state, verdict.pairs_to_pass) == ("PASS", 0)

    def test_verdict_is_pass_despite_a_rare_endpoint(self) -> None:
        verdict = get_verdict(pairs(20_000, "a"), pairs(5, "b"))

        assert verdict.state == "PASS"
        assert {endpoint.endpoint: endpoint.state for endpoint in verdict.endpoints} == {
            "a": "PASS",
            "b": "INCONCLUSIVE",
        }

    @pytest.mark.parametrize("n", [0, 1, 10, 100, 1000])
    def test_verdict_of_few_pairs_is_never_pass(self, n: int) -> None:
        verdict = get_verdict(pairs(n))

        assert verdict.state == "INCONCLUSIVE"

    def test_verdict_is_inconclusive_with_an_uncompared_endpoint(self) -> None:
        verdict = get_verdict(pairs(20_000, "a"), pairs(500, "b", compared=0, times=TimeCounts()))

        assert (verdict.state, verdict.pairs_to_pass) == ("INCONCLUSIVE", None)
        assert reason(verdict, "coverage", "b").text.startswith("none of 500 requests could be compared")

    def test_verdict_ignores_matches_of_truncated_pairs(self) -> None:
        """An endpoint of answers that are never whole is not covered, and its pairs make no rate pass."""
        quiet = get_verdict(pairs(20_000, "a"), pairs(500, "b", partial=500, times=TimeCounts()))
        alone = get_verdict(pairs(20_000, partial=19_000))

        assert (quiet.state, quiet.pairs_to_pass) == ("INCONCLUSIVE", None)
        assert "could be compared in full, 500 in part" in reason(quiet, "coverage", "b").text
        assert reason(quiet, "mismatches").state == "PASS"
        assert reason(alone, "mismatches").state == "INCONCLUSIVE"
        assert reason(alone, "mismatches").text.endswith(
            "19,000 compared in part; about 2,500 more pairs to pass at this rate"
        )

    def test_verdict_passes_and_names_a_waived_endpoint(self) -> None:
        waived = "waived by rule 7 of shop until 2099-01-01: streams never end"
        verdict = get_verdict(pairs(20_000, "a"), pairs(500, "b", partial=500, times=TimeCounts(), waived=waived))
        waived_verdict = get_verdict(
            pairs(20_000, "a"), pairs(5, "b", new_requests=0, compared=0, times=TimeCounts(), waived=waived)
        )

        assert (verdict.state, verdict.pairs_to_pass, reason(verdict, "coverage", "b").state) == ("PASS", 0, "PASS")
        assert reason(verdict, "coverage", "b").text.endswith(f"500 in part; for the causes: abreast pairs; {waived}")
        assert {endpoint.endpoint: endpoint.state for endpoint in verdict.endpoints} == {
            "a": "PASS",
            "b": "INCONCLUSIVE",
        }
        assert reason(waived_verdict, "coverage", "b").text == f"old answered 5 requests, new none; {waived}"
        assert not [
            item for item in get_verdict(pairs(20_000, "a", waived=waived)).reasons if item.subject == "coverage"
        ]

    @pytest.mark.parametrize(("waiting", "state"), [(199, "PASS"), (201, "INCONCLUSIVE")])
    def test_verdict_counts_pending_requests_against_pass(self, waiting: int, state: str) -> None:
        verdict = get_verdict(pairs(20_000), ledger=Completeness(20_000, 20_000, waiting))

        assert verdict.state == state
        assert ("still wait" in reason(verdict, "completeness").text) == (state != "PASS")

    def test_verdict_reports_pairs_explained_by_rules(self) -> None:
        verdict = get_verdict(pairs(20_000, by_rules=20_000))

        assert verdict.state == "PASS"
        assert "20,000 explained by rules" in reason(verdict, "mismatches").text

    def test_verdict_of_unsteady_equal_times_is_pass(self) -> None:
        """New is slower by a tenth in nearly half of the pairs where chance alone makes most of a time."""
        assert get_verdict(pairs(20_000, times=spread(17_354, 8421))).state == "PASS"

    def test_verdict_without_endpoints_is_never_pass(self) -> None:
        assert get_verdict(ledger=Completeness(0, 0)).state == "INCONCLUSIVE"

    def test_verdict_counts_undecided_pairs_against_pass_only(self) -> None:
        verdict = get_verdict(pairs(20_000, undecided=20_000))

        assert verdict.state == "INCONCLUSIVE"
        assert "20,000 more are undecided" in reason(verdict, "mismatches").text


class TestFail:
    def test_verdict_fails_one_in_2_000_after_20_000_requests(self) -> None:
        verdict = get_verdict(pairs(20_000, mismatches=10), budget=TIGHT)

        assert verdict.state == "FAIL"
        assert verdict.reasons[0].subject == "mismatches"
        assert "10 of 20,000 pairs" in verdict.reasons[0].text

    def test_verdict_fails_despite_waivers_and_truncated_pairs(self) -> None:
        """Beginnings that are equal are pairs of which some differ, not none: a few that do are no rate of one."""
        truncated = pairs(500, "b", partial=500, mismatches=50, times=TimeCounts(), waived="waived")
        few = pairs(20_000, "b", partial=20_000, mismatches=5, times=TimeCounts(), waived="waived")

        assert get_verdict(pairs(20_000, "a"), truncated).state == "FAIL"
        assert get_verdict(pairs(20_000, "a"), few).state == "PASS"

    @pytest.mark.parametrize("n", [20_000, 40_000, 100_000])
    def test_verdict_fails_for_one_of_20_endpoints(self, n: int) -> None:
        quiet = [pairs(n // 20, str(number)) for number in range(19)]
        verdict = get_verdict(pairs(n // 20, "broken", mismatches=n // 2000), *quiet, budget=TIGHT)

        assert verdict.state == "FAIL"
        assert verdict.endpoints[0].endpoint == "broken"
        assert all(endpoint.state != "FAIL" for endpoint in verdict.endpoints[1:])

    @pytest.mark.parametrize(("budget", "state"), [(0.01, "PASS"), (0.001, "INCONCLUSIVE"), (0.0001, "FAIL")])
    def test_verdict_depends_on_the_budget(self, budget: float, state: str) -> None:
        verdict = get_verdict(pairs(20_000, mismatches=10), budget=Budget(max_mismatch=budget))

        assert verdict.state == state

    def test_verdict_fails_for_a_broken_endpoint_within_the_service_budget(self) -> None:
        verdict = get_verdict(pairs(100_000, "big"), pairs(6, "small", mismatches=6))

        assert verdict.state == "FAIL"
        assert reason(verdict, "mismatches").state == "PASS"
        assert reason(verdict, "mismatches", "small").state == "FAIL"

    def test_verdict_needs_more_evidence_among_more_endpoints(self) -> None:
        slower_endpoint = pairs(1000, "odd", mismatches=7)
        others = [pairs(1000, str(number)) for number in range(99)]

        assert get_verdict(slower_endpoint, pairs(99_000)).state == "FAIL"
        assert get_verdict(slower_endpoint, *others).state == "PASS"

    def test_verdict_fails_for_errors_of_new_alone(self) -> None:
        verdict = get_verdict(pairs(20_000, new_errors=100, new_error_periods=12))

        assert verdict.state == "FAIL"
        assert verdict.reasons[0].subject == "errors"

    def test_verdict_tolerates_errors_of_both_versions(self) -> None:
        verdict = get_verdict(pairs(20_000, new_errors=100, old_errors=95, new_error_periods=20, old_error_periods=19))

        assert verdict.state == "INCONCLUSIVE"
        assert "95 the other way" in reason(verdict, "errors").text

    def test_verdict_tolerates_a_short_outage_of_new(self) -> None:
        """The outage affects two endpoints at the same time."""
        outage = [pairs(10_000, name, new_errors=300, new_error_periods=4) for name in "ab"]

        assert get_verdict(*outage).state == "INCONCLUSIVE"
        assert get_verdict(*(replace(counts, new_error_periods=15) for counts in outage)).state == "FAIL"

    def test_verdict_fails_soon_if_new_fails_in_a_large_share_of_pairs(self) -> None:
        broken: dict[str, Any] = {"new_errors": 40, "new_error_periods": 1}

        assert get_verdict(pairs(40, **broken), pairs(40, "b")).state == "FAIL"
        assert get_verdict(pairs(40, **broken), *(pairs(100, name) for name in "bcd")).state == "INCONCLUSIVE"
        assert get_verdict(pairs(19, new_errors=19, new_error_periods=1)).state == "INCONCLUSIVE"
        assert get_verdict(pairs(80, **broken, old_errors=30, old_error_periods=1)).state == "INCONCLUSIVE"

    def test_verdict_states_the_periods_of_errors_that_are_missing(self) -> None:
        text = reason(get_verdict(pairs(10_000, new_errors=300, new_error_periods=4)), "errors").text

        assert "new failed alone in 4 periods of ten seconds, old in 0: more such periods of new to fail" in text

    def test_verdict_rarely_fails_for_outages_of_both_versions(self) -> None:
        assert sum(ever_fails_by_outages(random.Random(seed)) for seed in range(20)) <= 2

    def test_verdict_fails_for_slower_responses(self) -> None:
        verdict = get_verdict(pairs(1000, times=spread(1000, 700)))

        assert verdict.state == "FAIL"
        assert "more than 10% slower in new" in verdict.reasons[0].text

    def test_verdict_stays_fail_with_an_incomplete_ledger(self) -> None:
        verdict = get_verdict(pairs(20_000, mismatches=10), budget=TIGHT, ledger=Completeness(40_000, 20_000))

        assert verdict.state == "FAIL"
        assert [item.state for item in verdict.reasons[:3]] == ["FAIL", "FAIL", "INCONCLUSIVE"]


class TestInconclusive:
    def test_verdict_estimates_pairs_to_pass(self) -> None:
        verdict = get_verdict(pairs(1000))

        assert verdict.pairs_to_pass is not None
        assert f"about {verdict.pairs_to_pass:,} more pairs to pass" in reason(verdict, "mismatches").text
        assert get_verdict(pairs(1000 + verdict.pairs_to_pass)).state == "PASS"
        assert get_verdict(pairs(990 + verdict.pairs_to_pass)).state == "INCONCLUSIVE"

    def test_verdict_estimates_pairs_to_fail(self) -> None:
        verdict = get_verdict(pairs(1000, mismatches=2), budget=BUDGET)
        estimate = reason(verdict, "mismatches").pairs_needed.to_fail

        assert verdict.pairs_to_pass is None
        assert estimate is not None
        factor = (1000 + estimate) / 1000
        assert get_verdict(pairs(1000 + estimate, mismatches=round(2 * factor))).state == "FAIL"

    def test_verdict_is_inconclusive_for_an_unanswered_endpoint(self) -> None:
        verdict = get_verdict(pairs(20_000, "a"), pairs(0, "gone", old_requests=50))

        assert verdict.state == "INCONCLUSIVE"
        assert "old answered 50 requests, new none" in verdict.reasons[0].text
        assert verdict.pairs_to_pass is None

    @pytest.mark.parametrize("ledger", [Completeness(20_000, 19_000), Completeness(0, 0)])
    def test_verdict_is_inconclusive_for_an_incomplete_ledger(self, ledger: Completeness) -> None:
        verdict = get_verdict(pairs(20_000), ledger=ledger)

        assert verdict.state == "INCONCLUSIVE"
        assert verdict.reasons[0].subject == "completeness"

    @pytest.mark.parametrize(("surplus", "state"), [(0, "PASS"), (200, "PASS"), (201, "INCONCLUSIVE")])
    def test_verdict_is_inconclusive_for_a_surplus(self, surplus: int, state: str) -> None:
        ledger = Completeness(20_000, 20_000 + surplus, surplus=surplus)
        verdict = get_verdict(pairs(20_000), ledger=ledger, budget=Budget(min_completeness=0.99))

        assert verdict.state == state
        assert ("201 requests more than the 20,000" in reason(verdict, "completeness").text) == (surplus == 201)

    @pytest.mark.parametrize(("row_count", "surplus"), [(90, 0), (100, 0), (110, 0), (111, 11)])
    def test_surplus_is_counted_beyond_the_tolerance(self, row_count: int, surplus: int) -> None:
        assert count_surplus(100, row_count, tolerance=10) == surplus

    def test_verdict_never_rounds_completeness_to_100_percent(self) -> None:
        verdict = get_verdict(pairs(20_000), ledger=Completeness(1_000_000, 999_999))

        assert "99.9999%" in reason(verdict, "completeness").text


RUNS = 25
LOOKS = 12


def ever_fails(dice: random.Random, rate: float) -> bool:
    """Two endpoints, whose mismatches and errors are exactly at the budget and whose medians are equal."""
    limits = Budget(max_mismatch=rate, max_error=rate, max_slower=0.0)
    totals = [[0, 0, 0, 0] for _ in range(2)]
    for _ in range(LOOKS):
        for total in totals:
            total[0] += 50
            for place, chance in ((1, rate), (2, rate), (3, 0.5)):
                total[place] += sum(dice.random() < chance for _ in range(50))
        counts = [
            pairs(
                total[0],
                str(name),
                mismatches=total[1],
                new_errors=total[2],
                new_error_periods=total[2],
                times=spread(total[0], total[3]),
            )
            for name, total in enumerate(totals)
        ]
        if decide_verdict(counts, ALL, limits).state == "FAIL":
            return True
    return False


def test_verdict_fails_wrongly_at_most_with_alpha() -> None:
    dice = random.Random(11)
    wrong = sum(ever_fails(dice, 0.02) for _ in range(RUNS))

    assert wrong <= RUNS * 0.05 + 3.1 * sqrt(RUNS * 0.05 * 0.95)


def ever_fails_by_outages(dice: random.Random) -> bool:
    """Each version has an outage of 30 pairs now and then, in a separate period."""
    totals: dict[str, Any] = Counter()
    for number in range(200):
        version = dice.choice(("new", "old"))
        totals[f"{version}_errors"] += 30
        totals[f"{version}_error_periods"] += 1
        if decide_verdict([pairs(500 * (number + 1), **totals)], ALL, BUDGET).state == "FAIL":
            return True
    return False


def ever_passes(dice: random.Random, rate: float) -> bool:
    """Mismatches slightly over the budget, and nothing else wrong."""
    hits = n = 0
    while n < 3000:
        n += 150
        hits += sum(dice.random() < rate * 1.01 for _ in range(150))
        if decide_verdict([pairs(n, mismatches=hits)], ALL, Budget(max_mismatch=rate, max_error=0.5)).state == "PASS":
            return True
    return False


def test_verdict_passes_wrongly_at_most_with_alpha() -> None:
    dice = random.Random(12)
    wrong = sum(ever_passes(dice, 0.02) for _ in range(RUNS))

    assert wrong <= RUNS * 0.05 + 3.1 * sqrt(RUNS * 0.05 * 0.95)


@st.composite
def endpoints(draw: st.DrawFn) -> EndpointCounts:
    n = draw(st.integers(0, 50_000))
    part = st.integers(0, n)
    mismatches = draw(part)
    return pairs(
        n,
        draw(st.sampled_from("abc")),
        new_requests=draw(part),
        mismatches=mismatches,
        undecided=draw(st.integers(0, n - mismatches)),
        new_errors=draw(part),
        times=TimeCounts(n, draw(part), SignCounts(draw(st.integers(0, 40)), draw(st.integers(0, 40)))),
    )


@given(
    st.lists(endpoints(), max_size=4),
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    st.sampled_from([0.0, 0.0001, 0.01, 1.0]),
)
def test_verdict_of_any_counts_has_reasons(counts: list[EndpointCounts], ledger: tuple[int, int], limit: float) -> None:
    verdict = decide_verdict(counts, Completeness(*ledger), Budget(max_mismatch=limit, max_error=limit))
    order = [("FAIL", "INCONCLUSIVE", "PASS").index(item.state) for item in verdict.reasons]

    assert order == sorted(order)
    assert verdict.state == verdict.reasons[0].state
    assert (verdict.pairs_to_pass == 0) <= (verdict.state == "PASS")


@given(st.integers(0, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_verdict_never_worsens_with_a_larger_budget(case: tuple[int, int]) -> None:
    hits, n = case
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    states = [
        get_verdict(pairs(n, mismatches=hits), budget=Budget(max_mismatch=limit)).state
        for limit in (0.0001, 0.001, 0.01, 0.1)
    ]
    order_of_states = [order.index(state) for state in states]

    assert order_of_states == sorted(order_of_states)


@pytest.mark.parametrize(
    "given_values",
    [{"max_mismatch": -0.1}, {"max_error": 1.1}, {"confidence": 1.0}, {"confidence": 0.0}, {"max_slower": -1.0}],
)
def test_budget_rejects_invalid_values(given_values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(given_values))):
        Budget(**given_values)


def test_verdict_passes_almost_as_early_as_a_single_look() -> None:
    pairs_needed = get_verdict(pairs(1, times=spread(1, 0))).pairs_to_pass

    assert pairs_needed is not None
    assert pairs_needed < 1.2 * log(20) / 0.001


@pytest.mark.parametrize("rate", [5e-324, 1e-308, 1e-9, 1.0])
def test_budget_at_its_limits_gives_a_verdict(rate: float) -> None:
    assert decide_verdict([pairs(1000, mismatches=1)], ALL, Budget(max_mismatch=rate, max_error=rate)).state in {
        "FAIL",
        "INCONCLUSIVE",
        "PASS",
    }


def test_reasons_have_their_numbers() -> None:
    reasons = {reason.subject: reason for reason in decide_verdict([pairs(1000, mismatches=20)], ALL, Budget()).reasons}
    mismatches, completeness = reasons["mismatches"].measure, reasons["completeness"].measure

    assert mismatches is not None
    assert mismatches.bounds is not None
    assert (mismatches.count, mismatches.total, mismatches.limit) == (20, 1000, 0.001)
    assert mismatches.bounds.low < 0.02 < mismatches.bounds.high
    assert completeness is not None
    assert (completeness.count, completeness.total, completeness.limit) == (ALL.accounted, ALL.sampled, 0.99)
