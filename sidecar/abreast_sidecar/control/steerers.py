"""What people ask of guard and ramp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abreast_sidecar.control import acts
from abreast_sidecar.control.acts import Guard, Turn
from abreast_sidecar.control.control import Control
from abreast_sidecar.control.traffic import Note, Traffic
from abreast_sidecar.errors import ConflictError
from abreast_sidecar.steer.guard import Policy
from abreast_sidecar.steer.ramp import Plan, Ramp, percent
from abreast_sidecar.store.database import Connection, Database

Decide = Callable[[Traffic, Ramp], Turn]


class Steerers:
    def __init__(self, database: Database, control: Control) -> None:
        self.database = database
        self.control = control

    async def guard(self, service: str) -> Guard:
        """One that was never set is off."""
        row = await self.database.one("guard_read", {"service": service})
        return acts.guard(row) if row else Guard(service, Policy(), None, {}, "idle", "", None, None)

    async def guards(self) -> list[Guard]:
        return [acts.guard(row) for row in await self.database.rows("guard_read", {"service": None})]

    async def set_guard(self, service: str, change: Callable[[Policy], Policy], note: Note) -> Guard:
        await self.control.read(service)  # it has traffic to guard from now on
        before = (await self.guard(service)).policy
        async with self.database.connection() as connection, connection.transaction():
            return await acts.set_guard(connection, service, change(before), note, expected=before)

    async def ramp(self, service: str) -> Ramp | None:
        """The one under way, else the last."""
        row = await self.database.one("ramp_last", {"service": service})
        return acts.ramp(row) if row else None

    async def ramps(self) -> list[Ramp]:
        """All under way."""
        return [acts.ramp(row) for row in await self.database.rows("ramps_active")]

    async def start(self, service: str, plan: Plan, note: Note) -> Ramp:
        await self.control.read(service)
        await self.control.brakes.settle(service)
        async with self.database.connection() as connection, connection.transaction():
            return await acts.start_ramp(connection, service, plan, note)

    async def pause(self, service: str, note: Note) -> Ramp:
        return await self._turn(service, note, lambda _, ramp: _paused(ramp))

    async def resume(self, service: str, note: Note) -> Ramp:
        return await self._turn(service, note, lambda _, ramp: _resumed(ramp))

    async def abort(self, service: str, note: Note) -> Ramp:
        """All users get old, until someone says otherwise."""
        return await self._turn(service, note, _aborted)

    async def _turn(self, service: str, note: Note, decide: Decide) -> Ramp:
        async with self.database.connection() as connection, connection.transaction():
            known = await self._under_way(connection, service)
            traffic, ramp = known
            return await acts.turn(connection, traffic, ramp, decide(traffic, ramp), note)

    async def _under_way(self, connection: Connection, service: str) -> tuple[Traffic, Ramp]:
        traffic = await acts.lock_traffic(connection, service)
        ramp = await acts.lock_ramp(connection, service)
        if ramp is None or acts.superseded(ramp, traffic):
            raise ConflictError(f"{service} has no ramp under way; start one with: abreast ramp start")
        return traffic, ramp


def _paused(ramp: Ramp) -> Turn:
    if ramp.state == "paused":
        raise ConflictError("the ramp is paused already")
    return Turn("ramp_pause", "paused", state="paused")


def _resumed(ramp: Ramp) -> Turn:
    if ramp.state != "paused":
        raise ConflictError("the ramp is not paused")
    return Turn("ramp_resume", f"resumed at {percent(ramp.share)}", state="progressing", restart=True)


def _aborted(traffic: Traffic, ramp: Ramp) -> Turn:
    back = replace(traffic.shares, new_share=0, rolled_back=True)
    return Turn("ramp_abort", f"aborted at {percent(ramp.share)}", state="aborted", shares=back)
