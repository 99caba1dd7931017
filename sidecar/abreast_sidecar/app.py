"""The whole sidecar: builds every part from the settings, runs them, and drains them."""

from __future__ import annotations

import asyncio
import socket

import structlog

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.ingest.pool import create_pool
from abreast_sidecar.jobs.runner import JobRunner
from abreast_sidecar.redis_client import connect_redis
from abreast_sidecar.rollout.leader_tasks import LeaderTasks
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.serve.grpc_server import GrpcServer, Interceptor
from abreast_sidecar.serve.health import NotReadyError, PairBacklog, Readiness
from abreast_sidecar.serve.http_server import HttpServer
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.services.comparison import ComparisonServicer, LatencyServicer
from abreast_sidecar.serve.services.rollout import RolloutServicer
from abreast_sidecar.serve.services.rules import RuleServicer
from abreast_sidecar.serve.services.traffic import TrafficServicer
from abreast_sidecar.serve.web_app import WebApp
from abreast_sidecar.settings import Settings
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
RPC_DRAIN_SHARE = 0.4  # part of the shutdown timeout for calls in flight

log = structlog.get_logger(__name__)


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set, then drain within settings.shutdown_timeout seconds.

    Raise ServerError if a port is taken, SchemaError if the ledger's schema is newer than this code.
    """
    await Sidecar(settings).run(stop)


class Sidecar:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.schema_version = 0  # 0 until the ledger is migrated
        self.database = Database(settings.postgres_url)
        self.redis = connect_redis(settings.redis_url)
        self.control = TrafficController(self.database, self.redis, settings)
        self.worker_pool = create_pool(settings, self.database)
        self.job_runner = JobRunner(settings, self.database.limit(MAX_JOB_CONNECTIONS, wait_s=None))
        query_database = self.database.limit(MAX_QUERY_CONNECTIONS)
        reader = LedgerReader(query_database)
        backlog = PairBacklog(self.redis)
        rollout_service = RolloutService(self.database, self.control)
        self.steering = LeaderTasks(settings, self.database, self.control, backlog.count)
        metrics = Metrics(self.control, self.steering)
        comparison = ComparisonServicer(reader, self.control, backlog)
        traffic, rollout = TrafficServicer(self.control), RolloutServicer(self.control, rollout_service)
        options = CompareOptions.with_ignored_headers(settings.volatile_headers)
        self.grpc = GrpcServer(
            settings.grpc_listen,
            comparison=comparison,
            traffic=traffic,
            latency=LatencyServicer(query_database, self.control),
            rules=RuleServicer(RuleStore(query_database), options),
            rollout=rollout,
            discovery=RtdsServer(self.control),
            interceptor=Interceptor(metrics),
        )
        checks = {"postgres": self._check_postgres, "redis": self._check_redis, "workers": self._check_workers}
        self.readiness = Readiness(checks, self.grpc.set_ready)
        web = WebApp(
            reader=reader,
            comparison=comparison,
            traffic=traffic,
            rollout=rollout,
            readiness=self.readiness,
            metrics=metrics,
        )
        self.http = HttpServer(settings.http_listen, web.create_app())
        self._drain_started = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        try:
            self.http.bind()
            await self.grpc.start()
            self.control.connections.sidecar_name = f"{socket.gethostname()}:{self.grpc.port}"
            await self.database.open()
            log.info("sidecar started", grpc=self.settings.grpc_listen, http=self.settings.http_listen)
            await self._run_until(stop)
        finally:
            await self.grpc.stop(0)
            self.http.close()
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
            for component in (self.control, self.worker_pool, self.job_runner, self.steering):
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
        await self.database.fetch_all("clock")
        if not self.schema_version:
            raise NotReadyError("the ledger's schema is not ready yet")

    async def _check_redis(self) -> None:
        await self.redis.ping()

    async def _check_workers(self) -> None:
        await asyncio.sleep(0)
        if problem := self.worker_pool.problem():
            raise NotReadyError(problem)
