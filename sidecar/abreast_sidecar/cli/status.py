"""`abreast status`, `abreast endpoints` and `abreast endpoint`: outcomes and response times."""

from __future__ import annotations

import datetime as dt
import json

import click
import grpc.aio
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import latency_pb2 as latency_api
from abreast.v1 import traffic_pb2
from abreast_sidecar.cli.options import (
    SHARE_TYPE,
    PrintingClient,
    api_options,
    limit_option,
    service_option,
    window_options,
)
from abreast_sidecar.cli.rollout import RolloutStatus, fetch_rollout_status, format_rollout_lines
from abreast_sidecar.cli.traffic import print_warnings
from abreast_sidecar.client.output import (
    Console,
    endpoint_name,
    enum_name,
    format_age,
    format_count,
    format_duration,
    format_percent,
    format_quantity,
    format_seconds,
    format_share_of,
    make_console,
    make_table,
    message_to_json,
    outcome_name,
    print_list,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls

EMPTY_STATUS_TEXT = (
    "no request has been compared yet; send requests through Envoy, and if this does not change, run: abreast doctor"
)
MAX_REASON_CHARS = 120
SETTLED_AFTER_S = 30.0  # without a new pair
MAX_LEDGER_CLOCK_OFFSET_S = 300.0
# Envoy's count and the ledger are read one after the other, so that some requests are always between the two.
IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE = 20, 0.01
ENDPOINT_NUMERIC_COLUMNS = ("requests", "match", "findings", "old\np50", "new\np50", "old\np99", "new\np99")
INTERVAL_COLUMN = "from … to"
REASON_TEXTS = {
    "grpc_unknown_method": "captures of calls that are compared by their bytes: the descriptors lack the methods",
    "grpc_unfit_message": "captures with a message that does not fit the descriptors, so its bytes are compared",
    "grpc_unknown_fields": "captures with fields that the descriptors lack, so these fields are not compared",
    "shed_queue": "copies that Envoy dropped, because copies queue: the effective sample is smaller",
    "shed_baseline": "baseline copies that Envoy dropped, because requests to old queue or fail",
    "shed_failing": "requests not sampled, because live requests of the other version fail",
    "shed_queueing": "requests not sampled, because live requests of the other version queue",
    "over_memory": "requests not sampled, because Envoy had no memory to hold them",
    "not_query": "requests without a copy, because a sampling rule takes only GraphQL queries",
    "logged_in": "requests not sampled, because their login belongs to the connection (NTLM, Negotiate)",
    "too_large": "requests without a copy, because their body exceeds ABREAST_MIRROR_BODY_LIMIT",
}


@click.command()
@service_option
@window_options
@api_options
def status_command(link: PrintingClient, service: str, window: common.TimeWindow | None) -> None:
    """Show the outcomes of the sampled requests, next to Envoy's own count."""
    request = api.GetSummaryRequest(service=service, window=window)
    summary, traffic, rollout = link.call(lambda calls: _fetch_status(calls, request))
    if link.as_json:
        messages = {"summary": summary, "traffic": traffic}
        objects = {name: message and json.loads(message_to_json(message)) for name, message in messages.items()}
        click.echo(json.dumps(objects, indent=2, ensure_ascii=False))
        return
    print_status(make_console(), summary, traffic, dt.datetime.now(dt.UTC), rollout)


async def _fetch_status(
    calls: Calls, request: api.GetSummaryRequest
) -> tuple[api.GetSummaryResponse, traffic_pb2.GetTrafficResponse | None, RolloutStatus | None]:
    """Fetch the summary, the traffic and the rollout. A service with captures may have no traffic settings yet."""
    summary = await calls.comparison.GetSummary(request)
    try:
        traffic = await calls.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=summary.service))
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
        print_warnings(out, traffic)
    for line in format_rollout_lines(rollout, current_time):
        out.print(line)
    out.print()
    if summary.pairs:
        out.print(_build_outcomes_table(summary))
        duration = summary.last_pair_time.ToDatetime() - summary.first_pair_time.ToDatetime()
        duration_text = format_seconds(duration.total_seconds())
        age = format_age(summary.last_pair_time, current_time)
        out.print(f"\n{format_quantity(summary.pairs, 'request')} in {duration_text}, the last {age}")
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
    table = make_table("outcome", "requests", "share", "", numeric_columns={"requests", "share"})
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
        unaccounted_text = _format_unaccounted(summary, current_time)
        table.add_row("sampled by Envoy", format_count(summary.envoy_sampled), unaccounted_text)
    else:
        table.add_row("sampled by Envoy", "?", "no admin address of an Envoy is set (ABREAST_ENVOY_ADMIN)")
    if summary.uncertain:
        text = "more may have been sampled, by the rate before: an Envoy ended between two readings of its count"
        table.add_row("uncertain", style_text(f"≤ {format_count(summary.uncertain)}", "warn"), text)
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
    for counted in (*summary.sheds, *summary.unconverted):
        name = "shed" if counted.stage == "envoy" else "gRPC"
        table.add_row(
            name, style_text(format_count(counted.count), "warn"), REASON_TEXTS.get(counted.reason, counted.reason)
        )
    if summary.load.unmatched * 2 > summary.load.pairs:
        table.add_row("load", style_text("!", "warn"), describe_load(summary.load))
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


def describe_load(load: api.LoadSummary) -> str:
    return (
        f"in {format_count(load.unmatched)} of the newest {format_count(load.pairs)} pairs one version was busier:"
        f" old had {load.old_in_flight:.0f} requests in flight in the median, new {load.new_in_flight:.0f}. Times don't count"
        " there; give the busier version more processes, or change the sampling"
    )


def _format_unaccounted(summary: api.GetSummaryResponse, current_time: dt.datetime) -> str | Text:
    requests = abs(summary.unaccounted)
    if not requests:
        return "all of them are in the ledger"
    number, is_missing = format_count(requests), summary.unaccounted > 0
    is_drained = summary.HasField("pending") and not summary.pending and summary.HasField("last_pair_time")
    last_pair_age = current_time - summary.last_pair_time.ToDatetime(dt.UTC)
    if is_missing and is_drained and last_pair_age.total_seconds() > SETTLED_AFTER_S:
        return style_text(f"{number} of them are missing, and none is in flight", "warn")
    if requests <= max(IN_FLIGHT_REQUESTS, IN_FLIGHT_SHARE * summary.envoy_sampled):
        return f"{number} in flight" if is_missing else f"{number} more in the ledger than counted so far"
    if is_missing:
        return style_text(f"{number} of them are in flight or lost", "warn")
    return style_text(f"{number} fewer than in the ledger: the count of an Envoy is missing or late", "warn")


@click.command()
@service_option
@window_options
@limit_option
@api_options
def endpoints_command(link: PrintingClient, service: str, window: common.TimeWindow | None, limit: int) -> None:
    """List the endpoints with their outcomes and response times.

    The source tells how the route of an endpoint was found. Response times are of the newest 2,000 pairs of an endpoint.
    """
    request = api.ListEndpointsRequest(service=service, window=window)
    link.show_rows(lambda calls: calls.comparison.ListEndpoints, request, limit, print_endpoints)


def print_endpoints(out: Console, response: api.ListEndpointsResponse) -> None:
    empty = "no endpoint has been compared yet; if this does not change, run: abreast doctor"
    print_list(out, response, response.endpoints, build_endpoints_table(response), empty=empty)


def build_endpoints_table(response: api.ListEndpointsResponse) -> Table:
    services = {row.endpoint.service for row in response.endpoints}
    table = make_table("endpoint", "source", *ENDPOINT_NUMERIC_COLUMNS, numeric_columns=ENDPOINT_NUMERIC_COLUMNS)
    for row in response.endpoints:
        name = endpoint_name(row.endpoint)
        matches = sum(outcome.count for outcome in row.outcomes if outcome.outcome == common.OUTCOME_MATCH)
        table.add_row(
            f"{row.endpoint.service}: {name}" if len(services) > 1 else name,
            enum_name(api.EndpointSource, row.source) if row.source else "-",
            format_count(row.pairs),
            format_share_of(matches, row.pairs),
            style_text(format_count(row.findings), "fail" if row.findings else ""),
            *(
                format_duration(getattr(row, field)) if row.HasField(field) else "-"
                for field in ("old_p50", "new_p50", "old_p99", "new_p99")
            ),
        )
    return table


@click.command()
@click.argument("method")
@click.argument("route")
@service_option
@click.option("--confidence", type=SHARE_TYPE, help="Confidence of the intervals.  [default: 95%]")
@window_options
@api_options
def endpoint_command(
    link: PrintingClient,
    method: str,
    route: str,
    service: str,
    confidence: float | None,
    window: common.TimeWindow | None,
) -> None:
    """Compare the response times of both versions for one endpoint, pair by pair.

    METHOD and ROUTE are as `abreast endpoints` prints them. The first pairs of each release are a separate group,
    because caches are cold.
    """
    request = latency_api.GetLatencyRequest(
        service=service, method=method, route=route, window=window, confidence=confidence or 0.0
    )
    link.show(lambda calls: calls.latency.GetLatency(request), print_latency)


def print_latency(out: Console, response: latency_api.GetLatencyResponse) -> None:
    newest = ", the newest" if response.truncated else ""
    out.print(f"{endpoint_name(response.endpoint)}: {format_quantity(response.warm.pairs, 'warm pair')}{newest}")
    if response.warm.pairs:
        out.print(build_percentiles_table(response.warm))
        out.print()
        out.print(build_latency_difference_table(response.warm))
        confidence = format_percent(response.confidence)
        out.print(f"confidence of the intervals: {confidence}, however often you look", style="dim")
        out.print(describe_compared_pairs(response.warm), style="dim")
    out.print(f"\nfirst {format_quantity(response.cold.pairs, 'pair')} of the releases, with cold caches")
    if response.cold.pairs:
        out.print(build_percentiles_table(response.cold))


def describe_compared_pairs(latency: latency_api.PairedLatency) -> str:
    text = _describe_roles(latency)
    if latency.unmatched_pairs:
        text += f"; {format_quantity(latency.unmatched_pairs, 'pair')} left out, because one version was busier"
    return text


def _describe_roles(latency: latency_api.PairedLatency) -> str:
    if latency.baseline_pairs:
        pairs = format_quantity(latency.baseline_pairs, "pair")
        return f"new - old and new / old compare two copies, in {pairs} with a baseline copy"
    return "new - old and new / old compare a live response with a copy, which may be slower for that reason alone"


def build_percentiles_table(latency: latency_api.PairedLatency) -> Table:
    table = make_table("requests", "old", INTERVAL_COLUMN, "new", INTERVAL_COLUMN, numeric_columns={"old", "new"})
    for percentile in latency.percentiles:
        limits = [
            format_duration(limit) if is_known else "?"
            for limit, is_known in (
                (percentile.old_low, percentile.HasField("old_low")),
                (percentile.old_high, percentile.HasField("old_high")),
                (percentile.new_low, percentile.HasField("new_low")),
                (percentile.new_high, percentile.HasField("new_high")),
            )
        ]
        old, new = format_duration(percentile.old), format_duration(percentile.new)
        band = f"{limits[0]} … {limits[1]}"
        table.add_row(f"{percentile.quantile:.0%} within", old, band, new, f"{limits[2]} … {limits[3]}")
    return table


def build_latency_difference_table(latency: latency_api.PairedLatency) -> Table:
    columns = ("pairs", "new - old", INTERVAL_COLUMN, "new / old", INTERVAL_COLUMN)
    table = make_table(*columns, numeric_columns={"new - old", "new / old"})
    for difference, ratio in zip(latency.differences, latency.ratios, strict=True):
        difference_bounds, ratio_bounds = (
            [to_text(getattr(interval, bound)) if interval.HasField(bound) else "?" for bound in ("low", "high")]
            for interval, to_text in ((difference, format_duration), (ratio, "{:.2f}".format))
        )
        table.add_row(
            f"{difference.quantile:.0%} at most",
            format_duration(difference.value),
            " … ".join(difference_bounds),
            f"{ratio.value:.2f}",
            " … ".join(ratio_bounds),
        )
    return table
