"""What a drill breaks in a stack that runs: as long as it is connected, and not longer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from abreast_sidecar.embedded import breaking, faults
from abreast_sidecar.embedded.breaking import Breaker, Broken
from abreast_sidecar.embedded.faults import Fault
from abreast_sidecar.embedded.record import RunRecord, drill_socket
from abreast_sidecar.errors import ServerError
from support import eventually, free_port

FACTS = {"url": "http://127.0.0.1:1", "service": "shop", "shop": False, "drills": ["redis-down"]}
HELD = (
    "import sys, time; from abreast_sidecar.embedded.breaking import Broken\n"
    "with Broken(sys.argv[1]) as broken:\n"
    "    broken.breaks('redis-down', 0); print('broken', flush=True); time.sleep(600)"
)
PARENT = (
    "import subprocess, time; subprocess.Popen(['sleep', '600']); print('runs', flush=True); time.sleep(600)"
)


@dataclass
class Stack:
    """Stands for one that runs: notes what is done to it."""

    address: str
    done: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    troubled: bool = False

    def find(self, name: str, new_pid: int) -> Fault:
        if name != "redis-down":
            raise ServerError(f"no {name} of {new_pid}")
        return Fault(lambda: self.done.append("broken"), self.repairs)

    def repairs(self) -> None:
        self.done.append("repaired")
        if self.troubled:
            raise ServerError("redis does not start")

    def is_repaired(self) -> bool:
        return self.done == ["broken", "repaired"]


@pytest.fixture
def stack() -> Iterator[Stack]:
    stack, over = Stack(f"127.0.0.1:{free_port()}"), threading.Event()
    with (
        RunRecord(stack.address, {}),
        Breaker(stack.address, FACTS, stack.find, stack.said.append) as breaker,
    ):

        def serve() -> None:
            while not over.is_set():
                breaker.serve(0.02)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield stack
        finally:
            over.set()
            thread.join()


def test_what_is_broken_is_repaired_on_demand(stack: Stack) -> None:
    with Broken(stack.address) as broken:
        assert broken.facts == FACTS
        broken.check("redis-down", 0)
        assert not stack.done
        broken.breaks("redis-down", 0)
        assert stack.done == ["broken"]
        broken.repairs()

    assert stack.is_repaired()
    assert stack.said == ["a drill: redis-down", "the drill is over: redis-down"]


def test_what_is_broken_is_repaired_when_the_drill_is_killed(stack: Stack) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, stack.address], stdout=subprocess.PIPE) as drill:
        assert drill.stdout is not None
        assert drill.stdout.readline() == b"broken\n"
        assert stack.done == ["broken"]
        drill.kill()

    eventually(stack.is_repaired, what="it is repaired")


def test_no_drill_lasts_for_ever(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaking, "LASTS", 0.2)
    with Broken(stack.address) as broken:
        broken.breaks("redis-down", 0)
        eventually(stack.is_repaired, what="it is repaired")
        with pytest.raises(ServerError, match="does not answer"):
            broken.repairs()


def test_one_drill_at_a_time(stack: Stack) -> None:
    with Broken(stack.address) as broken:
        broken.breaks("redis-down", 0)
        with pytest.raises(ServerError, match="another drill is under way"):
            Broken(stack.address)
        with pytest.raises(ServerError, match="redis-down is not over yet"):
            broken.breaks("redis-down", 0)
    eventually(stack.is_repaired, what="it is repaired")
    with Broken(stack.address) as broken:
        assert broken.facts


def test_what_is_refused_or_makes_no_sense_breaks_nothing(stack: Stack) -> None:
    with Broken(stack.address) as broken, pytest.raises(ServerError, match="no new-errors of 7"):
        broken.check("new-errors", 7)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(drill_socket(stack.address)))
        raw.recv(4096)
        for line in (b"{}\n", b"[]\n", b"7\n", b"\xff\n", b'{"do": "break", "drill": [], "new": "x"}\n'):
            raw.sendall(line)
            assert b'"error"' in raw.recv(4096), line

    assert not stack.done


def test_that_a_part_does_not_start_again_is_told_to_the_drill_or_to_the_run(stack: Stack) -> None:
    stack.troubled = True
    with Broken(stack.address) as broken:
        broken.breaks("redis-down", 0)
        with pytest.raises(ServerError, match="redis does not start"):
            broken.repairs()
        broken.breaks("redis-down", 0)

    eventually(lambda: "redis does not start" in stack.said, what="the run says it")


def test_where_nothing_runs_there_is_nothing_to_break() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match="no abreast up or abreast demo of this user"):
        Broken(address)
    with RunRecord(address, {}):
        with Breaker(address, FACTS, Stack(address).find, print):
            assert drill_socket(address).exists()
        assert not drill_socket(address).exists()


@contextlib.contextmanager
def parent() -> Iterator[list[int]]:
    """A process with a child; their ids."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        found = faults.family(process.pid)
        try:
            yield found
        finally:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_a_process_hangs_or_dies_with_all_that_it_has_started() -> None:
    with parent() as pids:
        assert len(pids) == 2
        fault = faults.hangs(pids[0])
        fault.breaks()
        eventually(lambda: {state(pid) for pid in pids} == {"T"}, what="both are stopped")
        fault.repairs()
        eventually(lambda: "T" not in {state(pid) for pid in pids}, what="both run")

        faults.killed(pids[0]).breaks()

        assert {state(pid) for pid in pids} <= {"Z", "gone"}


def test_what_must_go_on_is_not_broken() -> None:
    with parent() as pids:
        faults.check(pids[0], {os.getpid()})
        with pytest.raises(ServerError, match="runs Abreast itself"):
            faults.check(pids[0], {pids[1]})
        with pytest.raises(ServerError, match="runs Abreast itself"):
            faults.check(1, {os.getpid()})
        assert faults.described(pids[1]) == f"process {pids[1]} (sleep 600)"
    with pytest.raises(ServerError, match=f"there is no process {pids[0]}"):
        faults.check(pids[0], {os.getpid()})


def test_the_process_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _number: int) -> None:
        raise PermissionError

    with parent() as pids, monkeypatch.context() as patched:
        patched.setattr(os, "kill", refuse)
        with pytest.raises(ServerError, match="is another user's"):
            faults.check(pids[0], set())
