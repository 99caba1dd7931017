"""Whether the sidecar can do its work: the sum of its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

CHECK_INTERVAL_S = 1.0  # seconds between checks
STARTUP_CHECK_INTERVAL_S = 0.1  # seconds, until all is well
CHECK_TIMEOUT_S = 3.0  # seconds that one check may take

log = structlog.get_logger(__name__)

ReadinessCheck = Callable[[], Awaitable[None]]  # raises what is wrong
ReadinessListener = Callable[[bool], Awaitable[None]]


class NotReadyError(Exception):
    """Says in plain words what a part waits for."""


class Readiness:
    def __init__(self, checks: Mapping[str, ReadinessCheck], listener: ReadinessListener) -> None:
        self.checks = checks
        self.listener = listener
        self.is_draining = False
        self.problems: dict[str, str] = dict.fromkeys(checks, "not checked yet")
        self._reported_ready: bool | None = None
        self._once_ready_parts: set[str] = set()  # parts that were ready once

    @property
    def is_ready(self) -> bool:
        return not self.problems and not self.is_draining

    def describe_parts(self) -> dict[str, str]:
        """Each part's state in words: ok, or what is wrong."""
        return {name: self.problems.get(name, "ok") for name in self.checks}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.gather(*[self._check(name) for name in self.checks])
            await self._report()
            await asyncio.sleep(STARTUP_CHECK_INTERVAL_S if self.problems else CHECK_INTERVAL_S)

    async def drain(self) -> None:
        self.is_draining = True
        await self._report()

    async def _check(self, name: str) -> None:
        problem = ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self.checks[name]()
        except TimeoutError:
            problem = f"no answer within {CHECK_TIMEOUT_S:g} s"
        except Exception as error:  # noqa: BLE001  # whatever is wrong, the part is not ready
            problem = str(error) or type(error).__name__
        if problem and self.problems.get(name) != problem:
            (log.warning if name in self._once_ready_parts and not self.is_draining else log.info)(
                "not ready", part=name, error=problem
            )
        elif not problem and name in self.problems:
            self._once_ready_parts.add(name)
            log.info("ready", part=name)
        self.problems.pop(name, None)
        if problem:
            self.problems[name] = problem

    async def _report(self) -> None:
        if self.is_ready != self._reported_ready:
            self._reported_ready = self.is_ready
            await self.listener(self.is_ready)
