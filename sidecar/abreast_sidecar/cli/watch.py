"""`abreast watch`: findings as they appear and grow."""

from __future__ import annotations

import datetime as dt

import click

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import Calls, Link, connected, json_option, print_json, service_option
from abreast_sidecar.cli.findings import difference
from abreast_sidecar.cli.humane import count
from abreast_sidecar.cli.tables import Console, console, endpoint_name, impact_name, styled, where


@click.command()
@service_option
@click.option("--noise", is_flag=True, help="Also what is noise: what old differs from itself in.")
@json_option
@connected
def command(link: Link, service: str, noise: bool, as_json: bool) -> None:
    """Findings as they appear and grow, until Ctrl-C: first the present ones, then changes.

    With --json each is one line (NDJSON).
    """
    request = api.WatchFindingsRequest(service=service, include_noise=noise)
    link.run(lambda calls: _follow(calls, request, as_json=as_json))


async def _follow(calls: Calls, request: api.WatchFindingsRequest, *, as_json: bool) -> None:
    out = console()
    async for message in calls.comparison.WatchFindings(request):
        if as_json:
            print_json(message, indent=None)
        else:
            line(out, message.finding)


def line(out: Console, finding: api.Finding) -> None:
    """One line, whatever the terminal's width: it may wrap, but nothing is cut off."""
    text = styled(dt.datetime.now().strftime("%H:%M:%S"), "dim")  # noqa: DTZ005  # a clock on the wall
    text.append(f"  #{finding.id}  ")
    text.append(styled("noise" if finding.noise else impact_name(finding.impact)))
    text.append(f"  {count(finding.count)} of {count(finding.compared)}  {endpoint_name(finding.endpoint)}  ")
    text.append(f"{where(finding.part, finding.path)}  {difference(finding)}")
    out.print(text, soft_wrap=True)
