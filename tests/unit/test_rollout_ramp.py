"""What a ramp does next, from what is known."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
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
    describe_stale_counts,
)
from abreast_sidecar.rollout.ramp import Observation, Ramp, RampEvidence, RampPlan, decide_ramp
from abreast_sidecar.stats.verdict import Budget, Completeness, EndpointCounts
from abreast_sidecar.stats.verdict import decide_verdict as verdict

NOON = dt.datetime(2026, 3, 4, 12, tzinfo=dt.UTC)
LATER = NOON + dt.timedelta(hours=1)
BETWEEN = (dt.datetime(2026, 3, 4, 12), dt.datetime(2026, 3, 4, 14))  # noqa: DTZ001  # hypothesis adds the zone
PLAN = RampPlan((100, 500, 10_000), hold=600.0, min_pairs=100)


def ramp(**changes: Any) -> Ramp:
    known: dict[str, Any] = {
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
    return Ramp(**{**known, **changes})


def seen(compared: int, *, mismatches: int = 0, errors: int = 0, lost: int = 0, slower: int = 0) -> RampEvidence:
    counts = EndpointCounts("GET /", compared, compared, compared, mismatches, 0, errors, 0, compared, slower)
    return RampEvidence((counts,), Completeness(compared + lost, compared))


def look(whole: RampEvidence, step: RampEvidence | None = None, **changes: Any) -> Observation:
    known: dict[str, Any] = {"observed_at": LATER, "stale_counts_reason": "", "newest_pair_age_s": 1.0}
    return Observation(since_start=whole, since_step=step or whole, **{**known, **changes})


GOOD = seen(10_000)


@st.composite
def anything(draw: Any) -> RampEvidence:
    compared = draw(st.integers(0, 20_000))
    part = st.integers(0, compared)
    return seen(
        compared,
        mismatches=draw(part),
        errors=draw(part),
        slower=draw(part),
        lost=draw(st.sampled_from([0, 0, 1, 500])),
    )


looks = st.builds(
    Observation,
    observed_at=st.datetimes(*BETWEEN, timezones=st.just(dt.UTC)),
    since_start=anything(),
    since_step=anything(),
    stale_counts_reason=st.sampled_from(["", "", "no count"]),
    newest_pair_age_s=st.none() | st.floats(0, 100),
)


@given(looks, st.sampled_from(["progressing", "paused"]), st.integers(0, 2))
def test_ramp_steps_only_on_pass_with_complete_evidence(found: Observation, state: Any, step: int) -> None:
    known = ramp(state=state, step=step)
    move = decide_ramp(known, found)

    assert move.reason
    if move.action in {"step", "succeed"}:
        assert state == "progressing"
        assert verdict(found.since_start.endpoints, found.since_start.completeness, PLAN.budget).state == "PASS"
        assert not found.stale_counts_reason
        assert found.newest_pair_age_s is not None
        assert found.newest_pair_age_s <= 30
        assert (found.observed_at - known.step_at).total_seconds() >= PLAN.hold
        assert found.since_step.compared >= PLAN.min_pairs
        assert found.since_step.completeness.sampled is not None
        assert found.since_step.completeness.accounted >= 0.99 * found.since_step.completeness.sampled
        assert (move.action == "succeed") == (step == 2)


@given(looks, st.integers(0, 2))
def test_ramp_rolls_back_despite_pause_and_missing_evidence(found: Observation, step: int) -> None:
    """Holes, silence and pauses stop the climb. What is surely bad is bad."""
    move = decide_ramp(ramp(step=step), found)
    blinded = replace(found, stale_counts_reason="no count", newest_pair_age_s=None)

    if move.action == "roll back":
        assert decide_ramp(ramp(step=step, state="paused"), blinded).action == "roll back"


@given(looks)
def test_ramp_never_rolls_back_without_a_fail(found: Observation) -> None:
    states = {
        verdict(one.endpoints, one.completeness, PLAN.budget).state for one in (found.since_start, found.since_step)
    }

    if "FAIL" not in states:
        assert decide_ramp(ramp(), found).action != "roll back"


@pytest.mark.parametrize(
    ("known", "found", "said"),
    [
        (ramp(state="paused"), look(GOOD), "paused"),
        (ramp(), look(GOOD, stale_counts_reason="no Envoy tells"), "no Envoy tells"),
        (ramp(), look(GOOD, newest_pair_age_s=None), "no pair was compared within the last 30 s"),
        (ramp(), look(GOOD, newest_pair_age_s=-3600.0), "Postgres's clock is 60 min behind that of the pairs"),
        (ramp(), look(GOOD, newest_pair_age_s=31.0), "no pair was compared within the last 30 s"),
        (ramp(), look(GOOD, seen(980, lost=20)), "the ledger has 980 of 1,000 requests sampled in this step"),
        (ramp(step_at=LATER), look(GOOD), "holds 1% for another 10 min"),
        (ramp(), look(GOOD, seen(99)), "99 of 100 pairs were compared in this step"),
        (ramp(), look(seen(500)), "the verdict is INCONCLUSIVE: 0 of 500 pairs"),
        (ramp(), look(seen(10_000, lost=500), GOOD), "the verdict is INCONCLUSIVE: the ledger has 10,000 of 10,500"),
    ],
)
def test_ramp_states_the_reason_for_waiting(known: Ramp, found: Observation, said: str) -> None:
    move = decide_ramp(known, found)

    assert move.action == "wait"
    assert said in move.reason


def test_ramp_rolls_back_for_the_step_alone() -> None:
    move = decide_ramp(ramp(step=1), look(seen(50_000, errors=40), seen(200, errors=40)))

    assert move.action == "roll back"
    assert "the verdict since 5% is FAIL: 40 of 200 pairs" in move.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": ()}, "1 to 100 shares"),
        ({"steps": (100, 100)}, "must rise, above 0% and up to 100%, got 1%, 1%"),
        ({"steps": (100, 10_001)}, "must rise"),
        ({"steps": (100,), "hold": float("nan")}, "hold must be"),
    ],
)
def test_ramp_plan_rejects_invalid_values(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RampPlan(**changes)


def test_ramp_uses_the_budget_of_its_plan() -> None:
    strict = ramp(plan=replace(PLAN, budget=Budget(max_mismatch=0.00001)))

    assert decide_ramp(strict, look(GOOD)).action == "wait"
    assert decide_ramp(ramp(), look(GOOD)).action == "step"


@pytest.mark.parametrize(
    ("reports", "asked", "said"),
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
        ([EnvoyReport("a@1:1", ENVOY_GONE_AFTER_S + 1)], [], "no Envoy reports its count any more"),
    ],
)
def test_stale_counts_name_the_envoy(reports: list[EnvoyReport], asked: list[str], said: str) -> None:
    found = describe_stale_counts(reports, asked)

    assert said in found
    assert bool(found) == bool(said)


def test_lost_requests_exclude_those_missing_before() -> None:
    assert count_lost_requests(10, CompletenessGap(100, 80)) == 10
    assert count_lost_requests(30, CompletenessGap(100, 80)) == 0
    assert count_lost_requests(None, CompletenessGap(100, 80)) is None
    assert count_lost_requests(10, CompletenessGap(None, 80)) is None
