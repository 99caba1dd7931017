"""Small helpers for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from abreast_sidecar.stack.process import find_free_port

WITHIN = 60.0  # default deadline in seconds, generous because only failing tests reach it
POLLS = (0.01, 0.02, 0.03, 0.05, 0.07)  # seconds between the first polls
POLL = 0.1  # seconds between later polls, which cost CPU that the servers need

__all__ = ["eventually", "eventually_async", "find_free_port", "free_ports", "frozen"]


def free_ports(number: int) -> tuple[int, ...]:
    """Return different free ports."""
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(find_free_port())
    return tuple(ports)


def eventually(condition: Callable[[], bool], *, within: float = WITHIN, what: str = "the condition") -> None:
    """Wait for a condition. Fail with `what` if it does not become true in time."""
    deadline, polls = time.monotonic() + within, iter(POLLS)
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within:g} s")
        time.sleep(next(polls, POLL))


async def eventually_async(
    condition: Callable[[], Awaitable[bool]], *, within: float = WITHIN, what: str = "the condition"
) -> None:
    deadline, polls = time.monotonic() + within, iter(POLLS)
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within:g} s")
        await asyncio.sleep(next(polls, POLL))


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[Callable[[], None]]:
    """Suspend a process and its children, such as Postgres's sessions, until the end or a call of the yielded function."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def thaw() -> None:
        for member in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGCONT)

    for member in pids:
        os.kill(member, signal.SIGSTOP)
    try:
        yield thaw
    finally:
        thaw()
