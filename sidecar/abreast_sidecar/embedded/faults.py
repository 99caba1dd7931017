"""What a fire drill breaks, and how it is repaired."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abreast_sidecar.errors import ServerError

if TYPE_CHECKING:
    from abreast_sidecar.embedded.stack import Stack

PROCESSES = Path("/proc")  # where there is none, only the process that is named is known
END_TIMEOUT = 5.0  # seconds that the kernel gets for a killed process
POLL = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class Fault:
    breaks: Callable[[], None]
    repairs: Callable[[], None]


def of_stack(stack: Stack) -> dict[str, Fault]:
    """The parts that are Abreast's own."""

    def fault(name: str, *, kill: bool) -> Fault:
        return Fault(lambda: stack.take_down(name, kill=kill), lambda: stack.bring_back(name))

    return {
        "sidecar-killed": fault("sidecar", kill=True),
        "redis-down": fault("redis", kill=True),
        "postgres-down": fault("postgres", kill=False),
    }


def of_run(stack: Stack, name: str, new_pid: int) -> Fault:
    """Of a stack around services that somebody else started. Raise ServerError for what can't be done."""
    own = of_stack(stack)
    if name in own:
        return own[name]
    if name not in OF_PROCESS:
        raise ServerError(
            f"{name}: nothing here can make a service of yours fail so; abreast drill does it with the demo's shop"
        )
    if not new_pid:
        raise ServerError(
            f"{name}: abreast up knows where new listens and not which process it is; name that with --new-pid"
        )
    check(new_pid, set(family(os.getpid())))
    return OF_PROCESS[name](new_pid)


def hangs(pid: int) -> Fault:
    return Fault(lambda: _send(pid, signal.SIGSTOP), lambda: _send(pid, signal.SIGCONT))


def killed(pid: int) -> Fault:
    """Whoever started the process has to start it again."""

    def kill() -> None:
        found = family(pid)
        _send(pid, signal.SIGKILL)
        deadline = time.monotonic() + END_TIMEOUT
        while any(map(_runs, found)) and time.monotonic() < deadline:
            time.sleep(POLL)

    return Fault(kill, lambda: None)


OF_PROCESS: dict[str, Callable[[int], Fault]] = {"new-killed": killed, "new-hangs": hangs}


def family(pid: int) -> list[int]:
    """The process and all that it has started, such as a server's workers: they serve on without it."""
    children: dict[int, list[int]] = {}
    for stat in PROCESSES.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])  # a name may hold anything, `)` too
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:  # grows meanwhile
        found += children.get(one, [])
    return found


def check(pid: int, ours: set[int]) -> None:
    """Raise ServerError where the process is none that may be broken; `ours` are processes that must go on."""
    if pid <= 1 or ours & set(family(pid)):
        raise ServerError(f"process {pid} runs Abreast itself; name the one that runs new")
    try:
        for one in family(pid):
            os.kill(one, 0)
    except ProcessLookupError:
        raise ServerError(f"there is no process {pid}; name the one that runs new") from None
    except PermissionError:
        raise ServerError(
            f"process {pid} is another user's, and may not be broken by the one who runs abreast up"
        ) from None


def described(pid: int) -> str:
    """`process 42 (uvicorn shop:app)`; without its command where that is not known."""
    try:
        words = (PROCESSES / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({' '.join(words).strip()})"


def _send(pid: int, number: signal.Signals) -> None:
    for one in family(pid):
        with suppress(ProcessLookupError):
            os.kill(one, number)


def _runs(pid: int) -> bool:
    """Also false for one that has ended and that nobody has taken note of yet."""
    try:
        return (PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
