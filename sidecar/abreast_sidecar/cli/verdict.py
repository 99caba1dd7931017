"""`abreast verdict`: may the new version take over?"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.connection import Link, connected, json_option, print_json, service_option, window
from abreast_sidecar.cli.exits import Exit
from abreast_sidecar.cli.humane import count, printable
from abreast_sidecar.cli.parameters import SHARE, since_option, until_option
from abreast_sidecar.cli.tables import Console, console, endpoint_name, styled, table

BUDGET = tuple(api.Budget.DESCRIPTOR.fields_by_name)
EXIT = {
    api.VERDICT_STATE_PASS: Exit.OK,
    api.VERDICT_STATE_FAIL: Exit.NO,
    api.VERDICT_STATE_INCONCLUSIVE: Exit.USAGE,
}


Command = Callable[..., Any]
_OPTIONS = (
    service_option,
    click.option(
        "--max-mismatch", type=SHARE, help="Share of pairs that may have unexplained mismatches; 0.1%."
    ),
    click.option("--max-error", type=SHARE, help="Share of pairs in which only new may fail; 0.1%."),
    click.option("--max-slower", type=SHARE, help="How much slower new may be in the median pair; 10%."),
    click.option(
        "--min-completeness",
        type=SHARE,
        help="Share of the sampled requests that must be accounted for; 99%.",
    ),
    click.option("--confidence", type=SHARE, help="How sure to be; 95%."),
    click.option("--release", default="", help="The release of new to judge.  [default: the newest]"),
    click.option("--all-releases", is_flag=True, help="Judge all releases of new together."),
    since_option,
    until_option,
)


def asking(command: Command) -> Command:
    """Options that say what is judged, handed to the command as one `request`."""

    @functools.wraps(command)
    def with_request(
        *args: Any,
        service: str,
        release: str,
        all_releases: bool,
        since: dt.datetime | None,
        until: dt.datetime | None,
        **rest: Any,
    ) -> Any:
        given = {name: rest.pop(name) for name in BUDGET}
        request = api.GetVerdictRequest(
            service=service,
            window=window(since, until),
            budget=api.Budget(**{name: value for name, value in given.items() if value is not None}),
            release=release,
            all_releases=all_releases,
        )
        return command(*args, request=request, **rest)

    for option in reversed(_OPTIONS):
        option(with_request)
    return with_request


@click.command()
@asking
@json_option
@connected
def command(link: Link, request: api.GetVerdictRequest, as_json: bool) -> int:
    """May the new version take over? Exits with 0 for PASS, 1 for FAIL, 2 for INCONCLUSIVE.

    Judged are the pairs of new's newest release.

    Ask as often as you like: the error probability is that of all looks together.
    """
    found = link.run(lambda calls: calls.comparison.GetVerdict(request, timeout=calls.timeout))
    if as_json:
        print_json(found)
    else:
        show(console(), found)
    return EXIT.get(found.state, Exit.USAGE)


def show(out: Console, found: api.GetVerdictResponse) -> None:
    head = state(found.state)
    head.append(f"  {printable(found.service)}", "bold")
    if found.release:
        head.append(f"  release {printable(found.release)}")
    if more := to_pass(found):
        head.append(f"  {more}")
    out.print(head)
    out.print(reasons(found))
    doubtful = [one for one in found.endpoints if one.state != api.VERDICT_STATE_PASS]
    if len(found.endpoints) > 1:
        passed = len(found.endpoints) - len(doubtful)
        out.print(f"\nby themselves, {passed} of {len(found.endpoints)} endpoints pass", style="dim")
    if doubtful and len(found.endpoints) > 1:
        out.print(endpoints(doubtful))


def to_pass(found: api.GetVerdictResponse) -> str:
    if found.state != api.VERDICT_STATE_INCONCLUSIVE:
        return ""
    if not found.HasField("more"):
        return "more of the same would not make it pass"
    return f"about {count(found.more)} more pairs to pass, at the present rates" if found.more else ""


def reasons(found: api.GetVerdictResponse) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    for one in found.reasons:
        where = f"{endpoint_name(one.endpoint)}: " if one.HasField("endpoint") else ""
        made.add_row(state(one.state), subject(one.subject), f"{where}{printable(one.text)}")
    return made


def endpoints(found: list[api.EndpointVerdict]) -> Table:
    made = table("endpoint", "verdict", "why")
    for one in found:
        why = next((reason for reason in one.reasons if reason.state == one.state), None)
        made.add_row(endpoint_name(one.endpoint), state(one.state), printable(why.text) if why else "")
    return made


def state(value: api.VerdictState.ValueType) -> Text:
    name = api.VerdictState.Name(value).removeprefix("VERDICT_STATE_")
    return styled(name, {"PASS": "ok", "FAIL": "fail"}.get(name, "warn"))


def subject(value: api.VerdictSubject.ValueType) -> str:
    return api.VerdictSubject.Name(value).removeprefix("VERDICT_SUBJECT_").lower()
