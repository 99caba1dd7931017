"""A server that is away: how long to wait, and what to log. Once when it goes, rarely while it is gone, once when it is back."""

from __future__ import annotations

import asyncio
import random
import time

import structlog

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
            log.warning(
                "a server is away", server=self.server, error=str(error), seconds=outage_s, **self.fields
            )

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
