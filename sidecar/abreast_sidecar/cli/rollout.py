"""`abreast guard` and `abreast ramp`: automatic rollback, and users moved to new step by step."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import click
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from abreast.v1 import comparison_pb2
from abreast.v1 import rollout_pb2 as api
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    EXCESS_TYPE,
    SHARE_TYPE,
    SPAN_TYPE,
    ParserParamType,
    actor_option,
    connection_options,
    default_actor,
    json_option,
    reason_option,
    service_option,
)
from abreast_sidecar.client.output import (
    Console,
    format_age,
    format_count,
    format_duration,
    format_percent,
    make_table,
    print_response,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient
from abreast_sidecar.settings import share

GUARD_LIMIT_OPTIONS = {"errors": "max_error", "mismatches": "max_mismatch", "slower": "max_slower"}
GUARD_STATE_STYLES = {"CLEAR": "ok", "BREACHED": "fail", "BLIND": "warn", "WAITING": "warn"}
RAMP_PHASE_STYLES = {"SUCCEEDED": "ok", "FAILED": "fail", "ABORTED": "warn", "PAUSED": "warn", "SUPERSEDED": "warn"}

RampResponse: TypeAlias = (
    api.StartRampResponse | api.GetRampResponse | api.PauseRampResponse | api.ResumeRampResponse | api.AbortRampResponse
)
RampResponseT = TypeVar("RampResponseT", bound=RampResponse)


@dataclass(frozen=True)
class RolloutStatus:
    guard: api.Guard
    ramp: api.Ramp | None


@click.group(invoke_without_command=True)
@service_option
@json_option
@connection_options
@click.pass_context
def guard_command(ctx: click.Context, link: SidecarClient, service: str, as_json: bool) -> None:
    """Show the conditions for an automatic rollback, and the guard's current observations."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetGuardRequest(service=service)
    response = link.call(lambda calls: calls.steering.GetGuard(request, timeout=calls.timeout_s))
    print_response(response, print_guard_response, as_json=as_json)


@guard_command.command("set")
@click.option(
    "--mode",
    type=click.Choice(["off", "watching", "acting"]),
    help="`watching` only records rollbacks that `acting` would make.",
)
@click.option(
    "--max-error", type=SHARE_TYPE, help="Allowed share of users' requests in which only new fails.  [initially 0.1%]"
)
@click.option(
    "--max-mismatch", type=SHARE_TYPE, help="Allowed share of pairs with unexplained mismatches.  [initially 1%]"
)
@click.option("--max-slower", type=EXCESS_TYPE, help="Allowed slowdown of new in the median pair.  [initially 100%]")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(GUARD_LIMIT_OPTIONS),
    help="Apply --min-pairs, --window and --cooldown to this rule only (repeatable).  [default: all rules]",
)
@click.option(
    "--min-pairs", type=click.IntRange(min=1), help="Pairs that the window needs before the rule is evaluated."
)
@click.option("--window", type=SPAN_TYPE, help="Length of the time window, such as 10m.")
@click.option("--cooldown", type=SPAN_TYPE, help="Time for which a rule stays inactive after it acted, such as 5m.")
@click.option(
    "--min-completeness",
    type=SHARE_TYPE,
    help="Share of the sampled requests below which the guard is blind.  [initially 90%]",
)
@click.option("--confidence", type=SHARE_TYPE, help="Confidence of a decision.  [initially 99%]")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def set_guard(
    link: SidecarClient,
    service: str,
    mode: str | None,
    rules: tuple[str, ...],
    reason: str,
    actor: str | None,
    as_json: bool,
    **values: float | None,
) -> int:
    """Change the guard. Settings that you omit stay. The guard forgets its earlier observations."""
    policy = api.GuardPolicy()
    if mode:
        policy.mode = api.GuardMode.Value(f"GUARD_MODE_{mode.upper()}")
    for name in ("min_completeness", "confidence"):
        if (value := values[name]) is not None:
            setattr(policy, name, value)
    for rule, option in GUARD_LIMIT_OPTIONS.items():
        guard_rule = _build_guard_rule(values[option], rule in (rules or GUARD_LIMIT_OPTIONS), values)
        if guard_rule.ByteSize() or guard_rule.HasField("limit"):
            getattr(policy, rule).CopyFrom(guard_rule)
    if not policy.ByteSize():
        raise click.UsageError("set at least one option, such as --mode acting")
    request = api.SetGuardRequest(service=service, policy=policy, actor=default_actor(actor), reason=reason)
    response = link.call(lambda calls: calls.steering.SetGuard(request, timeout=calls.timeout_s))
    print_response(response, print_guard_response, as_json=as_json)
    return ExitCode.OK


def _build_guard_rule(limit: float | None, is_selected: bool, values: dict[str, float | None]) -> api.GuardRule:
    guard_rule = api.GuardRule()
    if limit is not None:
        guard_rule.limit = limit
    if not is_selected:
        return guard_rule
    if (pairs := values["min_pairs"]) is not None:
        guard_rule.min_pairs = int(pairs)
    for name in ("window", "cooldown"):
        if (seconds := values[name]) is not None:
            getattr(guard_rule, name).CopyFrom(_to_duration(seconds))
    return guard_rule


def _to_duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def print_guard_response(out: Console, response: api.GetGuardResponse | api.SetGuardResponse) -> None:
    print_guard(out, response.guard, dt.datetime.now(dt.UTC))


def print_guard(out: Console, guard: api.Guard, current_time: dt.datetime) -> None:
    out.print(format_guard_line(guard, current_time))
    table = make_table(
        "rule", "limit", "min pairs", "window", "cool-down", numeric_columns=frozenset({"limit", "min pairs"})
    )
    for rule in GUARD_LIMIT_OPTIONS:
        guard_rule: api.GuardRule = getattr(guard.policy, rule)
        table.add_row(
            rule,
            format_percent(guard_rule.limit),
            format_count(guard_rule.min_pairs),
            format_duration(guard_rule.window),
            format_duration(guard_rule.cooldown),
        )
    out.print(table)
    confidence, min_completeness = map(format_percent, (guard.policy.confidence, guard.policy.min_completeness))
    out.print(f"confidence {confidence}; blind below {min_completeness} of the sampled requests", style="dim")


def format_guard_changes(before: api.GuardPolicy, after: api.GuardPolicy) -> list[str]:
    """Return one text per change, such as `guard mode off → acting`."""
    values_before, values_after = _format_policy_values(before), _format_policy_values(after)
    return [
        f"guard {name} {values_before[name]} → {values_after[name]}"
        for name in values_after
        if values_before[name] != values_after[name]
    ]


def _format_policy_values(policy: api.GuardPolicy) -> dict[str, str]:
    values = {"mode": _format_guard_mode(policy)}
    for rule in GUARD_LIMIT_OPTIONS:
        guard_rule: api.GuardRule = getattr(policy, rule)
        values |= {
            f"{rule} limit": format_percent(guard_rule.limit),
            f"{rule} min pairs": format_count(guard_rule.min_pairs),
            f"{rule} window": format_duration(guard_rule.window),
            f"{rule} cool-down": format_duration(guard_rule.cooldown),
        }
    min_completeness, confidence = format_percent(policy.min_completeness), format_percent(policy.confidence)
    return values | {"completeness": min_completeness, "confidence": confidence}


def _format_guard_mode(policy: api.GuardPolicy) -> str:
    return api.GuardMode.Name(policy.mode).removeprefix("GUARD_MODE_").lower()


def format_guard_line(guard: api.Guard, current_time: dt.datetime) -> Text:
    mode = _format_guard_mode(guard.policy)
    state = api.GuardState.Name(guard.state).removeprefix("GUARD_STATE_")
    if mode == "off":
        return style_text("guard: off")
    age_text = f" ({format_age(guard.evaluate_time, current_time)})" if guard.HasField("evaluate_time") else ""
    line = style_text(f"guard: {mode}, ")
    line.append_text(style_text(state.lower(), GUARD_STATE_STYLES.get(state, "")))
    line.append(f"{age_text}" + (f": {to_printable(guard.message)}" if guard.message else ""))
    return line


def parse_steps(value: str) -> tuple[float, ...]:
    """Return the shares of a list of percentages, with or without percent signs."""
    try:
        return tuple(share(f"{part.strip().removesuffix('%')}%") for part in value.split(","))
    except ValueError as error:
        raise ValueError("percentages of users that rise, such as 1,5,25,50,100") from error


@click.group()
def ramp_command() -> None:
    """Move users to new step by step, based on evidence.

    A ramp continues while the verdict is PASS, waits while it is INCONCLUSIVE, and rolls back on FAIL.
    """


@ramp_command.command("start")
@click.option(
    "--steps",
    type=ParserParamType("percent,…", parse_steps),
    required=True,
    help="Users on new in percent, one number per step, such as 1,5,25,50,100.",
)
@click.option("--hold", type=SPAN_TYPE, help="Minimum duration of a step, such as 10m.  [default: 10m]")
@click.option("--min-pairs", type=click.IntRange(min=1), help="Number of pairs that each step needs.  [default: 100]")
@click.option(
    "--max-mismatch", type=SHARE_TYPE, help="Allowed share of pairs with unexplained mismatches.  [default: 0.1%]"
)
@click.option("--max-error", type=SHARE_TYPE, help="Allowed share of pairs in which only new fails.  [default: 0.1%]")
@click.option("--max-slower", type=EXCESS_TYPE, help="Allowed slowdown of new in the median pair.  [default: 10%]")
@click.option("--min-completeness", type=SHARE_TYPE, help="Required share of accounted requests.  [default: 99%]")
@click.option("--confidence", type=SHARE_TYPE, help="Confidence of the verdict.  [default: 95%]")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def start_ramp(
    link: SidecarClient,
    service: str,
    steps: tuple[float, ...],
    hold: float | None,
    min_pairs: int | None,
    reason: str,
    actor: str | None,
    as_json: bool,
    **budget: float | None,
) -> int:
    """Start a ramp. The first step takes effect at once."""
    budget_values = {name: value for name, value in budget.items() if value is not None}
    plan = api.RampPlan(steps=steps, min_pairs=min_pairs, budget=comparison_pb2.Budget(**budget_values))
    if hold is not None:
        plan.hold.CopyFrom(_to_duration(hold))
    request = api.StartRampRequest(service=service, plan=plan, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.StartRamp(request, timeout=calls.timeout_s), as_json=as_json
    )


@ramp_command.command("status")
@service_option
@json_option
@connection_options
def show_ramp_status(link: SidecarClient, service: str, as_json: bool) -> int:
    """Show the active or last ramp: its step and the condition that it waits for."""
    request = api.GetRampRequest(service=service)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.GetRamp(request, timeout=calls.timeout_s), as_json=as_json
    )


@ramp_command.command("pause")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def pause_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Pause the ramp at its step. A paused ramp still rolls back on FAIL."""
    request = api.PauseRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.PauseRamp(request, timeout=calls.timeout_s), as_json=as_json
    )


@ramp_command.command("resume")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def resume_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Resume the ramp. The hold of the step restarts."""
    request = api.ResumeRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.ResumeRamp(request, timeout=calls.timeout_s), as_json=as_json
    )


@ramp_command.command("abort")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def abort_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """End the ramp and send all users to old."""
    request = api.AbortRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.AbortRamp(request, timeout=calls.timeout_s), as_json=as_json
    )


def _call_and_print_ramp(
    link: SidecarClient, send: Callable[[Calls], Awaitable[RampResponseT]], *, as_json: bool
) -> ExitCode:
    print_response(link.call(send), print_ramp_response, as_json=as_json)
    return ExitCode.OK


def print_ramp_response(out: Console, response: RampResponse) -> None:
    if response.HasField("ramp"):
        print_ramp(out, response.ramp, dt.datetime.now(dt.UTC))
    else:
        out.print("no ramp yet; to start one: abreast ramp start")


def print_ramp(out: Console, ramp: api.Ramp, current_time: dt.datetime) -> None:
    out.print(format_ramp_line(ramp))
    plan = ramp.state.plan
    out.print(f"hold {format_duration(plan.hold)}, at least {format_count(plan.min_pairs)} pairs a step")
    verdict = comparison_pb2.VerdictState.Name(ramp.verdict).removeprefix("VERDICT_STATE_")
    if ramp.verdict:
        out.print(f"verdict since the start: {verdict} ({format_age(ramp.evaluate_time, current_time)})")
    start_text = f"started {format_age(ramp.start_time, current_time)} by {to_printable(ramp.actor)}"
    out.print(start_text + (f": {to_printable(ramp.reason)}" if ramp.reason else ""), style="dim")


def format_ramp_line(ramp: api.Ramp) -> Text:
    """Return a line such as `ramp: progressing  1% → [5%] → 25%  holds 5% for another 300 s`."""
    state = ramp.state
    phase = api.RampPhase.Name(state.phase).removeprefix("RAMP_PHASE_")
    line = style_text("ramp: ")
    line.append_text(style_text(phase.lower(), RAMP_PHASE_STYLES.get(phase, "bold")))
    for number, step in enumerate(state.plan.steps):
        is_current = number == state.step
        line.append(" → " if number else "  ")
        line.append(
            f"[{format_percent(step)}]" if is_current else format_percent(step), "bold" if is_current else "dim"
        )
    line.append(f"  {to_printable(state.message)}" if state.message else "")
    return line


async def fetch_rollout_status(calls: Calls, service: str) -> RolloutStatus | None:
    """Return None if the sidecar is older than this command."""
    try:
        guard = await calls.steering.GetGuard(api.GetGuardRequest(service=service), timeout=calls.timeout_s)
        ramp = await calls.steering.GetRamp(api.GetRampRequest(service=service), timeout=calls.timeout_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        return None
    return RolloutStatus(guard.guard, ramp.ramp if ramp.HasField("ramp") else None)


def format_rollout_lines(rollout: RolloutStatus | None, current_time: dt.datetime) -> list[Text]:
    if rollout is None:
        return []
    ramp = [format_ramp_line(rollout.ramp)] if rollout.ramp else []
    return [*ramp, format_guard_line(rollout.guard, current_time)]
