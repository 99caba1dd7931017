"""Who acts by itself: one sidecar of all, as long as it has the seat, watches over users' traffic and tells about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from abreast_sidecar.control.control import TrafficController
from abreast_sidecar.control.guarding import GuardController
from abreast_sidecar.control.ramping import PendingCounter, RampController
from abreast_sidecar.control.seat import LEADER_HEARTBEAT_S, LeaderLease, LeadershipLostError
from abreast_sidecar.control.webhooks import WebhookSender
from abreast_sidecar.ending import cancel_and_wait
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.outage import Outage, wait_or_stop
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database

RECONCILE_INTERVAL_S = 0.5  # seconds between two looks at the evidence
DELIVERY_INTERVAL_S = 0.5  # seconds between two looks at what is to be told
GUARD_REST_FACTOR = (
    4.0  # a look is followed by so many times its own length of rest: the database has other work
)
RAMP_REST_FACTOR = 10.0  # a ramp looks at all since it began

log = structlog.get_logger(__name__)


class LeaderTasks:
    def __init__(self, settings: Settings, control: TrafficController, count_pending: PendingCounter) -> None:
        self.lease = LeaderLease(settings.session_url)
        self._database = Database(settings.postgres_url)
        self._guard_controller = GuardController(self._database, self.lease, control, settings.envoy_admin)
        self._ramp_controller = RampController(
            self._database, self.lease, control, count_pending, settings.envoy_admin
        )
        self._settings = settings
        self._outage = Outage("postgres", by="steering")

    @property
    def is_leader(self) -> bool:
        return self.lease.is_held

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set. Whoever has the seat acts, the others are ready to."""
        await self._database.open()
        try:
            while not stop.is_set():
                try:
                    if await self.lease.acquire():
                        await self._lead(stop)
                    self._outage.record_success()
                    await wait_or_stop(stop, LEADER_HEARTBEAT_S)
                except LedgerError as error:
                    self._outage.record_failure(error)
                    await self._outage.back_off(stop)
        finally:
            await self.lease.release()
            await self._database.close()

    async def _lead(self, stop: asyncio.Event) -> None:
        """Until the seat is lost."""
        log.info("this sidecar acts for guard, ramps and webhooks")
        webhook_sender = WebhookSender(
            self._database, self._settings.webhook_urls, self._settings.webhook_secret
        )
        tasks = [
            asyncio.create_task(part)
            for part in (
                self._send_heartbeats(stop),
                self._run_periodically(
                    "guard", self._guard_controller.reconcile, RECONCILE_INTERVAL_S, GUARD_REST_FACTOR, stop
                ),
                self._run_periodically(
                    "ramp", self._ramp_controller.reconcile, RECONCILE_INTERVAL_S, RAMP_REST_FACTOR, stop
                ),
                self._run_periodically("webhooks", webhook_sender.deliver, DELIVERY_INTERVAL_S, 0.0, stop),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        except LeadershipLostError as error:
            log.warning("this sidecar does not act any more", error=str(error))
        finally:
            await cancel_and_wait(*tasks)

    async def _send_heartbeats(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.lease.heartbeat()
            await wait_or_stop(stop, LEADER_HEARTBEAT_S)

    async def _run_periodically(
        self,
        name: str,
        job: Callable[[], Awaitable[None]],
        period_s: float,
        rest_factor: float,
        stop: asyncio.Event,
    ) -> None:
        outage = Outage("postgres", by=name)
        clock = asyncio.get_running_loop().time
        while not stop.is_set():
            started = clock()
            try:
                await job()
            except LeadershipLostError:
                raise
            except LedgerError as error:
                outage.record_failure(error)
                await outage.back_off(stop)
            except Exception:
                log.exception("steering failed", part=name)
                await wait_or_stop(stop, period_s)
            else:
                outage.record_success()
                await wait_or_stop(stop, max(period_s, rest_factor * (clock() - started)))
