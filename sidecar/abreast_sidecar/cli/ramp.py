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
    Link,
    connected,
    json_option,
    print_json,
    service_option,
)
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import ago, count, duration, percent, printable
from abreast_sidecar.cli.parameters import EXCESS, SHARE, SPAN_OF_TIME, Parsed
from abreast_sidecar.cli.shift import actor_option, actor_or_user, reason_option
from abreast_sidecar.cli.tables import Console, console, styled
from abreast_sidecar.settings import share

STYLES = {"SUCCEEDED": "ok", "FAILED": "fail", "ABORTED": "warn", "PAUSED": "warn", "SUPERSEDED": "warn"}


def steps(value: str) -> tuple[float, ...]:
    """Percent, with or without the sign."""
    try:
        return tuple(share(f"{part.strip().removesuffix('%')}%") for part in value.split(","))
    except ValueError as error:
        raise ValueError("percentages of users that rise, such as 1,5,25,50,100") from error


@click.group()
def command() -> None:
    """Move users to new step by step: on while the verdict is PASS, waiting while INCONCLUSIVE, back on FAIL."""


@command.command("start")
@click.option(
    "--steps", type=Parsed("percent,…", steps), required=True, help="Percent of users, such as 1,5,25,50,100."
)
@click.option("--hold", type=SPAN_OF_TIME, help="How long each step lasts at least, such as 10m; 10 minutes.")
@click.option(
    "--min-pairs", type=click.IntRange(min=1), help="Pairs to compare in a step before the next; 100."
)
@click.option("--max-mismatch", type=SHARE, help="Share of pairs that may have unexplained mismatches; 0.1%.")
@click.option("--max-error", type=SHARE, help="Share of pairs in which only new may fail; 0.1%.")
@click.option("--max-slower", type=EXCESS, help="How much slower new may be in the median pair; 10%.")
@click.option(
    "--min-completeness", type=SHARE, help="Share of the sampled requests that must be accounted for; 99%."
)
@click.option("--confidence", type=SHARE, help="How sure to be; 95%.")
@reason_option
@actor_option
@service_option
@json_option
@connected
def start(
    link: Link,
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
    given = {name: value for name, value in budget.items() if value is not None}
    plan = api.RampPlan(steps=steps, min_pairs=min_pairs, budget=comparison_pb2.Budget(**given))
    if hold is not None:
        plan.hold.CopyFrom(Duration(seconds=int(hold), nanos=round(hold % 1 * 1e9)))
    request = api.StartRampRequest(service=service, plan=plan, actor=actor_or_user(actor), reason=reason)
    return _tell(link, lambda calls: calls.steering.StartRamp(request, timeout=calls.timeout), as_json)


@command.command("status")
@service_option
@json_option
@connected
def status(link: Link, service: str, as_json: bool) -> int:
    """Where the ramp is, and what it waits for."""
    request = api.GetRampRequest(service=service)
    return _tell(link, lambda calls: calls.steering.GetRamp(request, timeout=calls.timeout), as_json)


@command.command("pause")
@reason_option
@actor_option
@service_option
@json_option
@connected
def pause(link: Link, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Climb no further. It still goes back where the verdict is FAIL."""
    request = api.PauseRampRequest(service=service, actor=actor_or_user(actor), reason=reason)
    return _tell(link, lambda calls: calls.steering.PauseRamp(request, timeout=calls.timeout), as_json)


@command.command("resume")
@reason_option
@actor_option
@service_option
@json_option
@connected
def resume(link: Link, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """Go on; the step's hold begins anew."""
    request = api.ResumeRampRequest(service=service, actor=actor_or_user(actor), reason=reason)
    return _tell(link, lambda calls: calls.steering.ResumeRamp(request, timeout=calls.timeout), as_json)


@command.command("abort")
@reason_option
@actor_option
@service_option
@json_option
@connected
def abort(link: Link, service: str, reason: str, actor: str | None, as_json: bool) -> int:
    """End the ramp, and send all users to old until promote, traffic set or another ramp."""
    request = api.AbortRampRequest(service=service, actor=actor_or_user(actor), reason=reason)
    return _tell(link, lambda calls: calls.steering.AbortRamp(request, timeout=calls.timeout), as_json)


def _tell(link: Link, ask: Callable[[Calls], Awaitable[Any]], as_json: bool) -> Exit:
    found = link.run(ask)
    if as_json:
        print_json(found)
    elif found.HasField("ramp"):
        show(console(), found.ramp, dt.datetime.now(dt.UTC))
    else:
        click.echo("there was no ramp yet; start one with: abreast ramp start")
    return Exit.OK


def show(out: Console, ramp: api.Ramp, now: dt.datetime) -> None:
    out.print(ramp_line(ramp))
    plan = ramp.state.plan
    out.print(f"hold {duration(plan.hold)}, at least {count(plan.min_pairs)} pairs a step")
    verdict = comparison_pb2.VerdictState.Name(ramp.verdict).removeprefix("VERDICT_STATE_")
    if ramp.verdict:
        out.print(f"verdict since it began: {verdict} ({ago(ramp.look_time, now)})")
    began = f"started {ago(ramp.start_time, now)} by {printable(ramp.actor)}"
    out.print(began + (f": {printable(ramp.reason)}" if ramp.reason else ""), style="dim")


def ramp_line(ramp: api.Ramp) -> Text:
    """`ramp: progressing 1% → [5%] → 25%: holds 5% for another 300 s`."""
    state = ramp.state
    phase = api.RampPhase.Name(state.phase).removeprefix("RAMP_PHASE_")
    line = styled("ramp: ")
    line.append_text(styled(phase.lower(), STYLES.get(phase, "bold")))
    for number, step in enumerate(state.plan.steps):
        here = number == state.step
        line.append(" → " if number else "  ")
        line.append(f"[{percent(step)}]" if here else percent(step), "bold" if here else "dim")
    line.append(f"  {printable(state.said)}" if state.said else "")
    return line
