"""The whole sidecar: builds every part from the settings, runs them, and drains them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

import structlog

from abreast_sidecar.compare import Rules
from abreast_sidecar.control import Control, RuntimeDiscovery
from abreast_sidecar.control.steerers import Steerers
from abreast_sidecar.control.steering import Steering
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import LedgerError, SchemaError
from abreast_sidecar.housekeeping import Housekeeping
from abreast_sidecar.read.client import connect
from abreast_sidecar.serve import (
    Comparison,
    GrpcServer,
    HttpServer,
    Interceptor,
    Latency,
    Metrics,
    NotReadyError,
    Pending,
    Readiness,
    RuleControl,
    SteeringControl,
    TrafficControl,
    Web,
)
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import migrate
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.queries import Queries
from abreast_sidecar.store.rules import RuleStore
from abreast_sidecar.workers import workers

MIGRATE_AGAIN = 0.5  # seconds
CALLS_GRACE = 0.4  # of the time to stop, for calls under way

log = structlog.get_logger(__name__)


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set, then drain within settings.shutdown_timeout.

    Raise ServerError when a port is taken, SchemaError for a ledger that is newer than this code.
    """
    await Sidecar(settings).run(stop)


class Sidecar:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.postgres_url)
        self.redis = connect(settings.redis_url)
        self.control = Control(self.database, self.redis, settings)
        self.workers = workers(settings)
        self.housekeeping = Housekeeping(settings)
        self.schema = 0  # the ledger's version, once it is known
        queries = Queries(self.database)
        pending = Pending(self.redis)
        steerers = Steerers(self.database, self.control)
        self.steering = Steering(settings, self.control, pending.count)
        metrics = Metrics(self.control, self.steering)
        self.grpc = GrpcServer(
            settings.grpc_listen,
            comparison=Comparison(queries, self.control, pending),
            traffic=TrafficControl(self.control),
            latency=Latency(self.database, self.control),
            rules=RuleControl(RuleStore(self.database), Rules.ignoring(settings.volatile_headers)),
            steering=SteeringControl(self.control, steerers),
            discovery=RuntimeDiscovery(self.control),
            interceptor=Interceptor(metrics),
        )
        checks = {
            "postgres": self._check_postgres,
            "redis": self._check_redis,
            "workers": self._check_workers,
        }
        self.readiness = Readiness(checks, self.grpc.set_ready)
        web = Web(
            queries=queries,
            control=self.control,
            steerers=steerers,
            pending=pending,
            readiness=self.readiness,
            metrics=metrics,
        )
        self.http = HttpServer(settings.http_listen, web.app())
        self._working = asyncio.Event()  # set: workers and housekeeping finish

    async def run(self, stop: asyncio.Event) -> None:
        try:
            self.http.bind()
            await self.grpc.start()
            self.control.envoys.sidecar = f"{socket.gethostname()}:{self.grpc.port}"
            await self.database.open()
            log.info("sidecar started", grpc=self.settings.grpc_listen, http=self.settings.http_listen)
            await self._run(stop)
        finally:
            await self.grpc.stop(0)
            self.http.close()
            await self.database.close()
            await self.redis.aclose()
        log.info("sidecar stopped")

    async def _run(self, stop: asyncio.Event) -> None:
        """A part that ends by itself ends all: better started anew than half at work."""
        http = asyncio.create_task(self.http.run())
        watching = asyncio.create_task(self.readiness.run())
        braking = asyncio.create_task(self.control.brake())
        work = asyncio.create_task(self._work())
        asked = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({http, watching, braking, asked, work}, return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await self._drain(http, work)
        except TimeoutError:
            log.warning("the time to stop is over; what is under way is given up")
        finally:
            await ended(http, watching, braking, asked, work)
        for part in (http, watching, braking, work):
            if not part.cancelled():
                part.result()

    async def _work(self) -> None:
        await self._migrate()
        if not self.schema:
            return
        log.info("the ledger is ready", schema=self.schema)
        async with asyncio.TaskGroup() as group:
            for part in (self.control, self.workers, self.housekeeping, self.steering):
                group.create_task(part.run(self._working))

    async def _migrate(self) -> None:
        waiting = False
        while not self.schema and not self._working.is_set():
            try:
                self.schema = await migrate(self.settings.postgres_url)
            except SchemaError:
                raise
            except LedgerError as error:
                if not waiting:
                    log.warning("waiting for postgres", error=str(error))
                waiting = True
                await asyncio.sleep(MIGRATE_AGAIN)

    async def _drain(self, http: asyncio.Task[None], work: asyncio.Task[None]) -> None:
        log.info("draining", seconds=self.settings.shutdown_timeout)
        await self.readiness.drain()
        self._working.set()
        self.control.close()
        ends: list[Coroutine[Any, Any, Any]] = [
            self.grpc.stop(self.settings.shutdown_timeout * CALLS_GRACE),
            asyncio.wait({work}),
        ]
        await asyncio.gather(*ends)
        await self.http.stop(http)

    async def _check_postgres(self) -> None:
        await self.database.rows("clock")
        if not self.schema:
            raise NotReadyError("the ledger's schema is not ready yet")

    async def _check_redis(self) -> None:
        await self.redis.ping()

    async def _check_workers(self) -> None:
        await asyncio.sleep(0)
        if trouble := self.workers.trouble():
            raise NotReadyError(trouble)
