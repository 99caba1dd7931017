"""Changes of traffic, guard and ramp, each in one transaction with its event. Order of locks: traffic, guard, ramp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from abreast_sidecar.control import journal
from abreast_sidecar.control.traffic import Note, Shares, Traffic
from abreast_sidecar.errors import ConflictError
from abreast_sidecar.steer import ramp as ramps
from abreast_sidecar.steer.flow import Gap
from abreast_sidecar.steer.guard import Policy, Subject
from abreast_sidecar.steer.ramp import Plan, Ramp, State
from abreast_sidecar.store.database import Connection, Row, statement

GUARD, RAMP = "guard", "ramp"  # actors


@dataclass(frozen=True, slots=True)
class Guard:
    """`state` is idle, clear, breached, blind, or waiting where no sidecar has looked yet."""

    service: str
    policy: Policy
    since: datetime | None  # None: never set
    fired: Mapping[str, datetime]
    state: str
    message: str
    checked_at: datetime | None
    now: datetime | None


@dataclass(frozen=True, slots=True)
class Turn:
    """How a ramp goes on. None stays as it is."""

    action: str
    said: str
    state: State | None = None
    step: int | None = None
    shares: Shares | None = None
    restart: bool = False  # the step's time begins anew
    verdict: str | None = None


async def lock_traffic(connection: Connection, service: str) -> Traffic:
    return (await journal.locked(connection, service)).traffic


async def set_guard(
    connection: Connection, service: str, policy: Policy, note: Note, *, expected: Policy | None = None
) -> Guard:
    """Raise ConflictError where the policy is not what is expected."""
    traffic = await lock_traffic(connection, service)
    cursor = await connection.execute(statement("guard_lock"), {"service": service})
    row = await cursor.fetchone()
    before = guard(row).policy if row else Policy()
    if expected is not None and before != expected:
        raise ConflictError("the guard's policy was changed meanwhile; look at it, and set it again")
    if row and before == policy:
        return guard(row)
    values = {"service": service, "policy": Jsonb(asdict(policy))}
    cursor = await connection.execute(statement("guard_set"), values)
    (made,) = await cursor.fetchall()
    detail = {"guard_before": asdict(before), "guard_after": asdict(policy)}
    await _record(connection, "guard_set", note, traffic, traffic, detail)
    return guard(made)


async def guard_acts(connection: Connection, seen: Guard, version: int, rule: Subject, said: str) -> bool:
    """Roll back, or say that it would be. False where policy or traffic are not any more what was looked at."""
    before = await lock_traffic(connection, seen.service)
    cursor = await connection.execute(statement("guard_lock"), {"service": seen.service})
    row = await cursor.fetchone()
    if before.version != version or row is None or row["since"] != seen.since:
        return False
    after, action = before, "guard_would_roll_back"
    if seen.policy.mode == "acting":
        action = "rollback"
        after = await _moved(connection, before, rolled_back(before.shares))
    await connection.execute(
        statement("guard_fire"), {"service": seen.service, "rule": rule, "message": said}
    )
    detail = {"rule": rule, "guard_after": asdict(seen.policy)}
    await _record(connection, action, Note(GUARD, f"{rule}: {said}"), before, after, detail)
    return True


async def start_ramp(connection: Connection, service: str, plan: Plan, note: Note) -> Ramp:
    """Raise ConflictError where one is under way."""
    before = await lock_traffic(connection, service)
    if running := await lock_ramp(connection, service):
        raise ConflictError(
            f"a ramp is under way already, {running.state} at {ramps.percent(running.share)}; abort it first"
        )
    shares = replace(before.shares, new_share=plan.steps[0], rolled_back=False)
    after = await _moved(connection, before, shares)
    values = {
        "service": service,
        "steps": list(plan.steps),
        "step_seconds": plan.hold,
        "min_pairs": plan.min_pairs,
        "budget": Jsonb(asdict(plan.budget)),
        "actor": note.actor,
        "reason": note.reason,
        "version": after.version,
        "gap": (await gap(connection, service)).missing,
    }
    cursor = await connection.execute(statement("ramp_add"), values)
    (row,) = await cursor.fetchall()
    made = ramp(row)
    await _record(connection, "ramp_start", note, before, after, {"ramp_after": described(made)})
    return made


async def turn(connection: Connection, before: Traffic, known: Ramp, wanted: Turn, note: Note) -> Ramp:
    """`before` and `known` are locked. What was changed by somebody else is not undone here: see `superseded`."""
    after = await _moved(connection, before, wanted.shares or before.shares)
    values = {
        "id": known.id,
        "state": wanted.state or known.state,
        "step": known.step if wanted.step is None else wanted.step,
        "version": after.version if _is_of(known, before) else known.version,
        "message": wanted.said,
        "verdict": wanted.verdict,
        "restart": wanted.restart,
        "gap": (await gap(connection, known.service)).missing if wanted.restart else None,
    }
    cursor = await connection.execute(statement("ramp_update"), values)
    (row,) = await cursor.fetchall()
    made = ramp(row)
    detail = {"ramp_before": described(known), "ramp_after": described(made)}
    await _record(connection, wanted.action, note, before, after, detail)
    return made


async def lock_ramp(connection: Connection, service: str) -> Ramp | None:
    """The one under way."""
    cursor = await connection.execute(statement("ramp_lock"), {"service": service})
    row = await cursor.fetchone()
    return ramp(row) if row else None


async def gap(connection: Connection, service: str) -> Gap:
    cursor = await connection.execute(statement("ledger_gap"), {"service": service})
    (row,) = await cursor.fetchall()
    return Gap(row["sampled"], row["written"])


def superseded(known: Ramp, traffic: Traffic) -> bool:
    """Whether somebody else decided about the users since. Who changes only what is mirrored leaves the ramp alone."""
    return not _is_of(known, traffic)


def _is_of(known: Ramp, traffic: Traffic) -> bool:
    if known.version == traffic.version:
        return True
    return traffic.shares.new_share == known.share and not traffic.shares.rolled_back


def rolled_back(shares: Shares) -> Shares:
    return replace(shares, new_share=0, rolled_back=True)


async def _moved(connection: Connection, before: Traffic, shares: Shares) -> Traffic:
    if shares == before.shares:
        return before
    return (await journal.changed(connection, before.service, shares)).traffic


async def _record(
    connection: Connection,
    action: str,
    note: Note,
    before: Traffic,
    after: Traffic,
    detail: Mapping[str, Any],
) -> None:
    values = {
        "service": after.service,
        "actor": note.actor,
        "action": action,
        "reason": note.reason,
        "before": Jsonb(journal.document(before)),
        "after": Jsonb(journal.document(after)),
        "detail": Jsonb(dict(detail)),
    }
    await connection.execute(statement("rollout_event_add"), values)


def guard(row: Row) -> Guard:
    fired = {rule: datetime.fromisoformat(at) for rule, at in row["fired_at"].items()}
    known = {name: row[name] for name in ("service", "since", "state", "message", "checked_at", "now")}
    return Guard(**known, policy=Policy.of(row["policy"]), fired=fired)


def ramp(row: Row) -> Ramp:
    plan = Plan(tuple(row["steps"]), row["step_seconds"], row["min_pairs"], ramps.budget_of(row["budget"]))
    left_out = {"steps", "step_seconds", "min_pairs", "budget", "now"}
    return Ramp(plan=plan, **{name: value for name, value in row.items() if name not in left_out})


def described(known: Ramp) -> dict[str, Any]:
    """For the record of an event."""
    return {
        "id": known.id,
        "state": known.state,
        "steps": list(known.plan.steps),
        "step": known.step,
        "hold": known.plan.hold,
        "min_pairs": known.plan.min_pairs,
        "budget": asdict(known.plan.budget),
        "message": known.message,
    }
