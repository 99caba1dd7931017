"""`abreast traffic`, `abreast promote` and `abreast rollback`: users' shares and mirroring."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

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
    print_json,
    print_list,
    print_response,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import find_run

TRAFFIC_SHARE_LABELS = {
    "new_share": "users on new",
    "sample_safe": "GET, HEAD, OPTIONS mirrored",
    "sample_unsafe": "other methods mirrored",
    "baseline_share": "baseline (of the mirrored)",
}
ROLLBACK_ACTIONS = {"rollback", "ramp_abort", "guard_would_roll_back"}
MANUAL_ROLLBACK_COMMAND = "curl -X POST 'http://{}/runtime_modify?abreast.weight.old=10000&abreast.weight.new_or_old=0'"
ADMIN_PLACEHOLDER = "ENVOYS_ADMIN_ADDRESS"


class TrafficChange(Protocol):
    """The common part of the responses of GetTraffic, UpdateTraffic, Rollback and Promote."""

    @property
    def traffic(self) -> api.Traffic: ...
    @property
    def envoys(self) -> Iterable[api.EnvoyStatus]: ...
    @property
    def peers_error(self) -> str: ...


TrafficChangeT = TypeVar("TrafficChangeT", bound=TrafficChange)


@click.group(invoke_without_command=True)
@service_option
@json_option
@connection_options
@click.pass_context
def traffic_command(ctx: click.Context, link: SidecarClient, service: str, as_json: bool) -> None:
    """Show the users' shares, the mirroring, and the Envoys that confirmed them."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetTrafficRequest(service=service)
    if as_json:
        print_json(link.call(lambda calls: calls.traffic.GetTraffic(request, timeout=calls.timeout_s)))
        return

    async def fetch_traffic_and_rollout(calls: Calls) -> tuple[api.GetTrafficResponse, RolloutStatus | None]:
        response = await calls.traffic.GetTraffic(request, timeout=calls.timeout_s)
        return response, await fetch_rollout_status(calls, response.traffic.service)

    response, rollout = link.call(fetch_traffic_and_rollout)
    out, current_time = make_console(), dt.datetime.now(dt.UTC)
    print_traffic(out, response, current_time)
    for line in format_rollout_lines(rollout, current_time):
        out.print(line)


def print_traffic(out: Console, response: api.GetTrafficResponse, current_time: dt.datetime) -> None:
    traffic = response.traffic
    age = format_age(traffic.update_time, current_time)
    out.print(style_text(f"{traffic.service}  version {traffic.version}, set {age}", "bold"))
    if traffic.rolled_back:
        out.print(style_text("rolled back: all users get old until promote or traffic set", "warn"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for field, name in TRAFFIC_SHARE_LABELS.items():
        grid.add_row(name, format_percent(getattr(traffic, field)))
    out.print(grid)
    out.print()
    print_envoys(out, response)


def print_envoys(out: Console, change: TrafficChange) -> None:
    envoys, traffic = list(change.envoys), change.traffic
    if envoys:
        out.print(_build_envoys_table(envoys, traffic))
    else:
        out.print(style_text("no Envoy is connected (see: abreast doctor)", "warn"))
    if change.peers_error:
        out.print(style_text(f"the Envoys of other sidecars are unknown: {to_printable(change.peers_error)}", "warn"))


def _build_envoys_table(envoys: Sequence[api.EnvoyStatus], traffic: api.Traffic) -> Table:
    has_several_sidecars = len({envoy.sidecar for envoy in envoys}) > 1
    table = make_table(
        "Envoy",
        *(["sidecar"] if has_several_sidecars else []),
        "confirmed",
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
            state = style_text(f"not yet (at version {envoy.acknowledged_version} of {traffic.version})", "warn")
        delay_text = format_duration(envoy.acknowledged_after) if envoy.HasField("acknowledged_after") else ""
        node = f"{envoy.node} ({envoy.peer})" if node_counts[envoy.node] > 1 else envoy.node
        table.add_row(
            to_printable(node), *([to_printable(envoy.sidecar)] if has_several_sidecars else []), state, delay_text
        )
    return table


@traffic_command.command("set")
@click.option("--new", "new_share", type=SHARE_TYPE, help="Share of users on new, as 25% or 0.25.")
@click.option("--sample-safe", type=SHARE_TYPE, help="Share of GET, HEAD and OPTIONS requests to mirror.")
@click.option(
    "--sample-unsafe", type=SHARE_TYPE, help="Share of all other requests to mirror. Both versions execute them!"
)
@click.option(
    "--baseline", "baseline_share", type=SHARE_TYPE, help="Share of the mirrored safe requests that old receives twice."
)
@reason_option
@actor_option
@service_option
@json_option
@connection_options
def set_traffic(
    link: SidecarClient, service: str, reason: str, actor: str | None, as_json: bool, **shares: float | None
) -> int:
    """Change shares together and at once. Shares that you omit stay."""
    requested_shares = {name: share for name, share in shares.items() if share is not None}
    if not requested_shares:
        raise click.UsageError("set at least one of --new, --sample-safe, --sample-unsafe and --baseline")
    request = api.UpdateTrafficRequest(
        service=service,
        actor=default_actor(actor),
        reason=reason,
        **requested_shares,  # type: ignore[arg-type]  # names of fields
    )
    before, change = link.call(
        lambda calls: _change_traffic(
            calls, service, lambda: calls.traffic.UpdateTraffic(request, timeout=calls.timeout_s)
        )
    )
    return print_traffic_change(before, change, as_json=as_json)


async def _change_traffic(
    calls: Calls, service: str, send: Callable[[], Awaitable[TrafficChangeT]]
) -> tuple[api.Traffic, TrafficChangeT]:
    """Return the traffic before a change, and the response to the change."""
    before = await calls.traffic.GetTraffic(api.GetTrafficRequest(service=service), timeout=calls.timeout_s)
    return before.traffic, await send()


def print_traffic_change(
    before: api.Traffic, change: TrafficChange, *, as_json: bool, recording_error: str = ""
) -> ExitCode:
    """Print a change. Return CHECK_FAILED unless the ledger has recorded it and all Envoys have confirmed it."""
    if as_json:
        assert isinstance(change, Message)
        print_json(change)
    else:
        out = make_console()
        out.print(build_traffic_change_table(before, change.traffic))
        out.print()
        print_envoys(out, change)
    if recording_error:
        click.echo(f"abreast: in force, but {recording_error}", err=True)
    missing_text = describe_missing_envoys(change)
    if missing_text:
        click.echo(f"abreast: {'' if recording_error else 'the change is stored, but '}{missing_text}", err=True)
    return ExitCode.CHECK_FAILED if recording_error or missing_text else ExitCode.OK


def describe_missing_envoys(change: TrafficChange) -> str:
    """Describe the Envoys that have not confirmed the change. Return "" if all have."""
    envoys = list(change.envoys)
    missing_envoys = [envoy for envoy in envoys if not has_acknowledged(envoy, change.traffic)]
    if missing_envoys:
        return f"{len(missing_envoys)} of {len(envoys)} Envoys have not confirmed it yet"
    if change.peers_error:
        return "the Envoys of other sidecars are unknown"
    return "" if envoys else "no Envoy is connected"


def has_acknowledged(envoy: api.EnvoyStatus, traffic: api.Traffic) -> bool:
    return envoy.acknowledged_version >= traffic.version and not envoy.error


def build_traffic_change_table(before: api.Traffic, after: api.Traffic) -> Table:
    table = make_table(to_printable(after.service), "before", "after", numeric_columns=frozenset({"before", "after"}))
    for field, name in TRAFFIC_SHARE_LABELS.items():
        value_before, value_after = (format_percent(getattr(traffic, field)) for traffic in (before, after))
        table.add_row(name, value_before, style_text(value_after, "bold" if value_before != value_after else "dim"))
    return table


@traffic_command.command("events")
@limit_option
@service_option
@json_option
@connection_options
def list_traffic_events(link: SidecarClient, service: str, limit: int, as_json: bool) -> None:
    """List all traffic changes with actor, time and reason, newest first."""
    request = api.ListTrafficEventsRequest(service=service)
    response = link.list_rows(
        lambda calls: calls.traffic.ListTrafficEvents(request, timeout=calls.timeout_s), request, limit
    )
    print_response(response, print_traffic_events, as_json=as_json)


def print_traffic_events(out: Console, response: api.ListTrafficEventsResponse) -> None:
    print_list(out, response, response.events, build_traffic_events_table(response), empty="no traffic change yet")


def build_traffic_events_table(response: api.ListTrafficEventsResponse) -> Table:
    table = make_table("time", "action", "change", "reason", "actor")
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
    """Return one line per change, such as `users on new 0% → 25%`. A new service shows all its settings."""
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
    """Send all users to new.

    Exits with 1 if the change is stored but an Envoy has not confirmed it yet.
    """
    request = api.PromoteRequest(service=service, actor=default_actor(actor), reason=reason)
    before, change = link.call(
        lambda calls: _change_traffic(calls, service, lambda: calls.traffic.Promote(request, timeout=calls.timeout_s))
    )
    return print_traffic_change(before, change, as_json=as_json)


@click.command()
@click.option("--reason", default="", help="Reason for the audit log (optional).")
@actor_option
@service_option
@json_option
@connection_options
def rollback_command(link: SidecarClient, reason: str, actor: str | None, service: str, as_json: bool) -> int:
    """Send all users to old at once, until you run `promote` or `traffic set`.

    Exits with 1 if an Envoy has not confirmed the rollback yet, or the ledger has not recorded it yet.
    """
    request = api.RollbackRequest(service=service, actor=default_actor(actor), reason=reason)
    try:
        change = link.call(lambda calls: calls.traffic.Rollback(request, timeout=calls.timeout_s))
    except ServerError as error:
        admin = find_run(link.address).get("ABREAST_ENVOY_ADMIN", ADMIN_PLACEHOLDER).removeprefix("http://")
        raise ServerError(
            f"{error}; or override the weights in each Envoy: {MANUAL_ROLLBACK_COMMAND.format(admin)}"
        ) from error
    return print_traffic_change(change.previous, change, as_json=as_json, recording_error=change.recording_error)
