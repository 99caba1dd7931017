"""`abreast endpoint`: how fast both versions answer the same requests."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import latency_pb2 as api
from abreast_sidecar.cli.connection import (
    SidecarClient,
    build_time_window,
    connection_options,
    json_option,
    print_json,
    service_option,
)
from abreast_sidecar.cli.humane import format_duration, format_percent, format_quantity
from abreast_sidecar.cli.parameters import SHARE_TYPE, since_option, until_option
from abreast_sidecar.cli.tables import Console, endpoint_name, make_console, make_table

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
    request = api.GetLatencyRequest(
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


def print_latency(out: Console, response: api.GetLatencyResponse) -> None:
    newest = ", the newest" if response.cut else ""
    out.print(
        f"{endpoint_name(response.endpoint)}: {format_quantity(response.warm.pairs, 'warm pair')}{newest}"
    )
    if response.warm.pairs:
        out.print(build_percentiles_table(response.warm))
        out.print()
        out.print(build_latency_difference_table(response.warm))
        out.print(
            f"intervals hold at any number of looks, at {format_percent(response.confidence)}", style="dim"
        )
        out.print(describe_compared_pairs(response.warm), style="dim")
    out.print(
        f"\nthe first {format_quantity(response.cold.pairs, 'pair')} of the releases, when caches were cold"
    )
    if response.cold.pairs:
        out.print(build_percentiles_table(response.cold))


def describe_compared_pairs(latency: api.PairedLatency) -> str:
    if latency.copies:
        return f"new - old and new / old are of {format_quantity(latency.copies, 'pair')} of which both answers are copies'"
    return (
        "new - old and new / old are of all pairs: of two answers one is a copy's, which may tell by itself"
    )


def build_percentiles_table(latency: api.PairedLatency) -> Table:
    table = make_table("requests", "old", "new", numeric_columns=frozenset({"old", "new"}))
    for percentile in latency.percentiles:
        table.add_row(
            f"{percentile.share:.0%} within", format_duration(percentile.old), format_duration(percentile.new)
        )
    return table


def build_latency_difference_table(latency: api.PairedLatency) -> Table:
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
            f"{difference.share:.0%} at most",
            format_duration(difference.value),
            f"{format_duration(difference.low) if has_low else '?'} … {format_duration(difference.high) if has_high else '?'}",
            f"{ratio.value:.2f}",
            f"{f'{ratio.low:.2f}' if ratio.HasField('low') else '?'} … "
            f"{f'{ratio.high:.2f}' if ratio.HasField('high') else '?'}",
        )
    return table
