"""What has to be done now and then. Any number may run at once: each chore is atomic, or done by one at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from abreast_sidecar.compare import Rules
from abreast_sidecar.errors import LedgerError, RedisError
from abreast_sidecar.housekeeping.cache import find_misses
from abreast_sidecar.housekeeping.envoy import EnvoyError, bring_envoy
from abreast_sidecar.housekeeping.examples import trim_examples
from abreast_sidecar.housekeeping.latency import find_slow
from abreast_sidecar.housekeeping.missing import find_missing
from abreast_sidecar.housekeeping.noise import decide_noise
from abreast_sidecar.housekeeping.reports import bring_reports
from abreast_sidecar.housekeeping.retention import drop_days, open_days
from abreast_sidecar.outage import Outage, pause
from abreast_sidecar.read import connect, forget_consumers, shards, sweep, translated
from abreast_sidecar.rejudge import Learning, rejudge
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.rules import end_expired

SWEEP = 0.5  # seconds between two turns of a chore
REPORTS = 1.0
ENVOYS = 1.0
NOISE = 1.0
RULES = 0.5
RULES_STEPS = 200  # of judging again in one turn
SLOW = 5.0
EXAMPLES = 60.0
CONSUMERS = 60.0
DAYS = 600.0
CONSUMER_IDLE = 600.0  # seconds after which a consumer without entries is taken for dead

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chore:
    name: str
    period: float  # seconds
    servers: tuple[str, ...]  # that it can't do without
    turn: Callable[[], Awaitable[None]]


class Housekeeping:
    """`last_beat` is when it last swept (time.monotonic); `alive` is whether it runs."""

    def __init__(self, settings: Settings, *, name: str = "housekeeping") -> None:
        self.name = name
        self.alive = False
        self.last_beat = 0.0
        self._settings = settings
        self._rules = Rules.ignoring(settings.volatile_headers)
        self._redis = connect(settings.redis_url)
        self._database = Database(settings.postgres_url)
        self._outages = {
            server: Outage(server, by=name) for server in ("redis", "postgres", *settings.envoy_admin)
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set. Lost servers are waited for."""
        self.alive = True
        try:
            await self._database.open()
            async with asyncio.TaskGroup() as group:
                for chore in self._chores():
                    group.create_task(self._repeat(chore, stop), name=f"abreast {chore.name}")
        finally:
            self.alive = False
            await self._database.close()
            await self._redis.aclose()

    def _chores(self) -> list[Chore]:
        envoys = [
            Chore(f"envoy {address}", ENVOYS, ("postgres", address), self._envoy(address))
            for address in self._settings.envoy_admin
        ]
        return [
            Chore("sweep", SWEEP, ("redis",), self._sweep),
            Chore("reports", REPORTS, ("redis", "postgres"), self._bring_reports),
            Chore("noise", NOISE, ("postgres",), self._decide_noise),
            Chore("rules", RULES, ("postgres",), self._rejudge),
            Chore("latency", SLOW, ("postgres",), self._find_slow),
            Chore("cache", SLOW, ("postgres",), self._find_misses),
            Chore("missing", SLOW, ("postgres",), self._find_missing),
            Chore("examples", EXAMPLES, ("postgres",), self._trim_examples),
            Chore("consumers", CONSUMERS, ("redis",), self._forget_consumers),
            Chore("days", DAYS, ("postgres",), self._turn_days),
            *envoys,
        ]

    async def _repeat(self, chore: Chore, stop: asyncio.Event) -> None:
        while not stop.is_set():
            outage = None
            try:
                await chore.turn()
            except RedisError as error:
                outage = self._away("redis", error, chore)
            except LedgerError as error:
                outage = self._away("postgres", error, chore)
            except EnvoyError as error:
                outage = self._away(chore.servers[-1], error, chore)
            except Exception:
                log.exception("a chore failed", chore=chore.name)
            else:
                for server in chore.servers:
                    self._outages[server].end(chore.name)
            await (outage.wait(stop, chore.name) if outage else pause(stop, chore.period))

    def _away(self, server: str, error: Exception, chore: Chore) -> Outage:
        outage = self._outages[server]
        outage.begin(error, chore.name)
        return outage

    async def _sweep(self) -> None:
        with translated():
            for keys in await shards(self._redis):
                await sweep(self._redis, keys)
        self.last_beat = time.monotonic()

    async def _bring_reports(self) -> None:
        async with self._database.connection() as connection:
            await bring_reports(connection, self._redis)

    def _envoy(self, address: str) -> Callable[[], Awaitable[None]]:
        async def turn() -> None:
            async with self._database.connection() as connection:
                await bring_envoy(connection, address)

        return turn

    async def _decide_noise(self) -> None:
        async with self._database.connection() as connection:
            await decide_noise(connection)

    async def _rejudge(self) -> None:
        async with self._database.connection() as connection:
            await end_expired(connection)
            learning = Learning(self._settings.postgres_url)
            for _ in range(RULES_STEPS):
                if not await rejudge(connection, learning, self._rules):
                    return

    async def _find_slow(self) -> None:
        async with self._database.connection() as connection:
            await find_slow(connection)

    async def _find_misses(self) -> None:
        async with self._database.connection() as connection:
            await find_misses(connection)

    async def _find_missing(self) -> None:
        async with self._database.connection() as connection:
            await find_missing(connection)

    async def _trim_examples(self) -> None:
        async with self._database.connection() as connection:
            await trim_examples(connection, most=self._settings.examples_bytes)

    async def _forget_consumers(self) -> None:
        with translated():
            for keys in await shards(self._redis):
                await forget_consumers(self._redis, keys, idle=CONSUMER_IDLE)

    async def _turn_days(self) -> None:
        async with self._database.connection() as connection:
            await open_days(connection)
            await drop_days(
                connection,
                retention_days=self._settings.retention_days,
                retention_bytes=self._settings.retention_bytes,
            )
