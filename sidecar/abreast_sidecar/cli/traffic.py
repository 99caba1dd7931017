"""`abreast traffic`: who answers users, and what is mirrored."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    connection_options,
    json_option,
    print_json,
    service_option,
    split_page_sizes,
)
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.guard import format_guard_changes
from abreast_sidecar.cli.humane import format_age, format_local_time, format_percent, to_printable
from abreast_sidecar.cli.parameters import SHARE_TYPE, limit_option
from abreast_sidecar.cli.shift import (
    TRAFFIC_SHARE_LABELS,
    actor_option,
    default_actor,
    print_envoys,
    print_traffic_change,
    reason_option,
)
from abreast_sidecar.cli.steering import RolloutStatus, fetch_rollout_status, format_rollout_lines
from abreast_sidecar.cli.tables import Console, make_console, make_table, style_text

ROLLBACK_ACTIONS = {"rollback", "ramp_abort", "guard_would_roll_back"}


@click.group(invoke_without_command=True)
@service_option
@json_option
@connection_options
@click.pass_context
def traffic_command(ctx: click.Context, link: SidecarClient, service: str, as_json: bool) -> None:
    """Who answers users, and what is mirrored; `set` changes it, `events` lists changes."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetTrafficRequest(service=service)
    if as_json:
        print_json(link.call(lambda calls: calls.traffic.GetTraffic(request, timeout=calls.timeout_s)))
        return
    response, steering = link.call(lambda calls: _fetch_traffic_and_rollout(calls, request))
    out, current_time = make_console(), dt.datetime.now(dt.UTC)
    print_traffic(out, response, current_time)
    for line in format_rollout_lines(steering, current_time):
        out.print(line)


async def _fetch_traffic_and_rollout(
    calls: Calls, request: api.GetTrafficRequest
) -> tuple[api.GetTrafficResponse, RolloutStatus | None]:
    response = await calls.traffic.GetTraffic(request, timeout=calls.timeout_s)
    return response, await fetch_rollout_status(calls, response.traffic.service)


def print_traffic(out: Console, response: api.GetTrafficResponse, current_time: dt.datetime) -> None:
    traffic = response.traffic
    out.print(
        style_text(
            f"{traffic.service}  version {traffic.version}, set {format_age(traffic.update_time, current_time)}",
            "bold",
        )
    )
    if traffic.rolled_back:
        out.print(style_text("rolled back: all users get old, until promote or traffic set", "warn"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for field, name in TRAFFIC_SHARE_LABELS.items():
        grid.add_row(name, format_percent(getattr(traffic, field)))
    out.print(grid)
    out.print()
    print_envoys(out, response)


@traffic_command.command("set")
@click.option("--new", "new_share", type=SHARE_TYPE, help="Share of users that new answers: 25% or 0.25.")
@click.option(
    "--sample-safe", type=SHARE_TYPE, help="Share of GET, HEAD and OPTIONS requests that are mirrored."
)
@click.option(
    "--sample-unsafe",
    type=SHARE_TYPE,
    help="Share of other requests that are mirrored: both versions do them!",
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE_TYPE,
    help="Share of the mirrored safe requests that old gets twice.",
)
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def set_traffic(
    link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool, **shares: float | None
) -> int:
    """Change what is named, together and at once; the rest stays."""
    requested_shares = {name: share for name, share in shares.items() if share is not None}
    if not requested_shares:
        raise click.UsageError("say what to set: --new, --sample-safe, --sample-unsafe or --baseline")
    request = api.UpdateTrafficRequest(
        service=service,
        actor=default_actor(actor),
        reason=reason,
        **requested_shares,  # type: ignore[arg-type]  # names of fields
    )
    before, change = link.call(lambda calls: _update_traffic(calls, request))
    return print_traffic_change(before, change, as_json=as_json)


async def _update_traffic(
    calls: Calls, request: api.UpdateTrafficRequest
) -> tuple[api.Traffic, api.UpdateTrafficResponse]:
    before = await calls.traffic.GetTraffic(
        api.GetTrafficRequest(service=request.service), timeout=calls.timeout_s
    )
    return before.traffic, await calls.traffic.UpdateTraffic(request, timeout=calls.timeout_s)


@traffic_command.command("events")
@limit_option
@service_option
@json_option
@connection_options
def list_traffic_events(link: SidecarClient, service: str, limit: int, as_json: bool) -> int:
    """Who changed what, when and why; newest first."""
    request = api.ListTrafficEventsRequest(service=service)
    response = link.call(lambda calls: _fetch_traffic_events(calls, request, limit))
    if as_json:
        print_json(response)
    elif response.events:
        make_console().print(build_traffic_events_table(response))
    else:
        click.echo("nothing was changed yet")
    return ExitCode.OK


async def _fetch_traffic_events(
    calls: Calls, request: api.ListTrafficEventsRequest, limit: int
) -> api.ListTrafficEventsResponse:
    response = api.ListTrafficEventsResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.traffic.ListTrafficEvents(request, timeout=calls.timeout_s)
        response.events.extend(page.events)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


def build_traffic_events_table(response: api.ListTrafficEventsResponse) -> Table:
    table = make_table("time", "action", "change", "reason", "by")
    for event in response.events:
        table.add_row(
            format_local_time(event.time),
            style_text(event.action, "warn" if event.action in ROLLBACK_ACTIONS else ""),
            format_traffic_changes(event),
            to_printable(event.reason),
            to_printable(event.actor),
        )
    return table


def format_traffic_changes(event: api.TrafficEvent) -> str:
    """`users on new 0% → 25%`, one a line; for a new service all its settings."""
    lines = []
    for field, name in TRAFFIC_SHARE_LABELS.items():
        after = format_percent(getattr(event.after, field))
        before = format_percent(getattr(event.before, field)) if event.HasField("before") else ""
        if before != after:
            lines.append(f"{name} {before} → {after}" if before else f"{name} {after}")
    if event.HasField("guard_before"):
        lines += format_guard_changes(event.guard_before, event.guard_after)
    if event.HasField("ramp_after") and not lines:
        lines.append(to_printable(event.ramp_after.said))
    return "\n".join(lines) or "nothing"
