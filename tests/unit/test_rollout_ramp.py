"""Decisions of a ramp."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from math import nextafter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.rollout.completeness import (
    ENVOY_GONE_AFTER_S,
    MAX_REPORT_AGE_S,
    CompletenessGap,
    EnvoyReport,
    count_lost_requests,
    describe_envoy_trouble,
)
from abreast_sidecar.rollout.ramp import Observation, Ramp, RampEvidence, RampPlan, decide_ramp
from abreast_sidecar.stats.verdict import Budget, Completeness, EndpointCounts, decide_verdict
from support_verdict import spread

NOON = dt.datetime(2026, 3, 4, 12, tzinfo=dt.UTC)
LATER = NOON + dt.timedelta(hours=1)
BETWEEN = (dt.datetime(2026, 3, 4, 12), dt.datetime(2026, 3, 4, 14))  # noqa: DTZ001  # hypothesis adds the zone
PLAN = RampPlan((100, 500, 10_000), hold=600.0, min_pairs=100)


def ramp(**changes: Any) -> Ramp:
    current: dict[str, Any] = {
        "id": 1,
        "service": "shop",
        "state": "progressing",
        "plan": PLAN,
        "step": 0,
        "actor": "ada",
        "reason": "",
        "started_at": NOON,
        "step_at": NOON,
        "ended_at": None,
        "version": 2,
        "started_gap": 0,
        "step_gap": 0,
        "verdict": "",
        "message": "",
        "checked_at": None,
    }
    return Ramp(**{**current, **changes})


def evidence(compared: int, *, mismatches: int = 0, errors: int = 0, lost: int = 0, slower: int = 0) -> RampEvidence:
    """Make evidence with each error in a different period."""
    counts = EndpointCounts("GET /", compared, compared, compared, mismatches, 0, errors, 0, spread(compared, slower))
    counts = replace(counts, new_error_periods=errors)
    return RampEvidence((counts,), Completeness(compared + lost, compared))


def observe(total: RampEvidence, step: RampEvidence | None = None, **changes: Any) -> Observation:
    current: dict[str, Any] = {"observed_at": LATER, "stale_counts_reason": "", "newest_pair_age_s": 1.0}
    return Observation(since_start=total, since_step=step or total, **{**current, **changes})


GOOD = evidence(10_000)


@st.composite
def any_evidence(draw: Any) -> RampEvidence:
    compared = draw(st.integers(0, 20_000))
    part = st.integers(0, compared)
    return evidence(
        compared,
        mismatches=draw(part),
        errors=draw(part),
        slower=draw(part),
        lost=draw(st.sampled_from([0, 0, 1, 500])),
    )


observations = st.builds(
    Observation,
    observed_at=st.datetimes(*BETWEEN, timezones=st.just(dt.UTC)),
    since_start=any_evidence(),
    since_step=any_evidence(),
    stale_counts_reason=st.sampled_from(["", "", "no count"]),
    newest_pair_age_s=st.none() | st.floats(0, 100),
)


@given(observations, st.sampled_from(["progressing", "paused"]), st.integers(0, 2))
def test_ramp_steps_only_on_pass_with_complete_evidence(observation: Observation, state: Any, step: int) -> None:
    current = ramp(state=state, step=step)
    decision = decide_ramp(current, observation)

    assert decision.reason
    if decision.action in {"step", "succeed"}:
        assert state == "progressing"
        assert (
            decide_verdict(observation.since_start.endpoints, observation.since_start.completeness, PLAN.budget).state
            == "PASS"
        )
        assert not observation.stale_counts_reason
        assert observation.newest_pair_age_s is not None
        assert observation.newest_pair_age_s <= 30
        assert (observation.observed_at - current.step_at).total_seconds() >= PLAN.hold
        assert observation.since_step.compared >= PLAN.min_pairs
        assert observation.since_step.completeness.sampled is not None
        assert observation.since_step.completeness.accounted >= 0.99 * observation.since_step.completeness.sampled
        assert (decision.action == "succeed") == (step == 2)


@given(observations, st.integers(0, 2))
def test_ramp_rolls_back_despite_pause_and_missing_evidence(observation: Observation, step: int) -> None:
    """Missing evidence and pauses prevent a step, not a rollback."""
    decision = decide_ramp(ramp(step=step), observation)
    blinded = replace(observation, stale_counts_reason="no count", newest_pair_age_s=None)

    if decision.action == "roll back":
        assert decide_ramp(ramp(step=step, state="paused"), blinded).action == "roll back"


@given(observations)
def test_ramp_never_rolls_back_without_a_fail(observation: Observation) -> None:
    states = {
        decide_verdict(evidence.endpoints, evidence.completeness, PLAN.budget).state
        for evidence in (observation.since_start, observation.since_step)
    }

    if "FAIL" not in states:
        assert decide_ramp(ramp(), observation).action != "roll back"


@pytest.mark.parametrize(
    ("current", "observation", "expected"),
    [
        (ramp(state="paused"), observe(GOOD), "paused"),
        (ramp(), observe(GOOD, stale_counts_reason="no Envoy tells"), "no Envoy tells"),
        (ramp(), observe(GOOD, newest_pair_age_s=None), "no pair was compared within the last 30 s"),
        (ramp(), observe(GOOD, newest_pair_age_s=-3600.0), "Postgres's clock is 60 min behind that of the pairs"),
        (ramp(), observe(GOOD, newest_pair_age_s=31.0), "no pair was compared within the last 30 s"),
        (ramp(), observe(GOOD, evidence(980, lost=20)), "the ledger has 980 of 1,000 requests sampled in this step"),
        (ramp(step_at=LATER), observe(GOOD), "holds 1% for another 10 min"),
        (ramp(), observe(GOOD, evidence(99)), "99 of 100 pairs were compared in this step"),
        (ramp(), observe(evidence(500)), "the verdict is INCONCLUSIVE: 0 of 500 pairs"),
        (
            ramp(),
            observe(evidence(10_000, lost=500), GOOD),
            "the verdict is INCONCLUSIVE: the ledger has 10,000 of 10,500",
        ),
    ],
)
def test_ramp_states_the_reason_for_waiting(current: Ramp, observation: Observation, expected: str) -> None:
    decision = decide_ramp(current, observation)

    assert decision.action == "wait"
    assert expected in decision.reason


def test_ramp_rolls_back_for_the_step_alone() -> None:
    decision = decide_ramp(ramp(step=1), observe(evidence(50_000, errors=40), evidence(200, errors=40)))

    assert decision.action == "roll back"
    assert "the verdict since 5% is FAIL: 40 of 200 pairs" in decision.reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": ()}, "1 to 100 shares"),
        ({"steps": (100, 100)}, "must rise, above 0% and up to 100%, got 1%, 1%"),
        ({"steps": (100, 10_001)}, "must rise"),
        ({"steps": (100,), "hold": float("nan")}, "hold must be"),
    ],
)
def test_ramp_plan_rejects_invalid_values(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        RampPlan(**changes)


@given(
    st.builds(
        Budget,
        max_mismatch=st.just(0.0) | st.floats(1e-9, 1),
        max_error=st.just(0.0) | st.floats(1e-9, 1),
        max_slower=st.floats(0, 100),
        min_completeness=st.floats(0, 1),
        confidence=st.sampled_from((5e-324, 1e-9, 0.95, 1 - 1e-9, nextafter(1, 0))),
    ),
    st.integers(1, 100),
)
def test_ramp_accepts_every_budget_of_a_verdict(budget: Budget, steps: int) -> None:
    whole = evidence(1000, mismatches=3, errors=2, slower=400)
    plan = RampPlan(tuple(range(1, steps + 1)), hold=0.0, min_pairs=1, budget=budget)

    assert decide_verdict(whole.endpoints, whole.completeness, budget).state
    assert decide_ramp(ramp(plan=plan), observe(whole)).action


def test_ramp_uses_the_budget_of_its_plan() -> None:
    strict = ramp(plan=replace(PLAN, budget=Budget(max_mismatch=0.00001)))

    assert decide_ramp(strict, observe(GOOD)).action == "wait"
    assert decide_ramp(ramp(), observe(GOOD)).action == "step"


@pytest.mark.parametrize(
    ("reports", "addresses", "expected"),
    [
        ([], [], "no Envoy's count is known"),
        ([EnvoyReport("a@1:1", 1)], [], ""),
        (
            [EnvoyReport("a@1:1", 1), EnvoyReport("b@1:2", MAX_REPORT_AGE_S + 1)],
            [],
            "the count of the Envoy b@1:2 is 16 s old",
        ),
        ([EnvoyReport("a@1:1", 1), EnvoyReport("b@1:2", ENVOY_GONE_AFTER_S + 1)], [], ""),
        (
            [EnvoyReport("a@1:1", 1), EnvoyReport("b@1:2", ENVOY_GONE_AFTER_S + 1)],
            ["http://1:2/"],
            "the count of the Envoy b@1:2",
        ),
        ([EnvoyReport("a@1:1", 1, is_overridden=True)], [], "interface of the Envoy a@1:1 overrides"),
        ([EnvoyReport("a@1:1", 1), EnvoyReport("b@1:2", ENVOY_GONE_AFTER_S + 1, is_overridden=True)], [], ""),
        ([EnvoyReport("a@1:1", ENVOY_GONE_AFTER_S + 1)], [], "no Envoy reports its count any more"),
    ],
)
def test_stale_counts_name_the_envoy(reports: list[EnvoyReport], addresses: list[str], expected: str) -> None:
    observation = describe_envoy_trouble(reports, addresses)

    assert expected in observation
    assert bool(observation) == bool(expected)


def test_lost_requests_exclude_those_missing_before() -> None:
    assert count_lost_requests(10, CompletenessGap(100, 80)) == 10
    assert count_lost_requests(30, CompletenessGap(100, 80)) == 0
    assert count_lost_requests(None, CompletenessGap(100, 80)) is None
    assert count_lost_requests(10, CompletenessGap(None, 80)) is None
