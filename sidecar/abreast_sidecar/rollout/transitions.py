"""Changes of traffic, guard and ramp, each in one transaction with its event. Order of locks: traffic, guard, ramp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.errors import ConflictError
from abreast_sidecar.rollout import ramp as ramps
from abreast_sidecar.rollout.completeness import CompletenessGap
from abreast_sidecar.rollout.guard import GuardPolicy, GuardRuleName
from abreast_sidecar.rollout.ramp import Ramp, RampPlan, RampState
from abreast_sidecar.store.database import Connection, Row, load_statement
from abreast_sidecar.traffic import repository as journal
from abreast_sidecar.traffic.model import AuditNote, Shares, Traffic

GUARD_ACTOR, RAMP_ACTOR = "guard", "ramp"  # actors


@dataclass(frozen=True, slots=True)
class Guard:
    """`state` is idle, clear, breached, blind, or waiting where no sidecar has looked yet."""

    service: str
    policy: GuardPolicy
    since: datetime | None  # None: never set
    fired_at: Mapping[str, datetime]
    state: str
    message: str
    checked_at: datetime | None
    now: datetime | None


@dataclass(frozen=True, slots=True)
class RampTransition:
    """How a ramp goes on. None stays as it is."""

    action: str
    message: str
    state: RampState | None = None
    step: int | None = None
    shares: Shares | None = None
    restarts_step: bool = False  # the step's time begins anew
    verdict: str | None = None


async def lock_traffic(connection: Connection, service: str) -> Traffic:
    return (await journal.get_for_update(connection, service)).traffic


async def set_guard(
    connection: Connection,
    service: str,
    policy: GuardPolicy,
    note: AuditNote,
    *,
    expected_policy: GuardPolicy | None = None,
) -> Guard:
    """Raise ConflictError where the policy is not what is expected."""
    traffic = await lock_traffic(connection, service)
    cursor = await connection.execute(load_statement("guard_lock"), {"service": service})
    row = await cursor.fetchone()
    before = to_guard(row).policy if row else GuardPolicy()
    if expected_policy is not None and before != expected_policy:
        raise ConflictError("the guard's policy was changed meanwhile; look at it, and set it again")
    if row and before == policy:
        return to_guard(row)
    values = {"service": service, "policy": Jsonb(asdict(policy))}
    cursor = await connection.execute(load_statement("guard_set"), values)
    (new_row,) = await cursor.fetchall()
    detail = {"guard_before": asdict(before), "guard_after": asdict(policy)}
    await _record_event(connection, "guard_set", note, traffic, traffic, detail)
    return to_guard(new_row)


async def fire_guard(
    connection: Connection, observed_guard: Guard, version: int, rule: GuardRuleName, message: str
) -> bool:
    """Roll back, or say that it would be. False where policy or traffic are not any more what was looked at."""
    before = await lock_traffic(connection, observed_guard.service)
    cursor = await connection.execute(load_statement("guard_lock"), {"service": observed_guard.service})
    row = await cursor.fetchone()
    if before.version != version or row is None or row["since"] != observed_guard.since:
        return False
    after, action = before, "guard_would_roll_back"
    if observed_guard.policy.mode == "acting":
        action = "rollback"
        after = await _apply_shares(connection, before, roll_back_shares(before.shares))
    await connection.execute(
        load_statement("guard_fire"), {"service": observed_guard.service, "rule": rule, "message": message}
    )
    detail = {"rule": rule, "guard_after": asdict(observed_guard.policy)}
    await _record_event(connection, action, AuditNote(GUARD_ACTOR, f"{rule}: {message}"), before, after, detail)
    return True


async def start_ramp(connection: Connection, service: str, plan: RampPlan, note: AuditNote) -> Ramp:
    """Raise ConflictError where one is under way."""
    before = await lock_traffic(connection, service)
    if active_ramp := await lock_ramp(connection, service):
        raise ConflictError(
            f"a ramp is under way already, {active_ramp.state} at {ramps.format_percent(active_ramp.share)}; abort it first"
        )
    shares = replace(before.shares, new_share=plan.steps[0], rolled_back=False)
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
        "gap": (await read_completeness_gap(connection, service)).missing,
    }
    cursor = await connection.execute(load_statement("ramp_add"), values)
    (row,) = await cursor.fetchall()
    new_ramp = to_ramp(row)
    await _record_event(connection, "ramp_start", note, before, after, {"ramp_after": to_ramp_document(new_ramp)})
    return new_ramp


async def apply_transition(
    connection: Connection, before: Traffic, current_ramp: Ramp, transition: RampTransition, note: AuditNote
) -> Ramp:
    """`before` and `known` are locked. What was changed by somebody else is not undone here: see `superseded`."""
    after = await _apply_shares(connection, before, transition.shares or before.shares)
    values = {
        "id": current_ramp.id,
        "state": transition.state or current_ramp.state,
        "step": current_ramp.step if transition.step is None else transition.step,
        "version": after.version if _matches_traffic(current_ramp, before) else current_ramp.version,
        "message": transition.message,
        "verdict": transition.verdict,
        "restart": transition.restarts_step,
        "gap": (await read_completeness_gap(connection, current_ramp.service)).missing
        if transition.restarts_step
        else None,
    }
    cursor = await connection.execute(load_statement("ramp_update"), values)
    (row,) = await cursor.fetchall()
    updated_ramp = to_ramp(row)
    detail = {"ramp_before": to_ramp_document(current_ramp), "ramp_after": to_ramp_document(updated_ramp)}
    await _record_event(connection, transition.action, note, before, after, detail)
    return updated_ramp


async def lock_ramp(connection: Connection, service: str) -> Ramp | None:
    """The one under way."""
    cursor = await connection.execute(load_statement("ramp_lock"), {"service": service})
    row = await cursor.fetchone()
    return to_ramp(row) if row else None


async def read_completeness_gap(connection: Connection, service: str) -> CompletenessGap:
    cursor = await connection.execute(load_statement("ledger_gap"), {"service": service})
    (row,) = await cursor.fetchall()
    return CompletenessGap(row["sampled"], row["written"])


def is_superseded(current_ramp: Ramp, traffic: Traffic) -> bool:
    """Whether somebody else decided about the users since. Who changes only what is mirrored leaves the ramp alone."""
    return not _matches_traffic(current_ramp, traffic)


def _matches_traffic(current_ramp: Ramp, traffic: Traffic) -> bool:
    if current_ramp.version == traffic.version:
        return True
    return traffic.shares.new_share == current_ramp.share and not traffic.shares.rolled_back


def roll_back_shares(shares: Shares) -> Shares:
    return replace(shares, new_share=0, rolled_back=True)


async def _apply_shares(connection: Connection, before: Traffic, shares: Shares) -> Traffic:
    if shares == before.shares:
        return before
    return (await journal.update_shares(connection, before.service, shares)).traffic


async def _record_event(
    connection: Connection, action: str, note: AuditNote, before: Traffic, after: Traffic, detail: Mapping[str, Any]
) -> None:
    values = {
        "service": after.service,
        "actor": note.actor,
        "action": action,
        "reason": note.reason,
        "before": Jsonb(journal.to_traffic_document(before)),
        "after": Jsonb(journal.to_traffic_document(after)),
        "detail": Jsonb(dict(detail)),
    }
    await connection.execute(load_statement("rollout_event_add"), values)


def to_guard(row: Row) -> Guard:
    fired_at = {rule: datetime.fromisoformat(at) for rule, at in row["fired_at"].items()}
    columns = {name: row[name] for name in ("service", "since", "state", "message", "checked_at", "now")}
    return Guard(**columns, policy=GuardPolicy.from_document(row["policy"]), fired_at=fired_at)


def to_ramp(row: Row) -> Ramp:
    plan = RampPlan(
        tuple(row["steps"]), row["step_seconds"], row["min_pairs"], ramps.budget_from_document(row["budget"])
    )
    excluded_columns = {"steps", "step_seconds", "min_pairs", "budget", "now"}
    return Ramp(plan=plan, **{name: value for name, value in row.items() if name not in excluded_columns})


def to_ramp_document(current_ramp: Ramp) -> dict[str, Any]:
    """For the record of an event."""
    return {
        "id": current_ramp.id,
        "state": current_ramp.state,
        "steps": list(current_ramp.plan.steps),
        "step": current_ramp.step,
        "hold": current_ramp.plan.hold,
        "min_pairs": current_ramp.plan.min_pairs,
        "budget": asdict(current_ramp.plan.budget),
        "message": current_ramp.message,
    }
