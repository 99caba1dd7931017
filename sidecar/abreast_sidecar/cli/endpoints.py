"""`abreast endpoints` and `abreast endpoint`: outcomes and response times."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import latency_pb2 as latency_api
from abreast_sidecar.cli.options import (
    SHARE_TYPE,
    connection_options,
    json_option,
    limit_option,
    service_option,
    since_option,
    until_option,
)
from abreast_sidecar.client.output import (
    Console,
    endpoint_name,
    format_count,
    format_duration,
    format_percent,
    format_quantity,
    format_share_of,
    make_table,
    print_list,
    print_response,
    style_text,
)
from abreast_sidecar.client.sidecar_client import SidecarClient, build_time_window

NUMERIC_COLUMNS = ("requests", "match", "findings", "old\np50", "new\np50", "old\np99", "new\np99")
INTERVAL_COLUMN = "from … to"


@click.command()
@service_option
@since_option
@until_option
@limit_option
@json_option
@connection_options
def endpoints_command(
    link: SidecarClient, service: str, since: dt.datetime | None, until: dt.datetime | None, limit: int, as_json: bool
) -> None:
    """List the endpoints with their outcomes and response times.

    Response times are of the newest 2,000 pairs of an endpoint.
    """
    request = api.ListEndpointsRequest(service=service, window=build_time_window(since, until))
    response = link.list_rows(
        lambda calls: calls.comparison.ListEndpoints(request, timeout=calls.timeout_s), request, limit
    )
    print_response(response, print_endpoints, as_json=as_json)


def print_endpoints(out: Console, response: api.ListEndpointsResponse) -> None:
    empty = "no endpoint has been compared yet; if this does not change, run: abreast doctor"
    print_list(out, response, response.endpoints, build_endpoints_table(response), empty=empty)


def build_endpoints_table(response: api.ListEndpointsResponse) -> Table:
    services = {row.endpoint.service for row in response.endpoints}
    table = make_table("endpoint", *NUMERIC_COLUMNS, numeric_columns=frozenset(NUMERIC_COLUMNS))
    for row in response.endpoints:
        name = endpoint_name(row.endpoint)
        matches = sum(outcome.count for outcome in row.outcomes if outcome.outcome == common.OUTCOME_MATCH)
        table.add_row(
            f"{row.endpoint.service}: {name}" if len(services) > 1 else name,
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
@since_option
@until_option
@json_option
@connection_options
def endpoint_command(
    link: SidecarClient,
    method: str,
    route: str,
    service: str,
    confidence: float | None,
    since: dt.datetime | None,
    until: dt.datetime | None,
    as_json: bool,
) -> None:
    """Compare the response times of both versions for one endpoint, pair by pair.

    METHOD and ROUTE are as `abreast endpoints` prints them. The first pairs of each release are a separate group,
    because caches are cold.
    """
    request = latency_api.GetLatencyRequest(
        service=service,
        method=method,
        route=route,
        window=build_time_window(since, until),
        confidence=confidence or 0.0,
    )
    response = link.call(lambda calls: calls.latency.GetLatency(request, timeout=calls.timeout_s))
    print_response(response, print_latency, as_json=as_json)


def print_latency(out: Console, response: latency_api.GetLatencyResponse) -> None:
    newest = ", the newest" if response.truncated else ""
    out.print(f"{endpoint_name(response.endpoint)}: {format_quantity(response.warm.pairs, 'warm pair')}{newest}")
    if response.warm.pairs:
        out.print(build_percentiles_table(response.warm))
        out.print()
        out.print(build_latency_difference_table(response.warm))
        out.print(
            f"confidence of the intervals: {format_percent(response.confidence)}, however often you look", style="dim"
        )
        out.print(describe_compared_pairs(response.warm), style="dim")
    out.print(f"\nfirst {format_quantity(response.cold.pairs, 'pair')} of the releases, with cold caches")
    if response.cold.pairs:
        out.print(build_percentiles_table(response.cold))


def describe_compared_pairs(latency: latency_api.PairedLatency) -> str:
    if latency.baseline_pairs:
        pairs = format_quantity(latency.baseline_pairs, "pair")
        return f"new - old and new / old compare two copies, in {pairs} with a baseline copy"
    return "new - old and new / old compare a live response with a copy, which may be slower for that reason alone"


def build_percentiles_table(latency: latency_api.PairedLatency) -> Table:
    table = make_table("requests", "old", "new", numeric_columns=frozenset({"old", "new"}))
    for percentile in latency.percentiles:
        table.add_row(
            f"{percentile.quantile:.0%} within", format_duration(percentile.old), format_duration(percentile.new)
        )
    return table


def build_latency_difference_table(latency: latency_api.PairedLatency) -> Table:
    table = make_table(
        "pairs",
        "new - old",
        INTERVAL_COLUMN,
        "new / old",
        INTERVAL_COLUMN,
        numeric_columns=frozenset({"new - old", "new / old"}),
    )
    for difference, ratio in zip(latency.differences, latency.ratios, strict=True):
        has_low, has_high = difference.HasField("low"), difference.HasField("high")
        table.add_row(
            f"{difference.quantile:.0%} at most",
            format_duration(difference.value),
            f"{format_duration(difference.low) if has_low else '?'} … {format_duration(difference.high) if has_high else '?'}",
            f"{ratio.value:.2f}",
            f"{f'{ratio.low:.2f}' if ratio.HasField('low') else '?'} … "
            f"{f'{ratio.high:.2f}' if ratio.HasField('high') else '?'}",
        )
    return table
