"""Small helpers for tests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from abreast_sidecar.cli.up import PREFERRED_REDIS_PORT
from abreast_sidecar.stack.process import is_port_free

WITHIN = 60.0  # default deadline in seconds, generous because only failing tests reach it
POLLS = (0.01, 0.02, 0.03, 0.05, 0.07)  # seconds between the first polls
POLL = 0.1  # seconds between later polls, which cost CPU that the servers need

PORTS_PER_WORKER = 2_500
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4


def _generate_ports() -> Iterator[int]:
    first = 10_000 + WORKER * PORTS_PER_WORKER
    start = random.randrange(PORTS_PER_WORKER)
    for number in itertools.count(start):
        port = first + number % PORTS_PER_WORKER
        if port != PREFERRED_REDIS_PORT:  # which `abreast up` takes if it is free
            yield port


_ports = _generate_ports()


def find_free_port() -> int:
    """Return a port that no other test gets and no server of `abreast up` chooses, so it stays free until it is used."""
    return next(port for port in _ports if is_port_free("127.0.0.1", port))


def free_ports(number: int) -> tuple[int, ...]:
    """Return different free ports."""
    return tuple(find_free_port() for _ in range(number))


def eventually(condition: Callable[[], bool], *, within: float = WITHIN, description: str = "the condition") -> None:
    """Wait for a condition. Fail with `description` if it does not become true in time."""
    deadline, polls = time.monotonic() + within, iter(POLLS)
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{description} did not come true within {within:g} s")
        time.sleep(next(polls, POLL))


async def eventually_async(
    condition: Callable[[], Awaitable[bool]], *, within: float = WITHIN, description: str = "the condition"
) -> None:
    deadline, polls = time.monotonic() + within, iter(POLLS)
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{description} did not come true within {within:g} s")
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
