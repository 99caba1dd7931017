"""Readiness of the sidecar's parts, and the backlog of pairs in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import redis.asyncio as aioredis
import structlog
from redis.exceptions import RedisError

from abreast_sidecar.redis_client import list_shards

CHECK_INTERVAL_S = 1.0
STARTUP_CHECK_INTERVAL_S = 0.1  # until all parts are ready
CHECK_TIMEOUT_S = 3.0

log = structlog.get_logger(__name__)

ReadinessCheck = Callable[[], Awaitable[None]]  # raises an error that describes the problem
ReadinessListener = Callable[[bool], Awaitable[None]]


class PairBacklog:
    """Counts the pairs of a service that wait in Redis."""

    def __init__(self, client: aioredis.Redis) -> None:
        self.client = client

    async def count(self, service: str) -> int | None:
        """Count pairs that wait for a copy or for a worker. Return None while Redis can't be reached."""
        pairs = 0
        try:
            for keys in await list_shards(self.client):
                if keys.service == service:
                    pairs += await self.client.zcard(keys.due) + await self.client.xlen(keys.ready)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("can't count the pairs that wait in redis", error=str(error))
            return None
        return pairs


class NotReadyError(Exception):
    """A part is not ready. The message names what it waits for."""


class Readiness:
    """Checks the parts of the sidecar once a second, and reports when all of them become ready or one stops being so."""

    def __init__(self, checks: Mapping[str, ReadinessCheck], listener: ReadinessListener) -> None:
        self.checks = checks
        self.listener = listener
        self.is_draining = False
        self.problems: dict[str, str] = dict.fromkeys(checks, "not checked yet")  # by part
        self._reported_ready: bool | None = None
        self._once_ready_parts: set[str] = set()

    @property
    def is_ready(self) -> bool:
        return not self.problems and not self.is_draining

    def describe_parts(self) -> dict[str, str]:
        """Return `ok` or the problem of each part."""
        return {name: self.problems.get(name, "ok") for name in self.checks}

    async def run(self) -> None:
        """Check until cancelled."""
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
            problem = f"no response within {CHECK_TIMEOUT_S:g} s"
        except Exception as error:  # noqa: BLE001  # any error means that the part is not ready
            problem = str(error) or type(error).__name__
        if problem and self.problems.get(name) != problem:
            is_unexpected = name in self._once_ready_parts and not self.is_draining
            (log.warning if is_unexpected else log.info)("not ready", part=name, error=problem)
        elif not problem and name in self.problems:
            self._once_ready_parts.add(name)
            log.info("part ready", part=name)
        self.problems.pop(name, None)
        if problem:
            self.problems[name] = problem

    async def _report(self) -> None:
        if self.is_ready != self._reported_ready:
            self._reported_ready = self.is_ready
            await self.listener(self.is_ready)
