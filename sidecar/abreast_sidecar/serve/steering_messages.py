"""Guard and ramp as messages of the API, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from google.protobuf.duration_pb2 import Duration

from abreast.v1 import comparison_pb2
from abreast.v1 import steering_pb2 as pb
from abreast_sidecar.compare.verdict import Budget
from abreast_sidecar.control.acts import Guard
from abreast_sidecar.control.traffic import WEIGHTS, parts
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.serve import arguments
from abreast_sidecar.serve.values import duration, number, timestamp
from abreast_sidecar.steer.guard import RULES, Policy
from abreast_sidecar.steer.ramp import Plan, Ramp

MODE = pb.GuardMode.DESCRIPTOR
GUARD_STATE = pb.GuardState.DESCRIPTOR
PHASE = pb.RampPhase.DESCRIPTOR
VERDICT = comparison_pb2.VerdictState.DESCRIPTOR


def guard(found: Guard) -> pb.Guard:
    state = "idle" if found.policy.mode == "off" else found.state
    return pb.Guard(
        service=found.service,
        policy=policy(asdict(found.policy)),
        set_time=timestamp(found.since),
        state=number(GUARD_STATE, state),  # type: ignore[arg-type]  # an int is one
        said="off" if found.policy.mode == "off" else found.message,
        look_time=timestamp(found.checked_at),
    )


def policy(found: Mapping[str, Any]) -> pb.GuardPolicy:
    """Of a policy as a document."""
    return pb.GuardPolicy(
        mode=number(MODE, found["mode"]),  # type: ignore[arg-type]  # an int is one
        min_completeness=found["min_completeness"],
        confidence=found["confidence"],
        **{name: _rule(found[name]) for name in RULES},
    )


def _rule(found: Mapping[str, Any]) -> pb.GuardRule:
    return pb.GuardRule(
        limit=found["limit"],
        min_pairs=found["min_pairs"],
        window=duration(found["window"] * 1e6),
        cooldown=duration(found["cooldown"] * 1e6),
    )


def change(asked: pb.GuardPolicy) -> Callable[[Policy], Policy]:
    """What a request makes of a policy. Raise ArgumentError, at the latest when it is applied."""
    values: dict[str, Any] = {
        name: getattr(asked, name) for name in ("min_completeness", "confidence") if asked.HasField(name)
    }
    if asked.mode:
        if asked.mode not in MODE.values_by_number:
            raise ArgumentError(f"policy.mode must be a GuardMode, got {asked.mode}")
        values["mode"] = pb.GuardMode.Name(asked.mode).removeprefix("GUARD_MODE_").lower()
    rules = {name: _said(getattr(asked, name)) for name in RULES if asked.HasField(name)}

    def apply(before: Policy) -> Policy:
        changed: dict[str, Any] = {name: replace(before.rule(name), **said) for name, said in rules.items()}
        try:
            return replace(before, **values, **changed)
        except ValueError as error:
            raise ArgumentError(f"policy.{error}") from error

    if not values and not any(rules.values()):
        raise ArgumentError("set at least one field of policy")
    return apply


def _said(asked: pb.GuardRule) -> dict[str, Any]:
    said: dict[str, Any] = {
        name: getattr(asked, name) for name in ("limit", "min_pairs") if asked.HasField(name)
    }
    spans = {name: _seconds(getattr(asked, name)) for name in ("window", "cooldown") if asked.HasField(name)}
    return said | spans


def plan(asked: pb.RampPlan) -> Plan:
    given: dict[str, Any] = {"budget": arguments.budget(asked)}
    if asked.HasField("hold"):
        given["hold"] = _seconds(asked.hold)
    if asked.HasField("min_pairs"):
        given["min_pairs"] = asked.min_pairs
    try:
        return Plan(tuple(parts("plan.steps", share, WEIGHTS) for share in asked.steps), **given)
    except ValueError as error:
        raise ArgumentError(f"plan.{error}") from error


def ramp(found: Ramp) -> pb.Ramp:
    return pb.Ramp(
        service=found.service,
        state=_state(found.id, found.state, found.step, found.message, shown_plan(asdict(found.plan))),
        actor=found.actor,
        reason=found.reason,
        start_time=timestamp(found.started_at),
        step_time=timestamp(found.step_at),
        end_time=timestamp(found.ended_at),
        verdict=number(VERDICT, found.verdict) if found.verdict else 0,  # type: ignore[arg-type]  # an int is one
        look_time=timestamp(found.checked_at),
    )


def ramp_state(found: Mapping[str, Any]) -> pb.RampState:
    """Of a ramp as an event's record has it."""
    return _state(found["id"], found["state"], found["step"], found["message"], shown_plan(found))


def shown_plan(found: Mapping[str, Any]) -> pb.RampPlan:
    known = Budget.__dataclass_fields__
    return pb.RampPlan(
        steps=[step / WEIGHTS for step in found["steps"]],
        hold=duration(found["hold"] * 1e6),
        min_pairs=found["min_pairs"],
        budget=comparison_pb2.Budget(**{name: found["budget"][name] for name in known}),
    )


def _state(id_: int, phase: str, step: int, said: str, shown: pb.RampPlan) -> pb.RampState:
    return pb.RampState(id=id_, phase=number(PHASE, phase), plan=shown, step=step, said=said)  # type: ignore[arg-type]  # an int is one


def _seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9
