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
    Link,
    connected,
    json_option,
    page_sizes,
    print_json,
    service_option,
    window,
)
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.explanations import beside, cause, listing, why
from abreast_sidecar.cli.humane import count, counted, part_of, printable
from abreast_sidecar.cli.parameters import Names, limit_option, since_option, until_option
from abreast_sidecar.cli.statuses import status_name
from abreast_sidecar.cli.tables import (
    Console,
    console,
    endpoint_name,
    impact_name,
    kind_name,
    styled,
    table,
    where,
)

STACKED_BELOW = 110  # columns of a terminal in which endpoint and place share a column


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option("--part", "parts", multiple=True, type=Names("PART"), help="Only this part; may be repeated.")
@click.option("--kind", "kinds", multiple=True, type=Names("KIND"), help="Only this kind; may be repeated.")
@click.option(
    "--impact", "impacts", multiple=True, type=Names("IMPACT"), help="Only this impact; may be repeated."
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
@connected
def command(
    link: Link,
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
        window=window(since, until),
    )
    request.parts.extend(parts)
    request.kinds.extend(kinds)
    request.impacts.extend(impacts)
    found = link.run(lambda calls: _ask(calls, request, limit))
    if as_json:
        print_json(found)
    else:
        show(console(), found, explained=explained)
    return Exit.NO if exit_code and found.findings else Exit.OK


async def _ask(calls: Calls, request: api.ListFindingsRequest, limit: int) -> api.ListFindingsResponse:
    found = api.ListFindingsResponse()
    for request.page_size in page_sizes(limit):
        page = await calls.comparison.ListFindings(request, timeout=calls.timeout)
        found.findings.extend(page.findings)
        request.page_token = found.next_page_token = page.next_page_token
        if not page.next_page_token:
            break
    return found


def show(out: Console, found: api.ListFindingsResponse, *, explained: bool = False) -> None:
    if not found.findings:
        nothing = "nothing was explained" if explained else "nothing differs in what was compared"
        out.print(f"{nothing} (abreast status says how much that is)")
        return
    out.print(listing(found.findings) if explained else rows(found, stacked=out.width < STACKED_BELOW))
    more = "; there are more: raise --limit, or filter" if found.next_page_token else ""
    if out.is_terminal:
        first = found.findings[0].id
        out.print(
            f"\n{counted(len(found.findings), 'finding')}{more}. Look at one: abreast finding {first}",
            style="dim",
        )


def rows(found: api.ListFindingsResponse, *, stacked: bool) -> Table:
    services = {finding.endpoint.service for finding in found.findings}
    places = ("where",) if stacked else ("endpoint", "where")
    made = table("id", "impact", "requests", *places, "difference", right=frozenset({"id", "requests"}))
    for finding in found.findings:
        endpoint = endpoint_name(finding.endpoint)
        if len(services) > 1:
            endpoint = f"{printable(finding.endpoint.service)}: {endpoint}"
        place = where(finding.part, finding.path)
        made.add_row(
            str(finding.id),
            label(finding),
            _requests(finding),
            *((f"{endpoint}\n  {place}",) if stacked else (endpoint, place)),
            told(finding),
        )
    return made


def label(finding: api.Finding) -> Text:
    """Why it is of no concern, or what it means to a client."""
    if finding.explanations and (
        not finding.count or cause(finding.explanations[0]) not in {"rule", "drift"}
    ):
        return styled(cause(finding.explanations[0]), "dim")
    return styled(impact_name(finding.impact))


def told(finding: api.Finding) -> str:
    """The difference, with what was said of it, or what explains it."""
    remarks = []
    if (status := status_name(finding.status)) in {"confirmed", "reopened"}:
        remarks.append(status)
    elif finding.state == api.FINDING_STATE_UNDECIDED and finding.count:
        remarks.append("not yet told from noise")
    if label(finding).plain == impact_name(finding.impact):
        if explained := beside(finding):
            remarks.append(f"{count(explained)} more explained")
    else:
        remarks += map(why, finding.explanations)
    return f"{difference(finding)} ({'; '.join(remarks)})" if any(remarks) else difference(finding)


def difference(finding: api.Finding) -> str:
    """The summary, which says more than the kind where there is one."""
    return printable(finding.summary, 120) or kind_name(finding.kind)


def _requests(finding: api.Finding) -> str:
    share = part_of(finding.count, finding.compared)
    return count(finding.count) + (f" {f'({share})':>8}" if share else " " * 9)
