"""`abreast status`: outcomes of the sampled requests, and where the others are."""

from __future__ import annotations

import datetime as dt
import json

import click
import grpc.aio
from rich.table import Table
from rich.text import Text

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli.options import connection_options, json_option, service_option, since_option, until_option
from abreast_sidecar.cli.rollout import RolloutStatus, fetch_rollout_status, format_rollout_lines
from abreast_sidecar.client.output import (
    Console,
    format_age,
    format_count,
    format_percent,
    format_quantity,
    format_seconds,
    format_share_of,
    make_console,
    make_table,
    message_to_json,
    outcome_name,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window

EMPTY_STATUS_TEXT = (
    "no request has been compared yet; send requests through Envoy, and if this does not change, run: abreast doctor"
)
MAX_REASON_CHARS = 120
SETTLED_AFTER_S = 30.0  # without a new pair
MAX_LEDGER_CLOCK_OFFSET_S = 300.0
# Envoy's count and the ledger are read one after the other, so that some requests are always between the two.
IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE = 20, 0.01


@click.command()
@service_option
@since_option
@until_option
@json_option
@connection_options
def status_command(
    link: SidecarClient, service: str, since: dt.datetime | None, until: dt.datetime | None, as_json: bool
) -> None:
    """Show the outcomes of the sampled requests, next to Envoy's own count."""
    request = api.GetSummaryRequest(service=service, window=build_time_window(since, until))
    summary, traffic, rollout = link.call(lambda calls: _fetch_status(calls, request))
    if as_json:
        messages = {"summary": summary, "traffic": traffic}
        objects = {name: message and json.loads(message_to_json(message)) for name, message in messages.items()}
        click.echo(json.dumps(objects, indent=2, ensure_ascii=False))
        return
    print_status(make_console(), summary, traffic, dt.datetime.now(dt.UTC), rollout)


async def _fetch_status(
    calls: Calls, request: api.GetSummaryRequest
) -> tuple[api.GetSummaryResponse, traffic_pb2.GetTrafficResponse | None, RolloutStatus | None]:
    """Fetch the summary, the traffic and the rollout. A service with captures may have no traffic settings yet."""
    summary = await calls.comparison.GetSummary(request, timeout=calls.timeout_s)
    traffic_request = traffic_pb2.GetTrafficRequest(service=summary.service)
    try:
        traffic = await calls.traffic.GetTraffic(traffic_request, timeout=calls.timeout_s)
        return summary, traffic, await fetch_rollout_status(calls, traffic.traffic.service)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return summary, None, None


def print_status(
    out: Console,
    summary: api.GetSummaryResponse,
    traffic: traffic_pb2.GetTrafficResponse | None,
    current_time: dt.datetime,
    rollout: RolloutStatus | None = None,
) -> None:
    out.print(style_text(summary.service or "(no service yet)", "bold"))
    if traffic is not None:
        out.print(format_traffic_line(traffic.traffic))
    for line in format_rollout_lines(rollout, current_time):
        out.print(line)
    out.print()
    if summary.pairs:
        out.print(_build_outcomes_table(summary))
        duration = format_seconds(
            (summary.last_pair_time.ToDatetime() - summary.first_pair_time.ToDatetime()).total_seconds()
        )
        age = format_age(summary.last_pair_time, current_time)
        out.print(f"\n{format_quantity(summary.pairs, 'request')} in {duration}, the last {age}")
    else:
        out.print(EMPTY_STATUS_TEXT)
    out.print(_build_completeness_table(summary, current_time))


def format_traffic_line(traffic: traffic_pb2.Traffic) -> str:
    rollback_text = " (rolled back)" if traffic.rolled_back else ""
    return (
        f"users: {format_percent(1 - traffic.new_share)} old, {format_percent(traffic.new_share)} new{rollback_text} · "
        f"mirrored: {format_percent(traffic.sample_safe)} of safe requests, "
        f"{format_percent(traffic.sample_unsafe)} of others"
    )


def _build_outcomes_table(summary: api.GetSummaryResponse) -> Table:
    table = make_table("outcome", "requests", "share", "", numeric_columns=frozenset({"requests", "share"}))
    for row in summary.outcomes:
        name = outcome_name(row.outcome)
        note = ""
        if name == "mismatch" and summary.explained:
            note = f"{format_count(summary.explained)} of them explained or only additive"
        table.add_row(style_text(name), format_count(row.count), format_share_of(row.count, summary.pairs), note)
    return table


def _build_completeness_table(summary: api.GetSummaryResponse, current_time: dt.datetime) -> Table:
    table = make_table("", "", "")
    if summary.HasField("envoy_sampled"):
        unaccounted = _format_unaccounted(summary, current_time)
        table.add_row("sampled by Envoy", format_count(summary.envoy_sampled), unaccounted)
    else:
        table.add_row("sampled by Envoy", "?", "no admin address of an Envoy is set (ABREAST_ENVOY_ADMIN)")
    if summary.HasField("pending"):
        pending_note = "wait for a copy or a worker" if summary.pending else ""
        table.add_row("pending", format_count(summary.pending), pending_note)
    else:
        table.add_row("pending", "?", "Redis can't be reached (see: abreast doctor)")
    drops = sum(drop.count for drop in summary.drops)
    by_reason = ", ".join(
        f"{to_printable(drop.stage)} {to_printable(drop.reason)} {format_count(drop.count)}"
        for drop in summary.drops
        if drop.count
    )
    table.add_row("dropped", style_text(format_count(drops), "fail" if drops else ""), by_reason)
    if late_captures := summary.captures.late:
        table.add_row("late", format_count(late_captures), "captures that arrived after the comparison")
    if summary.not_sent:
        table.add_row("not sent", format_count(summary.not_sent), "copies that never left Envoy")
    for dead_letter in summary.dead_letters:
        count_text = style_text(format_count(dead_letter.count), "fail")
        table.add_row("dead letters", count_text, to_printable(dead_letter.reason, MAX_REASON_CHARS))
    clock_offset_s = summary.ledger_clock_ahead.ToTimedelta().total_seconds()
    if abs(clock_offset_s) > MAX_LEDGER_CLOCK_OFFSET_S:
        direction = "ahead of" if clock_offset_s > 0 else "behind"
        text = f"Postgres is {format_seconds(abs(clock_offset_s))} {direction} the sidecar: synchronize the clocks"
        table.add_row("clocks", style_text("!", "warn"), text)
    table.add_row("findings", format_count(summary.findings), "see: abreast findings" if summary.findings else "")
    return table


def _is_settled(summary: api.GetSummaryResponse, current_time: dt.datetime) -> bool:
    """Return True if no pair is pending and the last one is old."""
    is_drained = summary.HasField("pending") and not summary.pending and summary.HasField("last_pair_time")
    return is_drained and (current_time - summary.last_pair_time.ToDatetime(dt.UTC)).total_seconds() > SETTLED_AFTER_S


def _format_unaccounted(summary: api.GetSummaryResponse, current_time: dt.datetime) -> str | Text:
    requests = abs(summary.unaccounted)
    if not requests:
        return "all of them are in the ledger"
    number, is_missing = format_count(requests), summary.unaccounted > 0
    if is_missing and _is_settled(summary, current_time):
        return style_text(f"{number} of them are missing, and none is in flight", "warn")
    if requests <= max(IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE * summary.envoy_sampled):
        return f"{number} in flight" if is_missing else f"{number} more in the ledger than counted so far"
    if is_missing:
        return style_text(f"{number} of them are in flight or lost", "warn")
    return style_text(f"{number} fewer than in the ledger: the count of an Envoy is missing or late", "warn")
