"""Changes of traffic, guard and ramp. Each writes its event in the same transaction. Lock order: traffic, guard, ramp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.errors import ConflictError
from abreast_sidecar.rollout.completeness import CompletenessGap
from abreast_sidecar.rollout.guard import GuardPolicy, GuardRuleName
from abreast_sidecar.rollout.ramp import Ramp, RampPlan, RampState, format_percent
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.database import Connection, Row, load_statement
from abreast_sidecar.traffic.model import AuditNote, Drill, Shares, Traffic, TrafficChange
from abreast_sidecar.traffic.repository import get_for_update, insert_event, update_shares

GUARD_ACTOR, RAMP_ACTOR = "guard", "ramp"


@dataclass(frozen=True, slots=True)
class Guard:
    """`state` is idle, clear, breached or blind; waiting if no sidecar has evaluated the guard yet."""

    service: str
    policy: GuardPolicy
    since: datetime | None  # when the policy was set, None for never
    fired_at: Mapping[str, datetime]  # by rule
    state: str
    message: str
    checked_at: datetime | None
    now: datetime | None  # by Postgres's clock


@dataclass(frozen=True, slots=True)
class RampTransition:
    """New values of a ramp; None keeps the value."""

    action: str
    message: str
    state: RampState | None = None
    step: int | None = None
    shares: Shares | None = None
    restarts_step: bool = False
    verdict: str | None = None


async def lock_traffic(connection: Connection, service: str) -> Traffic:
    return await get_for_update(connection, service)


async def set_guard(
    connection: Connection, service: str, policy: GuardPolicy, note: AuditNote, *, expected_policy: GuardPolicy
) -> Guard:
    """Set the policy. Raise ConflictError if the present one is not `expected_policy`."""
    traffic = await lock_traffic(connection, service)
    current = await _lock_guard(connection, service)
    before = current.policy if current else GuardPolicy()
    if before != expected_policy:
        raise ConflictError("the guard's policy has changed since it was read; read it and set it again")
    if current and before == policy:
        return current
    values = {"service": service, "policy": Jsonb(asdict(policy))}
    cursor = await connection.execute(load_statement("guard_set"), values)
    (row,) = await cursor.fetchall()
    detail = {"guard_before": asdict(before), "guard_after": asdict(policy)}
    await insert_event(connection, "guard_set", note, traffic, traffic, detail=detail)
    return to_guard(row)


async def fire_guard(
    connection: Connection, observed_guard: Guard, observed_traffic: Traffic, rule: GuardRuleName, message: str
) -> bool:
    """Roll back, or record that the guard would. Return False if policy or traffic have changed since they were read."""
    service = observed_guard.service
    before = await lock_traffic(connection, service)
    guard = await _lock_guard(connection, service)
    if before != observed_traffic or guard is None or guard.since != observed_guard.since:
        return False
    after, action = before, "guard_would_roll_back"
    if observed_guard.policy.mode == "acting":
        action = "rollback"
        after = await _apply_shares(connection, before, TrafficChange.rollback().apply(before.shares))
    await connection.execute(load_statement("guard_fire"), {"service": service, "rule": rule, "message": message})
    note = AuditNote(GUARD_ACTOR, f"{rule}: {message}")
    detail = {"rule": rule, "guard_after": asdict(observed_guard.policy)}
    await insert_event(connection, action, note, before, after, detail=detail)
    return True


async def start_drill(connection: Connection, service: str, drill: Drill, note: AuditNote) -> None:
    """Start a drill. Raise ConflictError if a ramp is active, or new has too few users."""
    before = await lock_traffic(connection, service)
    if await lock_ramp(connection, service):
        raise ConflictError(f"{service} has an active ramp; abort it, or wait for its end")
    shares = drill.apply(before.shares)
    if not shares.drill_share:
        raise ConflictError("a drill needs users on new; send some: abreast traffic set --new 10%")
    after = await update_shares(connection, service, shares)
    await insert_event(connection, "drill_start", note, before, after, at=after.updated_at)


async def end_drill(connection: Connection, service: str, note: AuditNote, *, is_passed: bool) -> None:
    """End the drill, if something else has not, and record its result."""
    before = await lock_traffic(connection, service)
    after = await _apply_shares(connection, before, before.shares.without_drill())
    await insert_event(connection, "drill_end", note, before, after, detail={"passed": is_passed})


async def start_ramp(
    connection: Connection, service: str, plan: RampPlan, note: AuditNote, *, requires_drill: bool = False
) -> Ramp:
    """Start a ramp at its first step. Raise ConflictError if one is active, or a required drill has not passed."""
    before = await lock_traffic(connection, service)
    if requires_drill:
        cursor = await connection.execute(load_statement("drill_passed"), {"service": service})
        (row,) = await cursor.fetchall()
        if not row["passed"]:
            raise ConflictError("no drill has passed with the newest release of new; run: abreast drill")
    if active_ramp := await lock_ramp(connection, service):
        share = format_percent(active_ramp.share)
        raise ConflictError(f"{service} has a ramp, {active_ramp.state} at {share}; abort it first: abreast ramp abort")
    shares = TrafficChange("ramp_start", new_share=plan.steps[0]).apply(before.shares)
    after = await _apply_shares(connection, before, shares)
    values = {
        "service": service,
        "steps": list(plan.steps),
        "step_seconds": plan.hold,
        "min_pairs": plan.min_pairs,
        "budget": Jsonb(asdict(plan.budget)),
        "actor": note.actor,
        "reason": note.reason,
        "version": after.version,
        "gap": await _read_missing_count(connection, service),
    }
    cursor = await connection.execute(load_statement("ramp_add"), values)
    (row,) = await cursor.fetchall()
    ramp = to_ramp(row)
    await insert_event(connection, "ramp_start", note, before, after, detail={"ramp_after": _to_document(ramp)})
    return ramp


async def apply_transition(
    connection: Connection, before: Traffic, ramp: Ramp, transition: RampTransition, note: AuditNote
) -> Ramp:
    """Apply a transition to a locked ramp and its locked traffic. Changes of others are kept: see `is_superseded`."""
    after = await _apply_shares(connection, before, transition.shares or before.shares)
    values = {
        "id": ramp.id,
        "state": transition.state or ramp.state,
        "step": ramp.step if transition.step is None else transition.step,
        "version": ramp.version if is_superseded(ramp, before) else after.version,
        "message": transition.message,
        "verdict": transition.verdict,
        "restart": transition.restarts_step,
        "gap": await _read_missing_count(connection, ramp.service) if transition.restarts_step else None,
    }
    cursor = await connection.execute(load_statement("ramp_update"), values)
    (row,) = await cursor.fetchall()
    updated_ramp = to_ramp(row)
    detail = {"ramp_before": _to_document(ramp), "ramp_after": _to_document(updated_ramp)}
    await insert_event(connection, transition.action, note, before, after, detail=detail)
    return updated_ramp


async def lock_ramp(connection: Connection, service: str) -> Ramp | None:
    """Lock and return the active ramp. The caller has locked the traffic."""
    cursor = await connection.execute(load_statement("ramp_lock"), {"service": service})
    row = await cursor.fetchone()
    return to_ramp(row) if row else None


def is_superseded(ramp: Ramp, traffic: Traffic) -> bool:
    """Return True if someone else changed the users' share since the last step. Changes of mirroring don't count."""
    is_other_share = traffic.shares.new_share != ramp.share or traffic.shares.rolled_back or traffic.shares.conflict
    return ramp.version != traffic.version and bool(is_other_share)


async def _lock_guard(connection: Connection, service: str) -> Guard | None:
    cursor = await connection.execute(load_statement("guard_lock"), {"service": service})
    row = await cursor.fetchone()
    return to_guard(row) if row else None


async def _read_missing_count(connection: Connection, service: str) -> int | None:
    cursor = await connection.execute(load_statement("ledger_gap"), {"service": service})
    (row,) = await cursor.fetchall()
    return CompletenessGap(row["sampled"], row["written"]).missing


async def _apply_shares(connection: Connection, before: Traffic, shares: Shares) -> Traffic:
    if shares == before.shares:
        return before
    return await update_shares(connection, before.service, shares)


def to_guard(row: Row) -> Guard:
    fired_at = {rule: datetime.fromisoformat(at) for rule, at in row["fired_at"].items()}
    return Guard(**{**row, "policy": GuardPolicy.from_document(row["policy"]), "fired_at": fired_at})


def to_ramp(row: Row) -> Ramp:
    names = Budget.__dataclass_fields__
    budget = Budget(**{name: value for name, value in row["budget"].items() if name in names})
    plan = RampPlan(tuple(row["steps"]), row["step_seconds"], row["min_pairs"], budget)
    plan_columns = {"steps", "step_seconds", "min_pairs", "budget", "now"}
    return Ramp(plan=plan, **{name: value for name, value in row.items() if name not in plan_columns})


def _to_document(ramp: Ramp) -> dict[str, Any]:
    return {
        "id": ramp.id,
        "state": ramp.state,
        "steps": list(ramp.plan.steps),
        "step": ramp.step,
        "hold": ramp.plan.hold,
        "min_pairs": ramp.plan.min_pairs,
        "budget": asdict(ramp.plan.budget),
        "message": ramp.message,
    }
