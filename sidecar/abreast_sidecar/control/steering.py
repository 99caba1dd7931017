"""Who acts by itself: one sidecar of all, as long as it has the seat, watches over users' traffic and tells about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from abreast_sidecar.control.control import Control
from abreast_sidecar.control.guarding import Guarding
from abreast_sidecar.control.ramping import Pending, Ramping
from abreast_sidecar.control.seat import BEAT, Seat, SeatLostError
from abreast_sidecar.control.webhooks import Webhooks
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.outage import Outage, pause
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database

LOOK = 0.5  # seconds between two looks at the evidence
DELIVER = 0.5  # seconds between two looks at what is to be told
BUSY = 4.0  # a look is followed by so many times its own length of rest: the database has other work
BUSIER = 10.0  # a ramp looks at all since it began

log = structlog.get_logger(__name__)


class Steering:
    def __init__(self, settings: Settings, control: Control, pending: Pending) -> None:
        self.seat = Seat(settings.session_url)
        self._database = Database(settings.postgres_url)
        self._guarding = Guarding(self._database, self.seat, control, settings.envoy_admin)
        self._ramping = Ramping(self._database, self.seat, control, pending, settings.envoy_admin)
        self._settings = settings
        self._outage = Outage("postgres", by="steering")

    @property
    def acting(self) -> bool:
        return self.seat.held

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set. Whoever has the seat acts, the others are ready to."""
        await self._database.open()
        try:
            while not stop.is_set():
                try:
                    if await self.seat.take():
                        await self._serve(stop)
                    self._outage.end()
                    await pause(stop, BEAT)
                except LedgerError as error:
                    self._outage.begin(error)
                    await self._outage.wait(stop)
        finally:
            await self.seat.leave()
            await self._database.close()

    async def _serve(self, stop: asyncio.Event) -> None:
        """Until the seat is lost."""
        log.info("this sidecar acts for guard, ramps and webhooks")
        webhooks = Webhooks(self._database, self._settings.webhook_urls, self._settings.webhook_secret)
        parts = [
            asyncio.create_task(part)
            for part in (
                self._beat(stop),
                self._repeat("guard", self._guarding.look, LOOK, BUSY, stop),
                self._repeat("ramp", self._ramping.look, LOOK, BUSIER, stop),
                self._repeat("webhooks", webhooks.deliver, DELIVER, 0.0, stop),
            )
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        except SeatLostError as error:
            log.warning("this sidecar does not act any more", error=str(error))
        finally:
            await ended(*parts)

    async def _beat(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.seat.beat()
            await pause(stop, BEAT)

    async def _repeat(
        self, name: str, turn: Callable[[], Awaitable[None]], period: float, rest: float, stop: asyncio.Event
    ) -> None:
        outage = Outage("postgres", by=name)
        clock = asyncio.get_running_loop().time
        while not stop.is_set():
            began = clock()
            try:
                await turn()
            except SeatLostError:
                raise
            except LedgerError as error:
                outage.begin(error)
                await outage.wait(stop)
            except Exception:
                log.exception("steering failed", part=name)
                await pause(stop, period)
            else:
                outage.end()
                await pause(stop, max(period, rest * (clock() - began)))
