"""The verdict from plain counts."""

from __future__ import annotations

import random
from dataclasses import replace
from math import log, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.verdict import Budget, Completeness, EndpointCounts, Reason, Verdict, decide_verdict

ALL = Completeness(1000, 1000)
BUDGET = Budget()
TIGHT = Budget(max_mismatch=0.0001)


def pairs(n: int, endpoint: str = "GET /", **given: Any) -> EndpointCounts:
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
        timed=n,
        slower=n // 4,
    )
    return replace(clean, **given)


def reason(verdict: Verdict, subject: str, endpoint: str = "") -> Reason:
    return next(one for one in verdict.reasons if one.subject == subject and one.endpoint == endpoint)


def judged(*endpoints: EndpointCounts, budget: Budget = BUDGET, ledger: Completeness = ALL) -> Verdict:
    return decide_verdict(endpoints, ledger, budget)


class TestPass:
    def test_verdict_of_equal_versions_is_pass_with_enough_pairs(self) -> None:
        verdict = judged(pairs(10_000, "a"), pairs(10_000, "b"))

        assert (verdict.state, verdict.exit_code, verdict.pairs_to_pass) == ("PASS", 0, 0)

    def test_verdict_is_pass_despite_a_rare_endpoint(self) -> None:
        verdict = judged(pairs(20_000, "a"), pairs(5, "b"))

        assert verdict.state == "PASS"
        assert {one.endpoint: one.state for one in verdict.endpoints} == {"a": "PASS", "b": "INCONCLUSIVE"}

    @pytest.mark.parametrize("n", [0, 1, 10, 100, 1000])
    def test_verdict_of_few_pairs_is_never_pass(self, n: int) -> None:
        verdict = judged(pairs(n))

        assert (verdict.state, verdict.exit_code) == ("INCONCLUSIVE", 2)

    def test_verdict_is_inconclusive_with_an_uncompared_endpoint(self) -> None:
        verdict = judged(pairs(20_000, "a"), pairs(500, "b", compared=0, timed=0, slower=0))

        assert (verdict.state, verdict.pairs_to_pass) == ("INCONCLUSIVE", None)
        assert reason(verdict, "coverage", "b").text.startswith("none of 500 requests could be compared")

    def test_verdict_ignores_matches_of_truncated_pairs(self) -> None:
        """An endpoint of answers that are never whole is not covered, and its pairs make no rate pass."""
        quiet = judged(pairs(20_000, "a"), pairs(500, "b", partial=500, timed=0, slower=0))
        alone = judged(pairs(20_000, partial=19_000))

        assert (quiet.state, quiet.pairs_to_pass) == ("INCONCLUSIVE", None)
        assert "could be compared in full, 500 in part" in reason(quiet, "coverage", "b").text
        assert reason(quiet, "mismatches").state == "PASS"
        assert reason(alone, "mismatches").state == "INCONCLUSIVE"
        assert reason(alone, "mismatches").text.endswith(
            "19,000 compared in part; about 2,500 more pairs to pass at this rate"
        )

    def test_verdict_passes_and_names_a_waived_endpoint(self) -> None:
        waived = "waived by rule 7 of shop until 2099-01-01: streams never end"
        verdict = judged(pairs(20_000, "a"), pairs(500, "b", partial=500, timed=0, slower=0, waived=waived))
        gone = judged(pairs(20_000, "a"), pairs(5, "b", new_requests=0, compared=0, timed=0, waived=waived))

        assert (verdict.state, verdict.pairs_to_pass, reason(verdict, "coverage", "b").state) == ("PASS", 0, "PASS")
        assert reason(verdict, "coverage", "b").text.endswith(f"500 in part; for the causes: abreast pairs; {waived}")
        assert {one.endpoint: one.state for one in verdict.endpoints} == {"a": "PASS", "b": "INCONCLUSIVE"}
        assert reason(gone, "coverage", "b").text == f"old answered 5 requests, new none; {waived}"
        assert not [one for one in judged(pairs(20_000, "a", waived=waived)).reasons if one.subject == "coverage"]

    @pytest.mark.parametrize(("waiting", "state"), [(199, "PASS"), (201, "INCONCLUSIVE")])
    def test_verdict_counts_pending_requests_against_pass(self, waiting: int, state: str) -> None:
        verdict = judged(pairs(20_000), ledger=Completeness(20_000, 20_000, waiting))

        assert verdict.state == state
        assert ("still wait" in reason(verdict, "completeness").text) == (state != "PASS")

    def test_verdict_reports_pairs_explained_by_rules(self) -> None:
        verdict = judged(pairs(20_000, by_rules=20_000))

        assert verdict.state == "PASS"
        assert "20,000 explained by rules" in reason(verdict, "mismatches").text

    def test_verdict_of_unsteady_equal_times_is_pass(self) -> None:
        """New is slower by a tenth in nearly half of the pairs where chance alone makes most of a time."""
        assert judged(pairs(20_000, timed=17_354, slower=8421)).state == "PASS"

    def test_verdict_without_endpoints_is_never_pass(self) -> None:
        assert judged(ledger=Completeness(0, 0)).state == "INCONCLUSIVE"

    def test_verdict_counts_undecided_pairs_against_pass_only(self) -> None:
        verdict = judged(pairs(20_000, undecided=20_000))

        assert verdict.state == "INCONCLUSIVE"
        assert "20,000 more are undecided" in reason(verdict, "mismatches").text


class TestFail:
    def test_verdict_fails_one_in_2_000_after_20_000_requests(self) -> None:
        verdict = judged(pairs(20_000, mismatches=10), budget=TIGHT)

        assert (verdict.state, verdict.exit_code) == ("FAIL", 1)
        assert verdict.reasons[0].subject == "mismatches"
        assert "10 of 20,000 pairs" in verdict.reasons[0].text

    def test_verdict_fails_despite_waivers_and_truncated_pairs(self) -> None:
        """Beginnings that are equal are pairs of which some differ, not none: a few that do are no rate of one."""
        many = pairs(500, "b", partial=500, mismatches=50, timed=0, slower=0, waived="waived")
        few = pairs(20_000, "b", partial=20_000, mismatches=5, timed=0, slower=0, waived="waived")

        assert judged(pairs(20_000, "a"), many).state == "FAIL"
        assert judged(pairs(20_000, "a"), few).state == "PASS"

    @pytest.mark.parametrize("n", [20_000, 40_000, 100_000])
    def test_verdict_fails_for_one_of_20_endpoints(self, n: int) -> None:
        quiet = [pairs(n // 20, str(number)) for number in range(19)]
        verdict = judged(pairs(n // 20, "broken", mismatches=n // 2000), *quiet, budget=TIGHT)

        assert verdict.state == "FAIL"
        assert verdict.endpoints[0].endpoint == "broken"
        assert all(one.state != "FAIL" for one in verdict.endpoints[1:])

    @pytest.mark.parametrize(("budget", "state"), [(0.01, "PASS"), (0.001, "INCONCLUSIVE"), (0.0001, "FAIL")])
    def test_verdict_depends_on_the_budget(self, budget: float, state: str) -> None:
        verdict = judged(pairs(20_000, mismatches=10), budget=Budget(max_mismatch=budget))

        assert verdict.state == state

    def test_verdict_fails_for_a_broken_endpoint_within_the_service_budget(self) -> None:
        verdict = judged(pairs(100_000, "big"), pairs(6, "small", mismatches=6))

        assert verdict.state == "FAIL"
        assert reason(verdict, "mismatches").state == "PASS"
        assert reason(verdict, "mismatches", "small").state == "FAIL"

    def test_verdict_needs_more_evidence_among_more_endpoints(self) -> None:
        odd = pairs(1000, "odd", mismatches=7)
        many = [pairs(1000, str(number)) for number in range(99)]

        assert judged(odd, pairs(99_000)).state == "FAIL"
        assert judged(odd, *many).state == "PASS"

    def test_verdict_fails_for_errors_of_new_alone(self) -> None:
        verdict = judged(pairs(20_000, new_errors=100))

        assert verdict.state == "FAIL"
        assert verdict.reasons[0].subject == "errors"

    def test_verdict_tolerates_errors_of_both_versions(self) -> None:
        verdict = judged(pairs(20_000, new_errors=100, old_errors=95))

        assert verdict.state == "INCONCLUSIVE"
        assert "95 the other way" in reason(verdict, "errors").text

    def test_verdict_fails_for_slower_responses(self) -> None:
        verdict = judged(pairs(1000, slower=700))

        assert verdict.state == "FAIL"
        assert "by more than 10%" in verdict.reasons[0].text

    def test_verdict_stays_fail_with_an_incomplete_ledger(self) -> None:
        verdict = judged(pairs(20_000, mismatches=10), budget=TIGHT, ledger=Completeness(40_000, 20_000))

        assert verdict.state == "FAIL"
        assert [one.state for one in verdict.reasons[:3]] == ["FAIL", "FAIL", "INCONCLUSIVE"]


class TestInconclusive:
    def test_verdict_estimates_pairs_to_pass(self) -> None:
        verdict = judged(pairs(1000))

        assert verdict.pairs_to_pass is not None
        assert f"about {verdict.pairs_to_pass:,} more pairs to pass" in reason(verdict, "mismatches").text
        assert judged(pairs(1000 + verdict.pairs_to_pass)).state == "PASS"
        assert judged(pairs(990 + verdict.pairs_to_pass)).state == "INCONCLUSIVE"

    def test_verdict_estimates_pairs_to_fail(self) -> None:
        verdict = judged(pairs(1000, mismatches=2), budget=BUDGET)
        more = reason(verdict, "mismatches").pairs_needed.to_fail

        assert verdict.pairs_to_pass is None
        assert more is not None
        factor = (1000 + more) / 1000
        assert judged(pairs(1000 + more, mismatches=round(2 * factor))).state == "FAIL"

    def test_verdict_is_inconclusive_for_an_unanswered_endpoint(self) -> None:
        verdict = judged(pairs(20_000, "a"), pairs(0, "gone", old_requests=50))

        assert verdict.state == "INCONCLUSIVE"
        assert "old answered 50 requests, new none" in verdict.reasons[0].text
        assert verdict.pairs_to_pass is None

    @pytest.mark.parametrize("ledger", [Completeness(20_000, 19_000), Completeness(0, 0)])
    def test_verdict_is_inconclusive_for_an_incomplete_ledger(self, ledger: Completeness) -> None:
        verdict = judged(pairs(20_000), ledger=ledger)

        assert verdict.state == "INCONCLUSIVE"
        assert verdict.reasons[0].subject == "completeness"

    def test_verdict_never_rounds_completeness_to_100_percent(self) -> None:
        verdict = judged(pairs(20_000), ledger=Completeness(1_000_000, 999_999))

        assert "99.9999%" in reason(verdict, "completeness").text


RUNS = 25
LOOKS = 12


def ever_fails(dice: random.Random, rate: float) -> bool:
    """Two endpoints, whose mismatches and errors are exactly at the budget and whose medians are equal."""
    limits = Budget(max_mismatch=rate, max_error=rate, max_slower=0.0)
    totals = [[0, 0, 0, 0] for _ in range(2)]
    for _ in range(LOOKS):
        for one in totals:
            one[0] += 50
            for place, chance in ((1, rate), (2, rate), (3, 0.5)):
                one[place] += sum(dice.random() < chance for _ in range(50))
        counts = [
            pairs(one[0], str(name), mismatches=one[1], new_errors=one[2], slower=one[3])
            for name, one in enumerate(totals)
        ]
        if decide_verdict(counts, ALL, limits).state == "FAIL":
            return True
    return False


def test_verdict_fails_wrongly_at_most_with_alpha() -> None:
    dice = random.Random(11)
    wrong = sum(ever_fails(dice, 0.02) for _ in range(RUNS))

    assert wrong <= RUNS * 0.05 + 3.1 * sqrt(RUNS * 0.05 * 0.95)


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
        slower=draw(part),
    )


@given(
    st.lists(endpoints(), max_size=4),
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    st.sampled_from([0.0, 0.0001, 0.01, 1.0]),
)
def test_verdict_of_any_counts_has_reasons(counts: list[EndpointCounts], ledger: tuple[int, int], limit: float) -> None:
    verdict = decide_verdict(counts, Completeness(*ledger), Budget(max_mismatch=limit, max_error=limit))
    order = [("FAIL", "INCONCLUSIVE", "PASS").index(one.state) for one in verdict.reasons]

    assert order == sorted(order)
    assert verdict.state == verdict.reasons[0].state
    assert (verdict.pairs_to_pass == 0) <= (verdict.state == "PASS")
    assert verdict.exit_code == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}[verdict.state]


@given(st.integers(0, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_verdict_never_worsens_with_a_larger_budget(case: tuple[int, int]) -> None:
    hits, n = case
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    states = [
        judged(pairs(n, mismatches=hits), budget=Budget(max_mismatch=limit)).state
        for limit in (0.0001, 0.001, 0.01, 0.1)
    ]
    found = [order.index(state) for state in states]

    assert found == sorted(found)


@pytest.mark.parametrize(
    "given_values",
    [{"max_mismatch": -0.1}, {"max_error": 1.1}, {"confidence": 1.0}, {"confidence": 0.0}, {"max_slower": -1.0}],
)
def test_budget_rejects_invalid_values(given_values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(given_values))):
        Budget(**given_values)


def test_verdict_passes_almost_as_early_as_a_single_look() -> None:
    more = judged(pairs(1, slower=0)).pairs_to_pass

    assert more is not None
    assert more < 1.2 * log(20) / 0.001
