"""Reads and changes the traffic settings of all services, and keeps them up to date in memory for Envoys."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from redis.asyncio import Redis

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.traffic.envoys import ENVOYS_CHANNEL, EnvoyConnections, EnvoyRegistry
from abreast_sidecar.traffic.model import AuditNote, Shares, Traffic, TrafficChange, default_shares
from abreast_sidecar.traffic.pending_rollbacks import PendingRollbacks
from abreast_sidecar.traffic.repository import TRAFFIC_CHANNEL, TrafficRepository, VersionedTraffic
from abreast_sidecar.traffic.state import CurrentTraffic, TrafficState

ENSURE_RETRY_DELAY_S = 0.5
NO_MIRRORING_SHARES = Shares(new_share=0, sample_safe=0, sample_unsafe=0, baseline_share=0)
EPOCH = datetime.fromtimestamp(0, UTC)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RollbackResult:
    traffic: Traffic
    previous: Traffic | None  # None if the settings before the rollback are not known
    unrecorded_reason: str  # why Postgres has no record of it yet; empty if it has


class TrafficController:
    """Settings that were known stay in force while Postgres is away. Settings that were never known are not guessed."""

    def __init__(self, database: Database, redis: Redis, settings: Settings) -> None:
        self.repository = TrafficRepository(database)
        self.connections = EnvoyConnections()
        self.registry = EnvoyRegistry(database, self.connections)
        self.shutdown = asyncio.Event()
        self._direct_url = settings.direct_url
        self._default_shares = default_shares(settings)
        self._state = TrafficState()
        self.change_notifier = self._state.notifier
        self.pending_rollbacks = PendingRollbacks(self.repository, redis, self._state, self._default_shares)

    def current(self, service: str) -> CurrentTraffic | None:
        """Return the settings in force: the newest from Postgres, overridden by a rollback that is not recorded yet."""
        current = self._state.get(service)
        rollback = self.pending_rollbacks.get(service)
        if rollback is None or (current and current.traffic.is_on_old):
            return current
        traffic = current.traffic if current else Traffic(service, 0, EPOCH, NO_MIRRORING_SHARES)
        return CurrentTraffic(traffic.apply_rollback(), rollback.started_monotonic)

    def list_current(self) -> list[Traffic]:
        services = self._state.list_services() | self.pending_rollbacks.list_services()
        return [current.traffic for service in sorted(services) if (current := self.current(service))]

    async def resolve_service(self, service: str) -> str:
        """Return the service that a call names. Raise NotFoundError or ArgumentError.

        An empty name means the only service with an Envoy at this sidecar, else the only service at all. An Envoy with a
        misspelt cluster name creates a second service, which must not prevent a rollback.
        """
        counts = self.connections.count_by_service()
        if self._state.get(service) or service in counts:
            return service
        if service:
            if not await self.repository.is_known_service(service):
                raise NotFoundError(
                    f"no Envoy and no capture has named the service {service!r}; "
                    "a service is named by node.cluster in its Envoy's configuration"
                )
            return service
        if len(counts) == 1:
            return next(iter(counts))
        services = await self.repository.list_services()
        if not services:
            raise NotFoundError(
                "no Envoy and no capture has named a service yet; start Envoy with the sidecar's address"
            )
        if len(services) > 1:
            names = ", ".join(services)
            raise ArgumentError(f"service must be one of {names}, since there are several (command line: --service)")
        return services[0]

    async def read(self, service: str) -> Traffic:
        """Return the settings from Postgres. Create them for a service that only captures have named."""
        note = AuditNote("sidecar", "captures named this service")
        snapshots = await self.repository.read(service) or [
            await self.repository.ensure(service, self._default_shares, note)
        ]
        self._state.observe(snapshots[0])
        traffic = snapshots[0].traffic
        is_overridden = self.pending_rollbacks.get(traffic.service) and not traffic.is_on_old
        return traffic.apply_rollback() if is_overridden else traffic

    async def change(self, service: str, change: TrafficChange, note: AuditNote) -> Traffic:
        await self.pending_rollbacks.flush(service)
        started = time.monotonic()
        if self.current(service) is None:
            await self.read(service)
        snapshot = await self.repository.change(service, change, note)
        self._state.observe(VersionedTraffic(snapshot.traffic, time.monotonic() - started))
        return snapshot.traffic

    async def rollback(self, service: str, note: AuditNote) -> RollbackResult:
        """Send all users to old, from any state. Envoys of this sidecar are updated before any call to Postgres.

        An empty name is resolved as in `resolve_service`. While Postgres is away it means the only known service.
        """
        known_services = self._state.list_services()
        if not service and not self.connections.count_by_service() and len(known_services) == 1:
            (service,) = known_services
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
        """Wait until the settings of the service are known, however long Postgres is away."""
        note = AuditNote("sidecar", "an Envoy of this service connected")
        await self.pending_rollbacks.is_loaded.wait()
        while self.current(service) is None:
            try:
                self._state.observe(await self.repository.ensure(service, self._default_shares, note))
            except LedgerError as error:
                log.warning("no traffic settings for an envoy yet", service=service, error=str(error))
                await asyncio.sleep(ENSURE_RETRY_DELAY_S)

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the changes of other sidecars, and publish the Envoys of this one."""
        handlers = {TRAFFIC_CHANNEL: self._refresh, ENVOYS_CHANNEL: self.registry.handle_notification}
        listen_task = asyncio.create_task(listen(self._direct_url, handlers, name="abreast control"))
        registry_task = asyncio.create_task(self.registry.run(stop))
        await stop.wait()
        self.close()
        await cancel_and_wait(listen_task)
        await registry_task

    def close(self) -> None:
        """End the streams. Envoys keep their values and connect again."""
        self.shutdown.set()
        self.change_notifier.notify_all()
        self.connections.notifier.notify_all()

    async def _refresh(self) -> None:
        for snapshot in await self.repository.read():
            self._state.observe(snapshot)
