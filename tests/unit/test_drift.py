"""Drift of state, told from both versions' answers then and now; and what is no drift."""

from __future__ import annotations

import random
from typing import Any

import pytest

from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.stats.drift import find_state_drift
from captures import capture

STOCK = ("body", "$.stock", "changed")
RULES = CompareOptions()


def told(old: Any, new: Any, old_now: Any, new_now: Any, *codes: int) -> list[tuple[str, str, str]]:
    """What is drift, of answers then and now."""
    a, b, c, d = codes or (200, 200, 200, 200)

    def judged(one: Any, other: Any, status: int, second: int) -> Any:
        before = capture("old", one, status=status)
        return compare_pair([before, capture("new", other, role="shadow", status=second)], RULES)

    then, moved = judged(old, new, a, b), judged(old, old_now, a, c)
    return find_state_drift(then, moved, judged(old_now, new_now, c, d))


def stock(value: Any, **others: Any) -> dict[str, Any]:
    return {"stock": value, **others}


def test_what_old_says_now_and_new_said_then_is_drift() -> None:
    assert told(stock(5), stock(4), stock(4), stock(4)) == [STOCK]
    assert told(stock("in"), stock("out"), stock("out"), stock("out")) == [STOCK]


def test_a_number_may_have_gone_on() -> None:
    assert told(stock(5), stock(4), stock(2), stock(2)) == [STOCK]
    assert told(stock(5), stock(6), stock(4), stock(4)) == []


@pytest.mark.parametrize(
    ("old", "new", "now"),
    [
        (5, 0, 5),  # wrong now and then; the state stood still
        (5, 0, 4),  # wrong, while the state moved too
        (5, 9, 4),
        ("a", "", "b"),
        (5, None, 4),
        ("a", "c", "b"),
    ],
)
def test_a_wrong_answer_that_is_gone_is_no_drift(old: Any, new: Any, now: Any) -> None:
    assert told(stock(old), stock(new), stock(now), stock(now)) == []


def test_what_still_differs_is_no_drift() -> None:
    assert told(stock(5), stock(4), stock(4), stock(3)) == []


def test_each_place_is_told_by_itself() -> None:
    found = told(stock(5, price=1), stock(4, price=2), stock(4, price=1), stock(4, price=1))

    assert found == [STOCK]


def test_all_places_of_one_finding_must_have_moved() -> None:
    def rows(*values: int) -> list[dict[str, int]]:
        return [{"id": place, "stock": value} for place, value in enumerate(values)]

    assert told(rows(1, 2), rows(3, 4), rows(3, 4), rows(3, 4)) == [("body", "$[*].stock", "changed")]
    assert told(rows(1, 2), rows(3, 9), rows(3, 4), rows(3, 4)) == []


def test_a_thing_that_was_made_meanwhile_is_drift_and_an_error_never() -> None:
    made = told({}, stock(1), stock(1), stock(1), 404, 200, 200, 200)

    assert made == [("status", "404->200", "changed")]
    assert told(stock(1), {}, {}, {}, 200, 500, 500, 500) == []


def test_more_places_than_are_kept_are_no_drift() -> None:
    def rows(value: int) -> list[dict[str, int]]:
        return [{"id": place, "stock": value} for place in range(30)]

    assert told(rows(1), rows(2), rows(2), rows(2)) == []


def test_a_version_that_is_wrong_now_and_then_is_never_taken_for_drift() -> None:
    """A counter moves between any two answers; new is wrong in a third of them, with values that come up elsewhere."""
    dice, drift, hidden = random.Random(3), 0, 0
    for _ in range(2000):
        state = dice.randint(100, 999)
        later = state + dice.choice([0, 0, 1, 2])
        last = later + dice.choice([0, 0, 1])
        wrong = dice.random() < 0.3
        said = dice.choice([0, -1, 5000, state - 50]) if wrong else later
        found = told(stock(state), stock(said), stock(last), stock(last)) if said != state else []
        drift += bool(found) and not wrong
        hidden += bool(found) and wrong

    assert drift > 400
    assert hidden == 0
