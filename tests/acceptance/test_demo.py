"""`abreast demo`, as a person or a machine starts it."""

from __future__ import annotations

import contextlib
import itertools
import json
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

PLANTED = [plant.name for plant in PLANTED_REGRESSIONS]
HARMLESS = [plant.name for plant in (*PLANTED_NOISE, *PLANTED_ADDITIONS)]
ABREAST = Path(sys.executable).with_name("abreast")
LONGEST = 150.0  # seconds, on a machine that has other things to do


class Run:
    """A demo under way: notes its processes and folders, to see afterwards whether they are gone."""

    def __init__(self, *options: str) -> None:
        command = [str(ABREAST), "demo", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started: set[tuple[int, str]] = set()
        self.folders: set[Path] = set()
        self.errors: list[str] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._note), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _note(self) -> None:
        while not self._done.wait(0.1):
            for pid in descendants(self.process.pid):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text()
                    self.started.add((pid, start_time(pid)))
                    self.folders |= {
                        Path(found) for found in re.findall(f"{TEMPORARY_ROOT}/{RUN_FOLDER_PREFIX}\\w+", words)
                    }

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def finish(self, *, timeout: float = LONGEST) -> tuple[int, str]:
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

    def left_nothing(self) -> None:
        assert len(self.started) >= 7, "redis, postgres, sidecar, envoy, cache, old, new"
        assert self.folders
        eventually(lambda: not [one for one in self.started if lives(*one)], what="all its processes end")
        assert not [folder for folder in self.folders if folder.exists()]


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def start_time(pid: int) -> str:
    """Tells a process from a later one with the same id."""
    return _stat(pid)[19]


def lives(pid: int, started: str) -> bool:
    try:
        stat = _stat(pid)
    except OSError:
        return False
    return stat[0] != "Z" and stat[19] == started


def _stat(pid: int) -> Sequence[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def running(*options: str) -> Iterator[Run]:
    run = Run(*options)
    try:
        yield run
    finally:
        if run.process.stdout is not None and not run.process.stdout.closed:
            run.close()


@pytest.mark.timeout(200)
def test_a_run_finds_what_was_planted_and_nothing_else_and_leaves_nothing() -> None:
    """One test, since each run takes its 15 seconds of traffic."""
    with running("--once", "--json", "--listen", f"127.0.0.1:{find_free_port()}") as run:
        code, output = run.finish()
    assert output, "".join(run.errors)
    result = json.loads(output)

    assert result["planted"] == {"expected": PLANTED, "found": PLANTED, "missed": [], "unexpected": []}
    assert result["harmless"] == dict.fromkeys(HARMLESS, True)
    assert result["user_errors"] == 0
    assert {(row["endpoint"], row["path"], row["kind"]) for row in result["findings"]} == {
        (plant.location.endpoint, plant.location.path, plant.location.kind) for plant in PLANTED_REGRESSIONS
    }
    assert all(row["count"] > 0 for row in result["findings"])
    assert_summed(result)
    assert result["outcomes"]["match"] + result["outcomes"]["mismatch"] >= 0.99 * result["sampled"]
    assert code == 0
    run.left_nothing()


def assert_summed(result: dict[str, Any]) -> None:
    assert sum(result["outcomes"].values()) == result["sampled"] == result["ledger"]["envoy"]
    assert result["ledger"]["pending"] == result["ledger"]["unaccounted"] == 0
    assert 0 < result["sampled"] <= result["requests"]


@pytest.mark.timeout(200)
def test_two_at_the_same_time_do_not_meet() -> None:
    options = ("--once", "--json", "--seconds", "8", "--rate", "40")
    with running(*options, "--seed", "1") as first, running(*options, "--seed", "2") as second:
        results = [json.loads(run.finish()[1]) for run in (first, second)]

    for result in results:
        assert result["user_errors"] == 0
        assert_summed(result)
    first.left_nothing()
    second.left_nothing()


@pytest.mark.timeout(200)
def test_the_shop_stays_open_until_ctrl_c_and_what_is_proposed_works() -> None:
    port = find_free_port()
    with running("--seconds", "5", "--rate", "40", "--listen", f"127.0.0.1:{port}") as run:
        assert run.process.stdout is not None
        printed = list(itertools.takewhile(lambda line: "until Ctrl-C" not in line, run.process.stdout))
        proposed = [match[1] for line in printed if (match := re.match(r"(\S*abreast .*)\n", line))]
        for command in proposed:
            if " watch" not in command:
                subprocess.run(shlex.split(command), check=True, timeout=60)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/products/1", timeout=10) as answer:
            assert answer.status == 200
        run.process.send_signal(signal.SIGINT)
        code, _rest = run.finish(timeout=30)

    assert code == 0
    assert len(proposed) == 6
    run.left_nothing()
