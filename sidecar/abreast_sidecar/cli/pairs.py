"""`abreast pairs`: compared requests, newest first."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    Link,
    connected,
    json_option,
    page_sizes,
    print_json,
    service_option,
    window,
)
from abreast_sidecar.cli.humane import clock, counted, printable
from abreast_sidecar.cli.parameters import Names, limit_option, since_option, until_option
from abreast_sidecar.cli.tables import Console, console, outcome_name, styled, table, version_name


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option(
    "--outcome", "outcomes", multiple=True, type=Names("OUTCOME"), help="Only this outcome; may be repeated."
)
@click.option("--finding", type=click.IntRange(min=1), help="Only pairs that show this finding.")
@since_option
@until_option
@limit_option
@json_option
@connected
def command(
    link: Link,
    service: str,
    method: str,
    route: str,
    outcomes: tuple[common.Outcome.ValueType, ...],
    finding: int | None,
    since: dt.datetime | None,
    until: dt.datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """Compared requests, newest first.

    Look at one with `abreast pair ID`.
    """
    request = api.ListPairsRequest(
        service=service,
        method=method.upper(),
        route=route,
        finding_id=finding or 0,
        window=window(since, until),
    )
    request.outcomes.extend(outcomes)
    found = link.run(lambda calls: _ask(calls, request, limit))
    if as_json:
        print_json(found)
    else:
        show(console(), found)


async def _ask(calls: Calls, request: api.ListPairsRequest, limit: int) -> api.ListPairsResponse:
    found = api.ListPairsResponse()
    for request.page_size in page_sizes(limit):
        page = await calls.comparison.ListPairs(request, timeout=calls.timeout)
        found.pairs.extend(page.pairs)
        request.page_token = found.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return found


def show(out: Console, found: api.ListPairsResponse) -> None:
    if not found.pairs:
        out.print("no such pair is kept (abreast status says how requests ended)")
        return
    out.print(rows(found))
    if out.is_terminal:
        more = "; there are more: raise --limit, or filter" if found.next_page_token else ""
        first = found.pairs[0].id
        out.print(
            f"\n{counted(len(found.pairs), 'pair')}{more}. Look at one: abreast pair {first}", style="dim"
        )


def rows(found: api.ListPairsResponse) -> Table:
    made = table("time", "outcome", "request", "old", "new", "user got", "findings", "pair")
    for pair in found.pairs:
        outcome = outcome_name(pair.outcome)
        made.add_row(
            clock(pair.time),
            styled(outcome, outcome),
            printable(f"{pair.endpoint.method} {pair.request}", 120),
            str(pair.old_status or "-"),
            str(pair.new_status or "-"),
            version_name(pair.live) if pair.live else "-",
            ", ".join(map(str, pair.finding_ids)) or "-",
            printable(pair.id),
        )
    return made
