"""A server that is away: how long to wait, and what to log. Once when it goes, rarely while it is gone, once when it is back."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Coroutine
from typing import Any

import structlog

CANCEL_RETRY_S = 5.0  # seconds; longer than any of them takes to clean up


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and return once they are over, whatever they raised.

    Before Python 3.12 `asyncio.wait_for`, by which drivers wait for Redis and Postgres, swallows a cancellation that comes
    together with the answer. A loop would then go on for ever, so it is told again.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=CANCEL_RETRY_S)
    await asyncio.gather(*tasks, return_exceptions=True)


class Notifier:
    """Wakes everyone who waits for it. Look at the state, and wait only then: nothing is remembered."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify_all(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait(self) -> Coroutine[Any, Any, Any]:
        """For the next ring after this call, also where a task waits that starts later."""
        return self._event.wait()


MIN_BACKOFF_S = 0.05  # seconds
MAX_BACKOFF_S = 2.0  # seconds
LOG_REMINDER_S = 60.0  # seconds

log = structlog.get_logger()


class Outage:
    """Several may share one, each by a name: it is over when all who met it have been answered again. Each waits in its
    own time.
    """

    def __init__(self, server: str, **fields: str) -> None:
        self.server = server
        self.fields = fields
        self._backoffs_s: dict[str, float] = {}  # who meets it → how long to wait next
        self._started_at = self._last_logged_at = 0.0

    @property
    def is_active(self) -> bool:
        return self._started_at > 0

    def record_failure(self, error: Exception, caller: str = "") -> None:
        now = time.monotonic()
        self._started_at = self._started_at or now
        self._backoffs_s.setdefault(caller, MIN_BACKOFF_S)
        if not self._last_logged_at or now - self._last_logged_at > LOG_REMINDER_S:
            self._last_logged_at = now
            outage_s = round(now - self._started_at, 1)
            log.warning("a server is away", server=self.server, error=str(error), seconds=outage_s, **self.fields)

    def record_success(self, caller: str = "") -> None:
        self._backoffs_s.pop(caller, None)
        if self._backoffs_s:
            return
        if self.is_active:
            outage_s = round(time.monotonic() - self._started_at, 1)
            log.info("a server is back", server=self.server, seconds=outage_s, **self.fields)
        self._started_at = self._last_logged_at = 0.0

    async def back_off(self, stop: asyncio.Event, caller: str = "") -> None:
        """Longer each time, and never in step with others; ends when `stop` is set."""
        delay_s = self._backoffs_s.get(caller, MIN_BACKOFF_S)
        self._backoffs_s[caller] = min(delay_s * 2, MAX_BACKOFF_S)
        await wait_or_stop(stop, delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # not a secret


async def wait_or_stop(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


OPTIONAL_CALL_TIMEOUT_S = 1.0  # seconds


async def error_within(task: asyncio.Task[Any]) -> str:
    """What is amiss with the task after so long; empty for nothing. Never cancelled: a driver that waits for a frozen
    Postgres would not let go, and goes on once it thaws.
    """
    task.add_done_callback(lambda future: future.cancelled() or future.exception())  # whoever left, it is no news
    await asyncio.wait({task}, timeout=OPTIONAL_CALL_TIMEOUT_S)
    if not task.done():
        return f"postgres has not answered for {OPTIONAL_CALL_TIMEOUT_S:g} s"
    error = task.exception()
    return str(error) if error else ""


# Allocations between two collections. Captures and differences hold no cycles, so that next to all of what a collection
# walks is alive; with the default of 700 that was a fifth of a worker's time.
GC_THRESHOLDS = (50_000, 20, 50)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Like asyncio.run, for a process of the sidecar's own; what was imported until now is never collected."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=_find_loop_factory()) as runner:
        runner.run(main)


def _find_loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    return uvloop.new_event_loop
