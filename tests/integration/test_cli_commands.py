"""Requests, output and exit codes of the commands, over real gRPC to a server with prepared responses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli import COMMANDS, abreast
from support import find_free_port
from support_sidecar import Prepared, answers, cause, envoy, serving, traffic

QUERIES = {
    "status": ["status"],
    "endpoints": ["endpoints"],
    "findings": ["findings"],
    "findings of a cause": ["findings", "--cause", "12"],
    "finding": ["finding", "12"],
    "status of finding": ["finding", "12", "--expected", "--reason", "r"],
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
def test_commands_print_text(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run(*words, "--address", sidecar[0])

    assert (result.exit_code, result.stderr) == (0, "")
    assert any(text in result.stdout for text in ("shop", "/products/", "ann@desk"))


@pytest.mark.parametrize("words", QUERIES.values(), ids=QUERIES)
def test_commands_print_json(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run(*words, "--address", sidecar[0], "--json")

    texts = result.stdout.splitlines() if words == ["watch"] else [result.stdout]
    assert [type(json.loads(text)) for text in texts] == [dict] * len(texts)
    assert (result.exit_code, result.stderr) == (0, "")


def test_verdict_sends_budget_and_sets_exit_code(sidecar: tuple[str, Prepared]) -> None:
    words = "verdict --max-mismatch 0.1% --max-error 0.002 --confidence 99%"
    text, json_text = (run(*words.split(), "--address", sidecar[0], *extra) for extra in ([], ["--json"]))
    budget = sidecar[1].requests[0].budget

    assert (text.exit_code, json_text.exit_code) == (10, 10)
    assert (budget.max_mismatch, budget.max_error, budget.confidence) == (0.001, 0.002, 0.99)
    assert not budget.HasField("max_slower")
    assert text.stdout.startswith("INCONCLUSIVE  shop")
    assert json.loads(json_text.stdout)["state"] == "VERDICT_STATE_INCONCLUSIVE"


def test_json_keeps_proto_names_and_zeros(sidecar: tuple[str, Prepared]) -> None:
    (finding,) = json.loads(run("findings", "--each", "--address", sidecar[0], "--json").stdout)["findings"]

    assert finding["endpoint"] == {"service": "shop", "method": "GET", "route": "/products/{id}"}
    assert (finding["baseline_count"], finding["noise"], finding["kind"]) == ("0", False, "KIND_TYPE")


@pytest.mark.parametrize("words", QUERIES.values(), ids=QUERIES)
def test_refused_connection_is_reported_in_one_line(words: list[str]) -> None:
    address = f"127.0.0.1:{find_free_port()}"
    result = run(*words, "--address", address)

    assert result.exit_code == 3
    assert result.stderr.startswith(f"abreast: no sidecar answers at {address}; start one with")
    assert result.stderr.count("\n") == 1


def test_silent_server_is_reported_in_one_line() -> None:
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
def test_status_codes_map_to_exit_codes(code: grpc.StatusCode, exit_code: int) -> None:
    with serving(ListCauses=(code, "the reason")) as (address, _handler):
        result = run("findings", "--address", address)

    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (exit_code, 1, "")


def test_unimplemented_call_names_other_version() -> None:
    with serving() as (address, handler):
        del handler.table["ListCauses"]
        result = run("findings", "--address", address)

    assert (result.exit_code, "check that it is a sidecar of the same version" in result.stderr) == (5, True)


def test_findings_sends_filters(sidecar: tuple[str, Prepared]) -> None:
    words = "findings --service shop --method get --route /a --part body --kind type --kind order --impact breaking"
    run(*words.split(), "--noise", "--since", "2026-01-01T00:00Z", "--limit", "7", "--address", sidecar[0])
    (request,) = sidecar[1].requests

    assert (request.service, request.method, request.route, request.page_size) == ("shop", "GET", "/a", 7)
    assert (request.parts, request.kinds) == ([common.PART_BODY], [common.KIND_TYPE, common.KIND_ORDER])
    assert (request.impacts, request.include_noise) == ([common.IMPACT_BREAKING], True)
    assert (request.window.start.seconds, request.window.HasField("end")) == (1_767_225_600, False)


def test_window_that_ends_before_its_start_is_rejected(sidecar: tuple[str, Prepared]) -> None:
    result = run("status", "--since", "1h", "--until", "2h", "--address", sidecar[0])

    assert (result.exit_code, sidecar[1].requests) == (2, [])


def test_list_follows_pages_up_to_limit() -> None:
    page = api.ListFindingsResponse(findings=[api.Finding(id=1)], next_page_token="more")
    with serving(ListFindings=page) as (address, handler):
        result = run("findings", "--each", "--limit", "2500", "--json", "--address", address)

    assert [(request.page_size, request.page_token) for request in handler.requests] == [
        (1000, ""),
        (1000, "more"),
        (500, "more"),
    ]
    assert json.loads(result.stdout)["next_page_token"] == "more"


@pytest.mark.parametrize("options", [[], ["--each"]])
@pytest.mark.parametrize(("findings", "exit_code"), [([api.Finding(id=1)], 1), ([], 0)])
def test_findings_exit_code_reports_findings(findings: list[api.Finding], exit_code: int, options: list[str]) -> None:
    responses = {
        "ListFindings": api.ListFindingsResponse(findings=findings),
        "ListCauses": api.ListCausesResponse(causes=[api.Cause(lead=finding) for finding in findings]),
    }
    with serving(**responses) as (address, _handler):
        result = run("findings", "--exit-code", *options, "--address", address)

    assert result.exit_code == exit_code


def test_findings_prints_causes_and_the_number_of_others() -> None:
    page = api.ListCausesResponse(causes=[cause()], next_page_token="more", total_size=61, finding_count=1802)
    with serving(ListCauses=page) as (address, _handler):
        result = run("findings", "--limit", "1", "--address", address)

    assert "number → string" in result.stdout
    assert "61 causes of 1,802 findings; 60 more not shown: raise --limit, or add a filter" in result.stdout
    assert "abreast findings --cause 12" in result.stdout


def test_traffic_set_accepts_percent_and_fraction(sidecar: tuple[str, Prepared]) -> None:
    words = ["traffic", "set", "--new", "25%", "--sample-safe", "0.5", "--sample-unsafe", "0", "--reason"]
    run(*words, "first users", "--actor", "ann", "--address", sidecar[0])
    request = sidecar[1].requests[-1]

    assert (request.new_share, request.sample_safe, request.sample_unsafe) == (0.25, 0.5, 0.0)
    assert not request.HasField("baseline_share")
    assert (request.actor, request.reason) == ("ann", "first users")


@pytest.mark.parametrize(
    "words",
    [["--new", "25%"], ["--reason", "r"], ["--new", "2500%", "--reason", "r"], ["--new", "-1", "--reason", "r"]],
)
def test_traffic_set_rejects_invalid_shares(words: list[str], sidecar: tuple[str, Prepared]) -> None:
    result = run("traffic", "set", *words, "--address", sidecar[0])

    assert (result.exit_code, sidecar[1].requests) == (2, [])


@pytest.mark.parametrize(
    ("envoys", "expected"),
    [
        ([], "no Envoy is connected"),
        ([traffic_pb2.EnvoyStatus(node="edge-1", acknowledged_version=7)], "1 of 1 Envoys have not confirmed it yet"),
        ([traffic_pb2.EnvoyStatus(node="edge-1", acknowledged_version=8)], "1 of 1"),
        ([envoy(8, error="no")], "1 of 1"),
    ],
)
def test_rollback_fails_unless_every_envoy_confirms(envoys: list[Any], expected: str) -> None:
    answer = traffic_pb2.RollbackResponse(traffic=traffic(8, new_share=0.0), envoys=envoys)
    with serving(Rollback=answer) as (address, _handler):
        result = run("rollback", "--reason", "errors", "--address", address)

    assert result.exit_code == 1
    assert expected in result.stderr


def test_rollback_needs_no_reason_and_sends_one_request() -> None:
    answer = traffic_pb2.RollbackResponse(traffic=traffic(8, new_share=0.0), envoys=[envoy(8)])
    with serving(Rollback=answer) as (address, handler):
        result = run("rollback", "--address", address)

    assert result.exit_code == 0
    assert [type(request).__name__ for request in handler.requests] == ["RollbackRequest"]


def test_rollback_fails_if_ledger_has_not_recorded_it() -> None:
    answer = traffic_pb2.RollbackResponse(
        traffic=traffic(8, new_share=0.0), envoys=[envoy(8)], recording_error="the ledger does not know of it yet: x"
    )
    with serving(Rollback=answer) as (address, _handler):
        result = run("rollback", "--address", address)

    assert result.exit_code == 1
    assert "in force, but the ledger does not know of it yet: x" in result.stderr
    assert "stored" not in result.stderr


def test_rollback_without_sidecar_prints_override_in_envoy() -> None:
    result = run("rollback", "--address", "127.0.0.1:1", "--timeout", "2")

    assert result.exit_code == 3
    assert (
        "runtime_modify?abreast.weight.old=10000&abreast.weight.new_or_old=0&abreast.weight.drilled_or_old=0'"
        in result.stderr
    )


def test_status_works_without_traffic_settings() -> None:
    with serving(GetTraffic=(grpc.StatusCode.NOT_FOUND, "none")) as (address, _handler):
        result = run("status", "--json", "--address", address)

    assert json.loads(result.stdout)["traffic"] is None


@pytest.mark.parametrize("command", ["status", "traffic"])
def test_status_and_traffic_print_warnings(command: str) -> None:
    response = traffic_pb2.GetTrafficResponse(traffic=traffic(8, new_share=0.0), warnings=["Postgres lacks version 7"])
    with serving(GetTraffic=response) as (address, _handler):
        result = run(command, "--address", address)

    assert (result.exit_code, "Postgres lacks version 7" in result.stdout) == (0, True)


def test_address_is_read_from_environment(sidecar: tuple[str, Prepared]) -> None:
    result = CliRunner().invoke(abreast, ["status"], env={"ABREAST_SIDECAR": sidecar[0]})

    assert result.exit_code == 0


def process(*words: str, address: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "abreast_sidecar", *words]
    environment = {**os.environ, "ABREAST_SIDECAR": address, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


class EndlessUpdates(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield api.WatchFindingsResponse(finding=api.Finding(id=1))
            time.sleep(0.01)


def test_ctrl_c_exits_without_traceback() -> None:
    with serving(WatchFindings=EndlessUpdates()) as (address, _handler), process("watch", address=address) as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _out, error = watch.communicate(timeout=20)

    assert (watch.returncode, error.strip()) == (130, "")


def test_closed_pipe_is_no_error() -> None:
    with serving(WatchFindings=EndlessUpdates()) as (address, _handler), process("watch", address=address) as watch:
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
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert process.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in process.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")

    assert (result.exit_code, result.stderr) == (0, "")


def test_completion_script_completes_in_bash() -> None:
    script = "source <(abreast completion bash); COMP_WORDS=(abreast findings --impact b); COMP_CWORD=3; _abreast_completion abreast"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", f"{script}; echo ${{COMPREPLY[@]}}"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)

    assert process.stdout.split() == ["breaking"]


@pytest.mark.parametrize(
    ("shell", "sign"), [("zsh", "#compdef abreast"), ("fish", "complete --no-files --command abreast")]
)
def test_completion_knows_other_shells(shell: str, sign: str) -> None:
    result = run("completion", shell)

    assert (result.exit_code, sign in result.stdout, "_ABREAST_COMPLETE=" in result.stdout) == (0, True, True)


def test_doctor_reports_each_part_that_is_down() -> None:
    unused = f"127.0.0.1:{find_free_port()}"
    words = ["--address", unused, "--http", unused, "--envoy-admin", unused]
    words += ["--redis-url", f"redis://{unused}", "--postgres-url", f"postgresql://u:secret@{unused}/abreast"]
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


def test_prepared_responses_cover_the_api() -> None:
    """Prepared responses cover each call of the API, except for a stream that no command reads."""
    names = {m.name for s in (api, traffic_pb2) for d in s.DESCRIPTOR.services_by_name.values() for m in d.methods}

    assert names - set(answers()) == {"WatchTraffic"}
