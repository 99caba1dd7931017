"""`abreast pair ID`: one request with both answers."""

from __future__ import annotations

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.answers import render_answers, summarise_answer
from abreast_sidecar.cli.connection import SidecarClient, connection_options, json_option, print_json
from abreast_sidecar.cli.curl import build_curl_line
from abreast_sidecar.cli.effects import build_effects_table
from abreast_sidecar.cli.humane import format_local_time, to_printable
from abreast_sidecar.cli.tables import (
    Console,
    build_differences_table,
    endpoint_name,
    make_console,
    outcome_name,
    style_text,
    version_name,
)
from abreast_sidecar.cli.timeline import build_timeline_table

PIPED_PAIR_COLUMNS = 120  # columns; both answers side by side


@click.command()
@click.argument("id")
@click.option("--full", is_flag=True, help="Equal lines too.")
@click.option(
    "--url", default="", help="For the curl line: where to send the request, such as http://127.0.0.1:8002."
)
@json_option
@connection_options
def pair_command(link: SidecarClient, id: str, full: bool, url: str, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """One request: both answers, what differs, and when.

    ID is the answer's header x-abreast-pair, or one that `abreast finding` shows.
    """
    request = api.GetPairRequest(id=id)
    response = link.call(lambda calls: calls.comparison.GetPair(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        out = make_console()
        print_pair(
            out if out.is_terminal else make_console(PIPED_PAIR_COLUMNS), response.pair, full=full, url=url
        )


def print_pair(out: Console, detail: api.PairDetail, *, full: bool = False, url: str = "") -> None:
    pair = detail.pair
    heading = style_text(f"{outcome_name(pair.outcome)}", outcome_name(pair.outcome))
    heading.append(f"  {endpoint_name(pair.endpoint)}")
    out.print(heading)
    out.print(_build_pair_grid(detail))
    if not detail.captures:
        out.print("\nthe answers are not kept: only some examples of each finding are (abreast findings)")
        return
    line, omissions = build_curl_line(detail, url)
    out.print(f"\n{to_printable(line)}", soft_wrap=True)
    for omission in omissions:
        out.print(style_text(f"without {omission}", "dim"))
    if detail.differences:
        out.print()
        out.print(build_differences_table(detail.differences))
    out.print()
    out.print(render_answers(detail.captures, out.width, full=full))
    out.print()
    effects_table = build_effects_table(detail.captures)
    if effects_table is not None:
        out.print(effects_table)
        out.print()
    out.print(build_timeline_table(detail.captures, out.width))


def _build_pair_grid(detail: api.PairDetail) -> Table:
    pair = detail.pair
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("pair", to_printable(pair.id))
    grid.add_row("service", to_printable(pair.endpoint.service))
    grid.add_row("request", to_printable(f"{pair.endpoint.method} {pair.request}"))
    grid.add_row("time", format_local_time(pair.time))
    grid.add_row("old", _format_side(summarise_answer(detail, common.VERSION_OLD), pair.old_release))
    grid.add_row("new", _format_side(summarise_answer(detail, common.VERSION_NEW), pair.new_release))
    grid.add_row(
        "user got", f"{version_name(pair.live)}'s answer" if pair.live else "unknown: that capture is missing"
    )
    if pair.finding_ids:
        grid.add_row("findings", ", ".join(map(str, pair.finding_ids)))
    if pair.explained:
        rules_text = ", ".join(
            f"{explanation.finding_id} by rule {explanation.rule_id}" for explanation in pair.explained
        )
        grid.add_row("explained", f"{rules_text} (abreast rules list)")
    if pair.drift_finding_ids:
        grid.add_row("drift", ", ".join(map(str, pair.drift_finding_ids)))
    if pair.reason:
        grid.add_row("reason", to_printable(pair.reason))
    return grid


def _format_side(answer_text: str, release: str) -> str:
    return answer_text + (f", release {to_printable(release)}" if release else "")
