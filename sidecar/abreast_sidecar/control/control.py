"""The traffic settings of all services, held in memory, kept up to date from Postgres, and handed to Envoys."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import structlog

from abreast_sidecar.control.bell import Bell
from abreast_sidecar.control.envoys import Envoys, EnvoyState
from abreast_sidecar.control.journal import CHANNEL, Journal, Known
from abreast_sidecar.control.traffic import Change, Note, Traffic, initial
from abreast_sidecar.errors import ArgumentError, LedgerError, NotFoundError
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.follow import follow

RETRY = 0.5  # seconds

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    traffic: Traffic
    changed: float  # monotonic


class Control:
    """What is known stays in force while Postgres is away. What was never known is not made up."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.journal = Journal(database)
        self.envoys = Envoys()
        self.news = Bell()  # a state changed
        self.closing = asyncio.Event()
        self._conninfo = settings.postgres_session_url or settings.postgres_url
        self._initial = initial(settings)
        self._held: dict[str, Held] = {}

    def held(self, service: str) -> Held | None:
        return self._held.get(service)

    def all_held(self) -> list[Traffic]:
        return [held.traffic for held in self._held.values()]

    def states(self, traffic: Traffic) -> list[EnvoyState]:
        return [envoy.state(traffic) for envoy in self.envoys.of(traffic.service)]

    def learn(self, known: Known) -> None:
        traffic = known.traffic
        held = self.held(traffic.service)
        if not traffic.newer_than(held.traffic if held else None):
            return
        self._held[traffic.service] = Held(traffic, time.monotonic() - known.age)
        log.info("traffic settings", service=traffic.service, version=traffic.version, shares=traffic.shares)
        self.news.ring()

    async def resolve(self, service: str) -> str:
        """The service that a call means. An empty name means the only one with an Envoy here, else the only one known:
        a misspelt name, which is known from then on, must not stand in the way of a rollback.
        """
        if service in self._held:
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
        return known[0].traffic

    async def change(self, service: str, change: Change, note: Note) -> Traffic:
        began = time.monotonic()
        if self.held(service) is None:
            await self.read(service)
        known = await self.journal.change(service, change, note)
        self.learn(Known(known.traffic, time.monotonic() - began))
        return known.traffic

    async def welcome(self, service: str) -> None:
        """Return once the service's state is known, however long Postgres is away."""
        note = Note("sidecar", "an Envoy of this service connected")
        while self.held(service) is None:
            try:
                self.learn(await self.journal.seed(service, self._initial, note))
            except LedgerError as error:
                log.warning("no traffic settings for an envoy yet", service=service, error=str(error))
                await asyncio.sleep(RETRY)

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the changes that others make."""
        following = asyncio.create_task(
            follow(self._conninfo, CHANNEL, self._refresh, name="abreast control")
        )
        await stop.wait()
        self.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    def close(self) -> None:
        """End the streams: Envoys keep their values and connect again."""
        self.closing.set()
        self.news.ring()
        self.envoys.bell.ring()

    async def _refresh(self) -> None:
        for known in await self.journal.read():
            self.learn(known)
