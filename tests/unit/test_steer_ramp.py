"""What a ramp does next, from what is known."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.verdict import Budget, Counts, Ledger
from abreast_sidecar.compare.verdict import decide as verdict
from abreast_sidecar.steer.flow import FRESH, GONE, Gap, Report, lost, silent
from abreast_sidecar.steer.ramp import Look, Plan, Ramp, Seen, decide

NOON = dt.datetime(2026, 3, 4, 12, tzinfo=dt.UTC)
LATER = NOON + dt.timedelta(hours=1)
BETWEEN = (dt.datetime(2026, 3, 4, 12), dt.datetime(2026, 3, 4, 14))  # noqa: DTZ001  # hypothesis adds the zone
PLAN = Plan((100, 500, 10_000), hold=600.0, min_pairs=100)


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


def seen(compared: int, *, mismatches: int = 0, errors: int = 0, lost: int = 0, slower: int = 0) -> Seen:
    counts = Counts("GET /", compared, compared, compared, mismatches, 0, errors, 0, compared, slower)
    return Seen((counts,), Ledger(compared + lost, compared))


def look(whole: Seen, step: Seen | None = None, **changes: Any) -> Look:
    known: dict[str, Any] = {"now": LATER, "silent": "", "newest": 1.0}
    return Look(whole=whole, step=step or whole, **{**known, **changes})


GOOD = seen(10_000)


@st.composite
def anything(draw: Any) -> Seen:
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
    Look,
    now=st.datetimes(*BETWEEN, timezones=st.just(dt.UTC)),
    whole=anything(),
    step=anything(),
    silent=st.sampled_from(["", "", "no count"]),
    newest=st.none() | st.floats(0, 100),
)


@given(looks, st.sampled_from(["progressing", "paused"]), st.integers(0, 2))
def test_it_climbs_only_on_a_pass_with_fresh_whole_evidence_and_time(
    found: Look, state: Any, step: int
) -> None:
    known = ramp(state=state, step=step)
    move = decide(known, found)

    assert move.reason
    if move.action in {"step", "succeed"}:
        assert state == "progressing"
        assert verdict(found.whole.endpoints, found.whole.ledger, PLAN.budget).state == "PASS"
        assert not found.silent
        assert found.newest is not None
        assert found.newest <= 30
        assert (found.now - known.step_at).total_seconds() >= PLAN.hold
        assert found.step.compared >= PLAN.min_pairs
        assert found.step.ledger.sampled is not None
        assert found.step.ledger.accounted >= 0.99 * found.step.ledger.sampled
        assert (move.action == "succeed") == (step == 2)


@given(looks, st.integers(0, 2))
def test_nothing_that_is_amiss_with_the_evidence_keeps_it_from_going_back(found: Look, step: int) -> None:
    """Holes, silence and pauses stop the climb. What is surely bad is bad."""
    move = decide(ramp(step=step), found)
    blinded = replace(found, silent="no count", newest=None)

    if move.action == "roll back":
        assert decide(ramp(step=step, state="paused"), blinded).action == "roll back"


@given(looks)
def test_without_a_fail_at_all_it_never_goes_back(found: Look) -> None:
    states = {verdict(one.endpoints, one.ledger, PLAN.budget).state for one in (found.whole, found.step)}

    if "FAIL" not in states:
        assert decide(ramp(), found).action != "roll back"


@pytest.mark.parametrize(
    ("known", "found", "said"),
    [
        (ramp(state="paused"), look(GOOD), "paused"),
        (ramp(), look(GOOD, silent="no Envoy tells"), "no Envoy tells"),
        (ramp(), look(GOOD, newest=None), "no pair was compared within the last 30 s"),
        (ramp(), look(GOOD, newest=-3600.0), "Postgres's clock is 60 min behind that of the pairs"),
        (ramp(), look(GOOD, newest=31.0), "no pair was compared within the last 30 s"),
        (ramp(), look(GOOD, seen(980, lost=20)), "the ledger has 980 of 1,000 requests sampled in this step"),
        (ramp(step_at=LATER), look(GOOD), "holds 1% for another 10 min"),
        (ramp(), look(GOOD, seen(99)), "99 of 100 pairs were compared in this step"),
        (ramp(), look(seen(500)), "the verdict is INCONCLUSIVE: 0 of 500 pairs"),
        (
            ramp(),
            look(seen(10_000, lost=500), GOOD),
            "the verdict is INCONCLUSIVE: the ledger has 10,000 of 10,500",
        ),
    ],
)
def test_it_says_what_it_waits_for(known: Ramp, found: Look, said: str) -> None:
    move = decide(known, found)

    assert move.action == "wait"
    assert said in move.reason


def test_it_goes_back_for_its_step_alone() -> None:
    move = decide(ramp(step=1), look(seen(50_000, errors=40), seen(200, errors=40)))

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
def test_plans_are_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(**changes)


def test_a_budget_may_be_stricter_than_the_usual_one() -> None:
    strict = ramp(plan=replace(PLAN, budget=Budget(max_mismatch=0.00001)))

    assert decide(strict, look(GOOD)).action == "wait"
    assert decide(ramp(), look(GOOD)).action == "step"


@pytest.mark.parametrize(
    ("reports", "asked", "said"),
    [
        ([], [], "no Envoy's count is known"),
        ([Report("a@1:1", 1)], [], ""),
        (
            [Report("a@1:1", 1), Report("b@1:2", FRESH + 1)],
            [],
            "the Envoy b@1:2 has not told its count for 16 s",
        ),
        ([Report("a@1:1", 1), Report("b@1:2", GONE + 1)], [], ""),
        ([Report("a@1:1", 1), Report("b@1:2", GONE + 1)], ["http://1:2/"], "the Envoy b@1:2 has not told"),
        ([Report("a@1:1", GONE + 1)], [], "no Envoy tells its count any more"),
    ],
)
def test_an_envoy_that_is_not_heard_of_is_named(reports: list[Report], asked: list[str], said: str) -> None:
    found = silent(reports, asked)

    assert said in found
    assert bool(found) == bool(said)


def test_what_is_lost_is_what_was_not_missing_before() -> None:
    assert lost(10, Gap(100, 80)) == 10
    assert lost(30, Gap(100, 80)) == 0
    assert lost(None, Gap(100, 80)) is None
    assert lost(10, Gap(None, 80)) is None
