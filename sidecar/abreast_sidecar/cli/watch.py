"""`abreast watch`: findings as they appear and grow."""

from __future__ import annotations

import datetime as dt

import click

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import (
    Calls,
    SidecarClient,
    connection_options,
    json_option,
    print_json,
    service_option,
)
from abreast_sidecar.cli.findings import format_difference
from abreast_sidecar.cli.humane import format_count
from abreast_sidecar.cli.tables import (
    Console,
    endpoint_name,
    format_location,
    impact_name,
    make_console,
    style_text,
)


@click.command()
@service_option
@click.option("--noise", is_flag=True, help="Also what is noise: what old differs from itself in.")
@json_option
@connection_options
def watch_command(link: SidecarClient, service: str, noise: bool, as_json: bool) -> None:
    """Findings as they appear and grow, until Ctrl-C: first the present ones, then changes.

    With --json each is one line (NDJSON).
    """
    request = api.WatchFindingsRequest(service=service, include_noise=noise)
    link.call(lambda calls: _print_finding_updates(calls, request, as_json=as_json))


async def _print_finding_updates(calls: Calls, request: api.WatchFindingsRequest, *, as_json: bool) -> None:
    out = make_console()
    async for message in calls.comparison.WatchFindings(request):
        if as_json:
            print_json(message, indent=None)
        else:
            print_finding_line(out, message.finding)


def print_finding_line(out: Console, finding: api.Finding) -> None:
    """One line, whatever the terminal's width: it may wrap, but nothing is cut off."""
    text = style_text(dt.datetime.now().strftime("%H:%M:%S"), "dim")  # noqa: DTZ005  # a clock on the wall
    text.append(f"  #{finding.id}  ")
    text.append(style_text("noise" if finding.noise else impact_name(finding.impact)))
    text.append(
        f"  {format_count(finding.count)} of {format_count(finding.compared)}  {endpoint_name(finding.endpoint)}  "
    )
    text.append(f"{format_location(finding.part, finding.path)}  {format_difference(finding)}")
    out.print(text, soft_wrap=True)
