from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from abreast_demo.load import Tally
from abreast_demo.plants import ADDITIVE, NOISE, REGRESSIONS, Place, Plant
from abreast_demo.verdict import Ledger, Result, Seen

SUMMED = Ledger(outcomes={"match": 60, "mismatch": 40}, envoy=100, unaccounted=0, pending=0, drops={})
QUIET = Tally(requests=103, safe=100, statuses=Counter({200: 100, 201: 3}))


def seen(plant: Plant, *, noise: bool = False, impact: str = "breaking") -> Seen:
    return Seen(1, plant.place, impact, noise, count=3, baseline_count=int(noise), summary="")


EXPECTED = (
    *(seen(plant) for plant in REGRESSIONS),
    *(seen(plant, impact="additive") for plant in ADDITIVE),
    *(seen(plant, noise=True) for plant in NOISE),
)


def test_all_found_and_nothing_else_is_as_planted() -> None:
    result = Result(QUIET, SUMMED, EXPECTED)

    assert result.as_planted
    assert result.for_machines()["planted"] == {
        "expected": [plant.name for plant in REGRESSIONS],
        "found": [plant.name for plant in REGRESSIONS],
        "missed": [],
        "unexpected": [],
    }
    assert all(result.for_machines()["harmless"].values())


@pytest.mark.parametrize("index", range(len(REGRESSIONS)), ids=[plant.name for plant in REGRESSIONS])
def test_what_is_not_reported_is_missed(index: int) -> None:
    result = Result(QUIET, SUMMED, EXPECTED[:index] + EXPECTED[index + 1 :])

    assert result.missed == [REGRESSIONS[index]]
    assert not result.as_planted


def test_a_planted_mistake_that_is_taken_for_noise_is_missed() -> None:
    result = Result(QUIET, SUMMED, (seen(REGRESSIONS[0], noise=True), *EXPECTED[1:]))

    assert result.missed == [REGRESSIONS[0]]


@pytest.mark.parametrize("plant", NOISE, ids=lambda plant: plant.name)
def test_what_is_harmless_and_reported_is_unexpected(plant: Plant) -> None:
    reported = seen(plant)
    result = Result(QUIET, SUMMED, (*EXPECTED, reported))

    assert result.unexpected == [reported]
    assert not result.as_planted


def test_an_addition_that_nobody_planted_is_unexpected() -> None:
    added = Seen(9, Place("GET /stats", "body", "$.other", "added"), "additive", False, 1, 0, "")
    result = Result(QUIET, SUMMED, (*EXPECTED, added))

    assert result.unexpected == [added]


def test_an_endpoint_that_is_slower_by_itself_is_told_apart() -> None:
    slower = Seen(9, Place("GET /stats", "latency", "", "slower"), "value", False, 40, 0, "")
    result = Result(QUIET, SUMMED, (*EXPECTED, slower))

    assert (result.heavier, result.unexpected) == ([slower], [])
    assert result.for_machines()["heavier"] == ["GET /stats"]
    assert result.as_planted


@pytest.mark.parametrize(
    "ledger",
    [
        dataclasses.replace(SUMMED, envoy=101, unaccounted=1),
        dataclasses.replace(SUMMED, envoy=99, unaccounted=-1),
        dataclasses.replace(SUMMED, envoy=None, unaccounted=None),
        dataclasses.replace(SUMMED, pending=1),
        dataclasses.replace(SUMMED, pending=None),
        dataclasses.replace(SUMMED, outcomes={"match": 99}, envoy=99),
    ],
    ids=["lost", "too many", "no count", "waiting", "who knows what waits", "envoy's count is old"],
)
def test_a_ledger_that_does_not_sum_up_is_not_as_planted(ledger: Ledger) -> None:
    assert not Result(QUIET, ledger, EXPECTED).as_planted


@pytest.mark.parametrize(
    ("tally", "errors"),
    [
        (Tally(statuses=Counter({200: 5, 404: 2, 304: 1, 422: 1})), 0),
        (Tally(statuses=Counter({200: 5, 500: 2, 503: 1})), 3),
        (Tally(failures=Counter({"ReadTimeout": 2, "ConnectError": 1})), 3),
    ],
    ids=["an answer is no error", "5xx", "no answer"],
)
def test_what_is_an_error_to_a_user(tally: Tally, errors: int) -> None:
    assert tally.user_errors == errors
    assert Result(dataclasses.replace(tally, safe=0), SUMMED, EXPECTED).as_planted is (errors == 0)
