"""`abreast up` as a separate process with real servers and two small services."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from abreast_sidecar.cli.up import PREFERRED_REDIS_PORT
from support import eventually
from support_up import START, Up, answers, free_port, running, service

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def data() -> Iterator[Path]:
    """Yield a folder that the user who runs Postgres for root may enter, unlike the folders of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="abreast-test-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def test_up_compares_responses_and_streams() -> None:
    """One run covers responses first, then streams whose clients leave or stay."""
    with running() as up:
        pair = up.ask()["x-abreast-pair"]
        for number in range(12):
            up.ask(f"/products/{number}")
        up.compared(13)
        found = up.json("findings")["findings"]
        shown = up.command("pair", pair)
        doctor = up.command("doctor")

        assert [(f["endpoint"]["route"], f["path"], f["kind"]) for f in found] == [
            ("/products/{id}", "$.price", "KIND_TYPE")
        ]
        assert shown.returncode == 0, shown.stderr
        assert '"price": "7.5"' in shown.stdout
        assert doctor.returncode == 0, doctor.stdout
        assert "release old-1" in doctor.stdout
        eventually(lambda: "old is captured" in up.text and "new is captured" in up.text, what="both are announced")

        seen = up.watch("/events", lines=12)
        up.watch("/events", lines=300)  # five seconds, and the capture has left
        up.compared(15)
        pairs = [one for one in up.json("pairs")["pairs"] if one["endpoint"]["route"] == "/events"]
        (event,) = [one for one in up.json("findings")["findings"] if one["endpoint"]["route"] == "/events"]

        assert seen[-2:] == [b'data: {"name": "any"}\n', b"\n"]
        assert [one["outcome"] for one in pairs] == ["OUTCOME_PARTIAL"] * 2
        assert (event["path"], event["kind"], event["count"]) == ("events[*].data.name", "KIND_CHANGED", "2")


def test_up_stops_all_its_servers_on_ctrl_c() -> None:
    """Test a start with a shell's `&` too, which ignores the signal."""
    old, new = free_port(), free_port()
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    with Up(old, new, before=ignoring) as up, service("old", old, up.redis_url), service("new", new, up.redis_url):
        assert up.process is not None
        mine = descendants(up.process.pid)
        code = up.stop(signal.SIGINT)

        assert (code, len(mine) >= 4) == (0, True)
        assert not [pid for pid in mine if Path(f"/proc/{pid}").exists()]
        assert answers(old)
        assert answers(new)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@pytest.fixture
def taken_redis_port() -> Iterator[None]:
    """Take the usual port of Redis, so that two runs on the same data are given another one that stays theirs."""
    with socket.socket() as server:
        with suppress(OSError):  # another run has it already
            server.bind(("127.0.0.1", PREFERRED_REDIS_PORT))
            server.listen()
        yield


@pytest.mark.usefixtures("taken_redis_port")
def test_up_continues_data_of_killed_run(data: Path) -> None:
    with running("--data", str(data)) as first:
        first.ask()
        first.compared(1)
        first.stop(signal.SIGKILL)
        redis_url = first.redis_url
        with Up(
            first.old, first.new, ("--data", str(data)), listen=first.listen, grpc=first.grpc, http=first.http
        ) as second:
            assert second.redis_url == redis_url
            assert len(second.json("findings")["findings"]) == 1


def test_up_rejects_data_directory_in_use(data: Path) -> None:
    with Up(free_port(), free_port(), ("--data", str(data))):
        second = Up(free_port(), free_port(), ("--data", str(data)))
        second.start()
        code = second.stop(signal.SIGCONT)  # it ends after the signal

        assert (code, second.text.count("\n")) == (3, 1)
        assert f"{data} is in use by another run" in second.text


def test_up_rejects_address_in_use() -> None:
    taken = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(taken)], stderr=subprocess.DEVNULL
    ) as other:
        eventually(lambda: listening(taken), what="the other program listens")
        up = Up(free_port(), free_port(), listen=taken)
        up.start()
        code = up.stop(signal.SIGCONT)
        other.terminate()

    assert (code, up.text.count("\n")) == (3, 1)
    assert f"127.0.0.1:{taken}, the address for users' requests (--listen), is used" in up.text


def listening(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def test_doctor_reports_version_without_middleware() -> None:
    with running(bare="new") as up:
        for _ in range(3):
            up.ask()
        eventually(lambda: captured(up) == {"old": "ok", "new": "fail"}, what="new alone is named")


def captured(up: Up) -> dict[str, str]:
    checks = up.json("doctor")["checks"]
    return {c["name"]: c["state"] for c in checks if c["part"] == "services" and c["name"] in {"old", "new"}}


def test_doctor_reports_sampling_that_is_off() -> None:
    with running("--sample", "0%") as up:
        up.ask()

        assert up.failures() == {("Envoy", "sampling")}
        assert up.command("doctor").returncode == 1


def test_up_and_doctor_report_version_that_is_down() -> None:
    old, new = free_port(), free_port()
    with Up(old, new) as up:
        eventually(lambda: f"old can't be reached: 127.0.0.1:{old}" in up.text, what="up says so")
        assert {("Envoy", "old"), ("Envoy", "new")} <= up.failures()
        with service("old", old, up.redis_url):
            eventually(lambda: "old is healthy" in up.text, what="up says so of old")
            failures = up.failures()

        assert "Envoy finds new unhealthy: GET /healthz" in up.text
        assert (("Envoy", "old") in failures, ("Envoy", "new") in failures) == (False, True)
        assert f"new does not answer at 127.0.0.1:{new} yet" in up.text
        assert f"http://127.0.0.1:{up.http}" in up.text


def test_doctor_reports_suspended_redis() -> None:
    with Up(free_port(), free_port()) as up:
        assert up.process is not None
        redis = next(pid for pid in descendants(up.process.pid) if "valkey" in Path(f"/proc/{pid}/comm").read_text())
        os.kill(redis, signal.SIGSTOP)
        try:
            failures = up.failures()
        finally:
            os.kill(redis, signal.SIGCONT)

        assert ("Redis", "reachable") in failures
        assert not [name for part, name in failures if part == "Postgres"]


def test_up_interrupted_at_start_leaves_no_process() -> None:
    up = Up(free_port(), free_port())
    with closing(up.log):
        process = up.start()
        eventually(lambda: "starting postgres" in up.text, within=START, what="it starts")
        mine = descendants(process.pid)
        code = up.stop(signal.SIGINT)

        assert (code, "Traceback" in up.text, bool(mine)) == (0, False, True)
    assert not [pid for pid in mine if runs(pid)]


def runs(pid: int) -> bool:
    """Return True once the process has ended; it may stay a zombie for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_up_restarts_ended_server_with_its_data() -> None:
    with running() as up:
        assert up.process is not None
        up.ask()
        up.compared(1)
        redis = next(pid for pid in descendants(up.process.pid) if "valkey" in Path(f"/proc/{pid}/comm").read_text())
        os.kill(redis, signal.SIGKILL)
        eventually(lambda: "redis ended (exit code -9) and is being restarted" in up.text, what="up says so")
        up.ask()
        up.compared(2)


def test_up_shares_override_those_of_data_directory(data: Path) -> None:
    with Up(free_port(), free_port(), ("--data", str(data))) as first:
        assert first.json("traffic")["traffic"]["sample_safe"] == 1.0
    with Up(free_port(), free_port(), ("--data", str(data), "--sample", "20%")) as second:
        assert second.json("traffic")["traffic"]["sample_safe"] == 0.2
    with Up(free_port(), free_port(), ("--data", str(data))) as third:
        assert third.json("traffic")["traffic"]["sample_safe"] == 0.2
