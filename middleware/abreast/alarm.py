"""Wakes a background task: when there is work, or after a time. An asyncio.Event with a timeout costs five times as much."""

from __future__ import annotations

import asyncio


class WakeEvent:
    """Of one task, in the thread of its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        self._wake()

    def clear(self) -> None:
        """Forget that it rang."""
        self._is_set = False

    async def wait(self, seconds: float) -> bool:
        """Whether it rang within the time, or had before. It is silent then."""
        if not self._is_set and seconds > 0:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        was_set, self._is_set = self._is_set, False
        return was_set

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
