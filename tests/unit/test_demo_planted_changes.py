from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from starlette.routing import BaseRoute, Mount, Route

from abreast_demo import new, old
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
from abreast_demo.shop import Shop

ROOT = Path(__file__).parents[2]
ALL_CHANGES = (*PLANTED_REGRESSIONS, *PLANTED_ADDITIONS, *PLANTED_NOISE)
LEDGER = LedgerCounts(outcomes={"match": 60, "mismatch": 40}, envoy_sampled=100, unaccounted=0, pending=0, drops={})
TALLY = UserTally(requests=103, safe_requests=100, statuses=Counter({200: 100, 201: 3}))


def report(location: FindingLocation, *, noise: bool = False, impact: str = "breaking") -> ReportedFinding:
    return ReportedFinding(1, location, impact, noise, count=3, summary="")


EXPECTED = (
    *(report(change.location) for change in PLANTED_REGRESSIONS),
    *(report(change.location, impact="additive") for change in PLANTED_ADDITIONS),
    *(report(change.location, noise=True) for change in PLANTED_NOISE),
)


def list_paths(routes: Iterable[BaseRoute]) -> Iterator[str]:
    for route in routes:
        if isinstance(route, Mount):
            yield from (route.path + path for path in list_paths(route.routes))
        elif isinstance(route, Route):
            yield route.path_format


def test_regressions_are_each_marked_in_new_and_not_in_old() -> None:
    marks = re.findall(r"# planted: (.+)", (ROOT / "demo/abreast_demo/new.py").read_text())

    assert sorted(name for mark in marks for name in mark.split(", ")) == sorted(
        change.name for change in PLANTED_REGRESSIONS
    )
    assert "planted" not in (ROOT / "demo/abreast_demo/old.py").read_text()


def test_planted_changes_are_at_endpoints_of_both_versions() -> None:
    shop = Shop("postgresql://127.0.0.1/none", "redis://127.0.0.1/0")
    routes = set(new.build_fastapi_app(shop).openapi()["paths"]) & set(list_paths(old.build_starlette_app(shop).routes))

    assert {change.location.endpoint for change in ALL_CHANGES} <= {f"GET {route}" for route in routes}


def test_docs_list_exactly_the_planted_changes() -> None:
    page = (ROOT / "docs/demo.md").read_text()
    names = re.findall(r"^\| (?!name )([a-z-]*[a-z]) \|", page, re.MULTILINE)

    assert sorted(names) == sorted(change.name for change in ALL_CHANGES)
    for change in ALL_CHANGES:
        location = change.location
        finding = " ".join(f"`{part}`" for part in (location.part, location.path, location.kind) if part)
        assert f"| {change.name} | {change.description} | `{location.endpoint}` | {finding} |" in page


def test_result_with_all_planted_changes_is_as_planted() -> None:
    result = DemoResult(TALLY, LEDGER, EXPECTED)

    assert result.is_as_planted
    assert result.to_json_object()["planted"] == {
        "expected": [change.name for change in PLANTED_REGRESSIONS],
        "found": [change.name for change in PLANTED_REGRESSIONS],
        "missed": [],
        "unexpected": [],
    }
    assert all(result.to_json_object()["harmless"].values())


@pytest.mark.parametrize("index", range(len(PLANTED_REGRESSIONS)), ids=[change.name for change in PLANTED_REGRESSIONS])
def test_result_misses_a_change_that_is_not_reported(index: int) -> None:
    result = DemoResult(TALLY, LEDGER, EXPECTED[:index] + EXPECTED[index + 1 :])

    assert result.missed_changes == [PLANTED_REGRESSIONS[index]]
    assert not result.is_as_planted


def test_result_misses_a_regression_that_is_reported_as_noise() -> None:
    change = PLANTED_REGRESSIONS[0]
    result = DemoResult(TALLY, LEDGER, (report(change.location, noise=True), *EXPECTED[1:]))

    assert result.missed_changes == [change]


@pytest.mark.parametrize("change", PLANTED_NOISE, ids=lambda change: change.name)
def test_noise_that_is_reported_as_regression_is_unexpected(change: PlantedChange) -> None:
    result = DemoResult(TALLY, LEDGER, (*EXPECTED, report(change.location)))

    assert result.unexpected_findings == [report(change.location)]
    assert not result.is_as_planted


def test_addition_that_is_not_planted_is_unexpected() -> None:
    addition = report(FindingLocation("GET /stats", "body", "$.other", "added"), impact="additive")
    result = DemoResult(TALLY, LEDGER, (*EXPECTED, addition))

    assert result.unexpected_findings == [addition]


def test_slowdown_that_is_not_planted_is_listed_separately() -> None:
    slowdown = report(FindingLocation("GET /stats", "latency", "", "slower"), impact="value")
    result = DemoResult(TALLY, LEDGER, (*EXPECTED, slowdown))

    assert (result.unplanted_slowdowns, result.unexpected_findings) == ([slowdown], [])
    assert result.to_json_object()["heavier"] == ["GET /stats"]
    assert result.is_as_planted


@pytest.mark.parametrize(
    "ledger",
    [
        dataclasses.replace(LEDGER, envoy_sampled=101, unaccounted=1),
        dataclasses.replace(LEDGER, envoy_sampled=99, unaccounted=-1),
        dataclasses.replace(LEDGER, envoy_sampled=None, unaccounted=None),
        dataclasses.replace(LEDGER, pending=1),
        dataclasses.replace(LEDGER, pending=None),
        dataclasses.replace(LEDGER, outcomes={"match": 99}, envoy_sampled=99),
    ],
    ids=["lost", "too many", "no count", "pending", "unknown pending", "old count"],
)
def test_result_with_an_incomplete_ledger_is_not_as_planted(ledger: LedgerCounts) -> None:
    assert not DemoResult(TALLY, ledger, EXPECTED).is_as_planted


@pytest.mark.parametrize("unsampled", [3, None])
def test_requests_that_envoy_did_not_sample_under_load_are_not_missing(unsampled: int | None) -> None:
    ledger = dataclasses.replace(LEDGER, outcomes={"match": 97}, envoy_sampled=97, unsampled=unsampled)
    result = DemoResult(TALLY, ledger, EXPECTED)

    assert result.is_as_planted
    assert result.to_json_object()["ledger"]["unsampled"] == unsampled


@pytest.mark.parametrize(
    ("tally", "errors"),
    [
        (UserTally(statuses=Counter({200: 5, 404: 2, 304: 1, 422: 1})), 0),
        (UserTally(statuses=Counter({200: 5, 500: 2, 503: 1})), 3),
        (UserTally(failures=Counter({"ReadTimeout": 2, "ConnectError": 1})), 3),
    ],
    ids=["below 500", "5xx", "no response"],
)
def test_result_with_user_errors_is_not_as_planted(tally: UserTally, errors: int) -> None:
    assert tally.user_errors == errors
    assert DemoResult(tally, LEDGER, EXPECTED).is_as_planted is (errors == 0)


def test_ledger_is_complete_since_counts_pairs_pending_before_separately() -> None:
    def ledger(pairs: int, sampled: int, pending: int) -> LedgerCounts:
        return LedgerCounts(outcomes={"match": pairs}, envoy_sampled=sampled, unaccounted=0, pending=pending, drops={})

    before = ledger(9, 10, 1)

    assert ledger(15, 15, 0).is_complete_since(before)
    assert not ledger(14, 15, 0).is_complete_since(before)
    assert not ledger(14, 15, 1).is_complete_since(before)
    assert not ledger(10, 10, 0).is_complete_since(before)
