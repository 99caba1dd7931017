"""`abreast finding ID`: one cause, with examples to try."""

from __future__ import annotations

import datetime as dt

import click
from rich.table import Table

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1.rule_pb2 import ExplainedFinding, Rule
from abreast_sidecar.cli.answers import summarise_answer
from abreast_sidecar.cli.connection import SidecarClient, connection_options, json_option, print_json
from abreast_sidecar.cli.curl import build_curl_line
from abreast_sidecar.cli.explanations import format_explanation
from abreast_sidecar.cli.findings import format_difference
from abreast_sidecar.cli.humane import (
    format_age,
    format_count,
    format_percent,
    format_quantity,
    format_share_of,
    to_printable,
)
from abreast_sidecar.cli.rule_tables import format_rule_title
from abreast_sidecar.cli.shift import actor_option
from abreast_sidecar.cli.statuses import (
    format_status,
    parse_status_options,
    print_status_history,
    set_status,
    status_options,
)
from abreast_sidecar.cli.tables import (
    Console,
    build_differences_table,
    endpoint_name,
    format_location,
    impact_name,
    kind_name,
    make_console,
    style_text,
    version_name,
)


@click.command()
@click.argument("id", type=click.IntRange(min=1))
@click.option(
    "--examples", type=click.IntRange(min=0), default=3, show_default=True, help="At most so many examples."
)
@click.option(
    "--url", default="", help="For the curl lines: where to send the request, such as http://127.0.0.1:8002."
)
@status_options
@click.option(
    "--release", default="", help="With --fixed: the release of new that has the fix.  [default: the next]"
)
@click.option("--reason", default="", help="Why, for the record.")
@actor_option
@json_option
@connection_options
def finding_command(
    link: SidecarClient,
    id: int,  # noqa: A002  # the argument's name
    examples: int,
    url: str,
    word: str | None,
    release: str,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """One finding, with examples to try; or say what is known of it.

    The curl lines ask "$URL": set it to old's or new's address, or name it with --url.
    """
    if (status_request := parse_status_options(word, reason, actor, release)) is not None:
        status_request.id = id
        set_status(link, status_request)
    request = api.GetFindingRequest(id=id)
    response = link.call(lambda calls: calls.comparison.GetFinding(request, timeout=calls.timeout_s))
    if as_json:
        print_json(response)
    else:
        print_finding(make_console(), response, dt.datetime.now(dt.UTC), examples=examples, url=url)


def print_finding(
    out: Console,
    response: api.GetFindingResponse,
    current_time: dt.datetime,
    *,
    examples: int = 3,
    url: str = "",
) -> None:
    finding = response.finding
    heading = style_text(f"#{finding.id}  ", "bold")
    heading.append(style_text(impact_name(finding.impact)))
    heading.append(f"  {endpoint_name(finding.endpoint)}  {format_location(finding.part, finding.path)}")
    out.print(heading)
    grid = build_finding_grid(finding, current_time)
    grid.add_row("status", format_status(finding, response.events, current_time))
    if response.HasField("feature"):
        grid.add_row("only with", format_feature(response.feature))
    for rule in response.explained_by:
        grid.add_row("explained by", format_explaining_rule(rule, finding.id))
    for explanation in finding.explanations:
        if explanation.cause == api.EXPLANATION_CAUSE_DRIFT:
            grid.add_row(
                "drift",
                f"{format_quantity(explanation.pairs, 'pair')} more: {format_explanation(explanation)}",
            )
    out.print(grid)
    visible_examples = response.examples[:examples]
    for number, example in enumerate(visible_examples, 1):
        out.print()
        out.print(style_text(f"example {number} of {len(response.examples)}", "bold"))
        print_example(out, example, finding, url)
    if not response.examples:
        out.print("\nno example is kept of it any more")
    print_status_history(out, response.events, current_time)


def build_finding_grid(finding: api.Finding, current_time: dt.datetime) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("service", to_printable(finding.endpoint.service))
    grid.add_row(
        "difference",
        f"{format_difference(finding)} ({kind_name(finding.kind)})"
        if finding.summary
        else kind_name(finding.kind),
    )
    share = format_rate(finding)
    compared_text = f" of {format_count(finding.compared)} compared ({share})" if share else ""
    grid.add_row("requests", f"{format_count(finding.count)}{compared_text}")
    grid.add_row(
        "seen",
        f"first {format_age(finding.first_seen, current_time)}, last {format_age(finding.last_seen, current_time)}",
    )
    if labels := format_releases(finding):
        grid.add_row("releases", labels)
    if finding.count or finding.baseline_count:
        grid.add_row("noise", format_noise_state(finding))
    return grid


def format_rate(finding: api.Finding) -> str:
    """`6.9%, surely 5.1% to 9.2%`: the interval holds however often one looks."""
    share = format_share_of(finding.count, finding.compared)
    if not share or not finding.HasField("rate"):
        return share
    return f"{share}; with 95% confidence {format_percent(finding.rate.low)} to {format_percent(finding.rate.high)}"


def format_releases(finding: api.Finding) -> str:
    """In which it was seen, the latest first."""
    sides = (("new", finding.new_releases), ("old", finding.old_releases))
    labels_by_side = [(side, [to_printable(label) for label in labels if label]) for side, labels in sides]
    return "; ".join(f"{side} {', '.join(labels)}" for side, labels in labels_by_side if labels)


def format_explaining_rule(rule: Rule, finding_id: int) -> str:
    """`rule 7 (cents): rounding, 1,204 pairs`."""
    rule_finding = next(
        (entry for entry in rule.findings if entry.finding_id == finding_id), ExplainedFinding()
    )
    unknown_text = (
        f"; {format_count(rule_finding.unknown)} were judged before it" if rule_finding.unknown else ""
    )
    return f"{format_rule_title(rule)}: {to_printable(rule.reason)}, {format_quantity(rule_finding.pairs, 'pair')}{unknown_text}"


def format_feature(request_feature: api.RequestFeature) -> str:
    coverage_text, precision_text = (
        format_share_of(round(1000 * share), 1000)
        for share in (request_feature.coverage, request_feature.precision)
    )
    return f"{to_printable(request_feature.text)}: {coverage_text} of the requests that show it, and {precision_text} of those with it show it"


def format_noise_state(finding: api.Finding) -> str:
    answer = {api.FINDING_STATE_REAL: "no", api.FINDING_STATE_NOISE: "yes"}.get(
        finding.state, "not decided yet"
    )
    return f"{answer}: {to_printable(finding.reason)}" if finding.reason else answer


def print_example(out: Console, example: api.PairDetail, finding: api.Finding, url: str) -> None:
    pair = example.pair
    line, omissions = build_curl_line(example, url)
    out.print(f"  {to_printable(line)}", soft_wrap=True)  # one line, to be copied
    for omission in omissions:
        out.print(style_text(f"  without {omission}", "dim"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(
        "  answers",
        f"old {summarise_answer(example, common.VERSION_OLD)}, new {summarise_answer(example, common.VERSION_NEW)}; the user got {version_name(pair.live)}'s",
    )
    grid.add_row("  all of it", f"abreast pair {to_printable(pair.id)}")
    out.print(grid)
    finding_differences = [
        difference
        for difference in example.differences
        if (difference.part, difference.path, difference.kind) == (finding.part, finding.path, finding.kind)
    ]
    if finding_differences:
        out.print(build_differences_table(finding_differences))
    if other_count := len(example.differences) - len(finding_differences):
        out.print(
            style_text(
                f"  and {other_count} other {'difference' if other_count == 1 else 'differences'} in this pair",
                "dim",
            )
        )
