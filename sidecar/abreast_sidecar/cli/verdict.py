"""`abreast verdict`: whether the new version can take over."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    SHARE_TYPE,
    connection_options,
    json_option,
    service_option,
    since_option,
    until_option,
)
from abreast_sidecar.client.output import (
    Console,
    endpoint_name,
    format_count,
    make_table,
    print_response,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import SidecarClient, build_time_window

BUDGET_FIELDS = tuple(api.Budget.DESCRIPTOR.fields_by_name)
EXIT_BY_VERDICT = {
    api.VERDICT_STATE_PASS: ExitCode.OK,
    api.VERDICT_STATE_FAIL: ExitCode.CHECK_FAILED,
    api.VERDICT_STATE_INCONCLUSIVE: ExitCode.USAGE,
}
VERDICT_OPTIONS = (
    service_option,
    click.option(
        "--max-mismatch", type=SHARE_TYPE, help="Allowed share of pairs with unexplained mismatches.  [default: 0.1%]"
    ),
    click.option(
        "--max-error", type=SHARE_TYPE, help="Allowed share of pairs in which only new fails.  [default: 0.1%]"
    ),
    click.option("--max-slower", type=SHARE_TYPE, help="Allowed slowdown of new in the median pair.  [default: 10%]"),
    click.option(
        "--min-completeness",
        type=SHARE_TYPE,
        help="Required share of sampled requests that are accounted for.  [default: 99%]",
    ),
    click.option("--confidence", type=SHARE_TYPE, help="Confidence of the verdict.  [default: 95%]"),
    click.option("--release", default="", help="Release of new to evaluate.  [default: the newest]"),
    click.option("--all-releases", is_flag=True, help="Evaluate all releases of new together."),
    since_option,
    until_option,
)


def verdict_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a verdict, and pass them to the command as one `request`."""

    @functools.wraps(command)
    def with_request(
        *args: Any,
        service: str,
        release: str,
        all_releases: bool,
        since: dt.datetime | None,
        until: dt.datetime | None,
        **options: Any,
    ) -> Any:
        budget = {name: options.pop(name) for name in BUDGET_FIELDS}
        request = api.GetVerdictRequest(
            service=service,
            window=build_time_window(since, until),
            budget=api.Budget(**{name: value for name, value in budget.items() if value is not None}),
            release=release,
            all_releases=all_releases,
        )
        return command(*args, request=request, **options)

    for option in reversed(VERDICT_OPTIONS):
        option(with_request)
    return with_request


@click.command()
@verdict_options
@json_option
@connection_options
def verdict_command(link: SidecarClient, request: api.GetVerdictRequest, as_json: bool) -> int:
    """Decide whether the new version can take over.

    Exits with 0 for PASS, 1 for FAIL and 2 for INCONCLUSIVE. By default, the verdict covers the pairs of new's newest
    release. The confidence holds however often you look.
    """
    response = link.call(lambda calls: calls.comparison.GetVerdict(request, timeout=calls.timeout_s))
    print_response(response, print_verdict, as_json=as_json)
    return EXIT_BY_VERDICT.get(response.state, ExitCode.USAGE)


def print_verdict(out: Console, response: api.GetVerdictResponse) -> None:
    heading = style_verdict_state(response.state)
    heading.append(f"  {to_printable(response.service)}", "bold")
    if response.release:
        heading.append(f"  release {to_printable(response.release)}")
    if more_pairs_text := format_pairs_to_pass(response):
        heading.append(f"  {more_pairs_text}")
    out.print(heading)
    out.print(build_reasons_grid(response))
    undecided_endpoints = [endpoint for endpoint in response.endpoints if endpoint.state != api.VERDICT_STATE_PASS]
    if len(response.endpoints) > 1:
        pass_count = len(response.endpoints) - len(undecided_endpoints)
        out.print(f"\nevaluated separately, {pass_count} of {len(response.endpoints)} endpoints pass", style="dim")
    if undecided_endpoints and len(response.endpoints) > 1:
        out.print(build_verdict_endpoints_table(undecided_endpoints))


def format_pairs_to_pass(response: api.GetVerdictResponse) -> str:
    if response.state != api.VERDICT_STATE_INCONCLUSIVE:
        return ""
    if not response.HasField("pairs_needed"):
        return "more pairs at these rates can't make it pass"
    return (
        f"about {format_count(response.pairs_needed)} more pairs to pass, at these rates"
        if response.pairs_needed
        else ""
    )


def build_reasons_grid(response: api.GetVerdictResponse) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for reason in response.reasons:
        endpoint_text = f"{endpoint_name(reason.endpoint)}: " if reason.HasField("endpoint") else ""
        grid.add_row(
            style_verdict_state(reason.state),
            format_verdict_subject(reason.subject),
            f"{endpoint_text}{to_printable(reason.text)}",
        )
    return grid


def build_verdict_endpoints_table(verdicts: list[api.EndpointVerdict]) -> Table:
    table = make_table("endpoint", "verdict", "reason")
    for verdict in verdicts:
        first_reason = next((reason for reason in verdict.reasons if reason.state == verdict.state), None)
        table.add_row(
            endpoint_name(verdict.endpoint),
            style_verdict_state(verdict.state),
            to_printable(first_reason.text) if first_reason else "",
        )
    return table


def style_verdict_state(value: api.VerdictState.ValueType) -> Text:
    name = api.VerdictState.Name(value).removeprefix("VERDICT_STATE_")
    return style_text(name, {"PASS": "ok", "FAIL": "fail"}.get(name, "warn"))


def format_verdict_subject(value: api.VerdictSubject.ValueType) -> str:
    return api.VerdictSubject.Name(value).removeprefix("VERDICT_SUBJECT_").lower()
