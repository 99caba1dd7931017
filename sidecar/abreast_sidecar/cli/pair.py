"""`abreast pair ID`: one request with both answers."""

from __future__ import annotations

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.answers import answers, ended
from abreast_sidecar.cli.connection import Link, connected, json_option, print_json
from abreast_sidecar.cli.curl import curl
from abreast_sidecar.cli.effects import effects
from abreast_sidecar.cli.humane import clock, printable
from abreast_sidecar.cli.tables import (
    Console,
    console,
    differences,
    endpoint_name,
    outcome_name,
    styled,
    version_name,
)
from abreast_sidecar.cli.timeline import timeline

PIPED = 120  # columns; both answers side by side


@click.command()
@click.argument("id")
@click.option("--full", is_flag=True, help="Equal lines too.")
@click.option(
    "--url", default="", help="For the curl line: where to send the request, such as http://127.0.0.1:8002."
)
@json_option
@connected
def command(link: Link, id: str, full: bool, url: str, as_json: bool) -> None:  # noqa: A002  # the argument's name
    """One request: both answers, what differs, and when.

    ID is the answer's header x-abreast-pair, or one that `abreast finding` shows.
    """
    request = api.GetPairRequest(id=id)
    found = link.run(lambda calls: calls.comparison.GetPair(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        out = console()
        show(out if out.is_terminal else console(PIPED), found.pair, full=full, url=url)


def show(out: Console, detail: api.PairDetail, *, full: bool = False, url: str = "") -> None:
    pair = detail.pair
    head = styled(f"{outcome_name(pair.outcome)}", outcome_name(pair.outcome))
    head.append(f"  {endpoint_name(pair.endpoint)}")
    out.print(head)
    out.print(_facts(detail))
    if not detail.captures:
        out.print("\nthe answers are not kept: only some examples of each finding are (abreast findings)")
        return
    line, lacks = curl(detail, url)
    out.print(f"\n{printable(line)}", soft_wrap=True)
    for lack in lacks:
        out.print(styled(f"without {lack}", "dim"))
    if detail.differences:
        out.print()
        out.print(differences(detail.differences))
    out.print()
    out.print(answers(detail.captures, out.width, full=full))
    out.print()
    done = effects(detail.captures)
    if done is not None:
        out.print(done)
        out.print()
    out.print(timeline(detail.captures, out.width))


def _facts(detail: api.PairDetail) -> Table:
    pair = detail.pair
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_row("pair", printable(pair.id))
    made.add_row("service", printable(pair.endpoint.service))
    made.add_row("request", printable(f"{pair.endpoint.method} {pair.request}"))
    made.add_row("time", clock(pair.time))
    made.add_row("old", _side(ended(detail, common.VERSION_OLD), pair.old_release))
    made.add_row("new", _side(ended(detail, common.VERSION_NEW), pair.new_release))
    made.add_row(
        "user got", f"{version_name(pair.live)}'s answer" if pair.live else "unknown: that capture is missing"
    )
    if pair.finding_ids:
        made.add_row("findings", ", ".join(map(str, pair.finding_ids)))
    if pair.explained:
        said = ", ".join(f"{one.finding_id} by rule {one.rule_id}" for one in pair.explained)
        made.add_row("explained", f"{said} (abreast rules list)")
    if pair.drift_finding_ids:
        made.add_row("drift", ", ".join(map(str, pair.drift_finding_ids)))
    if pair.reason:
        made.add_row("reason", printable(pair.reason))
    return made


def _side(how: str, release: str) -> str:
    return how + (f", release {printable(release)}" if release else "")
