"""Looks at the evidence for every ramp under way, and moves it on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeAlias

import structlog

from abreast_sidecar.compare.verdict import Completeness
from abreast_sidecar.control import acts
from abreast_sidecar.control.acts import RAMP_ACTOR, RampTransition
from abreast_sidecar.control.control import TrafficController
from abreast_sidecar.control.seat import LeaderLease
from abreast_sidecar.control.traffic import AuditNote, Traffic
from abreast_sidecar.errors import LedgerError
from abreast_sidecar.steer import flow
from abreast_sidecar.steer.flow import CompletenessGap, EnvoyReport
from abreast_sidecar.steer.ramp import (
    Observation,
    Ramp,
    RampDecision,
    RampEvidence,
    decide_ramp,
    format_percent,
)
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.queries import LedgerReader
from abreast_sidecar.store.results import VerdictEvidence, Window

PendingCounter: TypeAlias = Callable[
    [str], Awaitable[int | None]
]  # requests on their way to a service's ledger

log = structlog.get_logger(__name__)


class RampController:
    def __init__(
        self,
        database: Database,
        lease: LeaderLease,
        control: TrafficController,
        count_pending: PendingCounter,
        envoy_admin: Iterable[str],
    ) -> None:
        self._database = database
        self._reader = LedgerReader(database)
        self._lease = lease
        self._control = control
        self._count_pending = count_pending
        self._admin_addresses = tuple(envoy_admin)

    async def reconcile(self) -> None:
        rows = await self._database.fetch_all("ramps_active")
        for error in await asyncio.gather(
            *(self._reconcile_ramp(acts.to_ramp(row), row["now"]) for row in rows), return_exceptions=True
        ):
            if error is not None:  # only now that the others had their turn
                raise error

    async def _reconcile_ramp(self, ramp: Ramp, current_time: datetime) -> None:
        (snapshot,) = await self._control.repository.read(ramp.service)
        if acts.is_superseded(ramp, snapshot.traffic):
            await self._end_superseded(ramp)
            return
        try:
            decision = decide_ramp(ramp, await self._observe(ramp, current_time))
        except LedgerError as error:  # such as more rows than can be read in time
            await self._write_status(
                ramp, RampDecision("wait", f"the evidence can't be read: {error}", "INCONCLUSIVE")
            )
            raise
        if decision.action != "wait":
            await self._apply_decision(ramp, snapshot.traffic, decision)
            return
        await self._write_status(ramp, decision)
        if ramp.started_gap is None or ramp.step_gap is None:
            await self._database.execute("ramp_gap_set", {"id": ramp.id, "service": ramp.service})

    async def _write_status(self, ramp: Ramp, decision: RampDecision) -> None:
        values = {"id": ramp.id, "verdict": decision.verdict, "message": decision.reason}
        await self._database.execute("ramp_status_set", values)

    async def _observe(self, ramp: Ramp, current_time: datetime) -> Observation:
        """Both windows end now: a look is about one moment."""
        pending = await self._count_pending(ramp.service)
        slower = ramp.plan.budget.max_slower
        total = await self._reader.read_evidence(ramp.service, Window(ramp.started_at), slower)
        step = await self._reader.read_evidence(ramp.service, Window(ramp.step_at), slower)
        reports = await self._database.fetch_all("envoy_reports", {"service": ramp.service})
        newest_pair = await self._database.fetch_one(
            "pair_newest_age", {"service": ramp.service, "sidecar_time": datetime.now(UTC)}
        )
        return Observation(
            observed_at=current_time,
            since_start=_to_ramp_evidence(total, ramp.started_gap, pending),
            since_step=_to_ramp_evidence(step, ramp.step_gap, pending),
            stale_counts_reason=flow.describe_stale_counts(
                (EnvoyReport(**row) for row in reports), self._admin_addresses
            ),
            newest_pair_age_s=newest_pair["age"] if newest_pair else None,
        )

    async def _apply_decision(self, observed_ramp: Ramp, traffic: Traffic, decision: RampDecision) -> None:
        """Only where nothing has changed since the look, and no rollback waits to be recorded."""
        async with self._lease.transaction() as connection:
            before = await acts.lock_traffic(connection, observed_ramp.service)
            ramp = await acts.lock_ramp(connection, observed_ramp.service)
            has_pending_rollback = self._control.pending_rollbacks.get(observed_ramp.service) is not None
            if (
                has_pending_rollback
                or before.version != traffic.version
                or ramp is None
                or not _is_unchanged(ramp, observed_ramp)
            ):
                return
            transition = replace(plan_transition(ramp, before, decision), verdict=decision.verdict)
            await acts.apply_transition(
                connection, before, ramp, transition, AuditNote(RAMP_ACTOR, decision.reason)
            )
        log.info(
            "the ramp moves",
            service=observed_ramp.service,
            action=transition.action,
            said=transition.message,
            reason=decision.reason,
        )

    async def _end_superseded(self, observed_ramp: Ramp) -> None:
        """Somebody else decided about the users: that stands."""
        async with self._lease.transaction() as connection:
            before = await acts.lock_traffic(connection, observed_ramp.service)
            ramp = await acts.lock_ramp(connection, observed_ramp.service)
            if ramp is None or not _is_unchanged(ramp, observed_ramp) or not acts.is_superseded(ramp, before):
                return
            reason = await self._describe_superseding_change(observed_ramp.service)
            transition = RampTransition(
                "ramp_end", f"ended at {format_percent(ramp.share)}: {reason}", state="superseded"
            )
            await acts.apply_transition(connection, before, ramp, transition, AuditNote(RAMP_ACTOR, reason))
        log.info("the ramp has ended", service=observed_ramp.service, reason=reason)

    async def _describe_superseding_change(self, service: str) -> str:
        events = await self._control.repository.list_events(service, before_id=None, limit=20)
        for event in events:
            if event.before is None or event.before.shares.new_share != event.after.shares.new_share:
                return f"{event.action} by {event.actor}" + (f": {event.reason}" if event.reason else "")
        return "somebody else set the traffic"


def plan_transition(ramp: Ramp, before: Traffic, decision: RampDecision) -> RampTransition:
    if decision.action == "roll back":
        message = f"rolled back from {format_percent(ramp.share)}: {decision.reason}"
        return RampTransition(
            "rollback", message, state="failed", shares=acts.roll_back_shares(before.shares)
        )
    if decision.action == "succeed":
        return RampTransition("ramp_succeed", f"all {len(ramp.plan.steps)} steps are done", state="succeeded")
    step = ramp.step + 1
    share = ramp.plan.steps[step]
    return RampTransition(
        "ramp_step",
        f"step {step + 1} of {len(ramp.plan.steps)}: {format_percent(share)}",
        step=step,
        shares=replace(before.shares, new_share=share, rolled_back=False),
        restarts_step=True,
    )


def _is_unchanged(ramp: Ramp, observed_ramp: Ramp) -> bool:
    """Whether it is where it was looked at; what it said last does not matter."""
    return (ramp.id, ramp.state, ramp.step, ramp.step_at) == (
        observed_ramp.id,
        observed_ramp.state,
        observed_ramp.step,
        observed_ramp.step_at,
    )


def _to_ramp_evidence(evidence: VerdictEvidence, gap_before: int | None, pending: int | None) -> RampEvidence:
    arrived_count = evidence.written + (pending or 0)
    missing_count = flow.count_lost_requests(
        gap_before, CompletenessGap(evidence.envoy_sampled, arrived_count)
    )
    sampled_count = None if missing_count is None else evidence.rows + missing_count
    return RampEvidence(evidence.endpoints, Completeness(sampled_count, evidence.accounted))
