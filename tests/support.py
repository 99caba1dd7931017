"""Small helpers for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from abreast_sidecar.embedded import free_port

__all__ = ["eventually", "eventually_async", "free_port"]


def eventually(condition: Callable[[], bool], *, within: float = 15.0, what: str = "the condition") -> None:
    """Wait for a condition; fail with its name when it does not come true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within:g} s")
        time.sleep(0.02)


async def eventually_async(
    condition: Callable[[], Awaitable[bool]], *, within: float = 15.0, what: str = "the condition"
) -> None:
    deadline = time.monotonic() + within
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within:g} s")
        await asyncio.sleep(0.02)
