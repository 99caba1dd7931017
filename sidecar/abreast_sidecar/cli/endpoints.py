"""`abreast endpoints`: where findings are, and how fast both versions answer."""

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
from abreast_sidecar.cli.humane import count, duration, part_of
from abreast_sidecar.cli.parameters import limit_option, since_option, until_option
from abreast_sidecar.cli.tables import console, endpoint_name, styled, table

NUMBERS = ("requests", "match", "findings", "old\np50", "new\np50", "old\np99", "new\np99")


@click.command()
@service_option
@since_option
@until_option
@limit_option
@json_option
@connected
def command(
    link: Link,
    service: str,
    since: dt.datetime | None,
    until: dt.datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """The endpoints that were seen, with their outcomes and times."""
    request = api.ListEndpointsRequest(service=service, window=window(since, until))
    found = link.run(lambda calls: _ask(calls, request, limit))
    if as_json:
        print_json(found)
    elif found.endpoints:
        console().print(rows(found))
    else:
        click.echo("no endpoint was seen yet; if this stays so: abreast doctor")


async def _ask(calls: Calls, request: api.ListEndpointsRequest, limit: int) -> api.ListEndpointsResponse:
    found = api.ListEndpointsResponse()
    for request.page_size in page_sizes(limit):
        page = await calls.comparison.ListEndpoints(request, timeout=calls.timeout)
        found.endpoints.extend(page.endpoints)
        request.page_token = found.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return found


def rows(found: api.ListEndpointsResponse) -> Table:
    services = {row.endpoint.service for row in found.endpoints}
    made = table("endpoint", *NUMBERS, right=frozenset(NUMBERS))
    for row in found.endpoints:
        name = endpoint_name(row.endpoint)
        matches = sum(part.count for part in row.outcomes if part.outcome == common.OUTCOME_MATCH)
        made.add_row(
            f"{row.endpoint.service}: {name}" if len(services) > 1 else name,
            count(row.pairs),
            part_of(matches, row.pairs),
            styled(count(row.findings), "fail" if row.findings else ""),
            *(_time(row, field) for field in ("old_p50", "new_p50", "old_p99", "new_p99")),
        )
    return made


def _time(row: api.EndpointSummary, field: str) -> str:
    return duration(getattr(row, field)) if row.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields
