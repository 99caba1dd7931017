"""`abreast drill`, as a person or a machine starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from abreast_demo.drill import DrillReport, DrillRun, RecordingLoadGenerator, UserResponse
from abreast_demo.planted_changes import LedgerCounts
from abreast_sidecar.cli import abreast
from abreast_sidecar.cli.demo import build_drill_table
from abreast_sidecar.client.output import make_console

ABREAST = Path(sys.executable).with_name("abreast")
EMPTY = LedgerCounts(outcomes={}, envoy_sampled=0, unaccounted=0, pending=0, drops={})
AFTER = LedgerCounts(outcomes={"match": 7, "only_old": 1}, envoy_sampled=10, unaccounted=2, pending=1, drops={})


def test_a_version_that_answers_500_is_left_alone_comes_back_and_costs_no_safe_request() -> None:
    done = subprocess.run(
        [ABREAST, "drill", "new-errors", "--seconds", "4", "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )

    assert done.returncode == 0, done.stderr + done.stdout
    (report,) = json.loads(done.stdout)
    assert (report["drill"], report["passed"], report["trouble"]) == ("new-errors", True, "")
    assert report["requests"] > 100
    assert report["safe_errors"] == 0
    assert 0 <= report["until_old"] < 4
    assert report["until_new"] > 0
    assert report["sampled"] > 100
    assert report["lost"] == 0


def run(*seen: UserResponse, name: str = "new-killed") -> DrillRun:
    """Broken from second 10 to 20."""
    made = DrillRun(
        name, RecordingLoadGenerator("http://127.0.0.1:1"), break_started_at=10.0, break_done_at=10.45, repaired_at=20.0
    )
    made.users.responses += seen
    return made


def answered(at: float, version: str, *, safe: bool = True, error: bool = False, took: float = 0.1) -> UserResponse:
    return UserResponse(at - took, at, version, safe, error)


GOOD = (answered(10.5, "new"), answered(10.6, "old"), answered(21.5, "new"))


def test_the_times_are_those_of_the_last_and_the_first_answer_by_new() -> None:
    report = run(*GOOD).build_report(EMPTY, AFTER)

    assert (report.until_old, report.until_new) == (0.5, 1.5)
    assert (report.sampled, report.pending, report.lost) == (10, 1, 1)
    assert report.trouble == ""


def test_what_fails_a_drill() -> None:
    troubles = {
        "1 users of safe methods saw an error": (*GOOD, answered(15, "", error=True)),
        "new was not left alone in time": (answered(19.9, "new"), answered(21.5, "new")),
        "new did not answer users again within 40 s": (answered(10.5, "new"), answered(10.6, "old")),
    }
    for trouble, seen in troubles.items():
        assert run(*seen).build_report(EMPTY, AFTER).trouble == trouble


def test_where_no_user_was_on_new_any_good_answer_will_do() -> None:
    made = run(answered(21, "old", error=True), answered(22, "old"), name="redis-down")

    assert not made.has_recovered()
    made.had_users_on_new = False
    assert made.has_recovered()
    assert made.build_report(EMPTY, AFTER).trouble == "1 users of safe methods saw an error"


def test_an_unsafe_request_may_fail_with_new_and_with_nothing_else() -> None:
    seen = (*GOOD, answered(15, "", safe=False, error=True))

    assert run(*seen).build_report(EMPTY, AFTER).trouble == ""
    assert run(*seen, name="redis-down").build_report(EMPTY, AFTER).trouble == "1 users saw an error"


def test_each_drill_is_a_row() -> None:
    report = DrillReport("new-hangs", 88, 0, 1, 5.0, 0.001, None, None, None, None, "")

    with (out := make_console()).capture() as shown:
        out.print(build_drill_table([report]))
    assert shown.get().splitlines()[1].split() == [
        "new-hangs",
        "ok",
        "88",
        "0",
        "1",
        "5.0",
        "s",
        "1",
        "ms",
        "–",
        "?",
        "?",
        "?",
    ]


def test_a_drill_must_be_named_and_needs_users_on_new() -> None:
    wrong: tuple[list[str], ...] = ([], ["new-hangs", "--all"], ["old-killed"], ["new-hangs", "--new", "0%"])
    for words in wrong:
        assert CliRunner().invoke(abreast, ["drill", *words]).exit_code == 2


def test_what_was_on_its_way_before_does_not_stand_for_what_is_missing_now() -> None:
    def ledger(rows: int, envoy: int, pending: int) -> LedgerCounts:
        return LedgerCounts(outcomes={"match": rows}, envoy_sampled=envoy, unaccounted=0, pending=pending, drops={})

    before = ledger(9, 10, 1)

    assert ledger(15, 15, 0).is_complete_since(before)
    assert not ledger(14, 15, 0).is_complete_since(before)
    assert not ledger(14, 15, 1).is_complete_since(before)
    assert not ledger(10, 10, 0).is_complete_since(before)
