"""A server that is away: how long to wait, and what to log. Once when it goes, rarely while it is gone, once when it is back."""

from __future__ import annotations

import asyncio
import random
import time

import structlog

SHORTEST = 0.05  # seconds
LONGEST = 2.0  # seconds
REMIND = 60.0  # seconds

log = structlog.get_logger()


class Outage:
    """Several may share one, each by a name: it is over when all who met it have been answered again. Each waits in its
    own time.
    """

    def __init__(self, what: str, **fields: str) -> None:
        self.what = what
        self.fields = fields
        self._waits: dict[str, float] = {}  # who meets it → how long to wait next
        self._since = self._logged = 0.0

    @property
    def on(self) -> bool:
        return self._since > 0

    def begin(self, error: Exception, who: str = "") -> None:
        now = time.monotonic()
        self._since = self._since or now
        self._waits.setdefault(who, SHORTEST)
        if not self._logged or now - self._logged > REMIND:
            self._logged = now
            away = round(now - self._since, 1)
            log.warning("a server is away", server=self.what, error=str(error), seconds=away, **self.fields)

    def end(self, who: str = "") -> None:
        self._waits.pop(who, None)
        if self._waits:
            return
        if self.on:
            away = round(time.monotonic() - self._since, 1)
            log.info("a server is back", server=self.what, seconds=away, **self.fields)
        self._since = self._logged = 0.0

    async def wait(self, stop: asyncio.Event, who: str = "") -> None:
        """Longer each time, and never in step with others; ends when `stop` is set."""
        wait = self._waits.get(who, SHORTEST)
        self._waits[who] = min(wait * 2, LONGEST)
        await pause(stop, wait * random.uniform(0.5, 1.0))  # noqa: S311  # not a secret


async def pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass
