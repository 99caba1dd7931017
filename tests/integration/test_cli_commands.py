"""The commands over a real gRPC connection, to a server with prepared answers: what they ask, print and exit with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli import COMMANDS, abreast
from support import find_free_port
from support_sidecar import Prepared, answers, envoy, serving, traffic

QUERIES = {
    "status": ["status"],
    "endpoints": ["endpoints"],
    "findings": ["findings"],
    "finding": ["finding", "12"],
    "said": ["finding", "12", "--expected", "--reason", "r"],
    "pairs": ["pairs"],
    "pair": ["pair", "0194b8a2-5f3e-4b7a-9a52-3c1f0d9e7b11"],
    "watch": ["watch"],
    "traffic": ["traffic"],
    "events": ["traffic", "events"],
    "set": ["traffic", "set", "--new", "25%", "--reason", "r"],
    "rollback": ["rollback", "--reason", "r"],
    "promote": ["promote", "--reason", "r"],
}


def run(*words: str) -> Result:
    return CliRunner().invoke(abreast, list(words))


@pytest.fixture
def sidecar() -> Iterator[tuple[str, Prepared]]:
    with serving() as (address, handler):
        yield address, handler


@pytest.mark.parametrize("words", QUERIES.values(), ids=QUERIES)
def test_every_command_answers(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run(*words, "--address", sidecar[0])

    assert (result.exit_code, result.stderr) == (0, "")
    assert any(text in result.stdout for text in ("shop", "/products/", "ann@desk"))


@pytest.mark.parametrize("words", QUERIES.values(), ids=QUERIES)
def test_every_command_prints_json(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run(*words, "--address", sidecar[0], "--json")

    texts = result.stdout.splitlines() if words == ["watch"] else [result.stdout]
    assert [type(json.loads(text)) for text in texts] == [dict] * len(texts)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_verdict_is_an_exit_code_and_its_budget_reaches_the_sidecar(sidecar: tuple[str, Prepared]) -> None:
    words = "verdict --max-mismatch 0.1% --max-error 0.002 --confidence 99%"
    text, json_text = (run(*words.split(), "--address", sidecar[0], *extra) for extra in ([], ["--json"]))
    asked = sidecar[1].asked[0].budget

    assert (text.exit_code, json_text.exit_code) == (2, 2)
    assert (asked.max_mismatch, asked.max_error, asked.confidence) == (0.001, 0.002, 0.99)
    assert not asked.HasField("max_slower")
    assert text.stdout.startswith("INCONCLUSIVE  shop")
    assert json.loads(json_text.stdout)["state"] == "VERDICT_STATE_INCONCLUSIVE"


def test_json_has_the_protos_names_and_zeros(sidecar: tuple[str, Prepared]) -> None:
    (found,) = json.loads(run("findings", "--address", sidecar[0], "--json").stdout)["findings"]

    assert found["endpoint"] == {"service": "shop", "method": "GET", "route": "/products/{id}"}
    assert (found["baseline_count"], found["noise"], found["kind"]) == ("0", False, "KIND_TYPE")


@pytest.mark.parametrize("words", QUERIES.values(), ids=QUERIES)
def test_nobody_at_the_address_is_one_line(words: list[str]) -> None:
    address = f"127.0.0.1:{find_free_port()}"
    result = run(*words, "--address", address)

    assert result.exit_code == 3
    assert result.stderr.startswith(f"abreast: no sidecar answers at {address}; start one with")
    assert result.stderr.count("\n") == 1


def test_something_else_at_the_address_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = run("status", "--address", address, "--timeout", "0.5")

    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert address in result.stderr


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 3),
        (grpc.StatusCode.NOT_FOUND, 4),
        (grpc.StatusCode.FAILED_PRECONDITION, 5),
        (grpc.StatusCode.INTERNAL, 5),
    ],
)
def test_errors_of_the_sidecar_have_exit_codes(code: grpc.StatusCode, exit_code: int) -> None:
    with serving(ListFindings=(code, "the reason")) as (address, _handler):
        result = run("findings", "--address", address)

    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (exit_code, 1, "")


def test_a_sidecar_of_another_version_is_named() -> None:
    with serving() as (address, handler):
        del handler.table["ListFindings"]
        result = run("findings", "--address", address)

    assert (result.exit_code, "is it a sidecar, of this version?" in result.stderr) == (5, True)


def test_filters_reach_the_sidecar(sidecar: tuple[str, Prepared]) -> None:
    words = "findings --service shop --method get --route /a --part body --kind type --kind order --impact breaking"
    run(*words.split(), "--noise", "--since", "2026-01-01T00:00Z", "--limit", "7", "--address", sidecar[0])
    (asked,) = sidecar[1].asked

    assert (asked.service, asked.method, asked.route, asked.page_size) == ("shop", "GET", "/a", 7)
    assert (asked.parts, asked.kinds) == ([common.PART_BODY], [common.KIND_TYPE, common.KIND_ORDER])
    assert (asked.impacts, asked.include_noise) == ([common.IMPACT_BREAKING], True)
    assert (asked.window.start.seconds, asked.window.HasField("end")) == (1_767_225_600, False)


def test_a_window_that_ends_before_it_begins_is_refused(sidecar: tuple[str, Prepared]) -> None:
    result = run("status", "--since", "1h", "--until", "2h", "--address", sidecar[0])

    assert (result.exit_code, sidecar[1].asked) == (2, [])


def test_pages_are_followed_up_to_the_limit() -> None:
    page = api.ListFindingsResponse(findings=[api.Finding(id=1)], next_page_token="more")
    with serving(ListFindings=page) as (address, handler):
        result = run("findings", "--limit", "2500", "--json", "--address", address)

    assert [(asked.page_size, asked.page_token) for asked in handler.asked] == [
        (1000, ""),
        (1000, "more"),
        (500, "more"),
    ]
    assert json.loads(result.stdout)["next_page_token"] == "more"


@pytest.mark.parametrize(("found", "exit_code"), [([api.Finding(id=1)], 1), ([], 0)])
def test_findings_can_decide_a_build(found: list[api.Finding], exit_code: int) -> None:
    with serving(ListFindings=api.ListFindingsResponse(findings=found)) as (address, _handler):
        result = run("findings", "--exit-code", "--address", address)

    assert result.exit_code == exit_code


def test_shares_are_set_as_percent_or_fraction(sidecar: tuple[str, Prepared]) -> None:
    words = ["traffic", "set", "--new", "25%", "--sample-safe", "0.5", "--sample-unsafe", "0", "--reason"]
    run(*words, "first users", "--actor", "ann", "--address", sidecar[0])
    asked = sidecar[1].asked[-1]

    assert (asked.new_share, asked.sample_safe, asked.sample_unsafe) == (0.25, 0.5, 0.0)
    assert not asked.HasField("baseline_share")
    assert (asked.actor, asked.reason) == ("ann", "first users")


@pytest.mark.parametrize(
    "words",
    [["--new", "25%"], ["--reason", "r"], ["--new", "2500%", "--reason", "r"], ["--new", "-1", "--reason", "r"]],
)
def test_shares_that_make_no_sense_are_refused(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run("traffic", "set", *words, "--address", sidecar[0])

    assert (result.exit_code, sidecar[1].asked) == (2, [])


@pytest.mark.parametrize(
    ("envoys", "said"),
    [
        ([], "no Envoy is connected"),
        ([envoy(7)], "1 of 1 Envoys do not have it yet"),
        ([envoy(8, error="no")], "1 of 1"),
    ],
)
def test_a_rollback_that_no_envoy_has_is_no_success(envoys: list[Any], said: str) -> None:
    answer = traffic_pb2.RollbackResponse(traffic=traffic(8, new_share=0.0), envoys=envoys)
    with serving(Rollback=answer) as (address, _handler):
        result = run("rollback", "--reason", "errors", "--address", address)

    assert result.exit_code == 1
    assert said in result.stderr


def test_a_rollback_needs_no_reason_and_asks_the_sidecar_nothing_else() -> None:
    answer = traffic_pb2.RollbackResponse(traffic=traffic(8, new_share=0.0), envoys=[envoy(8)])
    with serving(Rollback=answer) as (address, handler):
        result = run("rollback", "--address", address)

    assert result.exit_code == 0
    assert [type(asked).__name__ for asked in handler.asked] == ["RollbackRequest"]


def test_a_rollback_that_the_ledger_does_not_know_of_is_no_success_and_says_why() -> None:
    answer = traffic_pb2.RollbackResponse(
        traffic=traffic(8, new_share=0.0), envoys=[envoy(8)], recording_error="the ledger does not know of it yet: x"
    )
    with serving(Rollback=answer) as (address, _handler):
        result = run("rollback", "--address", address)

    assert result.exit_code == 1
    assert "in force, but the ledger does not know of it yet: x" in result.stderr
    assert "stored" not in result.stderr


def test_a_rollback_without_a_sidecar_names_the_brake_in_envoy() -> None:
    result = run("rollback", "--address", "127.0.0.1:1", "--timeout", "2")

    assert result.exit_code == 3
    assert "runtime_modify?abreast.weight.old=10000&abreast.weight.new_or_old=0" in result.stderr


def test_status_does_without_traffic_that_is_not_known() -> None:
    with serving(GetTraffic=(grpc.StatusCode.NOT_FOUND, "none")) as (address, _handler):
        result = run("status", "--json", "--address", address)

    assert json.loads(result.stdout)["traffic"] is None


def test_the_address_comes_from_the_environment(sidecar: tuple[str, Prepared]) -> None:
    result = CliRunner().invoke(abreast, ["status"], env={"ABREAST_SIDECAR": sidecar[0]})

    assert result.exit_code == 0


def process(*words: str, address: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "abreast_sidecar", *words]
    environment = {**os.environ, "ABREAST_SIDECAR": address, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def endless(_request: Any = None) -> Iterator[api.WatchFindingsResponse]:
    import time

    while True:
        yield api.WatchFindingsResponse(finding=api.Finding(id=1))
        time.sleep(0.01)


class Endless(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return endless()


def test_ctrl_c_is_quiet() -> None:
    with serving(WatchFindings=Endless()) as (address, _handler), process("watch", address=address) as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _out, error = watch.communicate(timeout=20)

    assert (watch.returncode, error.strip()) == (130, "")


def test_a_reader_that_leaves_is_no_error() -> None:
    with serving(WatchFindings=Endless()) as (address, _handler), process("watch", address=address) as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        watch.stdout.readline()
        watch.stdout.close()
        watch.wait(timeout=20)
        error = watch.stderr.read()

    assert (watch.returncode, error) == (141, "")


def test_help_imports_no_command() -> None:
    program = (
        "import sys; from abreast_sidecar.cli import abreast\n"
        "try: abreast(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('grpc', 'rich', 'google', 'psycopg', 'redis')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")

    assert (result.exit_code, result.stderr) == (0, "")


def test_doctor_says_a_line_for_each_part_that_is_down() -> None:
    nobody = f"127.0.0.1:{find_free_port()}"
    words = ["--address", nobody, "--http", nobody, "--envoy-admin", nobody]
    words += ["--redis-url", f"redis://{nobody}", "--postgres-url", f"postgresql://u:secret@{nobody}/abreast"]
    result = run("doctor", "--json", *words)
    checks = json.loads(result.stdout)["checks"]

    assert {(c["part"], c["state"]) for c in checks} == {
        ("sidecar", "fail"),
        ("sidecar", "warn"),
        ("Envoy", "fail"),
        ("Redis", "fail"),
        ("Postgres", "fail"),
    }
    assert result.exit_code == 1
    assert "secret" not in result.stdout


def test_every_answer_is_prepared() -> None:
    """The table of prepared answers has every call of the API but the streams nobody reads here."""
    names = {m.name for s in (api, traffic_pb2) for d in s.DESCRIPTOR.services_by_name.values() for m in d.methods}

    assert names - set(answers()) == {"WatchTraffic"}
