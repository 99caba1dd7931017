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


def find_rules(policy: GuardPolicy, *windows: WindowCounts) -> set[GuardRuleName]:
    return {breach.rule for breach in find_breaches(policy, dict.fromkeys(GUARD_RULE_NAMES, windows))}


@given(tallies(), tallies())
def test_find_breaches_sorts_by_evidence(first: WindowCounts, second: WindowCounts) -> None:
    breaches = find_breaches(GuardPolicy("acting"), dict.fromkeys(GUARD_RULE_NAMES, (first, second)))

    assert [breach.excess_evidence for breach in breaches] == sorted(
        (breach.excess_evidence for breach in breaches), reverse=True
    )
    assert all(breach.text and breach.excess_evidence >= 0 for breach in breaches)


@given(tallies())
def test_find_breaches_requires_the_least_pairs(tally: WindowCounts) -> None:
    rule = GuardRule(limit=0.0, min_pairs=5001)

    assert not find_rules(GuardPolicy("acting", errors=rule, mismatches=rule, slower=rule), tally)


@given(tallies())
def test_find_breaches_ignores_rates_within_limits(tally: WindowCounts) -> None:
    policy = GuardPolicy("acting")
    breaches = find_rules(policy, tally)

    if tally.new_errors <= max(policy.errors.limit * tally.live, tally.old_errors):
        assert "errors" not in breaches
    if tally.mismatches <= policy.mismatches.limit * tally.compared:
        assert "mismatches" not in breaches
    if tally.slower * 2 <= tally.timed:
        assert "slower" not in breaches


@given(tallies(), st.integers(1, 100))
def test_find_breaches_never_shrinks_with_more_errors(tally: WindowCounts, extra_errors: int) -> None:
    worse = replace(tally, live=tally.live + extra_errors, new_errors=tally.new_errors + extra_errors)

    if "errors" in find_rules(GuardPolicy("acting"), tally):
        assert "errors" in find_rules(GuardPolicy("acting"), worse)


def test_find_breaches_needs_about_ten_errors() -> None:
    """The minimum at 99% confidence."""
    enough = [n for n in range(1, 40) if find_rules(GuardPolicy("acting"), WindowCounts(live=n, new_errors=n))]

    assert 10 <= enough[0] <= 14
    assert enough == list(range(enough[0], 40))


def test_find_breaches_ignores_errors_of_both_versions() -> None:
    window = WindowCounts(live=2000, new_errors=300, old_errors=290)

    assert not find_rules(GuardPolicy("acting"), window)
    assert find_rules(GuardPolicy("acting"), replace(window, old_errors=100)) == {"errors"}


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
            if find_rules(policy, tally):
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


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_policy_rejects_completeness_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="min_completeness must be a share from 0 to 1"):
        GuardPolicy(min_completeness=share)


@pytest.mark.parametrize("pairs", [0, 1_000_001])
def test_policy_rejects_pairs_out_of_range(pairs: int) -> None:
    with pytest.raises(ValueError, match=r"errors\.min_pairs must be 1 to 1000000"):
        GuardPolicy(errors=GuardRule(0.001, pairs))
    assert GuardPolicy(errors=GuardRule(0.001, 1)).errors.min_pairs == 1


def test_policy_has_the_documented_defaults() -> None:
    policy = GuardPolicy()
    rules = {name: getattr(policy, name) for name in ("errors", "mismatches", "slower")}

    assert (policy.mode, policy.min_completeness, policy.confidence) == ("off", 0.9, 0.99)
    assert {name: (rule.limit, rule.min_pairs) for name, rule in rules.items()} == {
        "errors": (0.001, 10),
        "mismatches": (0.01, 50),
        "slower": (1.0, 100),
    }
    assert {(rule.window, rule.cooldown) for rule in rules.values()} == {(600.0, 300.0)}
