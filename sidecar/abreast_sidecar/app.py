"""The whole sidecar: builds every part from the settings, runs them, and drains them."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import Sequence

import structlog

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.collector.server import Collector
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.ingest.pool import create_pool
from abreast_sidecar.jobs.runner import JobRunner
from abreast_sidecar.redis_client import PairBacklog, connect_redis
from abreast_sidecar.rollout.leader_tasks import LeaderTasks
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve.access import Authenticator, CallGuard, LoginPages, PageAccess
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.render import render
from abreast_sidecar.serve.servers import GrpcServer, HttpServer
from abreast_sidecar.serve.services import (
    AccessServicer,
    ComparisonServicer,
    LatencyServicer,
    RolloutServicer,
    RuleServicer,
    Servicers,
    TrafficServicer,
    VerdictGate,
)
from abreast_sidecar.serve.web_app import NotReadyError, Readiness, WebApp
from abreast_sidecar.settings import CollectorSettings, Settings
from abreast_sidecar.store.access import TOKENS_CHANNEL, AuditLog, TokenStore
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.rules import RuleStore
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.rtds import RtdsServer

# Long queries and jobs leave connections of the pool for rollbacks, the guard and the heartbeat of the Envoys.
MAX_QUERY_CONNECTIONS = 6
MAX_JOB_CONNECTIONS = 5
MIGRATE_RETRY_S = 0.5
DELAY_CHECK_INTERVAL_S = 10.0  # while nothing is delayed
RPC_DRAIN_SHARE = 0.4  # part of the shutdown timeout for calls in flight

log = structlog.get_logger(__name__)


async def serve(
    settings: Settings,
    stop: asyncio.Event,
    collector_settings: CollectorSettings | None = None,
    services: Sequence[EnvoySettings] = (),
) -> None:
    """Run until `stop` is set, then drain within settings.shutdown_timeout seconds.

    Raise ServerError if a port is taken, SchemaError if the ledger's schema is newer than this code.
    """
    await Sidecar(settings, collector_settings, services).run(stop)


class Sidecar:
    """All parts. `services` are those of a configuration file, for their initial shares."""

    def __init__(
        self,
        settings: Settings,
        collector_settings: CollectorSettings | None = None,
        services: Sequence[EnvoySettings] = (),
    ) -> None:
        self.settings = settings
        self.collector = Collector(
            dataclasses.replace(
                collector_settings or CollectorSettings(),
                redis_url=settings.redis_url,
                collector_listen=settings.collector_listen,
                descriptors=settings.descriptors,
                insecure=settings.insecure,
            )
        )
        self.schema_version = 0  # 0 until the ledger is migrated
        self.database = Database(settings.postgres_url)
        self.redis = connect_redis(settings.redis_url)
        self.control = TrafficController(self.database, self.redis, settings, services)
        self.worker_pool = create_pool(settings, self.database)
        self.job_runner = JobRunner(
            settings, self.database.limit(MAX_JOB_CONNECTIONS, wait_s=None), self.control.activity
        )
        self.control.document_problems = [
            self.job_runner.declared_templates.problems,
            self.collector.descriptors.problems,
        ]
        query_database = self.database.limit(MAX_QUERY_CONNECTIONS)
        self.reader = reader = LedgerReader(query_database)
        self.backlog = backlog = PairBacklog(self.redis)
        rollout_service = RolloutService(self.database, self.control)
        self.leader_tasks = LeaderTasks(settings, self.database, self.control, backlog.count, backlog.describe_delay)
        metrics = Metrics(self.control, self.leader_tasks, self.job_runner)
        options = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self.tokens, audit = TokenStore(self.database), AuditLog(self.database)
        authenticator = Authenticator(settings, self.tokens)
        guard = CallGuard(authenticator, audit)
        self.control.notification_handlers[TOKENS_CHANNEL] = self.tokens.refresh
        self.control.warnings = [*settings.list_warnings(), *self.collector.settings.list_warnings()]
        gate = VerdictGate(reader, backlog)
        servicers = Servicers(
            access=AccessServicer(self.tokens, audit),
            comparison=ComparisonServicer(reader, self.control, backlog),
            latency=LatencyServicer(query_database, self.control),
            traffic=TrafficServicer(self.control, settings.envoy_admin, gate),
            rollout=RolloutServicer(self.control, rollout_service, gate),
            rules=RuleServicer(RuleStore(query_database), options),
        )
        self.grpc = GrpcServer(settings, servicers, RtdsServer(self.control), metrics, guard)
        checks = {"postgres": self._check_postgres, "redis": self._check_redis, "workers": self._check_workers}
        checks["control"] = self._check_control
        self.readiness = Readiness(checks, self.grpc.set_ready)
        web_app = WebApp(reader, guard.wrap(servicers), rollout_service, self.readiness, metrics)
        self.web_app = web_app.create_app(*LoginPages(authenticator, render).routes)
        self.http = HttpServer(settings, PageAccess(self.web_app, authenticator, settings))
        self._drain_started = asyncio.Event()
        self._delay = ""
        self._delay_checked_at = -DELAY_CHECK_INTERVAL_S  # monotonic

    async def run(self, stop: asyncio.Event) -> None:
        try:
            self.http.bind()
            await self.collector.start()
            await self.grpc.start()
            self.control.connections.sidecar_name = f"{socket.gethostname()}:{self.grpc.port}"
            await self.database.open()
            log.info("sidecar started", grpc=self.settings.grpc_listen, http=self.settings.http_listen)
            await self._run_until(stop)
        finally:
            await self.grpc.stop(0)
            self.http.close()
            await self.collector.stop()
            await self.database.close()
            await self.redis.aclose()
        log.info("sidecar stopped")

    async def _run_until(self, stop: asyncio.Event) -> None:
        """Run all parts. If one ends early, the process ends, and its supervisor restarts it as a whole."""
        http_task = asyncio.create_task(self.http.run())
        components_task = asyncio.create_task(self._run_components())
        tasks = [
            http_task,
            components_task,
            asyncio.create_task(self.readiness.run()),
            asyncio.create_task(self.control.pending_rollbacks.run()),
        ]
        stop_task = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*tasks, stop_task], return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await self._drain(http_task, components_task)
        except TimeoutError:
            log.warning("shutdown timeout exceeded; work in flight is cancelled")
        finally:
            await cancel_and_wait(*tasks, stop_task)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _run_components(self) -> None:
        await self._migrate()
        if not self.schema_version:
            return
        log.info("the ledger is ready", schema=self.schema_version)
        async with asyncio.TaskGroup() as group:
            for component in (self.control, self.worker_pool, self.job_runner, self.leader_tasks):
                group.create_task(component.run(self._drain_started))

    async def _migrate(self) -> None:
        is_waiting = False
        while not self.schema_version and not self._drain_started.is_set():
            try:
                self.schema_version = await migrate(self.settings.postgres_url)
            except SchemaError:
                raise
            except LedgerError as error:
                if not is_waiting:
                    log.warning("waiting for postgres", error=str(error))
                is_waiting = True
                await asyncio.sleep(MIGRATE_RETRY_S)

    async def _drain(self, http_task: asyncio.Task[None], components_task: asyncio.Task[None]) -> None:
        log.info("draining", seconds=self.settings.shutdown_timeout)
        await self.readiness.drain()
        self._drain_started.set()
        self.control.close()
        await asyncio.gather(
            self.grpc.stop(self.settings.shutdown_timeout * RPC_DRAIN_SHARE), asyncio.wait({components_task})
        )
        await self.http.stop(http_task)

    async def _check_postgres(self) -> None:
        if not self.schema_version:
            await self.database.fetch_all("clock")
            raise NotReadyError("the ledger's schema is not ready yet")
        if not self.tokens.is_loaded:
            raise NotReadyError("the tokens are not read from the ledger yet")
        if error := self.control.registry.error:
            raise NotReadyError(error)

    async def _check_redis(self) -> None:
        rollbacks = self.control.pending_rollbacks
        if not rollbacks.is_loaded:
            await self.redis.ping()
        elif rollbacks.redis_error:
            raise NotReadyError(rollbacks.redis_error)

    async def _check_control(self) -> None:
        await asyncio.sleep(0)
        if services := self.control.lost_services:
            raise NotReadyError(f"Postgres lacks the newest settings of {', '.join(services)} and can't be changed")

    async def _check_workers(self) -> None:
        now = time.monotonic()
        if self._delay or now - self._delay_checked_at >= DELAY_CHECK_INTERVAL_S:
            self._delay, self._delay_checked_at = await self.backlog.describe_delay(), now
        if problem := self.worker_pool.problem() or self._delay:
            raise NotReadyError(problem)
