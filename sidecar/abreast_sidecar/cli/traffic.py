"""`abreast traffic`: who answers users, and what is mirrored."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    Link,
    connected,
    json_option,
    page_sizes,
    print_json,
    service_option,
)
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.guard import guard_changes
from abreast_sidecar.cli.humane import ago, clock, percent, printable
from abreast_sidecar.cli.parameters import SHARE, limit_option
from abreast_sidecar.cli.shift import (
    SHARES,
    actor_option,
    actor_or_user,
    reason_option,
    report,
    show_envoys,
)
from abreast_sidecar.cli.steering import Steering, ask_steering, steering_lines
from abreast_sidecar.cli.tables import Console, console, styled, table

BACK = {"rollback", "ramp_abort", "guard_would_roll_back"}


@click.group(invoke_without_command=True)
@service_option
@json_option
@connected
@click.pass_context
def command(ctx: click.Context, link: Link, service: str, as_json: bool) -> None:
    """Who answers users, and what is mirrored; `set` changes it, `events` lists changes."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetTrafficRequest(service=service)
    if as_json:
        print_json(link.run(lambda calls: calls.traffic.GetTraffic(request, timeout=calls.timeout)))
        return
    found, steering = link.run(lambda calls: _ask(calls, request))
    out, now = console(), dt.datetime.now(dt.UTC)
    show(out, found, now)
    for line in steering_lines(steering, now):
        out.print(line)


async def _ask(
    calls: Calls, request: api.GetTrafficRequest
) -> tuple[api.GetTrafficResponse, Steering | None]:
    found = await calls.traffic.GetTraffic(request, timeout=calls.timeout)
    return found, await ask_steering(calls, found.traffic.service)


def show(out: Console, found: api.GetTrafficResponse, now: dt.datetime) -> None:
    traffic = found.traffic
    out.print(
        styled(f"{traffic.service}  version {traffic.version}, set {ago(traffic.update_time, now)}", "bold")
    )
    if traffic.rolled_back:
        out.print(styled("rolled back: all users get old, until promote or traffic set", "warn"))
    made = Table.grid(padding=(0, 2, 0, 0))
    for field, name in SHARES.items():
        made.add_row(name, percent(getattr(traffic, field)))
    out.print(made)
    out.print()
    show_envoys(out, found)


@command.command("set")
@click.option("--new", "new_share", type=SHARE, help="Share of users that new answers: 25% or 0.25.")
@click.option("--sample-safe", type=SHARE, help="Share of GET, HEAD and OPTIONS requests that are mirrored.")
@click.option(
    "--sample-unsafe", type=SHARE, help="Share of other requests that are mirrored: both versions do them!"
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE,
    help="Share of the mirrored safe requests that old gets twice.",
)
@reason_option
@actor_option
@service_option
@json_option
@connected
def set_(
    link: Link, service: str, reason: str, actor: str | None, as_json: bool, **shares: float | None
) -> int:
    """Change what is named, together and at once; the rest stays."""
    given = {name: share for name, share in shares.items() if share is not None}
    if not given:
        raise click.UsageError("say what to set: --new, --sample-safe, --sample-unsafe or --baseline")
    request = api.UpdateTrafficRequest(service=service, actor=actor_or_user(actor), reason=reason, **given)  # type: ignore[arg-type]  # names of fields
    before, changed = link.run(lambda calls: _update(calls, request))
    return report(before, changed, as_json=as_json)


async def _update(
    calls: Calls, request: api.UpdateTrafficRequest
) -> tuple[api.Traffic, api.UpdateTrafficResponse]:
    before = await calls.traffic.GetTraffic(
        api.GetTrafficRequest(service=request.service), timeout=calls.timeout
    )
    return before.traffic, await calls.traffic.UpdateTraffic(request, timeout=calls.timeout)


@command.command("events")
@limit_option
@service_option
@json_option
@connected
def events(link: Link, service: str, limit: int, as_json: bool) -> int:
    """Who changed what, when and why; newest first."""
    request = api.ListTrafficEventsRequest(service=service)
    found = link.run(lambda calls: _events(calls, request, limit))
    if as_json:
        print_json(found)
    elif found.events:
        console().print(rows(found))
    else:
        click.echo("nothing was changed yet")
    return Exit.OK


async def _events(
    calls: Calls, request: api.ListTrafficEventsRequest, limit: int
) -> api.ListTrafficEventsResponse:
    found = api.ListTrafficEventsResponse()
    for request.page_size in page_sizes(limit):
        page = await calls.traffic.ListTrafficEvents(request, timeout=calls.timeout)
        found.events.extend(page.events)
        request.page_token = found.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return found


def rows(found: api.ListTrafficEventsResponse) -> Table:
    made = table("time", "action", "change", "reason", "by")
    for event in found.events:
        made.add_row(
            clock(event.time),
            styled(event.action, "warn" if event.action in BACK else ""),
            what_changed(event),
            printable(event.reason),
            printable(event.actor),
        )
    return made


def what_changed(event: api.TrafficEvent) -> str:
    """`users on new 0% → 25%`, one a line; for a new service all its settings."""
    made = []
    for field, name in SHARES.items():
        after = percent(getattr(event.after, field))
        before = percent(getattr(event.before, field)) if event.HasField("before") else ""
        if before != after:
            made.append(f"{name} {before} → {after}" if before else f"{name} {after}")
    if event.HasField("guard_before"):
        made += guard_changes(event.guard_before, event.guard_after)
    if event.HasField("ramp_after") and not made:
        made.append(printable(event.ramp_after.said))
    return "\n".join(made) or "nothing"
