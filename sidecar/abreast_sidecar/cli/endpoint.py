"""`abreast endpoint`: how fast both versions answer the same requests."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import latency_pb2 as api
from abreast_sidecar.cli.connection import Link, connected, json_option, print_json, service_option, window
from abreast_sidecar.cli.humane import counted, duration, percent
from abreast_sidecar.cli.parameters import SHARE, since_option, until_option
from abreast_sidecar.cli.tables import Console, console, endpoint_name, table

BETWEEN = "from … to"


@click.command()
@click.argument("method")
@click.argument("route")
@service_option
@click.option("--confidence", type=SHARE, help="How sure the intervals are; 95%.")
@since_option
@until_option
@json_option
@connected
def command(
    link: Link,
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
        service=service, method=method, route=route, window=window(since, until), confidence=confidence or 0.0
    )
    found = link.run(lambda calls: calls.latency.GetLatency(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        show(console(), found)


def show(out: Console, found: api.GetLatencyResponse) -> None:
    newest = ", the newest" if found.cut else ""
    out.print(f"{endpoint_name(found.endpoint)}: {counted(found.warm.pairs, 'warm pair')}{newest}")
    if found.warm.pairs:
        out.print(sides(found.warm))
        out.print()
        out.print(spread(found.warm))
        out.print(f"intervals hold at any number of looks, at {percent(found.confidence)}", style="dim")
        out.print(copies(found.warm), style="dim")
    out.print(f"\nthe first {counted(found.cold.pairs, 'pair')} of the releases, when caches were cold")
    if found.cold.pairs:
        out.print(sides(found.cold))


def copies(found: api.PairedLatency) -> str:
    if found.copies:
        return f"new - old and new / old are of {counted(found.copies, 'pair')} of which both answers are copies'"
    return (
        "new - old and new / old are of all pairs: of two answers one is a copy's, which may tell by itself"
    )


def sides(found: api.PairedLatency) -> Table:
    made = table("requests", "old", "new", right=frozenset({"old", "new"}))
    for one in found.percentiles:
        made.add_row(f"{one.share:.0%} within", duration(one.old), duration(one.new))
    return made


def spread(found: api.PairedLatency) -> Table:
    made = table(
        "pairs", "new - old", BETWEEN, "new / old", BETWEEN, right=frozenset({"new - old", "new / old"})
    )
    for later, ratio in zip(found.differences, found.ratios, strict=True):
        low, high = later.HasField("low"), later.HasField("high")
        made.add_row(
            f"{later.share:.0%} at most",
            duration(later.value),
            f"{duration(later.low) if low else '?'} … {duration(later.high) if high else '?'}",
            f"{ratio.value:.2f}",
            f"{f'{ratio.low:.2f}' if ratio.HasField('low') else '?'} … "
            f"{f'{ratio.high:.2f}' if ratio.HasField('high') else '?'}",
        )
    return made
