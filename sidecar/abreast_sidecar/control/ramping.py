"""Looks at the evidence for every ramp under way, and moves it on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeAlias

import structlog

from abreast_sidecar.compare.verdict import Ledger
from abreast_sidecar.control import acts
from abreast_sidecar.control.acts import RAMP, Turn
from abreast_sidecar.control.control import Control
from abreast_sidecar.control.seat import Seat
from abreast_sidecar.control.traffic import Note, Traffic
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.steer import flow
from abreast_sidecar.steer.flow import Gap, Report
from abreast_sidecar.steer.ramp import Look, Move, Ramp, Seen, decide, percent
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.queries import Queries
from abreast_sidecar.store.results import Evidence, Window

Pending: TypeAlias = Callable[[str], Awaitable[int | None]]  # requests on their way to a service's ledger

log = structlog.get_logger(__name__)


class Ramping:
    def __init__(
        self,
        database: Database,
        seat: Seat,
        control: Control,
        pending: Pending,
        envoy_admin: Iterable[str],
    ) -> None:
        self._database = database
        self._queries = Queries(database)
        self._seat = seat
        self._control = control
        self._pending = pending
        self._asked = tuple(envoy_admin)

    async def look(self) -> None:
        rows = await self._database.rows("ramps_active")
        for ended in await asyncio.gather(
            *(self._one(acts.ramp(row), row["now"]) for row in rows), return_exceptions=True
        ):
            if ended is not None:  # only now that the others had their turn
                raise ended

    async def _one(self, ramp: Ramp, now: datetime) -> None:
        (known,) = await self._control.journal.read(ramp.service)
        if acts.superseded(ramp, known.traffic):
            await self._end(ramp)
            return
        try:
            move = decide(ramp, await self._look(ramp, now))
        except LedgerError as error:  # such as more rows than can be read in time
            await self._say(ramp, Move("wait", f"the evidence can't be read: {error}", "INCONCLUSIVE"))
            raise
        if move.action != "wait":
            await self._move(ramp, known.traffic, move)
            return
        await self._say(ramp, move)
        if ramp.started_gap is None or ramp.step_gap is None:
            await self._database.execute("ramp_gap_set", {"id": ramp.id, "service": ramp.service})

    async def _say(self, ramp: Ramp, move: Move) -> None:
        values = {"id": ramp.id, "verdict": move.verdict, "message": move.reason}
        await self._database.execute("ramp_status_set", values)

    async def _look(self, ramp: Ramp, now: datetime) -> Look:
        """Both windows end now: a look is about one moment."""
        pending = await self._pending(ramp.service)
        slower = ramp.plan.budget.max_slower
        whole = await self._queries.evidence(ramp.service, Window(ramp.started_at), slower)
        step = await self._queries.evidence(ramp.service, Window(ramp.step_at), slower)
        reports = await self._database.rows("envoy_reports", {"service": ramp.service})
        newest = await self._database.one(
            "pair_newest_age", {"service": ramp.service, "sidecar_time": datetime.now(UTC)}
        )
        return Look(
            now=now,
            whole=_seen(whole, ramp.started_gap, pending),
            step=_seen(step, ramp.step_gap, pending),
            silent=flow.silent((Report(**row) for row in reports), self._asked),
            newest=newest["age"] if newest else None,
        )

    async def _move(self, seen: Ramp, traffic: Traffic, move: Move) -> None:
        """Only where nothing has changed since the look, and no rollback waits to be recorded."""
        async with self._seat.transaction() as connection:
            before = await acts.lock_traffic(connection, seen.service)
            ramp = await acts.lock_ramp(connection, seen.service)
            braked = self._control.brakes.on(seen.service) is not None
            if braked or before.version != traffic.version or ramp is None or not _same(ramp, seen):
                return
            wanted = replace(turn(ramp, before, move), verdict=move.verdict)
            await acts.turn(connection, before, ramp, wanted, Note(RAMP, move.reason))
        log.info(
            "the ramp moves", service=seen.service, action=wanted.action, said=wanted.said, reason=move.reason
        )

    async def _end(self, seen: Ramp) -> None:
        """Somebody else decided about the users: that stands."""
        async with self._seat.transaction() as connection:
            before = await acts.lock_traffic(connection, seen.service)
            ramp = await acts.lock_ramp(connection, seen.service)
            if ramp is None or not _same(ramp, seen) or not acts.superseded(ramp, before):
                return
            why = await self._who(seen.service)
            wanted = Turn("ramp_end", f"ended at {percent(ramp.share)}: {why}", state="superseded")
            await acts.turn(connection, before, ramp, wanted, Note(RAMP, why))
        log.info("the ramp has ended", service=seen.service, reason=why)

    async def _who(self, service: str) -> str:
        events = await self._control.journal.events(service, before_id=None, limit=20)
        for event in events:
            if event.before is None or event.before.shares.new_share != event.after.shares.new_share:
                return f"{event.action} by {event.actor}" + (f": {event.reason}" if event.reason else "")
        return "somebody else set the traffic"


def turn(ramp: Ramp, before: Traffic, move: Move) -> Turn:
    if move.action == "roll back":
        said = f"rolled back from {percent(ramp.share)}: {move.reason}"
        return Turn("rollback", said, state="failed", shares=acts.rolled_back(before.shares))
    if move.action == "succeed":
        return Turn("ramp_succeed", f"all {len(ramp.plan.steps)} steps are done", state="succeeded")
    step = ramp.step + 1
    share = ramp.plan.steps[step]
    return Turn(
        "ramp_step",
        f"step {step + 1} of {len(ramp.plan.steps)}: {percent(share)}",
        step=step,
        shares=replace(before.shares, new_share=share, rolled_back=False),
        restart=True,
    )


def _same(ramp: Ramp, seen: Ramp) -> bool:
    """Whether it is where it was looked at; what it said last does not matter."""
    return (ramp.id, ramp.state, ramp.step, ramp.step_at) == (seen.id, seen.state, seen.step, seen.step_at)


def _seen(evidence: Evidence, before: int | None, pending: int | None) -> Seen:
    arrived = evidence.written + (pending or 0)
    missing = flow.lost(before, Gap(evidence.envoy_sampled, arrived))
    sampled = None if missing is None else evidence.rows + missing
    return Seen(evidence.endpoints, Ledger(sampled, evidence.accounted))
