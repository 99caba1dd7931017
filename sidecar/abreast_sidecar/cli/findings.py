"""`abreast findings`: what differs, one cause a row."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table
from rich.text import Text

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
from abreast_sidecar.cli.exits import ExitCode
from abreast_sidecar.cli.explanations import (
    build_explanations_table,
    count_pairs_outside,
    format_cause,
    format_explanation,
)
from abreast_sidecar.cli.humane import format_count, format_quantity, format_share_of, to_printable
from abreast_sidecar.cli.parameters import EnumParamType, limit_option, since_option, until_option
from abreast_sidecar.cli.statuses import status_name
from abreast_sidecar.cli.tables import (
    Console,
    endpoint_name,
    format_location,
    impact_name,
    kind_name,
    make_console,
    make_table,
    style_text,
)

MIN_UNSTACKED_COLUMNS = 110  # columns of a terminal in which endpoint and place share a column


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option(
    "--part", "parts", multiple=True, type=EnumParamType("PART"), help="Only this part; may be repeated."
)
@click.option(
    "--kind", "kinds", multiple=True, type=EnumParamType("KIND"), help="Only this kind; may be repeated."
)
@click.option(
    "--impact",
    "impacts",
    multiple=True,
    type=EnumParamType("IMPACT"),
    help="Only this impact; may be repeated.",
)
@click.option("--noise", is_flag=True, help="Also what is noise: what old differs from itself in.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also noise, what was said to be expected or fixed, and what rules or drift explain.",
)
@click.option("--explained", is_flag=True, help="Only what was explained, with the reason.")
@click.option("--release", default="", help="Only pairs with this release of new.")
@since_option
@until_option
@limit_option
@click.option("--exit-code", is_flag=True, help="Exit with 1 where something is listed.")
@json_option
@connection_options
def findings_command(
    link: SidecarClient,
    service: str,
    method: str,
    route: str,
    parts: tuple[common.Part.ValueType, ...],
    kinds: tuple[common.Kind.ValueType, ...],
    impacts: tuple[common.Impact.ValueType, ...],
    noise: bool,
    everything: bool,
    explained: bool,
    release: str,
    since: dt.datetime | None,
    until: dt.datetime | None,
    limit: int,
    exit_code: bool,
    as_json: bool,
) -> int:
    """What differs, one cause a row: breaking ones first, then the most frequent.

    Look at one with `abreast finding ID`.
    """
    request = api.ListFindingsRequest(
        service=service,
        method=method.upper(),
        route=route,
        include_noise=noise or everything,
        include_settled=everything,
        only_explained=explained,
        release=release,
        window=build_time_window(since, until),
    )
    request.parts.extend(parts)
    request.kinds.extend(kinds)
    request.impacts.extend(impacts)
    response = link.call(lambda calls: _fetch_findings(calls, request, limit))
    if as_json:
        print_json(response)
    else:
        print_findings(make_console(), response, only_explained=explained)
    return ExitCode.CHECK_FAILED if exit_code and response.findings else ExitCode.OK


async def _fetch_findings(
    calls: Calls, request: api.ListFindingsRequest, limit: int
) -> api.ListFindingsResponse:
    response = api.ListFindingsResponse()
    for request.page_size in split_page_sizes(limit):
        page = await calls.comparison.ListFindings(request, timeout=calls.timeout_s)
        response.findings.extend(page.findings)
        request.page_token = response.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return response


def print_findings(out: Console, response: api.ListFindingsResponse, *, only_explained: bool = False) -> None:
    if not response.findings:
        empty_text = "nothing was explained" if only_explained else "nothing differs in what was compared"
        out.print(f"{empty_text} (abreast status says how much that is)")
        return
    out.print(
        build_explanations_table(response.findings)
        if only_explained
        else build_findings_table(response, is_stacked=out.width < MIN_UNSTACKED_COLUMNS)
    )
    more_text = "; there are more: raise --limit, or filter" if response.next_page_token else ""
    if out.is_terminal:
        first_id = response.findings[0].id
        out.print(
            f"\n{format_quantity(len(response.findings), 'finding')}{more_text}. Look at one: abreast finding {first_id}",
            style="dim",
        )


def build_findings_table(response: api.ListFindingsResponse, *, is_stacked: bool) -> Table:
    services = {finding.endpoint.service for finding in response.findings}
    location_columns = ("where",) if is_stacked else ("endpoint", "where")
    table = make_table(
        "id",
        "impact",
        "requests",
        *location_columns,
        "difference",
        numeric_columns=frozenset({"id", "requests"}),
    )
    for finding in response.findings:
        endpoint = endpoint_name(finding.endpoint)
        if len(services) > 1:
            endpoint = f"{to_printable(finding.endpoint.service)}: {endpoint}"
        location = format_location(finding.part, finding.path)
        table.add_row(
            str(finding.id),
            format_finding_label(finding),
            _format_finding_requests(finding),
            *((f"{endpoint}\n  {location}",) if is_stacked else (endpoint, location)),
            format_remarked_difference(finding),
        )
    return table


def format_finding_label(finding: api.Finding) -> Text:
    """Why it is of no concern, or what it means to a client."""
    if finding.explanations and (
        not finding.count or format_cause(finding.explanations[0]) not in {"rule", "drift"}
    ):
        return style_text(format_cause(finding.explanations[0]), "dim")
    return style_text(impact_name(finding.impact))


def format_remarked_difference(finding: api.Finding) -> str:
    """The difference, with what was said of it, or what explains it."""
    remarks = []
    if (status := status_name(finding.status)) in {"confirmed", "reopened"}:
        remarks.append(status)
    elif finding.state == api.FINDING_STATE_UNDECIDED and finding.count:
        remarks.append("not yet told from noise")
    if format_finding_label(finding).plain == impact_name(finding.impact):
        if explained_pairs := count_pairs_outside(finding):
            remarks.append(f"{format_count(explained_pairs)} more explained")
    else:
        remarks += map(format_explanation, finding.explanations)
    return (
        f"{format_difference(finding)} ({'; '.join(remarks)})" if any(remarks) else format_difference(finding)
    )


def format_difference(finding: api.Finding) -> str:
    """The summary, which says more than the kind where there is one."""
    return to_printable(finding.summary, 120) or kind_name(finding.kind)


def _format_finding_requests(finding: api.Finding) -> str:
    share = format_share_of(finding.count, finding.compared)
    return format_count(finding.count) + (f" {f'({share})':>8}" if share else " " * 9)
