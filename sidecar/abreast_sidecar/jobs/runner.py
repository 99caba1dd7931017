"""Runs periodic jobs. Any number of sidecars may do so: each job is atomic, or one process at a time does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

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
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.store.rules import end_expired_rules

MAX_RULE_STEPS = 200  # steps of reapplying rules in one run
MAX_CONSUMER_IDLE_S = 600.0  # after it, a consumer without pending entries counts as dead

P = ParamSpec("P")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    interval_s: float
    servers: tuple[str, ...]  # needed by the job
    run: Callable[[], Awaitable[object]]


class JobRunner:
    """Runs each job in its interval. `last_heartbeat` (monotonic) is the last expiry of incomplete pairs."""

    def __init__(self, settings: Settings, database: Database, *, name: str = "housekeeping") -> None:
        self.name = name
        self.is_running = False
        self.last_heartbeat = 0.0
        self._settings = settings
        self._options = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self._redis = connect_redis(settings.redis_url)
        self._database = database
        self._outages = {server: Outage(server, by=name) for server in ("redis", "postgres", *settings.envoy_admin)}

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set. Retry while a server is away."""
        self.is_running = True
        try:
            async with asyncio.TaskGroup() as group:
                for job in self._list_jobs():
                    group.create_task(self._run_periodically(job, stop), name=f"abreast {job.name}")
        finally:
            self.is_running = False
            await self._redis.aclose()

    def _list_jobs(self) -> list[Job]:
        settings = self._settings
        postgres = ("postgres",)
        return [
            Job("expire", 0.5, ("redis",), self._expire_incomplete_pairs),
            Job("reports", 1.0, ("redis", "postgres"), self._connected(collect_reports, self._redis)),
            Job("noise", 1.0, postgres, self._connected(classify_findings)),
            Job("rules", 0.5, postgres, self._connected(self._reapply_rules)),
            Job("latency", 5.0, postgres, self._connected(detect_slowdowns)),
            Job("cache", 5.0, postgres, self._connected(detect_misses)),
            Job("unanswered", 5.0, postgres, self._connected(detect_unanswered)),
            Job("examples", 60.0, postgres, self._connected(trim_examples, max_bytes=settings.examples_bytes)),
            Job("consumers", 60.0, ("redis",), self._delete_idle_consumers),
            Job("open_days", 600.0, postgres, self._connected(open_days)),
            Job("drop_days", 600.0, postgres, self._connected(self._drop_days)),
            *(
                Job(f"envoy {address}", 1.0, ("postgres", address), self._connected(collect_envoy_counts, address))
                for address in settings.envoy_admin
            ),
        ]

    def _connected(
        self, function: Callable[Concatenate[Connection, P], Awaitable[object]], *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], Awaitable[None]]:
        """Call the function with a connection to Postgres as its first argument."""

        async def run() -> None:
            async with self._database.connection() as connection:
                await function(connection, *args, **kwargs)

        return run

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
                log.exception("a job failed", job=job.name)
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

    async def _delete_idle_consumers(self) -> None:
        with map_redis_errors():
            for keys in await list_shards(self._redis):
                await delete_idle_consumers(self._redis, keys, idle_s=MAX_CONSUMER_IDLE_S)

    async def _drop_days(self, connection: Connection) -> None:
        settings = self._settings
        await drop_days(connection, retention_days=settings.retention_days, retention_bytes=settings.retention_bytes)

    async def _reapply_rules(self, connection: Connection) -> None:
        await end_expired_rules(connection)
        finding_ids = FindingIds(self._settings.postgres_url)
        for _ in range(MAX_RULE_STEPS):
            if not await reapply_rules(connection, finding_ids, self._options):
                return
