"""`abreast traffic`: who answers users, and what is mirrored."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import click
from google.protobuf.message import Message
from rich.table import Table

from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    SHARE_TYPE,
    actor_option,
    connection_options,
    default_actor,
    json_option,
    limit_option,
    reason_option,
    service_option,
)
from abreast_sidecar.cli.rollout import RolloutStatus, fetch_rollout_status, format_guard_changes, format_rollout_lines
from abreast_sidecar.client.output import (
    Console,
    format_age,
    format_duration,
    format_local_time,
    format_percent,
    make_console,
    make_table,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, print_json, split_page_sizes
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import find_run

TRAFFIC_SHARE_LABELS = {
    "new_share": "users on new",
    "sample_safe": "GET, HEAD, OPTIONS mirrored",
    "sample_unsafe": "other methods mirrored",
    "baseline_share": "baseline (of the mirrored)",
}


class TrafficChange(Protocol):
    """GetTrafficResponse, UpdateTrafficResponse, RollbackResponse and PromoteResponse alike."""

    @property
    def traffic(self) -> api.Traffic: ...
    @property
    def envoys(self) -> Iterable[api.EnvoyStatus]: ...
    @property
    def peers_error(self) -> str: ...


def print_traffic_change(
    before: api.Traffic, change: TrafficChange, *, as_json: bool, not_recorded: str = ""
) -> ExitCode:
    """Print what changed. Exit.NO where an Envoy or the ledger does not have it, or where that is not known."""
    if as_json:
        assert isinstance(change, Message)
        print_json(change)
    else:
        out = make_console()
        out.print(build_traffic_change_table(before, change.traffic))
        out.print()
        print_envoys(out, change)
    if not_recorded:
        click.echo(f"abreast: in force, but {not_recorded}", err=True)
    missing_text = describe_missing_envoys(change)
    if missing_text:
        click.echo(f"abreast: {'' if not_recorded else 'the change is stored, but '}{missing_text}", err=True)
    return ExitCode.CHECK_FAILED if not_recorded or missing_text else ExitCode.OK


def describe_missing_envoys(change: TrafficChange) -> str:
    """Who does not have it; empty where all have."""
    envoys = list(change.envoys)
    missing_envoys = [envoy for envoy in envoys if not has_acknowledged(envoy, change.traffic)]
    if missing_envoys:
        return f"{len(missing_envoys)} of {len(envoys)} Envoys do not have it yet"
    if change.peers_error:
        return "whether Envoys of other sidecars have it is not known"
    return "" if envoys else "no Envoy is connected"


def has_acknowledged(envoy: api.EnvoyStatus, traffic: api.Traffic) -> bool:
    return envoy.acknowledged_version >= traffic.version and not envoy.error


def build_traffic_change_table(before: api.Traffic, after: api.Traffic) -> Table:
    table = make_table(to_printable(after.service), "before", "after", numeric_columns=frozenset({"before", "after"}))
    for field, name in TRAFFIC_SHARE_LABELS.items():
        value_before, value_after = (format_percent(getattr(before, field)), format_percent(getattr(after, field)))
        table.add_row(name, value_before, style_text(value_after, "bold" if value_before != value_after else "dim"))
    return table


def print_envoys(out: Console, change: TrafficChange) -> None:
    envoys, traffic = list(change.envoys), change.traffic
    if envoys:
        out.print(_build_envoys_table(envoys, traffic))
    else:
        out.print(style_text("no Envoy is connected (abreast doctor)", "warn"))
    if change.peers_error:
        out.print(style_text(f"Envoys of other sidecars are not known: {to_printable(change.peers_error)}", "warn"))


def _build_envoys_table(envoys: Sequence[api.EnvoyStatus], traffic: api.Traffic) -> Table:
    has_several_sidecars = len({envoy.sidecar for envoy in envoys}) > 1
    table = make_table(
        "Envoy",
        *(["sidecar"] if has_several_sidecars else []),
        "has the settings",
        "after",
        numeric_columns=frozenset({"after"}),
    )
    node_counts = Counter(envoy.node for envoy in envoys)
    for envoy in envoys:
        if envoy.error:
            state = style_text(f"refused: {envoy.error}", "fail")
        elif has_acknowledged(envoy, traffic):
            state = style_text("yes", "ok")
        else:
            state = style_text(f"not yet (has version {envoy.acknowledged_version} of {traffic.version})", "warn")
        delay_text = format_duration(envoy.acknowledged_after) if envoy.HasField("acknowledged_after") else ""
        node = f"{envoy.node} ({envoy.peer})" if node_counts[envoy.node] > 1 else envoy.node
        table.add_row(
            to_printable(node), *([to_printable(envoy.sidecar)] if has_several_sidecars else []), state, delay_text
        )
    return table


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
            f"{traffic.service}  version {traffic.version}, set {format_age(traffic.update_time, current_time)}", "bold"
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
@click.option("--sample-safe", type=SHARE_TYPE, help="Share of GET, HEAD and OPTIONS requests that are mirrored.")
@click.option(
    "--sample-unsafe", type=SHARE_TYPE, help="Share of other requests that are mirrored: both versions do them!"
)
@click.option(
    "--baseline", "baseline_share", type=SHARE_TYPE, help="Share of the mirrored safe requests that old gets twice."
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
    before = await calls.traffic.GetTraffic(api.GetTrafficRequest(service=request.service), timeout=calls.timeout_s)
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
        lines.append(to_printable(event.ramp_after.message))
    return "\n".join(lines) or "nothing"


@click.command()
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def promote_command(link: SidecarClient, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to the new version.

    Exits with 1 where the change is stored and an Envoy does not have it yet.
    """
    request = api.PromoteRequest(service=service, actor=default_actor(actor), reason=reason)
    before, change = link.call(lambda calls: _promote(calls, request))
    return print_traffic_change(before, change, as_json=as_json)


async def _promote(calls: Calls, request: api.PromoteRequest) -> tuple[api.Traffic, api.PromoteResponse]:
    before = await calls.traffic.GetTraffic(api.GetTrafficRequest(service=request.service), timeout=calls.timeout_s)
    return before.traffic, await calls.traffic.Promote(request, timeout=calls.timeout_s)


MANUAL_ROLLBACK_COMMAND = "curl -X POST 'http://{}/runtime_modify?abreast.weight.old=10000&abreast.weight.new_or_old=0'"
ADMIN_PLACEHOLDER = "ENVOYS_ADMIN_ADDRESS"


@click.command()
@click.option("--reason", default="", help="Why, for the record; may be given, need not: nothing is to hold this up.")
@actor_option
@service_option
@json_option
@connection_options
def rollback_command(link: SidecarClient, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to the old version, at once, until promote or traffic set.

    Exits with 1 where an Envoy does not have it yet, or the ledger does not know of it yet.
    """
    request = api.RollbackRequest(service=service, actor=default_actor(actor), reason=reason)
    try:
        change = link.call(lambda calls: calls.traffic.Rollback(request, timeout=calls.timeout_s))
    except ServerError as error:
        admin = find_run(link.address).get("ABREAST_ENVOY_ADMIN", ADMIN_PLACEHOLDER).removeprefix("http://")
        raise ServerError(
            f"{error}; or pull the brake in each Envoy: {MANUAL_ROLLBACK_COMMAND.format(admin)}"
        ) from error
    return print_traffic_change(change.previous, change, as_json=as_json, not_recorded=change.recording_error)
