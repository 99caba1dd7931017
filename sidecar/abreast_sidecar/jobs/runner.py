"""Runs periodic jobs. Any number of sidecars may do so: each job is atomic, or one process at a time does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Concatenate, ParamSpec

import structlog

from abreast_sidecar.aio import Activity, Outage, wait_or_stop
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import LedgerError, RedisError
from abreast_sidecar.jobs.detectors import detect_misses, detect_slowdowns, detect_unanswered
from abreast_sidecar.jobs.endpoints import DeclaredTemplates, learn_endpoints
from abreast_sidecar.jobs.noise import classify_findings
from abreast_sidecar.jobs.reports import EnvoyError, collect_envoy_counts, collect_reports
from abreast_sidecar.jobs.retention import (
    delete_idle_consumers,
    drop_days,
    expire_incomplete_pairs,
    open_days,
    trim_examples,
)
from abreast_sidecar.redis_client import ShardList, connect_redis, list_shards, map_redis_errors
from abreast_sidecar.rules.reapply import FindingIds, reapply_rules
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.store.rules import end_expired_rules

SHARDS_TTL_S = 10.0  # less than pairs usually wait for their captures
EXPIRE_INTERVAL_S = 60.0
MAX_RULE_STEPS = 200  # steps of reapplying rules in one run
MAX_CONSUMER_IDLE_S = 600.0  # after it, a consumer without pending entries counts as dead

P = ParamSpec("P")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """docs/scaling.md has the reasons for the intervals."""

    name: str
    interval_s: float
    idle_interval_s: float  # while nothing happens
    servers: tuple[str, ...]  # needed by the job
    run: Callable[[], Awaitable[object]]


class JobRunner:
    """Runs each job in its interval. Without `activity`, jobs are never idle."""

    def __init__(self, settings: Settings, database: Database, activity: Activity | None = None) -> None:
        self._settings = settings
        self._activity = activity
        self.shards = ShardList()
        self._shards_listed_at = self._overdue_moved_at = -float("inf")  # monotonic
        self._options = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self.declared_templates = DeclaredTemplates(settings.endpoints, settings.openapi)
        self._redis = connect_redis(settings.redis_url)
        self._database = database
        servers = ("redis", "postgres", *settings.envoy_admin)
        self._outages = {server: Outage(server, by="housekeeping") for server in servers}

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set. Retry while a server is away."""
        try:
            async with asyncio.TaskGroup() as group:
                for job in self._list_jobs():
                    group.create_task(self._run_periodically(job, stop), name=f"abreast {job.name}")
        finally:
            await self._redis.aclose()

    def _list_jobs(self) -> list[Job]:
        settings = self._settings
        postgres = ("postgres",)
        drop = partial(drop_days, retention_days=settings.retention_days, retention_bytes=settings.retention_bytes)
        endpoint_limits = {"max_values": settings.endpoint_values, "max_examples": settings.examples_per_finding}
        return [
            Job("expire", 0.5, 3.0, ("redis",), self._expire_incomplete_pairs),
            Job("reports", 1.0, 15.0, ("redis", "postgres"), self._connected(collect_reports, self._redis)),
            Job("noise", 1.0, 60.0, postgres, self._connected(classify_findings)),
            Job("rules", 2.0, 30.0, postgres, self._connected(self._reapply_rules)),
            Job("templates", 60.0, 60.0, postgres, self._connected(self.declared_templates.store)),
            Job("endpoints", 2.0, 60.0, postgres, self._connected(learn_endpoints, **endpoint_limits)),
            Job("latency", 5.0, 60.0, postgres, self._connected(detect_slowdowns)),
            Job("cache", 5.0, 60.0, postgres, self._connected(detect_misses)),
            Job("unanswered", 5.0, 60.0, postgres, self._connected(detect_unanswered)),
            Job("examples", 60.0, 600.0, postgres, self._connected(trim_examples, max_bytes=settings.examples_bytes)),
            Job("consumers", 60.0, 600.0, ("redis",), self._delete_idle_consumers),
            Job("open_days", 600.0, 600.0, postgres, self._connected(open_days)),
            Job("drop_days", 600.0, 600.0, postgres, self._connected(drop)),
            *(
                Job(f"envoy {address}", 1.0, 5.0, ("postgres", address), self._connected(self._count_envoy, address))
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
            except (RedisError, LedgerError, EnvoyError) as error:
                is_redis, is_postgres = isinstance(error, RedisError), isinstance(error, LedgerError)
                outage = self._outages["redis" if is_redis else "postgres" if is_postgres else job.servers[-1]]
                outage.record_failure(error, job.name)
            except Exception:
                log.exception("a job failed", job=job.name)
            else:
                for server in job.servers:
                    self._outages[server].record_success(job.name)
            if outage:
                await outage.back_off(stop, job.name)
            elif self._activity:
                await self._activity.wait(stop, job.interval_s, job.idle_interval_s)
            else:
                await wait_or_stop(stop, job.interval_s)

    async def _expire_incomplete_pairs(self) -> None:
        """Move overdue pairs. The script runs only while pairs wait, and every EXPIRE_INTERVAL_S to watch Redis's clock."""
        now = time.monotonic()
        with map_redis_errors():
            if not self.shards or now - self._shards_listed_at >= SHARDS_TTL_S:
                self.shards, self._shards_listed_at = await list_shards(self._redis), now
            is_due = now - self._overdue_moved_at >= EXPIRE_INTERVAL_S
            for keys in self.shards:
                is_waiting = bool(await self._redis.zcard(keys.due))
                if is_waiting:
                    await self._record_activity()
                if is_waiting or is_due:
                    await expire_incomplete_pairs(self._redis, keys)
        if is_due:
            self._overdue_moved_at = now

    async def _delete_idle_consumers(self) -> None:
        with map_redis_errors():
            for keys in await list_shards(self._redis):
                await delete_idle_consumers(self._redis, keys, idle_s=MAX_CONSUMER_IDLE_S)

    async def _count_envoy(self, connection: Connection, address: str) -> None:
        if await collect_envoy_counts(connection, address):
            await self._record_activity()

    async def _record_activity(self) -> None:
        if self._activity:
            await self._activity.record()

    async def _reapply_rules(self, connection: Connection) -> None:
        await end_expired_rules(connection)
        finding_ids = FindingIds(self._settings.postgres_url)
        for _ in range(MAX_RULE_STEPS):
            if not await reapply_rules(connection, finding_ids, self._options):
                return
            await self._record_activity()  # the noise job has to classify the findings again
