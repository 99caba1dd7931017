"""`abreast ramp`: moves users to new step by step, on evidence."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Any

import click
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from abreast.v1 import comparison_pb2
from abreast.v1 import steering_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    connection_options,
    json_option,
    print_json,
    service_option,
)
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.humane import format_age, format_count, format_duration, format_percent, to_printable
from abreast_sidecar.cli.parameters import EXCESS_TYPE, SHARE_TYPE, SPAN_TYPE, ParserParamType
from abreast_sidecar.cli.shift import actor_option, default_actor, reason_option
from abreast_sidecar.cli.tables import Console, make_console, style_text
from abreast_sidecar.settings import share

RAMP_PHASE_STYLES = {
    "SUCCEEDED": "ok",
    "FAILED": "fail",
    "ABORTED": "warn",
    "PAUSED": "warn",
    "SUPERSEDED": "warn",
}


def parse_steps(value: str) -> tuple[float, ...]:
    """Percent, with or without the sign."""
    try:
        return tuple(share(f"{part.strip().removesuffix('%')}%") for part in value.split(","))
    except ValueError as error:
        raise ValueError("percentages of users that rise, such as 1,5,25,50,100") from error


@click.group()
def ramp_command() -> None:
    """Move users to new step by step: on while the verdict is PASS, waiting while INCONCLUSIVE, back on FAIL."""


@ramp_command.command("start")
@click.option(
    "--steps",
    type=ParserParamType("percent,…", parse_steps),
    required=True,
    help="Percent of users, such as 1,5,25,50,100.",
)
@click.option("--hold", type=SPAN_TYPE, help="How long each step lasts at least, such as 10m; 10 minutes.")
@click.option(
    "--min-pairs", type=click.IntRange(min=1), help="Pairs to compare in a step before the next; 100."
)
@click.option(
    "--max-mismatch", type=SHARE_TYPE, help="Share of pairs that may have unexplained mismatches; 0.1%."
)
@click.option("--max-error", type=SHARE_TYPE, help="Share of pairs in which only new may fail; 0.1%.")
@click.option("--max-slower", type=EXCESS_TYPE, help="How much slower new may be in the median pair; 10%.")
@click.option(
    "--min-completeness",
    type=SHARE_TYPE,
    help="Share of the sampled requests that must be accounted for; 99%.",
)
@click.option("--confidence", type=SHARE_TYPE, help="How sure to be; 95%.")
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
    """Set the first step's share at once, and go on from there."""
    budget_values = {name: value for name, value in budget.items() if value is not None}
    plan = api.RampPlan(steps=steps, min_pairs=min_pairs, budget=comparison_pb2.Budget(**budget_values))
    if hold is not None:
        plan.hold.CopyFrom(Duration(seconds=int(hold), nanos=round(hold % 1 * 1e9)))
    request = api.StartRampRequest(service=service, plan=plan, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.StartRamp(request, timeout=calls.timeout_s), as_json
    )


@ramp_command.command("status")
@service_option
@json_option
@connection_options
def show_ramp_status(link: SidecarClient, service: str, as_json: bool) -> int:
    """Where the ramp is, and what it waits for."""
    request = api.GetRampRequest(service=service)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.GetRamp(request, timeout=calls.timeout_s), as_json
    )


@ramp_command.command("pause")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def pause_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Climb no further. It still goes back where the verdict is FAIL."""
    request = api.PauseRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.PauseRamp(request, timeout=calls.timeout_s), as_json
    )


@ramp_command.command("resume")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def resume_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Go on; the step's hold begins anew."""
    request = api.ResumeRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.ResumeRamp(request, timeout=calls.timeout_s), as_json
    )


@ramp_command.command("abort")
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def abort_ramp(link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """End the ramp, and send all users to old until promote, traffic set or another ramp."""
    request = api.AbortRampRequest(service=service, actor=default_actor(actor), reason=reason)
    return _call_and_print_ramp(
        link, lambda calls: calls.steering.AbortRamp(request, timeout=calls.timeout_s), as_json
    )


def _call_and_print_ramp(
    link: SidecarClient, operation: Callable[[Calls], Awaitable[Any]], as_json: bool
) -> ExitCode:
    response = link.call(operation)
    if as_json:
        print_json(response)
    elif response.HasField("ramp"):
        print_ramp(make_console(), response.ramp, dt.datetime.now(dt.UTC))
    else:
        click.echo("there was no ramp yet; start one with: abreast ramp start")
    return ExitCode.OK


def print_ramp(out: Console, ramp: api.Ramp, current_time: dt.datetime) -> None:
    out.print(format_ramp_line(ramp))
    plan = ramp.state.plan
    out.print(f"hold {format_duration(plan.hold)}, at least {format_count(plan.min_pairs)} pairs a step")
    verdict = comparison_pb2.VerdictState.Name(ramp.verdict).removeprefix("VERDICT_STATE_")
    if ramp.verdict:
        out.print(f"verdict since it began: {verdict} ({format_age(ramp.look_time, current_time)})")
    start_text = f"started {format_age(ramp.start_time, current_time)} by {to_printable(ramp.actor)}"
    out.print(start_text + (f": {to_printable(ramp.reason)}" if ramp.reason else ""), style="dim")


def format_ramp_line(ramp: api.Ramp) -> Text:
    """`ramp: progressing 1% → [5%] → 25%: holds 5% for another 300 s`."""
    state = ramp.state
    phase = api.RampPhase.Name(state.phase).removeprefix("RAMP_PHASE_")
    line = style_text("ramp: ")
    line.append_text(style_text(phase.lower(), RAMP_PHASE_STYLES.get(phase, "bold")))
    for number, step in enumerate(state.plan.steps):
        is_current = number == state.step
        line.append(" → " if number else "  ")
        line.append(
            f"[{format_percent(step)}]" if is_current else format_percent(step),
            "bold" if is_current else "dim",
        )
    line.append(f"  {to_printable(state.said)}" if state.said else "")
    return line
