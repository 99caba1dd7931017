"""The traffic settings of all services, held in memory, kept up to date from Postgres, and handed to Envoys."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from redis.asyncio import Redis

from abreast_sidecar.aio import Notifier, cancel_and_wait
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.traffic.envoys import ENVOYS_CHANNEL as ENVOYS
from abreast_sidecar.traffic.envoys import EnvoyConnections, EnvoyRegistry
from abreast_sidecar.traffic.model import AuditNote, Shares, Traffic, TrafficChange, default_shares
from abreast_sidecar.traffic.repository import TRAFFIC_CHANNEL, TrafficRepository, VersionedTraffic
from abreast_sidecar.traffic.rollbacks import PendingRollbacks

ENSURE_RETRY_DELAY_S = 0.5  # seconds

NO_MIRRORING_SHARES = Shares(new_share=0, sample_safe=0, sample_unsafe=0, baseline_share=0)
EPOCH = datetime.fromtimestamp(0, UTC)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CurrentTraffic:
    traffic: Traffic
    changed_monotonic: float  # monotonic


@dataclass(frozen=True, slots=True)
class RollbackResult:
    traffic: Traffic
    previous: Traffic | None  # None where it was not known
    unrecorded_reason: str  # why the ledger does not have it yet, and what follows from that; empty where it has


class TrafficController:
    """What is known stays in force while Postgres is away. What was never known is not made up."""

    def __init__(self, database: Database, redis: Redis, settings: Settings) -> None:
        self.repository = TrafficRepository(database)
        self.connections = EnvoyConnections()
        self.registry = EnvoyRegistry(database, self.connections)
        self.change_notifier = Notifier()  # a state changed
        self.shutdown = asyncio.Event()
        self._conninfo = settings.direct_url
        self._default_shares = default_shares(settings)
        self._current: dict[str, CurrentTraffic] = {}
        self.pending_rollbacks = PendingRollbacks(
            self.repository,
            redis,
            self._default_shares,
            observe=self.observe,
            on_change=self.change_notifier.notify_all,
        )

    def current(self, service: str) -> CurrentTraffic | None:
        """What is in force: what the ledger said last, under a rollback that it has not recorded yet."""
        current = self._current.get(service)
        rollback = self.pending_rollbacks.get(service)
        if rollback is None or (current and current.traffic.is_on_old):
            return current
        unknown_traffic = Traffic(service, 0, EPOCH, NO_MIRRORING_SHARES)  # what was never known is not made up
        return CurrentTraffic(
            (current.traffic if current else unknown_traffic).apply_rollback(), rollback.started_monotonic
        )

    def list_current(self) -> list[Traffic]:
        services = self._current.keys() | self.pending_rollbacks.list_services()
        return [current.traffic for service in sorted(services) if (current := self.current(service))]

    def observe(self, snapshot: VersionedTraffic) -> None:
        traffic = snapshot.traffic
        current = self._current.get(traffic.service)
        if not traffic.is_newer_than(current.traffic if current else None):
            return
        self._current[traffic.service] = CurrentTraffic(traffic, time.monotonic() - snapshot.age_s)
        log.info("traffic settings", service=traffic.service, version=traffic.version, shares=traffic.shares)
        self.change_notifier.notify_all()

    async def resolve_service(self, service: str) -> str:
        """The service that a call means. An empty name means the only one with an Envoy here, else the only one known:
        a misspelt name, which is known from then on, must not stand in the way of a rollback.
        """
        if service in self._current or service in self.connections.count_by_service():
            return service
        if service:
            if not await self.repository.is_known_service(service):
                raise NotFoundError(
                    f"no Envoy and no capture has named the service {service!r}; "
                    "a service is named by node.cluster in its Envoy's configuration"
                )
            return service
        counts = self.connections.count_by_service()
        if len(counts) == 1:
            return next(iter(counts))
        services = await self.repository.list_services()
        if not services:
            raise NotFoundError(
                "no Envoy and no capture has named a service yet; start Envoy with the sidecar's address"
            )
        if len(services) > 1:
            raise ArgumentError(
                f"service must be one of {', '.join(services)}, since there are several (on the command line: --service)"
            )
        return services[0]

    async def read(self, service: str) -> Traffic:
        """The state in Postgres. A service that only captures have named gets its first state by this."""
        snapshots = await self.repository.read(service) or [
            await self.repository.ensure(
                service, self._default_shares, AuditNote("sidecar", "captures named this service")
            )
        ]
        self.observe(snapshots[0])
        return self._apply_pending_rollback(snapshots[0])

    def _apply_pending_rollback(self, snapshot: VersionedTraffic) -> Traffic:
        traffic = snapshot.traffic
        return (
            traffic.apply_rollback()
            if self.pending_rollbacks.get(traffic.service) and not traffic.is_on_old
            else traffic
        )

    async def change(self, service: str, change: TrafficChange, note: AuditNote) -> Traffic:
        await self.pending_rollbacks.flush(service)
        started = time.monotonic()
        if self.current(service) is None:
            await self.read(service)
        snapshot = await self.repository.change(service, change, note)
        self.observe(VersionedTraffic(snapshot.traffic, time.monotonic() - started))
        return snapshot.traffic

    async def rollback(self, service: str, note: AuditNote) -> RollbackResult:
        """Everyone to old, from any state: Envoys here are told before Postgres is asked for anything.

        An empty name means what it means to `resolve`, and while Postgres is away the only service that is held.
        """
        if not service and not self.connections.count_by_service() and len(self._current) == 1:
            (service,) = self._current
        service = await self.resolve_service(service)
        before = self.current(service)
        if before is None and service not in self.connections.count_by_service():
            await self.read(service)
            before = self.current(service)
        unrecorded_reason = await self.pending_rollbacks.add(service, note)
        after = self.current(service)
        assert after is not None
        return RollbackResult(after.traffic, before.traffic if before else None, unrecorded_reason)

    async def ensure_known(self, service: str) -> None:
        """Return once the service's state is known, however long Postgres is away."""
        note = AuditNote("sidecar", "an Envoy of this service connected")
        await self.pending_rollbacks.is_loaded.wait()
        while self.current(service) is None:
            try:
                self.observe(await self.repository.ensure(service, self._default_shares, note))
            except LedgerError as error:
                log.warning("no traffic settings for an envoy yet", service=service, error=str(error))
                await asyncio.sleep(ENSURE_RETRY_DELAY_S)

    async def run_rollbacks(self) -> None:
        """Follow rollbacks that the ledger does not know yet. Works while Postgres has never been reached."""
        await self.pending_rollbacks.run()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the changes that others make, and tell them which Envoys are here."""
        handlers = {TRAFFIC_CHANNEL: self._refresh, ENVOYS: self.registry.handle_notification}
        listen_task = asyncio.create_task(listen(self._conninfo, handlers, name="abreast control"))
        registry_task = asyncio.create_task(self.registry.run(stop))
        await stop.wait()
        self.close()
        await cancel_and_wait(listen_task)
        await registry_task

    def close(self) -> None:
        """End the streams: Envoys keep their values and connect again."""
        self.shutdown.set()
        self.change_notifier.notify_all()
        self.connections.notifier.notify_all()

    async def _refresh(self) -> None:
        for snapshot in await self.repository.read():
            self.observe(snapshot)
