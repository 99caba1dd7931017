"""Decisions of the guard, with property tests and seeded simulations."""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.rollout.guard import (
    GUARD_RULE_NAMES,
    GuardPolicy,
    GuardRule,
    GuardRuleName,
    WindowCounts,
    find_breaches,
    window_starts,
)

NOON = dt.datetime(2026, 3, 4, 12, tzinfo=dt.UTC)
BETWEEN = (dt.datetime(2020, 1, 1), dt.datetime(2030, 1, 1))  # noqa: DTZ001  # hypothesis adds the zone
counts = st.integers(0, 5000)


@st.composite
def tallies(draw: Any) -> WindowCounts:
    live, compared, timed = (draw(counts) for _ in range(3))
    new_errors = draw(st.integers(0, live))
    return WindowCounts(
        live=live,
        new_errors=new_errors,
        old_errors=draw(st.integers(0, live - new_errors)),
        compared=compared,
        mismatches=draw(st.integers(0, compared)),
        timed=timed,
        slower=draw(st.integers(0, timed)),
    )


def found(policy: GuardPolicy, *windows: WindowCounts) -> set[GuardRuleName]:
    return {one.rule for one in find_breaches(policy, dict.fromkeys(GUARD_RULE_NAMES, windows))}


@given(tallies(), tallies())
def test_find_breaches_sorts_by_evidence(one: WindowCounts, other: WindowCounts) -> None:
    made = find_breaches(GuardPolicy("acting"), dict.fromkeys(GUARD_RULE_NAMES, (one, other)))

    assert [one.excess_evidence for one in made] == sorted((one.excess_evidence for one in made), reverse=True)
    assert all(one.text and one.excess_evidence >= 0 for one in made)


@given(tallies())
def test_find_breaches_requires_the_least_pairs(tally: WindowCounts) -> None:
    rule = GuardRule(limit=0.0, min_pairs=5001)

    assert not found(GuardPolicy("acting", errors=rule, mismatches=rule, slower=rule), tally)


@given(tallies())
def test_find_breaches_ignores_rates_within_limits(tally: WindowCounts) -> None:
    policy = GuardPolicy("acting")
    made = found(policy, tally)

    if tally.new_errors <= max(policy.errors.limit * tally.live, tally.old_errors):
        assert "errors" not in made
    if tally.mismatches <= policy.mismatches.limit * tally.compared:
        assert "mismatches" not in made
    if tally.slower * 2 <= tally.timed:
        assert "slower" not in made


@given(tallies(), st.integers(1, 100))
def test_find_breaches_never_shrinks_with_more_errors(tally: WindowCounts, more: int) -> None:
    worse = replace(tally, live=tally.live + more, new_errors=tally.new_errors + more)

    if "errors" in found(GuardPolicy("acting"), tally):
        assert "errors" in found(GuardPolicy("acting"), worse)


def test_find_breaches_needs_about_ten_errors() -> None:
    """The minimum at 99% confidence."""
    enough = [n for n in range(1, 40) if found(GuardPolicy("acting"), WindowCounts(live=n, new_errors=n))]

    assert 10 <= enough[0] <= 14
    assert enough == list(range(enough[0], 40))


def test_find_breaches_ignores_errors_of_both_versions() -> None:
    both = WindowCounts(live=2000, new_errors=300, old_errors=290)

    assert not found(GuardPolicy("acting"), both)
    assert found(GuardPolicy("acting"), replace(both, old_errors=100)) == {"errors"}


def test_find_breaches_keeps_alpha_at_every_look() -> None:
    """500 windows of 300 requests, evaluated after every five: at most 1% may breach."""
    chance = random.Random(7)
    policy, wrong = GuardPolicy("acting"), 0
    for _ in range(500):
        tally = WindowCounts()
        for _ in range(60):
            new = sum(chance.random() < 0.02 for _ in range(5))
            old = sum(chance.random() < 0.02 for _ in range(5))
            tally = replace(
                tally, live=tally.live + 5, new_errors=tally.new_errors + new, old_errors=tally.old_errors + old
            )
            if found(policy, tally):
                wrong += 1
                break

    assert wrong <= 5


@given(st.floats(10, 86_400), st.datetimes(*BETWEEN, timezones=st.just(dt.UTC)))
def test_window_starts_cover_the_last_half_window(window: float, now: dt.datetime) -> None:
    rule = GuardRule(limit=0.1, min_pairs=1, window=window)
    since = dt.datetime(2019, 1, 1, tzinfo=dt.UTC)
    first, second = window_starts(rule, now, since)
    slack = dt.timedelta(milliseconds=1)

    assert first < second <= now + slack
    assert now - first <= dt.timedelta(seconds=window) + slack
    assert now - first >= dt.timedelta(seconds=window / 2) - slack
    assert window_starts(rule, second + dt.timedelta(seconds=window / 4), since)[1] - second < slack


def test_window_starts_never_precede_the_exposure() -> None:
    since = NOON + dt.timedelta(seconds=57)
    now = NOON + dt.timedelta(seconds=60)

    assert window_starts(GuardRule(0.1, 1), now, since) == (since, since)


@given(st.sampled_from(["off", "watching", "acting"]), st.floats(0, 1), st.integers(1, 1000))
def test_policy_round_trips_through_a_document(mode: Any, limit: float, pairs: int) -> None:
    policy = GuardPolicy(mode, errors=GuardRule(limit, pairs, 60.0, 0.0))

    assert GuardPolicy.from_document(asdict(policy)) == policy


def test_policy_ignores_unknown_fields() -> None:
    assert GuardPolicy.from_document({"mode": "acting", "more": 1}) == GuardPolicy("acting")


@pytest.mark.parametrize("mode", ["on", "", "OFF"])
def test_policy_rejects_unknown_modes(mode: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of off, watching, acting"):
        GuardPolicy(mode)
