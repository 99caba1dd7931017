"""`abreast traffic`, `abreast promote` and `abreast rollback`: users' shares and mirroring."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import click
from rich.table import Table
from rich.text import Text

from abreast.settings import share as parse_share
from abreast.v1 import traffic_pb2 as api
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    SHARE_TYPE,
    Audit,
    ParserParamType,
    PrintingClient,
    actor_option,
    api_options,
    change_options,
    default_actor,
    force_option,
    limit_option,
    service_option,
)
from abreast_sidecar.cli.rollout import RolloutStatus, fetch_rollout_status, format_guard_changes, format_rollout_lines
from abreast_sidecar.client.output import (
    Console,
    format_age,
    format_count,
    format_duration,
    format_local_time,
    format_percent,
    make_console,
    make_grid,
    make_table,
    print_json,
    print_list,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import find_run

TRAFFIC_SHARE_LABELS = {
    "new_share": "users on new",
    "sample_safe": "GET, HEAD, OPTIONS mirrored",
    "sample_unsafe": "other methods mirrored",
    "baseline_share": "baseline (of the mirrored)",
}
RULE_LABEL = "sampling rule"
ROLLBACK_ACTIONS = {"rollback", "ramp_abort", "guard_would_roll_back"}
MANUAL_ROLLBACK_COMMAND = (
    "curl --unix-socket {socket} -X POST 'http://envoy/runtime_modify?abreast.weight.{scope}old=10000"
    "&abreast.weight.{scope}new_or_old=0&abreast.weight.{scope}drilled_or_old=0'"
)
ADMIN_PLACEHOLDER = "SOCKET_OF_ENVOYS_ADMIN"
MIN_EFFECTIVE_SHARE = 0.95  # below it, the effective sample is a warning


TrafficChange: TypeAlias = api.UpdateTrafficResponse | api.PromoteResponse | api.RollbackResponse


def parse_rule_share(value: str) -> tuple[str, float]:
    name, equals, share = value.rpartition("=")
    if not equals or not name.strip():
        raise ValueError("NAME=SHARE, such as post-search=10%")
    return name.strip(), parse_share(share)


RULE_SHARE_TYPE = ParserParamType("name=share", parse_rule_share)


@click.group(invoke_without_command=True)
@service_option
@api_options
@click.pass_context
def traffic_command(ctx: click.Context, link: PrintingClient, service: str) -> None:
    """Show the users' shares, the mirroring, and the Envoys that confirmed them."""
    if ctx.invoked_subcommand is not None:
        return
    request = api.GetTrafficRequest(service=service)
    if link.as_json:
        print_json(link.call(lambda calls: calls.traffic.GetTraffic(request)))
        return

    async def fetch_traffic_and_rollout(calls: Calls) -> tuple[api.GetTrafficResponse, RolloutStatus | None]:
        response = await calls.traffic.GetTraffic(request)
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
    print_warnings(out, response)
    out.print(
        make_grid((name, format_percent(getattr(traffic, field))) for field, name in TRAFFIC_SHARE_LABELS.items())
    )
    if response.HasField("effective_sample"):
        out.print(describe_effective_sample(response.effective_sample))
    if response.rules:
        out.print()
        out.print(_build_rules_table(response.rules))
    out.print()
    print_envoys(out, response)


def _build_rules_table(rules: Sequence[api.SampleRule]) -> Table:
    numeric_columns = ("mirrored", "in file", "sampled", "no query")
    table = make_table("sampling rule", "requests", *numeric_columns, numeric_columns=set(numeric_columns))
    for rule in rules:
        table.add_row(
            to_printable(rule.name),
            to_printable(rule.condition),
            style_text(format_percent(rule.share), "bold" if rule.share != rule.initial_share else ""),
            format_percent(rule.initial_share),
            format_count(rule.sampled),
            format_count(rule.not_query) if rule.not_query else "",
        )
    return table


def describe_effective_sample(sample: api.EffectiveSample) -> Text:
    share = min(sample.copied / sample.selected, 1.0)
    text = (
        f"effective sample: {format_percent(share)} of the selected requests had a copy"
        f" ({format_count(sample.copied)} of {format_count(sample.selected)} in the last 10 minutes)"
    )
    return style_text(text, "warn" if share < MIN_EFFECTIVE_SHARE else "dim")


def print_warnings(out: Console, response: api.GetTrafficResponse) -> None:
    for warning in response.warnings:
        out.print(style_text(to_printable(warning), "warn"))


def print_envoys(out: Console, change: TrafficChange | api.GetTrafficResponse) -> None:
    if change.envoys:
        out.print(_build_envoys_table(change.envoys, change.traffic))
    else:
        out.print(style_text("no Envoy is connected (see: abreast doctor)", "warn"))
    if change.peers_error:
        out.print(style_text(f"the Envoys of other sidecars are unknown: {to_printable(change.peers_error)}", "warn"))


def _build_envoys_table(envoys: Sequence[api.EnvoyStatus], traffic: api.Traffic) -> Table:
    has_several_sidecars = len({envoy.sidecar for envoy in envoys}) > 1
    sidecar_columns = ["sidecar"] if has_several_sidecars else []
    table = make_table("Envoy", *sidecar_columns, "confirmed", "after", numeric_columns={"after"})
    node_counts = Counter(envoy.node for envoy in envoys)
    for envoy in envoys:
        if envoy.error:
            state = style_text(f"refused: {envoy.error}", "fail")
        elif has_acknowledged(envoy):
            state = style_text("yes", "ok")
        else:
            state = style_text(f"not yet (at version {envoy.acknowledged_version} of {traffic.version})", "warn")
        delay_text = format_duration(envoy.acknowledged_after) if envoy.HasField("acknowledged_after") else ""
        node = f"{envoy.node} ({envoy.peer})" if node_counts[envoy.node] > 1 else envoy.node
        sidecar_cells = [to_printable(envoy.sidecar)] if has_several_sidecars else []
        table.add_row(to_printable(node), *sidecar_cells, state, delay_text)
    return table


@traffic_command.command("set")
@click.option("--new", "new_share", type=SHARE_TYPE, help="Share of users on new, as 25% or 0.25.")
@click.option("--sample-safe", type=SHARE_TYPE, help="Share of GET, HEAD and OPTIONS requests to mirror.")
@click.option(
    "--sample-unsafe", type=SHARE_TYPE, help="Share of all other requests to mirror. Both versions execute them!"
)
@click.option(
    "--baseline",
    "baseline_share",
    type=SHARE_TYPE,
    help="Share of the mirrored safe requests that the answering version receives twice.",
)
@click.option(
    "--sample",
    "rule_shares",
    type=RULE_SHARE_TYPE,
    multiple=True,
    help="Share of a sampling rule, by its name or condition, such as post-search=10% (repeatable).",
)
@force_option
@change_options
def set_traffic(
    link: PrintingClient,
    service: str,
    audit: Audit,
    *,
    force: bool,
    rule_shares: Sequence[tuple[str, float]],
    **shares: float | None,
) -> int:
    """Change shares together and at once. Shares that you omit stay.

    The sidecar refuses to send more users to new while the verdict is FAIL, and warns while it is INCONCLUSIVE.
    """
    requested_shares: Any = {name: share for name, share in shares.items() if share is not None}
    if not requested_shares and not rule_shares:
        raise click.UsageError("set at least one of --new, --sample, --sample-safe, --sample-unsafe and --baseline")
    request = api.UpdateTrafficRequest(
        service=service, force=force, rule_shares=dict(rule_shares), **audit, **requested_shares
    )
    return _change_traffic(link, service, lambda calls: calls.traffic.UpdateTraffic(request))


def _change_traffic(link: PrintingClient, service: str, send: Callable[[Calls], Awaitable[TrafficChange]]) -> ExitCode:
    """Make a change, and print the shares before and after it."""

    async def fetch_and_change(calls: Calls) -> tuple[api.Traffic, TrafficChange]:
        before = await calls.traffic.GetTraffic(api.GetTrafficRequest(service=service))
        return before.traffic, await send(calls)

    before, change = link.call(fetch_and_change)
    return print_traffic_change(before, change, as_json=link.as_json)


def print_traffic_change(
    before: api.Traffic, change: TrafficChange, *, as_json: bool, recording_error: str = ""
) -> ExitCode:
    """Print a change. Return CHECK_FAILED unless the ledger has recorded it and all Envoys have confirmed it."""
    if as_json:
        print_json(change)
    else:
        out = make_console()
        out.print(build_traffic_change_table(before, change.traffic))
        out.print()
        print_envoys(out, change)
    for warning in getattr(change, "warnings", ()):
        click.echo(f"abreast: warning: {to_printable(warning)}", err=True)
    if recording_error:
        click.echo(f"abreast: in force, but {recording_error}", err=True)
    missing_text = describe_missing_envoys(change)
    if missing_text:
        click.echo(f"abreast: {'' if recording_error else 'the change is stored, but '}{missing_text}", err=True)
    return ExitCode.CHECK_FAILED if recording_error or missing_text else ExitCode.OK


def describe_missing_envoys(change: TrafficChange) -> str:
    """Describe the Envoys that have not confirmed the change. Return "" if all have."""
    missing_envoys = [envoy for envoy in change.envoys if not has_acknowledged(envoy)]
    if missing_envoys:
        return f"{len(missing_envoys)} of {len(change.envoys)} Envoys have not confirmed it yet"
    if change.peers_error:
        return "the Envoys of other sidecars are unknown"
    return "" if change.envoys else "no Envoy is connected"


def has_acknowledged(envoy: api.EnvoyStatus) -> bool:
    return envoy.HasField("acknowledged_after") and not envoy.error


def build_traffic_change_table(before: api.Traffic, after: api.Traffic) -> Table:
    table = make_table(to_printable(after.service), "before", "after", numeric_columns={"before", "after"})
    for name in list_share_names(before, after):
        value_before, value_after = (format_share(traffic, name) for traffic in (before, after))
        label = TRAFFIC_SHARE_LABELS.get(name, name)
        table.add_row(label, value_before, style_text(value_after, "bold" if value_before != value_after else "dim"))
    return table


def list_share_names(*settings: api.Traffic) -> list[str]:
    """Return the names of all shares, and of the rules whose share was set."""
    rules = {f"{RULE_LABEL} {name}" for traffic in settings for name in traffic.rule_shares}
    return [*TRAFFIC_SHARE_LABELS, *sorted(rules)]


def format_share(traffic: api.Traffic, name: str) -> str:
    """Return the share with a name of `list_share_names`. A rule whose share was never set has that of Envoy's file."""
    if name in TRAFFIC_SHARE_LABELS:
        return format_percent(getattr(traffic, name))
    rule = name.removeprefix(f"{RULE_LABEL} ")
    return format_percent(traffic.rule_shares[rule]) if rule in traffic.rule_shares else "as in the file"


@traffic_command.command("events")
@limit_option
@service_option
@api_options
def list_traffic_events(link: PrintingClient, service: str, limit: int) -> None:
    """List all traffic changes with actor, time and reason, newest first."""
    request = api.ListTrafficEventsRequest(service=service)
    link.show_rows(lambda calls: calls.traffic.ListTrafficEvents, request, limit, print_traffic_events)


def print_traffic_events(out: Console, response: api.ListTrafficEventsResponse) -> None:
    table = make_table("time", "action", "change", "reason", "actor")
    for event in response.events:
        table.add_row(
            format_local_time(event.time),
            style_text(event.action, "warn" if event.action in ROLLBACK_ACTIONS else ""),
            format_traffic_changes(event),
            to_printable(event.reason),
            to_printable(event.actor),
        )
    print_list(out, response, response.events, table, empty="no traffic change yet")


def format_traffic_changes(event: api.TrafficEvent) -> str:
    """Return one line per change, such as `users on new 0% → 25%`. A new service shows all its settings."""
    lines = []
    for field in list_share_names(event.before, event.after):
        name, after = TRAFFIC_SHARE_LABELS.get(field, field), format_share(event.after, field)
        before = format_share(event.before, field) if event.HasField("before") else ""
        if before != after:
            lines.append(f"{name} {before} → {after}" if before else f"{name} {after}")
    if event.HasField("guard_before"):
        lines += format_guard_changes(event.guard_before, event.guard_after)
    if event.HasField("ramp_after") and not lines:
        lines.append(to_printable(event.ramp_after.message))
    return "\n".join(lines) or "nothing"


@click.command()
@force_option
@change_options
def promote_command(link: PrintingClient, audit: Audit, service: str, *, force: bool) -> int:
    """Send all users to new.

    The sidecar refuses this while the verdict is FAIL, and warns while it is INCONCLUSIVE.

    Exits with 1 if the change is stored but an Envoy has not confirmed it yet.
    """
    request = api.PromoteRequest(service=service, force=force, **audit)
    return _change_traffic(link, service, lambda calls: calls.traffic.Promote(request))


@click.command()
@click.option("--reason", default="", help="Reason for the audit log (optional).")
@actor_option
@service_option
@api_options
def rollback_command(link: PrintingClient, reason: str, actor: str | None, service: str) -> int:
    """Send all users to old at once, until you run `promote` or `traffic set`.

    Exits with 1 if an Envoy has not confirmed the rollback yet, or the ledger has not recorded it yet.
    """
    request = api.RollbackRequest(service=service, actor=default_actor(actor), reason=reason)
    try:
        change = link.call(lambda calls: calls.traffic.Rollback(request))
    except ServerError as error:
        command = describe_manual_rollback(find_run(link.address), service)
        raise ServerError(f"{error}; or override the weights in each Envoy: {command}") from error
    return print_traffic_change(change.previous, change, as_json=link.as_json, recording_error=change.recording_error)


def describe_manual_rollback(run: Mapping[str, str], service: str) -> str:
    """Return the command for an Envoy. If it has several services, the keys name the service.

    `run` has the addresses of a running stack, if there is one. Only an Envoy itself knows whether it has several services.
    """
    from abreast_sidecar.jobs.reports import EnvoyError, list_scopes, read_admin

    scopes: Mapping[str, str] = {}
    if address := run.get("ABREAST_ENVOY_ADMIN", ""):
        with contextlib.suppress(EnvoyError, KeyError, TypeError):
            scopes = list_scopes(*read_admin(address.removeprefix("http://"), "/server_info"))
    scope = scopes.get(service, "SERVICE-") if len(scopes) > 1 else ""
    command = MANUAL_ROLLBACK_COMMAND.format(socket=run.get("ABREAST_ADMIN_SOCKET", ADMIN_PLACEHOLDER), scope=scope)
    return (
        command if scopes else f"{command} (with several services, its keys are abreast.weight.SERVICE-old and so on)"
    )
