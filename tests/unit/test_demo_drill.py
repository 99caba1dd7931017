from __future__ import annotations

import pytest
from click.testing import CliRunner

from abreast_demo.drill import DrillReport, DrillRun
from abreast_demo.load import UserResponse
from abreast_demo.planted_changes import LedgerCounts
from abreast_sidecar.cli import abreast
from abreast_sidecar.cli.demo import build_drill_table
from abreast_sidecar.client.output import make_console

BEFORE = LedgerCounts(outcomes={}, envoy_sampled=0, unaccounted=0, pending=0, drops={})
AFTER = LedgerCounts(outcomes={"match": 7, "only_old": 1}, envoy_sampled=10, unaccounted=2, pending=1, drops={})


def make_run(*responses: UserResponse, name: str = "new-killed") -> DrillRun:
    """Return a run with a fault from second 10 to 20."""
    return DrillRun(name, fault_started_at=10.0, repaired_at=20.0, responses=list(responses))


def respond(answered_at: float, version: str, *, safe: bool = True, error: bool = False) -> UserResponse:
    return UserResponse(answered_at - 0.1, answered_at, version, safe, error)


GOOD_RESPONSES = (respond(10.5, "new"), respond(10.6, "old"), respond(21.5, "new"))


def test_report_times_are_of_the_last_and_the_first_response_by_new() -> None:
    report = make_run(*GOOD_RESPONSES).build_report(BEFORE, AFTER)

    assert (report.until_old, report.until_new) == (0.5, 1.5)
    assert (report.sampled, report.pending, report.lost) == (10, 1, 1)
    assert report.trouble == ""


@pytest.mark.parametrize(
    ("responses", "trouble"),
    [
        ((*GOOD_RESPONSES, respond(15, "", error=True)), "1 users of safe methods saw an error"),
        ((respond(19.9, "new"), respond(21.5, "new")), "new still answered users when it was repaired"),
        ((respond(10.5, "new"), respond(10.6, "old")), "new answered no user within 40 s of the repair"),
    ],
    ids=["safe error", "not ejected", "no recovery"],
)
def test_report_names_the_reason_of_failure(responses: tuple[UserResponse, ...], trouble: str) -> None:
    assert make_run(*responses).build_report(BEFORE, AFTER).trouble == trouble


def test_run_without_users_on_new_recovers_with_any_good_response() -> None:
    run = make_run(respond(21, "old", error=True), respond(22, "old"), name="redis-down")

    assert not run.has_recovered()
    run.had_users_on_new = False
    assert run.has_recovered()
    assert run.build_report(BEFORE, AFTER).trouble == "1 users of safe methods saw an error"


def test_report_allows_unsafe_errors_only_if_the_drill_breaks_new() -> None:
    responses = (*GOOD_RESPONSES, respond(15, "", safe=False, error=True))

    assert make_run(*responses).build_report(BEFORE, AFTER).trouble == ""
    assert make_run(*responses, name="redis-down").build_report(BEFORE, AFTER).trouble == "1 users saw an error"


def test_drill_table_has_a_row_per_report() -> None:
    report = DrillReport("new-hangs", 88, 0, 1, 5.0, 0.001, None, None, None, None, "")

    with (console := make_console()).capture() as capture:
        console.print(build_drill_table([report]))

    assert capture.get().splitlines()[1].split() == "new-hangs ok 88 0 1 5.0 s 1 ms – ? ? ?".split()  # noqa: SIM905


@pytest.mark.parametrize(
    "arguments", [[], ["new-hangs", "--all"], ["old-killed"], ["new-hangs", "--new", "0%"]], ids=str
)
def test_faults_command_needs_a_drill_and_users_on_new(arguments: list[str]) -> None:
    assert CliRunner().invoke(abreast, ["faults", *arguments]).exit_code == 2
