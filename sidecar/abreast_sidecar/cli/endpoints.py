"""`abreast endpoint`: how fast both versions answer the same requests."""

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
    make_console,
    make_table,
    style_text,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window, print_json, split_page_sizes

INTERVAL_COLUMN = "from … to"


@click.command()
@click.argument("method")
@click.argument("route")
@service_option
@click.option("--confidence", type=SHARE_TYPE, help="How sure the intervals are; 95%.")
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
    """Times of one endpoint, pair by pair: both versions' percentiles, and how much slower new is.

    METHOD and ROUTE are as `abreast endpoints` prints them. The first pairs of each release stand apart.
    """
    request = latency_api.GetLatencyRequest(
        service=service,
        method=method,
        route=route,
        window=build_time_window(since, until),
        confidence=confidence or 0.0,
    )
    response = link.call(lambda calls: calls.latency.GetLatency(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        print_latency(make_console(), response)


def print_latency(out: Console, response: latency_api.GetLatencyResponse) -> None:
    newest = ", the newest" if response.truncated else ""
    out.print(f"{endpoint_name(response.endpoint)}: {format_quantity(response.warm.pairs, 'warm pair')}{newest}")
    if response.warm.pairs:
        out.print(build_percentiles_table(response.warm))
        out.print()
        out.print(build_latency_difference_table(response.warm))
        out.print(f"intervals hold at any number of looks, at {format_percent(response.confidence)}", style="dim")
        out.print(describe_compared_pairs(response.warm), style="dim")
    out.print(f"\nthe first {format_quantity(response.cold.pairs, 'pair')} of the releases, when caches were cold")
    if response.cold.pairs:
        out.print(build_percentiles_table(response.cold))


def describe_compared_pairs(latency: latency_api.PairedLatency) -> str:
    if latency.baseline_pairs:
        return f"new - old and new / old are of {format_quantity(latency.baseline_pairs, 'pair')} of which both answers are copies'"
    return "new - old and new / old are of all pairs: of two answers one is a copy's, which may tell by itself"


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


NUMERIC_COLUMNS = ("requests", "match", "findings", "old\np50", "new\np50", "old\np99", "new\np99")


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
    """The endpoints that were seen, with their outcomes and times."""
    request = api.ListEndpointsRequest(service=service, window=build_time_window(since, until))
    response = link.call(lambda calls: _fetch_endpoints(calls, request, limit))
    if as_json:
        print_json(response)
    elif response.endpoints:
        make_console().print(build_endpoints_table(response))
    else:
        click.echo("no endpoint was seen yet; if this stays so: abreast doctor")


async def _fetch_endpoints(calls: Calls, request: api.ListEndpointsRequest, limit: int) -> api.ListEndpointsResponse:
    response = api.ListEndpointsResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.comparison.ListEndpoints(request, timeout=calls.timeout_s)
        response.endpoints.extend(page.endpoints)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


def build_endpoints_table(response: api.ListEndpointsResponse) -> Table:
    services = {row.endpoint.service for row in response.endpoints}
    table = make_table("endpoint", *NUMERIC_COLUMNS, numeric_columns=frozenset(NUMERIC_COLUMNS))
    for row in response.endpoints:
        name = endpoint_name(row.endpoint)
        matches = sum(
            outcome_count.count for outcome_count in row.outcomes if outcome_count.outcome == common.OUTCOME_MATCH
        )
        table.add_row(
            f"{row.endpoint.service}: {name}" if len(services) > 1 else name,
            format_count(row.pairs),
            format_share_of(matches, row.pairs),
            style_text(format_count(row.findings), "fail" if row.findings else ""),
            *(_format_percentile(row, field) for field in ("old_p50", "new_p50", "old_p99", "new_p99")),
        )
    return table


def _format_percentile(row: api.EndpointSummary, field: str) -> str:
    return format_duration(getattr(row, field)) if row.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields
