"""Reads and changes the traffic settings of all services, and keeps them up to date in memory for Envoys."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from abreast_sidecar.aio import Activity, cancel_and_wait, wait_or_stop
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database, listen
from abreast_sidecar.store.rules import RULES_CHANNEL
from abreast_sidecar.store.writer import PAIRS_CHANNEL
from abreast_sidecar.traffic.envoys import ENVOYS_CHANNEL, EnvoyConnections, EnvoyRegistry
from abreast_sidecar.traffic.model import (
    EPOCH,
    OTHER_RULES,
    TOTAL_WEIGHT,
    AuditNote,
    InitialShares,
    Shares,
    Traffic,
    TrafficChange,
)
from abreast_sidecar.traffic.pending_rollbacks import PendingRollbacks
from abreast_sidecar.traffic.repository import TRAFFIC_CHANNEL, TrafficRepository
from abreast_sidecar.traffic.state import CurrentTraffic, TrafficState

ENSURE_RETRY_DELAY_S = 0.5
MERGE_RETRY_DELAY_S = 5.0
POLL_INTERVAL_S = 30.0
NO_MIRRORING_SHARES = Shares(
    new_share=0, sample_safe=0, sample_unsafe=0, baseline_share=0, rule_shares={OTHER_RULES: 0}
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RollbackResult:
    traffic: Traffic
    previous: Traffic | None  # None if the settings before the rollback are not known
    unrecorded_reason: str  # why Postgres has no record of it yet; empty if it has


class TrafficController:
    """Settings that were known stay in force while Postgres is away. Settings that were never known are not guessed.

    Postgres may come back without the newest changes: restored from an older copy, or as a replica that lagged. The
    settings that a sidecar or an Envoy has are then merged into the ledger: users get the lower share of new until
    somebody sets one. Versions of the two histories can't be compared, so each version has a unique revision, and the
    ledger's events tell whether its history contains the revision.
    """

    def __init__(
        self, database: Database, redis: Redis, settings: Settings, services: Iterable[EnvoySettings] = ()
    ) -> None:
        self.repository = TrafficRepository(database)
        self.connections = EnvoyConnections()
        self.registry = EnvoyRegistry(database, self.connections)
        self.shutdown = asyncio.Event()
        self.activity = Activity()
        self.notification_handlers: dict[str, Callable[[], Awaitable[None]]] = {
            TRAFFIC_CHANNEL: self._handle_notification,
            ENVOYS_CHANNEL: self.registry.handle_notification,
            PAIRS_CHANNEL: self.activity.record,
            RULES_CHANNEL: self.activity.record,
        }
        self.warnings: list[str] = []  # about the settings of this sidecar
        self.document_problems: list[list[str]] = []  # lists that the readers of documents keep current
        self._direct_url = settings.direct_url
        self.initial_shares = InitialShares(settings, services)
        self._state = TrafficState()
        self.change_notifier = self._state.notifier
        self.pending_rollbacks = PendingRollbacks(
            self.repository,
            redis,
            refresh=self._refresh,
            notifier=self.change_notifier,
            initial_shares=self.initial_shares,
            key=settings.control_key.encode(),
        )

    def current(self, service: str) -> CurrentTraffic | None:
        """Return the settings in force: those from Postgres, overridden by the last rollback that is not recorded yet."""
        current = self._state.get(service)
        rollback = self.pending_rollbacks.get(service)
        if rollback is None or (current and current.traffic.revision == rollback.call_id):
            return current and current.end_drill()
        traffic = current.traffic if current else Traffic(service, 0, EPOCH, NO_MIRRORING_SHARES)
        return CurrentTraffic(traffic.apply_rollback(rollback.call_id), rollback.started_monotonic)

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

    def list_warnings(self, service: str) -> list[str]:
        """Return problems that people should know."""
        current = self.current(service)
        conflict = current.traffic.shares.conflict if current else ""
        return [
            text
            for text in (
                conflict,
                self.pending_rollbacks.describe_rejected(),
                *self.warnings,
                *itertools.chain(*self.document_problems),
            )
            if text
        ]

    @property
    def lost_services(self) -> list[str]:
        """Return the services whose settings the ledger lacks, because it can't be changed."""
        return [traffic.service for traffic in self.list_current() if traffic.is_lost]

    async def read(self, service: str) -> Traffic:
        """Read Postgres, and return the settings in force. Create them for a service that only captures have named."""
        if not await self._refresh(service):
            note = AuditNote("sidecar", "captures named this service")
            await self.repository.ensure(service, self.initial_shares[service], note)
            await self._refresh(service)
        current = self.current(service)
        assert current is not None
        return current.traffic

    async def change(self, service: str, change: TrafficChange, note: AuditNote) -> Traffic:
        await self.pending_rollbacks.flush(service)
        await self.read(service)
        traffic = await self.repository.change(service, change, note)
        await self._refresh(service)
        return traffic

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

    async def ensure_known(self, service: str, held: Traffic | None) -> None:
        """Wait until the settings of the service are known, however long Postgres is away.

        The Envoy has the settings `held`. While it is unknown whether the ledger has lost them, the Envoy gets only
        settings with fewer users on new.
        """
        while not self.pending_rollbacks.is_loaded and self.pending_rollbacks.get(service) is None:
            await self.change_notifier.wait()
        while True:
            try:
                await self._update_known(service, held)
            except LedgerError as error:
                current = self.current(service)
                if current and (held is None or current.traffic.shares.new_share <= held.shares.new_share):
                    return
                log.warning("no traffic settings for an envoy yet", service=service, error=str(error))
                await asyncio.sleep(ENSURE_RETRY_DELAY_S)
            else:
                return

    async def _update_known(self, service: str, held: Traffic | None) -> None:
        if self.current(service) is None:
            note = AuditNote("sidecar", "an Envoy of this service connected")
            await self.repository.ensure(service, self.initial_shares[service], note)
            await self._refresh(service)
        current = self.current(service)
        if held is None or (current and held.revision == current.traffic.revision):
            return
        if await self.repository.includes(held):
            await self._refresh(service)
        else:
            await self._merge(held)

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the changes of other sidecars, and publish the Envoys of this one."""
        listen_task = asyncio.create_task(listen(self._direct_url, self.notification_handlers, name="abreast control"))
        poll_task = asyncio.create_task(self._poll(stop))
        registry_task = asyncio.create_task(self.registry.run(stop))
        await stop.wait()
        self.close()
        await cancel_and_wait(listen_task, poll_task)
        await registry_task

    def close(self) -> None:
        """End the streams. Envoys keep their values and connect again."""
        self.shutdown.set()
        self.change_notifier.notify_all()
        self.connections.notifier.notify_all()

    async def _refresh_all(self) -> None:
        services = await self._refresh()
        for service in self._state.list_services() - services:
            await self.read(service)
        await self.pending_rollbacks.refresh_recorded()

    async def _handle_notification(self) -> None:
        await self._refresh_all()
        await self.activity.record()

    async def _poll(self, stop: asyncio.Event) -> None:
        """Read changes that nobody notifies of, such as those by hand, and retry to merge lost settings."""
        while not stop.is_set():
            await wait_or_stop(stop, MERGE_RETRY_DELAY_S if self.lost_services else POLL_INTERVAL_S)
            with contextlib.suppress(LedgerError):
                await self._refresh_all()

    async def _refresh(self, service: str | None = None) -> set[str]:
        """Take over the settings in Postgres, and return their services. Lost settings are merged into them first."""
        known_revisions = self._state.revisions
        snapshots = await self.repository.read(service, known_revisions)
        for snapshot in snapshots:
            name = snapshot.traffic.service
            if self._state.revisions.get(name) != known_revisions.get(name):
                await self._refresh(name)  # another call was faster, and this snapshot may be older
            elif snapshot.includes_known:
                self._state.set(snapshot.traffic, snapshot.age_s)
            else:
                await self._merge_current(snapshot.traffic)
        return {snapshot.traffic.service for snapshot in snapshots}

    async def _merge_current(self, restored: Traffic) -> None:
        """Put the safest settings in force, and try to merge those of this sidecar into the ledger."""
        current = self._state.get(restored.service)
        assert current is not None
        lost = current.traffic
        if not lost.is_lost:
            lost = replace(lost, shares=restored.shares.merge(lost.shares, describe_conflict(lost)), is_lost=True)
            self._state.set(lost, age_s=0)
        try:
            await self._merge(lost)
        except LedgerError as error:
            log.warning("the ledger lacks newer settings and can't be changed", service=lost.service, error=str(error))

    async def _merge(self, lost: Traffic) -> None:
        await self.repository.merge(lost, lost.shares.conflict or describe_conflict(lost))
        await self._refresh(lost.service)


def describe_conflict(lost: Traffic) -> str:
    return (
        f"Postgres lacks version {lost.version} ({lost.shares.new_share * 100 / TOTAL_WEIGHT:g}% of users on new), which Envoys"
        " had: it was restored from an older copy, or a replica that lagged took over. Users have the lower share of new;"
        " set a share: abreast traffic set --new SHARE"
    )
