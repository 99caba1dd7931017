"""What people ask of guard and ramp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abreast_sidecar.errors import ConflictError
from abreast_sidecar.rollout import transitions as acts
from abreast_sidecar.rollout.guard import GuardPolicy
from abreast_sidecar.rollout.ramp import Ramp, RampPlan, format_percent
from abreast_sidecar.rollout.transitions import Guard, RampTransition
from abreast_sidecar.store.database import Connection, Database
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote, Traffic

TransitionFactory = Callable[[Traffic, Ramp], RampTransition]


class RolloutService:
    def __init__(self, database: Database, control: TrafficController) -> None:
        self.database = database
        self.control = control

    async def get_guard(self, service: str) -> Guard:
        """One that was never set is off."""
        row = await self.database.fetch_one("guard_read", {"service": service})
        return acts.to_guard(row) if row else Guard(service, GuardPolicy(), None, {}, "idle", "", None, None)

    async def list_guards(self) -> list[Guard]:
        return [acts.to_guard(row) for row in await self.database.fetch_all("guard_read", {"service": None})]

    async def set_guard(self, service: str, change: Callable[[GuardPolicy], GuardPolicy], note: AuditNote) -> Guard:
        await self.control.read(service)  # it has traffic to guard from now on
        before = (await self.get_guard(service)).policy
        async with self.database.connection() as connection, connection.transaction():
            return await acts.set_guard(connection, service, change(before), note, expected_policy=before)

    async def get_ramp(self, service: str) -> Ramp | None:
        """The one under way, else the last."""
        row = await self.database.fetch_one("ramp_last", {"service": service})
        return acts.to_ramp(row) if row else None

    async def list_active_ramps(self) -> list[Ramp]:
        """All under way."""
        return [acts.to_ramp(row) for row in await self.database.fetch_all("ramps_active")]

    async def start_ramp(self, service: str, plan: RampPlan, note: AuditNote) -> Ramp:
        await self.control.read(service)
        await self.control.pending_rollbacks.flush(service)
        async with self.database.connection() as connection, connection.transaction():
            return await acts.start_ramp(connection, service, plan, note)

    async def pause_ramp(self, service: str, note: AuditNote) -> Ramp:
        return await self._apply_transition(service, note, lambda _, ramp: _plan_pause(ramp))

    async def resume_ramp(self, service: str, note: AuditNote) -> Ramp:
        return await self._apply_transition(service, note, lambda _, ramp: _plan_resume(ramp))

    async def abort_ramp(self, service: str, note: AuditNote) -> Ramp:
        """All users get old, until someone says otherwise."""
        return await self._apply_transition(service, note, _plan_abort)

    async def _apply_transition(self, service: str, note: AuditNote, decide: TransitionFactory) -> Ramp:
        async with self.database.connection() as connection, connection.transaction():
            locked_state = await self._lock_active_ramp(connection, service)
            traffic, ramp = locked_state
            return await acts.apply_transition(connection, traffic, ramp, decide(traffic, ramp), note)

    async def _lock_active_ramp(self, connection: Connection, service: str) -> tuple[Traffic, Ramp]:
        traffic = await acts.lock_traffic(connection, service)
        ramp = await acts.lock_ramp(connection, service)
        if ramp is None or acts.is_superseded(ramp, traffic):
            raise ConflictError(f"{service} has no ramp under way; start one with: abreast ramp start")
        return traffic, ramp


def _plan_pause(ramp: Ramp) -> RampTransition:
    if ramp.state == "paused":
        raise ConflictError("the ramp is paused already")
    return RampTransition("ramp_pause", "paused", state="paused")


def _plan_resume(ramp: Ramp) -> RampTransition:
    if ramp.state != "paused":
        raise ConflictError("the ramp is not paused")
    return RampTransition(
        "ramp_resume", f"resumed at {format_percent(ramp.share)}", state="progressing", restarts_step=True
    )


def _plan_abort(traffic: Traffic, ramp: Ramp) -> RampTransition:
    old_only_shares = replace(traffic.shares, new_share=0, rolled_back=True)
    return RampTransition(
        "ramp_abort", f"aborted at {format_percent(ramp.share)}", state="aborted", shares=old_only_shares
    )
