"""`abreast demo` on real stacks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from abreast_demo.planted_changes import PLANTED_ADDITIONS, PLANTED_NOISE, PLANTED_REGRESSIONS
from abreast_sidecar.stack.data import RUN_FOLDER_PREFIX, TEMPORARY_ROOT
from support import eventually, find_free_port

ABREAST = Path(sys.executable).with_name("abreast")
RUN_TIMEOUT_S = 250.0


class DemoProcess:
    """A running demo. It records the demo's processes and folders for `assert_cleaned_up`."""

    def __init__(self, *options: str) -> None:
        command = [str(ABREAST), "demo", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.processes: set[tuple[int, str]] = set()
        self.folders: set[Path] = set()
        self.errors: list[str] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._watch), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            for pid in list_descendants(self.process.pid):
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    self.processes.add((pid, read_start_time(pid)))
                    self.folders |= {
                        Path(path) for path in re.findall(f"{TEMPORARY_ROOT}/{RUN_FOLDER_PREFIX}\\w+", command)
                    }

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def finish(self, *, timeout: float = RUN_TIMEOUT_S) -> tuple[int, str]:
        assert self.process.stdout is not None
        try:
            output = self.process.stdout.read()
            code = self.process.wait(timeout)
        finally:
            self.close()
        return code, output

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._done.set()
        for thread in self._threads:
            thread.join(30)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def assert_cleaned_up(self) -> None:
        assert len(self.processes) >= 7, "redis, postgres, sidecar, envoy, cache, old, new"
        assert self.folders
        eventually(lambda: not any(itertools.starmap(is_alive, self.processes)), description="all its processes end")
        assert not [folder for folder in self.folders if folder.exists()]


def list_descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from list_descendants(int(child))


def read_sidecar_address(pid: int) -> str:
    """Return the address of the sidecar that a process has started."""
    for descendant in list_descendants(pid):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{descendant}/environ").read_text()
            if match := re.search(r"ABREAST_GRPC_LISTEN=([^\0]+)", environment):
                return match[1]
    raise AssertionError("no sidecar runs")


def read_start_time(pid: int) -> str:
    """Return what distinguishes a process from a later one with the same id."""
    return _read_stat(pid)[19]


def is_alive(pid: int, start_time: str) -> bool:
    try:
        stat = _read_stat(pid)
    except OSError:
        return False
    return stat[0] != "Z" and stat[19] == start_time


def _read_stat(pid: int) -> Sequence[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def start_demo(*options: str) -> Iterator[DemoProcess]:
    run = DemoProcess(*options)
    try:
        yield run
    finally:
        if run.process.stdout is not None and not run.process.stdout.closed:
            run.close()


def assert_ledger_holds_every_request(result: dict[str, Any]) -> None:
    assert sum(result["outcomes"].values()) == result["sampled"] == result["ledger"]["envoy"]
    assert result["ledger"]["pending"] == result["ledger"]["unaccounted"] == 0
    assert 0 < result["sampled"] <= result["requests"]


def test_demo_reports_exactly_the_planted_changes_and_cleans_up() -> None:
    options = ("--rate", "60", "--seconds", "40", "--listen", f"127.0.0.1:{find_free_port()}")
    with start_demo("--once", "--json", *options) as run:
        code, output = run.finish()
    assert output, "".join(run.errors)
    result = json.loads(output)

    regressions = [change.name for change in PLANTED_REGRESSIONS]
    assert result["planted"] == {"expected": regressions, "found": regressions, "missed": [], "unexpected": []}
    assert result["harmless"] == {change.name: True for change in (*PLANTED_NOISE, *PLANTED_ADDITIONS)}
    assert result["user_errors"] == 0
    assert {(row["endpoint"], row["path"], row["kind"]) for row in result["findings"]} >= {
        (change.location.endpoint, change.location.path, change.location.kind) for change in PLANTED_REGRESSIONS
    }
    assert all(row["count"] > 0 for row in result["findings"])
    assert_ledger_holds_every_request(result)
    assert result["outcomes"]["match"] + result["outcomes"]["mismatch"] >= 0.99 * result["sampled"]
    assert code == 0
    run.assert_cleaned_up()


@pytest.mark.timeout(600)
def test_demo_stays_open_until_ctrl_c_beside_another_demo() -> None:
    """The commands that the first demo prints work, and the second one does not meet it."""
    port = find_free_port()
    with start_demo("--seconds", "5", "--rate", "40", "--listen", f"127.0.0.1:{port}") as first:
        assert first.process.stdout is not None
        printed = list(itertools.takewhile(lambda line: "until Ctrl-C" not in line, first.process.stdout))
        commands = [match[1] for line in printed if (match := re.match(r"(\S*abreast .*)\n", line))]
        # Without an address, commands ask which stack, if another test has started one since.
        environment = {**os.environ, "ABREAST_SIDECAR": read_sidecar_address(first.process.pid)}
        for command in commands:
            if " watch" not in command:
                subprocess.run(shlex.split(command), check=True, timeout=60, env=environment)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/products/1", timeout=30) as response:
            assert response.status == 200
        with start_demo("--once", "--json", "--seconds", "5", "--rate", "40", "--seed", "2") as second:
            result = json.loads(second.finish()[1])
        first.process.send_signal(signal.SIGINT)
        code, _rest = first.finish()

    assert code == 0
    assert len(commands) == 6
    assert "The ledger: it holds every request that Envoy sampled\n" in printed
    assert result["user_errors"] == 0
    assert (
        150 <= result["requests"] <= 201
    )  # three steps of 5/3 s at 40 requests per second; a busy machine sends fewer
    assert_ledger_holds_every_request(result)
    assert not first.folders & second.folders
    first.assert_cleaned_up()
    second.assert_cleaned_up()
