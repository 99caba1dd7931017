"""Whether the sidecar can do its work: the sum of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

EVERY = 1.0  # seconds between checks
SOON = 0.1  # seconds, until all is well
PATIENCE = 3.0  # seconds that one check may take

log = structlog.get_logger(__name__)

Check = Callable[[], Awaitable[None]]  # raises what is wrong
Listener = Callable[[bool], Awaitable[None]]


class NotReadyError(Exception):
    """Says in plain words what a part waits for."""


class Readiness:
    def __init__(self, checks: Mapping[str, Check], listener: Listener) -> None:
        self.checks = checks
        self.listener = listener
        self.draining = False
        self.wrong: dict[str, str] = dict.fromkeys(checks, "not checked yet")
        self._told: bool | None = None
        self._began: set[str] = set()  # parts that were ready once

    @property
    def ready(self) -> bool:
        return not self.wrong and not self.draining

    def states(self) -> dict[str, str]:
        """Each part's state in words: ok, or what is wrong."""
        return {name: self.wrong.get(name, "ok") for name in self.checks}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.gather(*[self._check(name) for name in self.checks])
            await self._tell()
            await asyncio.sleep(SOON if self.wrong else EVERY)

    async def drain(self) -> None:
        self.draining = True
        await self._tell()

    async def _check(self, name: str) -> None:
        wrong = ""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.checks[name]()
        except TimeoutError:
            wrong = f"no answer within {PATIENCE:g} s"
        except Exception as error:  # noqa: BLE001  # whatever is wrong, the part is not ready
            wrong = str(error) or type(error).__name__
        if wrong and self.wrong.get(name) != wrong:
            (log.warning if name in self._began and not self.draining else log.info)(
                "not ready", part=name, error=wrong
            )
        elif not wrong and name in self.wrong:
            self._began.add(name)
            log.info("ready", part=name)
        self.wrong.pop(name, None)
        if wrong:
            self.wrong[name] = wrong

    async def _tell(self) -> None:
        if self.ready != self._told:
            self._told = self.ready
            await self.listener(self.ready)
