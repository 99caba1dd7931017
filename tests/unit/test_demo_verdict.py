from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from abreast_demo.load import UserTally
from abreast_demo.planted_changes import (
    PLANTED_ADDITIONS,
    PLANTED_NOISE,
    PLANTED_REGRESSIONS,
    DemoResult,
    FindingLocation,
    LedgerCounts,
    PlantedChange,
    ReportedFinding,
)

SUMMED = LedgerCounts(outcomes={"match": 60, "mismatch": 40}, envoy_sampled=100, unaccounted=0, pending=0, drops={})
QUIET = UserTally(requests=103, safe_requests=100, statuses=Counter({200: 100, 201: 3}))


def seen(plant: PlantedChange, *, noise: bool = False, impact: str = "breaking") -> ReportedFinding:
    return ReportedFinding(1, plant.location, impact, noise, count=3, baseline_count=int(noise), summary="")


EXPECTED = (
    *(seen(plant) for plant in PLANTED_REGRESSIONS),
    *(seen(plant, impact="additive") for plant in PLANTED_ADDITIONS),
    *(seen(plant, noise=True) for plant in PLANTED_NOISE),
)


def test_all_found_and_nothing_else_is_as_planted() -> None:
    result = DemoResult(QUIET, SUMMED, EXPECTED)

    assert result.is_as_planted
    assert result.to_json_object()["planted"] == {
        "expected": [plant.name for plant in PLANTED_REGRESSIONS],
        "found": [plant.name for plant in PLANTED_REGRESSIONS],
        "missed": [],
        "unexpected": [],
    }
    assert all(result.to_json_object()["harmless"].values())


@pytest.mark.parametrize("index", range(len(PLANTED_REGRESSIONS)), ids=[plant.name for plant in PLANTED_REGRESSIONS])
def test_what_is_not_reported_is_missed(index: int) -> None:
    result = DemoResult(QUIET, SUMMED, EXPECTED[:index] + EXPECTED[index + 1 :])

    assert result.missed_changes == [PLANTED_REGRESSIONS[index]]
    assert not result.is_as_planted


def test_a_planted_mistake_that_is_taken_for_noise_is_missed() -> None:
    result = DemoResult(QUIET, SUMMED, (seen(PLANTED_REGRESSIONS[0], noise=True), *EXPECTED[1:]))

    assert result.missed_changes == [PLANTED_REGRESSIONS[0]]


@pytest.mark.parametrize("plant", PLANTED_NOISE, ids=lambda plant: plant.name)
def test_what_is_harmless_and_reported_is_unexpected(plant: PlantedChange) -> None:
    reported = seen(plant)
    result = DemoResult(QUIET, SUMMED, (*EXPECTED, reported))

    assert result.unexpected_findings == [reported]
    assert not result.is_as_planted


def test_an_addition_that_nobody_planted_is_unexpected() -> None:
    added = ReportedFinding(9, FindingLocation("GET /stats", "body", "$.other", "added"), "additive", False, 1, 0, "")
    result = DemoResult(QUIET, SUMMED, (*EXPECTED, added))

    assert result.unexpected_findings == [added]


def test_an_endpoint_that_is_slower_by_itself_is_told_apart() -> None:
    slower = ReportedFinding(9, FindingLocation("GET /stats", "latency", "", "slower"), "value", False, 40, 0, "")
    result = DemoResult(QUIET, SUMMED, (*EXPECTED, slower))

    assert (result.unplanted_slowdowns, result.unexpected_findings) == ([slower], [])
    assert result.to_json_object()["heavier"] == ["GET /stats"]
    assert result.is_as_planted


@pytest.mark.parametrize(
    "ledger",
    [
        dataclasses.replace(SUMMED, envoy_sampled=101, unaccounted=1),
        dataclasses.replace(SUMMED, envoy_sampled=99, unaccounted=-1),
        dataclasses.replace(SUMMED, envoy_sampled=None, unaccounted=None),
        dataclasses.replace(SUMMED, pending=1),
        dataclasses.replace(SUMMED, pending=None),
        dataclasses.replace(SUMMED, outcomes={"match": 99}, envoy_sampled=99),
    ],
    ids=["lost", "too many", "no count", "waiting", "who knows what waits", "envoy's count is old"],
)
def test_a_ledger_that_does_not_sum_up_is_not_as_planted(ledger: LedgerCounts) -> None:
    assert not DemoResult(QUIET, ledger, EXPECTED).is_as_planted


@pytest.mark.parametrize(
    ("tally", "errors"),
    [
        (UserTally(statuses=Counter({200: 5, 404: 2, 304: 1, 422: 1})), 0),
        (UserTally(statuses=Counter({200: 5, 500: 2, 503: 1})), 3),
        (UserTally(failures=Counter({"ReadTimeout": 2, "ConnectError": 1})), 3),
    ],
    ids=["an answer is no error", "5xx", "no answer"],
)
def test_what_is_an_error_to_a_user(tally: UserTally, errors: int) -> None:
    assert tally.user_errors == errors
    assert DemoResult(dataclasses.replace(tally, safe_requests=0), SUMMED, EXPECTED).is_as_planted is (errors == 0)
