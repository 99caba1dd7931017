"""Drift of state, decided from first responses and a recheck."""

from __future__ import annotations

import random
from typing import Any

import pytest

from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.stats.drift import find_state_drift
from support_captures import capture

STOCK = ("body", "$.stock", "changed")
RULES = CompareOptions()


def find_drift(old: Any, new: Any, old_now: Any, new_now: Any, *codes: int) -> list[tuple[str, str, str]]:
    """Return the drift between first and later responses."""
    a, b, c, d = codes or (200, 200, 200, 200)

    def compare(value: Any, other: Any, status: int, second: int) -> Any:
        before = capture("old", value, status=status)
        return compare_pair([before, capture("new", other, role="shadow", status=second)], RULES)

    then, moved = compare(old, new, a, b), compare(old, old_now, a, c)
    return find_state_drift(then, moved, compare(old_now, new_now, c, d))


def stock(value: Any, **fields: Any) -> dict[str, Any]:
    return {"stock": value, **fields}


def test_drift_is_old_catching_up_with_new() -> None:
    assert find_drift(stock(5), stock(4), stock(4), stock(4)) == [STOCK]
    assert find_drift(stock("in"), stock("out"), stock("out"), stock("out")) == [STOCK]


def test_drift_includes_numbers_that_moved_on() -> None:
    assert find_drift(stock(5), stock(4), stock(2), stock(2)) == [STOCK]
    assert find_drift(stock(5), stock(6), stock(4), stock(4)) == []


@pytest.mark.parametrize(
    ("old", "new", "later"),
    [
        (5, 0, 5),  # wrong now and then; the state stood still
        (5, 0, 4),  # wrong, while the state moved too
        (5, 9, 4),
        ("a", "", "b"),
        (5, None, 4),
        ("a", "c", "b"),
    ],
)
def test_drift_excludes_wrong_values_that_are_gone(old: Any, new: Any, later: Any) -> None:
    assert find_drift(stock(old), stock(new), stock(later), stock(later)) == []


def test_drift_excludes_remaining_differences() -> None:
    assert find_drift(stock(5), stock(4), stock(4), stock(3)) == []


def test_drift_is_decided_per_place() -> None:
    drift = find_drift(stock(5, price=1), stock(4, price=2), stock(4, price=1), stock(4, price=1))

    assert drift == [STOCK]


def test_drift_requires_all_places_of_a_finding_to_move() -> None:
    def rows(*values: int) -> list[dict[str, int]]:
        return [{"id": place, "stock": value} for place, value in enumerate(values)]

    assert find_drift(rows(1, 2), rows(3, 4), rows(3, 4), rows(3, 4)) == [("body", "$[*].stock", "changed")]
    assert find_drift(rows(1, 2), rows(3, 9), rows(3, 4), rows(3, 4)) == []


def test_drift_includes_new_resources_but_no_errors() -> None:
    drift = find_drift({}, stock(1), stock(1), stock(1), 404, 200, 200, 200)

    assert drift == [("status", "404->200", "changed")]
    assert find_drift(stock(1), {}, {}, {}, 200, 500, 500, 500) == []


def test_drift_excludes_findings_beyond_the_limit_of_places() -> None:
    def rows(value: int) -> list[dict[str, int]]:
        return [{"id": place, "stock": value} for place in range(30)]

    assert find_drift(rows(1), rows(2), rows(2), rows(2)) == []


def test_drift_excludes_random_errors_of_new() -> None:
    """A counter moves between any two responses. New is wrong in a third of them, with plausible values."""
    dice, drift, hidden_count = random.Random(3), 0, 0
    for _ in range(2000):
        state = dice.randint(100, 999)
        later = state + dice.choice([0, 0, 1, 2])
        last = later + dice.choice([0, 0, 1])
        wrong = dice.random() < 0.3
        answer = dice.choice([0, -1, 5000, state - 50]) if wrong else later
        differences = find_drift(stock(state), stock(answer), stock(last), stock(last)) if answer != state else []
        drift += bool(differences) and not wrong
        hidden_count += bool(differences) and wrong

    assert drift > 400
    assert hidden_count == 0


def test_drift_needs_the_later_value_to_reach_or_pass_the_first_one_of_new() -> None:
    assert find_drift(stock(5), stock(4), stock(4), stock(4)) == [STOCK]
    assert find_drift(stock(5), stock(4), stock(3), stock(3)) == [STOCK]
    assert find_drift(stock(5), stock(4), stock(6), stock(6)) == []
