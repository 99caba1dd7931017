"""`abreast endpoints`: where findings are, and how fast both versions answer."""

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
from abreast_sidecar.cli.humane import format_count, format_duration, format_share_of
from abreast_sidecar.cli.parameters import limit_option, since_option, until_option
from abreast_sidecar.cli.tables import endpoint_name, make_console, make_table, style_text

NUMERIC_COLUMNS = ("requests", "match", "findings", "old\np50", "new\np50", "old\np99", "new\np99")


@click.command()
@service_option
@since_option
@until_option
@limit_option
@json_option
@connection_options
def endpoints_command(
    link: SidecarClient,
    service: str,
    since: dt.datetime | None,
    until: dt.datetime | None,
    limit: int,
    as_json: bool,
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


async def _fetch_endpoints(
    calls: Calls, request: api.ListEndpointsRequest, limit: int
) -> api.ListEndpointsResponse:
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
            outcome_count.count
            for outcome_count in row.outcomes
            if outcome_count.outcome == common.OUTCOME_MATCH
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
