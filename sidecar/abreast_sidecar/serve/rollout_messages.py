"""Guard and ramp as messages of the API, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from google.protobuf.duration_pb2 import Duration

from abreast.v1 import comparison_pb2
from abreast.v1 import rollout_pb2 as pb
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rollout.guard import GUARD_RULE_NAMES, GuardPolicy
from abreast_sidecar.rollout.ramp import Ramp, RampPlan
from abreast_sidecar.rollout.transitions import Guard
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.serve.values import to_duration, to_enum_number, to_timestamp
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.traffic.model import TOTAL_WEIGHT, to_fixed_point

GUARD_MODE_ENUM = pb.GuardMode.DESCRIPTOR
GUARD_STATE_ENUM = pb.GuardState.DESCRIPTOR
RAMP_PHASE_ENUM = pb.RampPhase.DESCRIPTOR
RAMP_VERDICT_ENUM = comparison_pb2.VerdictState.DESCRIPTOR


def to_guard_message(guard: Guard) -> pb.Guard:
    state = "idle" if guard.policy.mode == "off" else guard.state
    return pb.Guard(
        service=guard.service,
        policy=to_policy_message(asdict(guard.policy)),
        update_time=to_timestamp(guard.since),
        state=to_enum_number(GUARD_STATE_ENUM, state),  # type: ignore[arg-type]  # an int is one
        message="off" if guard.policy.mode == "off" else guard.message,
        evaluate_time=to_timestamp(guard.checked_at),
    )


def to_policy_message(document: Mapping[str, Any]) -> pb.GuardPolicy:
    """Of a policy as a document."""
    return pb.GuardPolicy(
        mode=to_enum_number(GUARD_MODE_ENUM, document["mode"]),  # type: ignore[arg-type]  # an int is one
        min_completeness=document["min_completeness"],
        confidence=document["confidence"],
        **{name: _to_guard_rule_message(document[name]) for name in GUARD_RULE_NAMES},
    )


def _to_guard_rule_message(document: Mapping[str, Any]) -> pb.GuardRule:
    return pb.GuardRule(
        limit=document["limit"],
        min_pairs=document["min_pairs"],
        window=to_duration(document["window"] * 1e6),
        cooldown=to_duration(document["cooldown"] * 1e6),
    )


def parse_policy_change(policy_message: pb.GuardPolicy) -> Callable[[GuardPolicy], GuardPolicy]:
    """What a request makes of a policy. Raise ArgumentError, at the latest when it is applied."""
    values: dict[str, Any] = {
        name: getattr(policy_message, name)
        for name in ("min_completeness", "confidence")
        if policy_message.HasField(name)
    }
    if policy_message.mode:
        if policy_message.mode not in GUARD_MODE_ENUM.values_by_number:
            raise ArgumentError(f"policy.mode must be a GuardMode, got {policy_message.mode}")
        values["mode"] = pb.GuardMode.Name(policy_message.mode).removeprefix("GUARD_MODE_").lower()
    rules = {
        name: _parse_guard_rule(getattr(policy_message, name))
        for name in GUARD_RULE_NAMES
        if policy_message.HasField(name)
    }

    def apply(before: GuardPolicy) -> GuardPolicy:
        changed_rules: dict[str, Any] = {
            name: replace(before.rule(name), **rule_fields) for name, rule_fields in rules.items()
        }
        try:
            return replace(before, **values, **changed_rules)
        except ValueError as error:
            raise ArgumentError(f"policy.{error}") from error

    if not values and not any(rules.values()):
        raise ArgumentError("set at least one field of policy")
    return apply


def _parse_guard_rule(rule_message: pb.GuardRule) -> dict[str, Any]:
    rule_fields: dict[str, Any] = {
        name: getattr(rule_message, name) for name in ("limit", "min_pairs") if rule_message.HasField(name)
    }
    durations = {
        name: _to_seconds(getattr(rule_message, name)) for name in ("window", "cooldown") if rule_message.HasField(name)
    }
    return rule_fields | durations


def parse_plan(plan_message: pb.RampPlan) -> RampPlan:
    options: dict[str, Any] = {"budget": arguments.parse_budget(plan_message)}
    if plan_message.HasField("hold"):
        options["hold"] = _to_seconds(plan_message.hold)
    if plan_message.HasField("min_pairs"):
        options["min_pairs"] = plan_message.min_pairs
    try:
        return RampPlan(
            tuple(to_fixed_point("plan.steps", share, TOTAL_WEIGHT) for share in plan_message.steps), **options
        )
    except ValueError as error:
        raise ArgumentError(f"plan.{error}") from error


def to_ramp_message(ramp: Ramp) -> pb.Ramp:
    return pb.Ramp(
        service=ramp.service,
        state=_build_ramp_state(ramp.id, ramp.state, ramp.step, ramp.message, to_plan_message(asdict(ramp.plan))),
        actor=ramp.actor,
        reason=ramp.reason,
        start_time=to_timestamp(ramp.started_at),
        step_time=to_timestamp(ramp.step_at),
        end_time=to_timestamp(ramp.ended_at),
        verdict=to_enum_number(RAMP_VERDICT_ENUM, ramp.verdict) if ramp.verdict else 0,  # type: ignore[arg-type]  # an int is one
        evaluate_time=to_timestamp(ramp.checked_at),
    )


def to_ramp_state_message(document: Mapping[str, Any]) -> pb.RampState:
    """Of a ramp as an event's record has it."""
    return _build_ramp_state(
        document["id"], document["state"], document["step"], document["message"], to_plan_message(document)
    )


def to_plan_message(document: Mapping[str, Any]) -> pb.RampPlan:
    budget_fields = Budget.__dataclass_fields__
    return pb.RampPlan(
        steps=[step / TOTAL_WEIGHT for step in document["steps"]],
        hold=to_duration(document["hold"] * 1e6),
        min_pairs=document["min_pairs"],
        budget=comparison_pb2.Budget(**{name: document["budget"][name] for name in budget_fields}),
    )


def _build_ramp_state(id_: int, phase: str, step: int, message: str, plan_message: pb.RampPlan) -> pb.RampState:
    return pb.RampState(
        id=id_,
        phase=to_enum_number(RAMP_PHASE_ENUM, phase),  # type: ignore[arg-type]  # an int is one
        plan=plan_message,
        step=step,
        message=message,
    )


def _to_seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9
