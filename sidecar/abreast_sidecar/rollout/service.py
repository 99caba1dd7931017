"""Operations on guard and ramp for the API and the page."""

from __future__ import annotations

from collections.abc import Callable

from abreast_sidecar.errors import ConflictError
from abreast_sidecar.rollout import transitions
from abreast_sidecar.rollout.guard import GuardPolicy
from abreast_sidecar.rollout.ramp import Ramp, RampPlan, format_percent
from abreast_sidecar.rollout.transitions import Guard, RampTransition
from abreast_sidecar.store.database import Database, Row
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote, Drill, Traffic, TrafficChange


class RolloutService:
    def __init__(self, database: Database, control: TrafficController) -> None:
        self.database = database
        self.control = control

    async def get_guard(self, service: str) -> Guard:
        """Return the guard of a service; it is off until someone sets it."""
        row = await self.database.fetch_one("guard_read", {"service": service})
        return transitions.to_guard(row) if row else Guard(service, GuardPolicy(), None, {}, "idle", "", None, None)

    async def list_guards(self) -> list[Guard]:
        return [transitions.to_guard(row) for row in await self.database.fetch_all("guard_read", {"service": None})]

    async def set_guard(self, service: str, change: Callable[[GuardPolicy], GuardPolicy], note: AuditNote) -> Guard:
        await self.control.read(service)  # creates the traffic settings that the guard needs
        before = (await self.get_guard(service)).policy
        async with self.database.connection() as connection, connection.transaction():
            return await transitions.set_guard(connection, service, change(before), note, expected_policy=before)

    async def get_ramp(self, service: str) -> Ramp | None:
        """Return the active ramp, else the last one."""
        row = await self.database.fetch_one("ramp_last", {"service": service})
        return transitions.to_ramp(row) if row else None

    async def list_active_ramps(self) -> list[Ramp]:
        return [transitions.to_ramp(row) for row in await self.database.fetch_all("ramps_active")]

    async def start_ramp(self, service: str, plan: RampPlan, note: AuditNote, *, requires_drill: bool = False) -> Ramp:
        await self.control.read(service)
        await self.control.pending_rollbacks.flush(service)
        async with self.database.connection() as connection, connection.transaction():
            return await transitions.start_ramp(connection, service, plan, note, requires_drill=requires_drill)

    async def pause_ramp(self, service: str, note: AuditNote) -> Ramp:
        return await self._apply_transition(service, note, _plan_pause)

    async def resume_ramp(self, service: str, note: AuditNote) -> Ramp:
        return await self._apply_transition(service, note, _plan_resume)

    async def abort_ramp(self, service: str, note: AuditNote) -> Ramp:
        """Send all users to old and end the ramp."""
        return await self._apply_transition(service, note, _plan_abort)

    async def start_drill(self, service: str, drill: Drill, note: AuditNote) -> Traffic:
        before = await self.control.read(service)
        if before.shares.drill_share:
            raise ConflictError(f"{service} has a drill already; wait for its end")
        async with self.database.connection() as connection, connection.transaction():
            await transitions.start_drill(connection, service, drill, note)
        return await self.control.read(service)

    async def end_drill(self, service: str, note: AuditNote, *, is_passed: bool) -> Traffic:
        async with self.database.connection() as connection, connection.transaction():
            await transitions.end_drill(connection, service, note, is_passed=is_passed)
        return await self.control.read(service)

    async def count_users(self, service: str) -> Row:
        """Return the responses to users, the server errors among them, and the faults of drills; None if unknown."""
        return await self.database.fetch_row("drill_counts", {"service": service})

    async def _apply_transition(
        self, service: str, note: AuditNote, plan: Callable[[Traffic, Ramp], RampTransition]
    ) -> Ramp:
        async with self.database.connection() as connection, connection.transaction():
            traffic = await transitions.lock_traffic(connection, service)
            ramp = await transitions.lock_ramp(connection, service)
            if ramp is None or transitions.is_superseded(ramp, traffic):
                raise ConflictError(f"{service} has no active ramp; start one with: abreast ramp start")
            return await transitions.apply_transition(connection, traffic, ramp, plan(traffic, ramp), note)


def _plan_pause(_: Traffic, ramp: Ramp) -> RampTransition:
    if ramp.state == "paused":
        raise ConflictError("the ramp is already paused")
    return RampTransition("ramp_pause", "paused", state="paused")


def _plan_resume(_: Traffic, ramp: Ramp) -> RampTransition:
    if ramp.state != "paused":
        raise ConflictError("the ramp is not paused")
    message = f"resumed at {format_percent(ramp.share)}"
    return RampTransition("ramp_resume", message, state="progressing", restarts_step=True)


def _plan_abort(traffic: Traffic, ramp: Ramp) -> RampTransition:
    shares = TrafficChange.rollback().apply(traffic.shares)
    return RampTransition("ramp_abort", f"aborted at {format_percent(ramp.share)}", state="aborted", shares=shares)
