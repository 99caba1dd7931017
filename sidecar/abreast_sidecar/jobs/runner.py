"""What has to be done now and then. Any number may run at once: each chore is atomic, or done by one at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from abreast_sidecar.aio import Outage, wait_or_stop
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import LedgerError, RedisError
from abreast_sidecar.jobs.detectors import detect_misses, detect_slowdowns, detect_unanswered
from abreast_sidecar.jobs.envoy_counts import EnvoyError, collect_envoy_counts
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.jobs.reports import collect_reports
from abreast_sidecar.jobs.retention import drop_days, open_days, trim_examples
from abreast_sidecar.jobs.streams import delete_idle_consumers, expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis, list_shards, map_redis_errors
from abreast_sidecar.rules.reapply import FindingIds, reapply_rules
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.rules import end_expired_rules

EXPIRE_INTERVAL_S = 0.5  # seconds between two turns of a chore
REPORTS_INTERVAL_S = 1.0
ENVOYS_INTERVAL_S = 1.0
NOISE_INTERVAL_S = 1.0
RULES_INTERVAL_S = 0.5
MAX_RULE_STEPS = 200  # of judging again in one turn
DETECTORS_INTERVAL_S = 5.0
EXAMPLES_INTERVAL_S = 60.0
CONSUMERS_INTERVAL_S = 60.0
DAYS_INTERVAL_S = 600.0
MAX_CONSUMER_IDLE_S = 600.0  # seconds after which a consumer without entries is taken for dead

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    interval_s: float  # seconds
    servers: tuple[str, ...]  # that it can't do without
    run: Callable[[], Awaitable[None]]


class JobRunner:
    """`last_beat` is when it last swept (time.monotonic); `alive` is whether it runs."""

    def __init__(self, settings: Settings, database: Database, *, name: str = "housekeeping") -> None:
        self.name = name
        self.is_running = False
        self.last_heartbeat = 0.0
        self._settings = settings
        self._rules = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self._redis = connect_redis(settings.redis_url)
        self._database = database
        self._outages = {server: Outage(server, by=name) for server in ("redis", "postgres", *settings.envoy_admin)}

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set. Lost servers are waited for."""
        self.is_running = True
        try:
            async with asyncio.TaskGroup() as group:
                for job in self._list_jobs():
                    group.create_task(self._run_periodically(job, stop), name=f"abreast {job.name}")
        finally:
            self.is_running = False
            await self._redis.aclose()

    def _list_jobs(self) -> list[Job]:
        envoys = [
            Job(f"envoy {address}", ENVOYS_INTERVAL_S, ("postgres", address), self._make_envoy_job(address))
            for address in self._settings.envoy_admin
        ]
        return [
            Job("sweep", EXPIRE_INTERVAL_S, ("redis",), self._expire_incomplete_pairs),
            Job("reports", REPORTS_INTERVAL_S, ("redis", "postgres"), self._collect_reports),
            Job("noise", NOISE_INTERVAL_S, ("postgres",), self._decide_noise),
            Job("rules", RULES_INTERVAL_S, ("postgres",), self._reapply_rules),
            Job("latency", DETECTORS_INTERVAL_S, ("postgres",), self._detect_slowdowns),
            Job("cache", DETECTORS_INTERVAL_S, ("postgres",), self._detect_misses),
            Job("missing", DETECTORS_INTERVAL_S, ("postgres",), self._detect_unanswered),
            Job("examples", EXAMPLES_INTERVAL_S, ("postgres",), self._trim_examples),
            Job("consumers", CONSUMERS_INTERVAL_S, ("redis",), self._delete_idle_consumers),
            Job("days", DAYS_INTERVAL_S, ("postgres",), self._rotate_days),
            *envoys,
        ]

    async def _run_periodically(self, job: Job, stop: asyncio.Event) -> None:
        while not stop.is_set():
            outage = None
            try:
                await job.run()
            except RedisError as error:
                outage = self._record_failure("redis", error, job)
            except LedgerError as error:
                outage = self._record_failure("postgres", error, job)
            except EnvoyError as error:
                outage = self._record_failure(job.servers[-1], error, job)
            except Exception:
                log.exception("a chore failed", chore=job.name)
            else:
                for server in job.servers:
                    self._outages[server].record_success(job.name)
            await (outage.back_off(stop, job.name) if outage else wait_or_stop(stop, job.interval_s))

    def _record_failure(self, server: str, error: Exception, job: Job) -> Outage:
        outage = self._outages[server]
        outage.record_failure(error, job.name)
        return outage

    async def _expire_incomplete_pairs(self) -> None:
        with map_redis_errors():
            for keys in await list_shards(self._redis):
                await expire_incomplete_pairs(self._redis, keys)
        self.last_heartbeat = time.monotonic()

    async def _collect_reports(self) -> None:
        async with self._database.connection() as connection:
            await collect_reports(connection, self._redis)

    def _make_envoy_job(self, address: str) -> Callable[[], Awaitable[None]]:
        async def collect() -> None:
            async with self._database.connection() as connection:
                await collect_envoy_counts(connection, address)

        return collect

    async def _decide_noise(self) -> None:
        async with self._database.connection() as connection:
            await classify_findings(connection)

    async def _reapply_rules(self) -> None:
        async with self._database.connection() as connection:
            await end_expired_rules(connection)
            finding_ids = FindingIds(self._settings.postgres_url)
            for _ in range(MAX_RULE_STEPS):
                if not await reapply_rules(connection, finding_ids, self._rules):
                    return

    async def _detect_slowdowns(self) -> None:
        async with self._database.connection() as connection:
            await detect_slowdowns(connection)

    async def _detect_misses(self) -> None:
        async with self._database.connection() as connection:
            await detect_misses(connection)

    async def _detect_unanswered(self) -> None:
        async with self._database.connection() as connection:
            await detect_unanswered(connection)

    async def _trim_examples(self) -> None:
        async with self._database.connection() as connection:
            await trim_examples(connection, max_bytes=self._settings.examples_bytes)

    async def _delete_idle_consumers(self) -> None:
        with map_redis_errors():
            for keys in await list_shards(self._redis):
                await delete_idle_consumers(self._redis, keys, idle_s=MAX_CONSUMER_IDLE_S)

    async def _rotate_days(self) -> None:
        async with self._database.connection() as connection:
            await open_days(connection)
            await drop_days(
                connection, retention_days=self._settings.retention_days, retention_bytes=self._settings.retention_bytes
            )
