"""The traffic settings of all services, held in memory, kept up to date from Postgres, and handed to Envoys."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from redis.asyncio import Redis

from abreast_sidecar.control.bell import Bell
from abreast_sidecar.control.brakes import Brakes
from abreast_sidecar.control.envoys import Envoys
from abreast_sidecar.control.journal import CHANNEL, Journal, Known
from abreast_sidecar.control.roster import CHANNEL as ENVOYS
from abreast_sidecar.control.roster import Roster
from abreast_sidecar.control.traffic import Change, Note, Shares, Traffic, initial
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.follow import follow

RETRY = 0.5  # seconds

NOTHING_MIRRORED = Shares(new_share=0, sample_safe=0, sample_unsafe=0, baseline_share=0)
NEVER = datetime.fromtimestamp(0, UTC)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    traffic: Traffic
    changed: float  # monotonic


@dataclass(frozen=True, slots=True)
class RolledBack:
    traffic: Traffic
    before: Traffic | None  # None where it was not known
    not_recorded: str  # why the ledger does not have it yet, and what follows from that; empty where it has


class Control:
    """What is known stays in force while Postgres is away. What was never known is not made up."""

    def __init__(self, database: Database, redis: Redis, settings: Settings) -> None:
        self.journal = Journal(database)
        self.envoys = Envoys()
        self.roster = Roster(database, self.envoys)
        self.news = Bell()  # a state changed
        self.closing = asyncio.Event()
        self._conninfo = settings.session_url
        self._initial = initial(settings)
        self._held: dict[str, Held] = {}
        self.brakes = Brakes(self.journal, redis, self._initial, learn=self.learn, changed=self.news.ring)

    def held(self, service: str) -> Held | None:
        """What is in force: what the ledger said last, under a rollback that it has not recorded yet."""
        held = self._held.get(service)
        brake = self.brakes.on(service)
        if brake is None or (held and held.traffic.on_old):
            return held
        unknown = Traffic(service, 0, NEVER, NOTHING_MIRRORED)  # what was never known is not made up
        return Held((held.traffic if held else unknown).rolled_back(), brake.pulled)

    def all_held(self) -> list[Traffic]:
        services = self._held.keys() | self.brakes.services()
        return [held.traffic for service in sorted(services) if (held := self.held(service))]

    def learn(self, known: Known) -> None:
        traffic = known.traffic
        held = self._held.get(traffic.service)
        if not traffic.newer_than(held.traffic if held else None):
            return
        self._held[traffic.service] = Held(traffic, time.monotonic() - known.age)
        log.info("traffic settings", service=traffic.service, version=traffic.version, shares=traffic.shares)
        self.news.ring()

    async def resolve(self, service: str) -> str:
        """The service that a call means. An empty name means the only one with an Envoy here, else the only one known:
        a misspelt name, which is known from then on, must not stand in the way of a rollback.
        """
        if service in self._held or service in self.envoys.counts():
            return service
        if service:
            if not await self.journal.named(service):
                raise NotFoundError(
                    f"no Envoy and no capture has named the service {service!r}; "
                    "a service is named by node.cluster in its Envoy's configuration"
                )
            return service
        connected = self.envoys.counts()
        if len(connected) == 1:
            return next(iter(connected))
        known = await self.journal.services()
        if not known:
            raise NotFoundError(
                "no Envoy and no capture has named a service yet; start Envoy with the sidecar's address"
            )
        if len(known) > 1:
            raise ArgumentError(
                f"service must be one of {', '.join(known)}, since there are several (on the command line: --service)"
            )
        return known[0]

    async def read(self, service: str) -> Traffic:
        """The state in Postgres. A service that only captures have named gets its first state by this."""
        known = await self.journal.read(service) or [
            await self.journal.seed(service, self._initial, Note("sidecar", "captures named this service"))
        ]
        self.learn(known[0])
        return self._in_force(known[0])

    def _in_force(self, known: Known) -> Traffic:
        traffic = known.traffic
        return traffic.rolled_back() if self.brakes.on(traffic.service) and not traffic.on_old else traffic

    async def change(self, service: str, change: Change, note: Note) -> Traffic:
        await self.brakes.settle(service)
        began = time.monotonic()
        if self.held(service) is None:
            await self.read(service)
        known = await self.journal.change(service, change, note)
        self.learn(Known(known.traffic, time.monotonic() - began))
        return known.traffic

    async def rollback(self, service: str, note: Note) -> RolledBack:
        """Everyone to old, from any state: Envoys here are told before Postgres is asked for anything.

        An empty name means what it means to `resolve`, and while Postgres is away the only service that is held.
        """
        if not service and not self.envoys.counts() and len(self._held) == 1:
            (service,) = self._held
        service = await self.resolve(service)
        before = self.held(service)
        if before is None and service not in self.envoys.counts():
            await self.read(service)
            before = self.held(service)
        not_recorded = await self.brakes.pull(service, note)
        after = self.held(service)
        assert after is not None
        return RolledBack(after.traffic, before.traffic if before else None, not_recorded)

    async def welcome(self, service: str) -> None:
        """Return once the service's state is known, however long Postgres is away."""
        note = Note("sidecar", "an Envoy of this service connected")
        await self.brakes.looked.wait()
        while self.held(service) is None:
            try:
                self.learn(await self.journal.seed(service, self._initial, note))
            except LedgerError as error:
                log.warning("no traffic settings for an envoy yet", service=service, error=str(error))
                await asyncio.sleep(RETRY)

    async def brake(self) -> None:
        """Follow rollbacks that the ledger does not know yet. Works while Postgres has never been reached."""
        await self.brakes.run()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the changes that others make, and tell them which Envoys are here."""
        refreshes = {CHANNEL: self._refresh, ENVOYS: self.roster.hear}
        following = asyncio.create_task(follow(self._conninfo, refreshes, name="abreast control"))
        telling = asyncio.create_task(self.roster.run(stop))
        await stop.wait()
        self.close()
        await ended(following)
        await telling

    def close(self) -> None:
        """End the streams: Envoys keep their values and connect again."""
        self.closing.set()
        self.news.ring()
        self.envoys.bell.ring()

    async def _refresh(self) -> None:
        for known in await self.journal.read():
            self.learn(known)
