"""`abreast status`: one look at what has been compared so far."""

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
    outcome_name,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window, message_to_json

EMPTY_STATUS_TEXT = "nothing has been compared yet; send requests through Envoy, and if this stays so: abreast doctor"

MAX_REASON_CHARS = 120  # characters
SETTLED_AFTER_S = 30.0  # seconds without a row
MAX_LEDGER_CLOCK_OFFSET_S = 300.0  # seconds that they may be apart
IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE = (
    20,
    0.01,
)  # requests, and a share of them, that are on their way at any moment: the counts are read in turn


@click.command()
@service_option
@since_option
@until_option
@json_option
@connection_options
def status_command(
    link: SidecarClient, service: str, since: dt.datetime | None, until: dt.datetime | None, as_json: bool
) -> None:
    """How the sampled requests ended, held against Envoy's own count."""
    request = api.GetSummaryRequest(service=service, window=build_time_window(since, until))
    summary, traffic, steering = link.call(lambda calls: _fetch_status(calls, request))
    if as_json:
        messages = {"summary": summary, "traffic": traffic}
        objects = {name: message and json.loads(message_to_json(message)) for name, message in messages.items()}
        click.echo(json.dumps(objects, indent=2, ensure_ascii=False))
        return
    print_status(make_console(), summary, traffic, dt.datetime.now(dt.UTC), steering)


async def _fetch_status(
    calls: Calls, request: api.GetSummaryRequest
) -> tuple[api.GetSummaryResponse, traffic_pb2.GetTrafficResponse | None, RolloutStatus | None]:
    """Traffic may not be known yet where captures are, and the other way round."""
    summary = await calls.comparison.GetSummary(request, timeout=calls.timeout_s)
    question = traffic_pb2.GetTrafficRequest(service=summary.service)
    try:
        traffic = await calls.traffic.GetTraffic(question, timeout=calls.timeout_s)
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
    steering: RolloutStatus | None = None,
) -> None:
    out.print(style_text(summary.service or "(no service yet)", "bold"))
    if traffic is not None:
        out.print(format_traffic_line(traffic.traffic))
    for line in format_rollout_lines(steering, current_time):
        out.print(line)
    out.print()
    if summary.pairs:
        out.print(_build_outcomes_table(summary))
        duration_text = format_observed_period(summary, current_time)
        out.print(f"\n{format_quantity(summary.pairs, 'request')} {duration_text}")
    else:
        out.print(EMPTY_STATUS_TEXT)
    out.print(_build_completeness_table(summary, current_time))


def format_observed_period(summary: api.GetSummaryResponse, current_time: dt.datetime) -> str:
    duration_s = (summary.last_pair_time.ToDatetime() - summary.first_pair_time.ToDatetime()).total_seconds()
    return f"in {format_seconds(duration_s)}, the last {format_age(summary.last_pair_time, current_time)}"


def format_traffic_line(traffic: traffic_pb2.Traffic) -> str:
    rollback_text = " (rolled back)" if traffic.rolled_back else ""
    return (
        f"users: {format_percent(1 - traffic.new_share)} old, {format_percent(traffic.new_share)} new{rollback_text} · "
        f"mirrored: {format_percent(traffic.sample_safe)} of safe requests, {format_percent(traffic.sample_unsafe)} of others"
    )


def _build_outcomes_table(summary: api.GetSummaryResponse) -> Table:
    table = make_table("outcome", "requests", "share", "", numeric_columns=frozenset({"requests", "share"}))
    for row in summary.outcomes:
        name = outcome_name(row.outcome)
        note = ""
        if name == "mismatch" and summary.explained:
            note = f"{format_count(summary.explained)} of them noise or additive only"
        table.add_row(style_text(name), format_count(row.count), format_share_of(row.count, summary.pairs), note)
    return table


def _build_completeness_table(summary: api.GetSummaryResponse, current_time: dt.datetime) -> Table:
    table = make_table("", "", "")
    if summary.HasField("envoy_sampled"):
        table.add_row(
            "sampled by Envoy", format_count(summary.envoy_sampled), _format_unaccounted(summary, current_time)
        )
    else:
        table.add_row("sampled by Envoy", "?", "no Envoy's admin address is known (ABREAST_ENVOY_ADMIN)")
    if summary.HasField("pending"):
        table.add_row(
            "pending", format_count(summary.pending), "wait for a copy or a worker" if summary.pending else ""
        )
    else:
        table.add_row("pending", "?", "Redis can't be reached (abreast doctor)")
    drops = sum(drop.count for drop in summary.drops)
    by_reason = ", ".join(
        f"{to_printable(drop_count.stage)} {to_printable(drop_count.reason)} {format_count(drop_count.count)}"
        for drop_count in summary.drops
        if drop_count.count
    )
    table.add_row("dropped", style_text(format_count(drops), "fail" if drops else ""), by_reason)
    late_captures = summary.captures.late
    if late_captures:
        table.add_row("late", format_count(late_captures), "captures that came after their pair had been compared")
    if summary.not_sent:
        table.add_row("not sent", format_count(summary.not_sent), "copies that never left Envoy")
    for dead_letter in summary.dead_letters:
        table.add_row(
            "put apart",
            style_text(format_count(dead_letter.count), "fail"),
            to_printable(dead_letter.reason, MAX_REASON_CHARS),
        )
    if abs(clock_offset_s := summary.ledger_clock_ahead.ToTimedelta().total_seconds()) > MAX_LEDGER_CLOCK_OFFSET_S:
        text = f"Postgres's is {format_seconds(abs(clock_offset_s))} {'ahead of' if clock_offset_s > 0 else 'behind'} the sidecar's: synchronise them"
        table.add_row("clocks", style_text("!", "warn"), text)
    table.add_row("findings", format_count(summary.findings), "see: abreast findings" if summary.findings else "")
    return table


def _is_settled(summary: api.GetSummaryResponse, current_time: dt.datetime) -> bool:
    """Whether nothing has come for long, and nothing waits."""
    is_drained = summary.HasField("pending") and not summary.pending and summary.HasField("last_pair_time")
    return is_drained and (current_time - summary.last_pair_time.ToDatetime(dt.UTC)).total_seconds() > SETTLED_AFTER_S


def _format_unaccounted(summary: api.GetSummaryResponse, current_time: dt.datetime) -> str | Text:
    request_count = abs(summary.unaccounted)
    if not request_count:
        return "all of them are in the ledger"
    if summary.unaccounted > 0 and _is_settled(summary, current_time):
        return style_text(f"{format_count(request_count)} of them did not come, and nothing is on its way", "warn")
    if request_count <= max(IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE * summary.envoy_sampled):
        return f"{format_count(request_count)} {'on their way' if summary.unaccounted > 0 else 'more on their way from Envoy'}"
    if summary.unaccounted > 0:
        return style_text(f"{format_count(request_count)} of them are on their way, or lost", "warn")
    return style_text(
        f"{format_count(request_count)} fewer than in the ledger: an Envoy's count is missing or late", "warn"
    )
