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

WITHIN = 60.0  # seconds that a condition gets unless said otherwise: only a test that fails waits so long
POLLS = (0.01, 0.02, 0.03, 0.05, 0.07)  # seconds between the first looks
POLL = 0.1  # and between all others: a look costs CPU, which what it waits for needs too

__all__ = ["eventually", "eventually_async", "find_free_port", "free_ports", "frozen"]


def free_ports(number: int) -> tuple[int, ...]:
    """All different."""
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(find_free_port())
    return tuple(ports)


def eventually(condition: Callable[[], bool], *, within: float = WITHIN, what: str = "the condition") -> None:
    """Wait for a condition; fail with its name when it does not come true in time."""
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
    """Stop a process and its children (Postgres has one for each connection) until the end, or until they are thawed."""
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def thaw() -> None:
        for one in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGCONT)

    for one in family:
        os.kill(one, signal.SIGSTOP)
    try:
        yield thaw
    finally:
        thaw()
