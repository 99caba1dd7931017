"""`abreast pairs`: compared requests, newest first."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    build_time_window,
    connection_options,
    json_option,
    print_json,
    service_option,
    split_page_sizes,
)
from abreast_sidecar.cli.humane import format_local_time, format_quantity, to_printable
from abreast_sidecar.cli.parameters import EnumParamType, limit_option, since_option, until_option
from abreast_sidecar.cli.tables import (
    Console,
    make_console,
    make_table,
    outcome_name,
    style_text,
    version_name,
)


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option(
    "--outcome",
    "outcomes",
    multiple=True,
    type=EnumParamType("OUTCOME"),
    help="Only this outcome; may be repeated.",
)
@click.option("--finding", type=click.IntRange(min=1), help="Only pairs that show this finding.")
@since_option
@until_option
@limit_option
@json_option
@connection_options
def pairs_command(
    link: SidecarClient,
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
        window=build_time_window(since, until),
    )
    request.outcomes.extend(outcomes)
    response = link.call(lambda calls: _fetch_pairs(calls, request, limit))
    if as_json:
        print_json(response)
    else:
        print_pairs(make_console(), response)


async def _fetch_pairs(calls: Calls, request: api.ListPairsRequest, limit: int) -> api.ListPairsResponse:
    response = api.ListPairsResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.comparison.ListPairs(request, timeout=calls.timeout_s)
        response.pairs.extend(page.pairs)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


def print_pairs(out: Console, response: api.ListPairsResponse) -> None:
    if not response.pairs:
        out.print("no such pair is kept (abreast status says how requests ended)")
        return
    out.print(build_pairs_table(response))
    if out.is_terminal:
        more_text = "; there are more: raise --limit, or filter" if response.next_page_token else ""
        first_id = response.pairs[0].id
        out.print(
            f"\n{format_quantity(len(response.pairs), 'pair')}{more_text}. Look at one: abreast pair {first_id}",
            style="dim",
        )


def build_pairs_table(response: api.ListPairsResponse) -> Table:
    table = make_table("time", "outcome", "request", "old", "new", "user got", "findings", "pair")
    for pair in response.pairs:
        outcome = outcome_name(pair.outcome)
        table.add_row(
            format_local_time(pair.time),
            style_text(outcome, outcome),
            to_printable(f"{pair.endpoint.method} {pair.request}", 120),
            str(pair.old_status or "-"),
            str(pair.new_status or "-"),
            version_name(pair.live) if pair.live else "-",
            ", ".join(map(str, pair.finding_ids)) or "-",
            to_printable(pair.id),
        )
    return table
