"""`abreast guard` and `abreast ramp`: automatic rollback, and users moved to new step by step."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TypeAlias

import click
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from abreast.v1 import comparison_pb2
from abreast.v1 import rollout_pb2 as api
from abreast_sidecar.cli.options import (
    EXCESS_TYPE,
    SHARE_TYPE,
    Audit,
    ParserParamType,
    PrintingClient,
    api_options,
    budget_options,
    change_options,
    force_option,
    parse_span,
    service_option,
)
from abreast_sidecar.client.output import (
    Console,
    enum_name,
    format_age,
    format_count,
    format_duration,
    format_percent,
    make_table,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls
from abreast_sidecar.settings import share


def parse_duration(value: str) -> Duration:
    duration = Duration()
    duration.FromTimedelta(parse_span(value))
    return duration


DURATION_TYPE = ParserParamType("span", parse_duration)
GUARD_LIMIT_OPTIONS = {"errors": "max_error", "mismatches": "max_mismatch", "slower": "max_slower"}
GUARD_STATE_STYLES = {"clear": "ok", "breached": "fail", "blind": "warn", "waiting": "warn"}
RAMP_PHASE_STYLES = {"succeeded": "ok", "failed": "fail", "aborted": "warn", "paused": "warn", "superseded": "warn"}

RampResponse: TypeAlias = (
    api.StartRampResponse | api.GetRampResponse | api.PauseRampResponse | api.ResumeRampResponse | api.AbortRampResponse
)


@dataclass(frozen=True)
class RolloutStatus:
    guard: api.Guard
    ramp: api.Ramp | None


@click.group(invoke_without_command=True)
@service_option
@api_options
@click.pass_context
def guard_command(ctx: click.Context, link: PrintingClient, service: str) -> None:
    """Show the conditions for an automatic rollback, and the guard's current observations."""
    if ctx.invoked_subcommand is None:
        request = api.GetGuardRequest(service=service)
        link.show(lambda calls: calls.rollout.GetGuard(request), print_guard_response)


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
@click.option("--window", type=DURATION_TYPE, help="Length of the time window, such as 10m.")
@click.option("--cooldown", type=DURATION_TYPE, help="Time for which a rule stays inactive after it acted, such as 5m.")
@click.option(
    "--min-completeness",
    type=SHARE_TYPE,
    help="Share of the sampled requests below which the guard is blind.  [initially 90%]",
)
@click.option("--confidence", type=SHARE_TYPE, help="Confidence of a decision.  [initially 99%]")
@change_options
def set_guard(
    link: PrintingClient,
    service: str,
    mode: str | None,
    rules: tuple[str, ...],
    min_pairs: int | None,
    window: Duration | None,
    cooldown: Duration | None,
    min_completeness: float | None,
    confidence: float | None,
    audit: Audit,
    **limits: float | None,
) -> None:
    """Change the guard. Settings that you omit stay. The guard forgets its earlier observations."""
    policy = api.GuardPolicy(min_completeness=min_completeness, confidence=confidence)
    if mode:
        policy.mode = api.GuardMode.Value(f"GUARD_MODE_{mode.upper()}")
    for rule, option in GUARD_LIMIT_OPTIONS.items():
        guard_rule = api.GuardRule(limit=limits[option])
        if rule in (rules or GUARD_LIMIT_OPTIONS):
            guard_rule.MergeFrom(api.GuardRule(min_pairs=min_pairs, window=window, cooldown=cooldown))
        if guard_rule.ByteSize():
            getattr(policy, rule).CopyFrom(guard_rule)
    if not policy.ByteSize():
        raise click.UsageError("set at least one option, such as --mode acting")
    request = api.SetGuardRequest(service=service, policy=policy, **audit)
    link.show(lambda calls: calls.rollout.SetGuard(request), print_guard_response)


def print_guard_response(out: Console, response: api.GetGuardResponse | api.SetGuardResponse) -> None:
    print_guard(out, response.guard, dt.datetime.now(dt.UTC))


def print_guard(out: Console, guard: api.Guard, current_time: dt.datetime) -> None:
    out.print(format_guard_line(guard, current_time))
    texts_by_rule = {rule: _format_guard_rule(getattr(guard.policy, rule)) for rule in GUARD_LIMIT_OPTIONS}
    rows = ((rule, *texts.values()) for rule, texts in texts_by_rule.items())
    out.print(make_table("rule", *texts_by_rule["errors"], numeric_columns={"limit", "min pairs"}, rows=rows))
    confidence, min_completeness = map(format_percent, (guard.policy.confidence, guard.policy.min_completeness))
    out.print(f"confidence {confidence}; blind below {min_completeness} of the sampled requests", style="dim")


def _format_guard_rule(guard_rule: api.GuardRule) -> dict[str, str]:
    return {
        "limit": format_percent(guard_rule.limit),
        "min pairs": format_count(guard_rule.min_pairs),
        "window": format_duration(guard_rule.window),
        "cool-down": format_duration(guard_rule.cooldown),
    }


def format_guard_changes(before: api.GuardPolicy, after: api.GuardPolicy) -> list[str]:
    """Return one text per change, such as `guard mode off → acting`."""
    values_before, values_after = _format_policy_values(before), _format_policy_values(after)
    return [
        f"guard {name} {values_before[name]} → {values_after[name]}"
        for name in values_after
        if values_before[name] != values_after[name]
    ]


def _format_policy_values(policy: api.GuardPolicy) -> dict[str, str]:
    values = {"mode": enum_name(api.GuardMode, policy.mode)}
    for rule in GUARD_LIMIT_OPTIONS:
        values |= {f"{rule} {name}": text for name, text in _format_guard_rule(getattr(policy, rule)).items()}
    min_completeness, confidence = format_percent(policy.min_completeness), format_percent(policy.confidence)
    return values | {"completeness": min_completeness, "confidence": confidence}


def format_guard_line(guard: api.Guard, current_time: dt.datetime) -> Text:
    mode, state = enum_name(api.GuardMode, guard.policy.mode), enum_name(api.GuardState, guard.state)
    if mode == "off":
        return style_text("guard: off")
    age_text = f" ({format_age(guard.evaluate_time, current_time)})" if guard.HasField("evaluate_time") else ""
    line = style_text(f"guard: {mode}, ")
    line.append_text(style_text(state, GUARD_STATE_STYLES.get(state, "")))
    line.append(f"{age_text}" + (f": {to_printable(guard.message)}" if guard.message else ""))
    return line


def parse_steps(value: str) -> tuple[float, ...]:
    """Return the shares of a list of percentages, with or without percent signs."""
    try:
        return tuple(share(f"{part.strip().removesuffix('%')}%") for part in value.split(","))
    except ValueError as error:
        raise ValueError("percentages of users that rise, such as 1,5,25,50,100") from error


@click.group(invoke_without_command=True)
@service_option
@api_options
@click.pass_context
def ramp_command(ctx: click.Context, link: PrintingClient, service: str) -> None:
    """Move users to new step by step, based on evidence. Without a command, show the ramp.

    A ramp continues while the verdict is PASS, waits while it is INCONCLUSIVE, and rolls back on FAIL.
    """
    if ctx.invoked_subcommand is None:
        link.show(lambda calls: calls.rollout.GetRamp(api.GetRampRequest(service=service)), print_ramp_response)


@ramp_command.command("start")
@click.option(
    "--steps",
    type=ParserParamType("percent,…", parse_steps),
    required=True,
    help="Users on new in percent, one number per step, such as 1,5,25,50,100.",
)
@click.option("--hold", type=DURATION_TYPE, help="Minimum duration of a step, such as 10m.  [default: 10m]")
@click.option("--min-pairs", type=click.IntRange(min=1), help="Number of pairs that each step needs.  [default: 100]")
@click.option("--require-drill", is_flag=True, help="Start only if a drill has passed with the newest release of new.")
@budget_options
@force_option
@change_options
def start_ramp(
    link: PrintingClient,
    *,
    service: str,
    steps: tuple[float, ...],
    hold: Duration | None,
    min_pairs: int | None,
    require_drill: bool,
    audit: Audit,
    budget: comparison_pb2.Budget,
    force: bool,
) -> None:
    """Start a ramp. The first step takes effect at once.

    The sidecar refuses this while the verdict is FAIL, and warns while it is INCONCLUSIVE.
    """
    plan = api.RampPlan(steps=steps, hold=hold, min_pairs=min_pairs, budget=budget)
    request = api.StartRampRequest(service=service, plan=plan, require_drill=require_drill, force=force, **audit)
    response = link.show(lambda calls: calls.rollout.StartRamp(request), print_ramp_response)
    for warning in response.warnings:
        click.echo(f"abreast: warning: {to_printable(warning)}", err=True)


@ramp_command.command("status")
@service_option
@api_options
def show_ramp_status(link: PrintingClient, service: str) -> None:
    """Show the active or last ramp: its step and the condition that it waits for."""
    link.show(lambda calls: calls.rollout.GetRamp(api.GetRampRequest(service=service)), print_ramp_response)


@ramp_command.command("pause")
@change_options
def pause_ramp(link: PrintingClient, service: str, audit: Audit) -> None:
    """Pause the ramp at its step. A paused ramp still rolls back on FAIL."""
    request = api.PauseRampRequest(service=service, **audit)
    link.show(lambda calls: calls.rollout.PauseRamp(request), print_ramp_response)


@ramp_command.command("resume")
@change_options
def resume_ramp(link: PrintingClient, service: str, audit: Audit) -> None:
    """Resume the ramp. The hold of the step restarts."""
    request = api.ResumeRampRequest(service=service, **audit)
    link.show(lambda calls: calls.rollout.ResumeRamp(request), print_ramp_response)


@ramp_command.command("abort")
@change_options
def abort_ramp(link: PrintingClient, service: str, audit: Audit) -> None:
    """End the ramp and send all users to old."""
    request = api.AbortRampRequest(service=service, **audit)
    link.show(lambda calls: calls.rollout.AbortRamp(request), print_ramp_response)


def print_ramp_response(out: Console, response: RampResponse) -> None:
    if response.HasField("ramp"):
        print_ramp(out, response.ramp, dt.datetime.now(dt.UTC))
    else:
        out.print("no ramp yet; to start one: abreast ramp start")


def print_ramp(out: Console, ramp: api.Ramp, current_time: dt.datetime) -> None:
    out.print(format_ramp_line(ramp))
    plan = ramp.state.plan
    out.print(f"hold {format_duration(plan.hold)}, at least {format_count(plan.min_pairs)} pairs a step")
    if ramp.verdict:
        verdict = enum_name(comparison_pb2.VerdictState, ramp.verdict).upper()
        out.print(f"verdict since the start: {verdict} ({format_age(ramp.evaluate_time, current_time)})")
    start_text = f"started {format_age(ramp.start_time, current_time)} by {to_printable(ramp.actor)}"
    out.print(start_text + (f": {to_printable(ramp.reason)}" if ramp.reason else ""), style="dim")


def format_ramp_line(ramp: api.Ramp) -> Text:
    """Return a line such as `ramp: progressing  1% → [5%] → 25%  holds 5% for another 300 s`."""
    state = ramp.state
    phase = enum_name(api.RampPhase, state.phase)
    line = style_text("ramp: ")
    line.append_text(style_text(phase, RAMP_PHASE_STYLES.get(phase, "bold")))
    for number, step in enumerate(state.plan.steps):
        line.append(" → " if number else "  ")
        text, style = (f"[{format_percent(step)}]", "bold") if number == state.step else (format_percent(step), "dim")
        line.append(text, style)
    line.append(f"  {to_printable(state.message)}" if state.message else "")
    return line


async def fetch_rollout_status(calls: Calls, service: str) -> RolloutStatus | None:
    """Return None if the sidecar is older than this command."""
    try:
        guard = await calls.rollout.GetGuard(api.GetGuardRequest(service=service))
        ramp = await calls.rollout.GetRamp(api.GetRampRequest(service=service))
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
