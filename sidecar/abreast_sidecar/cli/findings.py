"""`abreast finding ID`: one cause, with examples to try."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

import click
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1.rule_pb2 import ExplainedFinding, Rule
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    EnumParamType,
    actor_option,
    connection_options,
    default_actor,
    json_option,
    limit_option,
    service_option,
    since_option,
    until_option,
)
from abreast_sidecar.cli.pairs import build_curl_line, summarise_answer
from abreast_sidecar.cli.rules import format_rule_title
from abreast_sidecar.client.output import (
    Console,
    build_differences_table,
    endpoint_name,
    format_age,
    format_count,
    format_location,
    format_percent,
    format_quantity,
    format_share_of,
    impact_name,
    kind_name,
    make_console,
    make_table,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window, print_json, split_page_sizes
from abreast_sidecar.errors import ArgumentError

CAUSES_OUTSIDE_COUNT = {
    api.EXPLANATION_CAUSE_RULE,
    api.EXPLANATION_CAUSE_DRIFT,
}  # of pairs that the finding does not count


def format_cause(explanation: api.FindingExplanation) -> str:
    return api.ExplanationCause.Name(explanation.cause).removeprefix("EXPLANATION_CAUSE_").lower()


def format_explanation(explanation: api.FindingExplanation) -> str:
    """`rule 7 (cents), shop: rounding`."""
    if explanation.cause == api.EXPLANATION_CAUSE_RULE:
        return to_printable(
            f"rule {explanation.rule_id} ({explanation.rule_name}), {explanation.owner}: {explanation.reason}"
        )
    return to_printable(explanation.reason)


def count_pairs_outside(finding: api.Finding) -> int:
    """Pairs that show it and are not among its count."""
    return sum(explanation.pairs for explanation in finding.explanations if explanation.cause in CAUSES_OUTSIDE_COUNT)


def build_explanations_table(findings: Iterable[api.Finding]) -> Table:
    """One row for each that explains."""
    table = make_table(
        "id", "as", "requests", "endpoint", "where", "why", numeric_columns=frozenset({"id", "requests"})
    )
    for finding in findings:
        for explanation in finding.explanations:
            table.add_row(
                str(finding.id),
                style_text(format_cause(explanation), "dim"),
                format_count(explanation.pairs),
                endpoint_name(finding.endpoint),
                format_location(finding.part, finding.path),
                format_explanation(explanation),
            )
    return table


STATUS_HELP = {
    "confirmed": "Say that it is a regression: it counts, whatever the counts say of noise.",
    "expected": "Say that the change is meant: it counts as explained.",
    "fixed": "Say that it is fixed: it reopens by itself when a later release shows it.",
    "open": "Take back what was said.",
}


def status_name(value: api.FindingStatus.ValueType) -> str:
    return api.FindingStatus.Name(value).removeprefix("FINDING_STATUS_").lower()


def parse_status_options(
    word: str | None, reason: str, actor: str | None, release: str
) -> api.SetFindingStatusRequest | None:
    """What the options say; None where they only ask. Raise ArgumentError for those that don't fit together."""
    if word is None:
        if reason or actor or release:
            raise ArgumentError("--reason, --actor and --release go with one of --" + ", --".join(STATUS_HELP))
        return None
    if not reason.strip():
        raise ArgumentError(f"--{word} needs a --reason, which is kept with the finding")
    status = api.FindingStatus.Value(f"FINDING_STATUS_{word.upper()}")
    return api.SetFindingStatusRequest(status=status, reason=reason, actor=default_actor(actor), release=release)


def set_status(link: SidecarClient, request: api.SetFindingStatusRequest) -> None:
    async def send_request(calls: Calls) -> api.SetFindingStatusResponse:
        return await calls.comparison.SetFindingStatus(request, timeout=calls.timeout_s)

    link.call(send_request)


def format_status(finding: api.Finding, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> str:
    """The status, and who said so last."""
    name = status_name(finding.status)
    if not events:
        return name
    last_event = events[0]
    release = f" in release {to_printable(last_event.release)}" if last_event.release else ""
    return f"{name}{release}: {to_printable(last_event.reason)} ({to_printable(last_event.actor)}, {format_age(last_event.time, current_time)})"


def print_status_history(out: Console, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> None:
    """What was said before; nothing where that is little."""
    if len(events) < 2:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    for event in events[1:]:
        release = f" in {to_printable(event.release)}" if event.release else ""
        grid.add_row(
            format_age(event.time, current_time),
            to_printable(event.actor),
            f"{status_name(event.after)}{release}",
            to_printable(event.reason),
        )
    out.print(style_text("\nsaid before", "bold"))
    out.print(grid)


def status_options(command: click.decorators.FC) -> click.decorators.FC:
    for word, line in reversed(STATUS_HELP.items()):
        command = click.option(f"--{word}", "word", flag_value=word, help=line)(command)
    return command


MIN_UNSTACKED_COLUMNS = 110  # columns of a terminal in which endpoint and place share a column


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, exactly, such as /products/{id}.")
@click.option("--part", "parts", multiple=True, type=EnumParamType("PART"), help="Only this part; may be repeated.")
@click.option("--kind", "kinds", multiple=True, type=EnumParamType("KIND"), help="Only this kind; may be repeated.")
@click.option(
    "--impact", "impacts", multiple=True, type=EnumParamType("IMPACT"), help="Only this impact; may be repeated."
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


async def _fetch_findings(calls: Calls, request: api.ListFindingsRequest, limit: int) -> api.ListFindingsResponse:
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
        "id", "impact", "requests", *location_columns, "difference", numeric_columns=frozenset({"id", "requests"})
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
    if finding.explanations and (not finding.count or format_cause(finding.explanations[0]) not in {"rule", "drift"}):
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
    return f"{format_difference(finding)} ({'; '.join(remarks)})" if any(remarks) else format_difference(finding)


def format_difference(finding: api.Finding) -> str:
    """The summary, which says more than the kind where there is one."""
    return to_printable(finding.summary, 120) or kind_name(finding.kind)


def _format_finding_requests(finding: api.Finding) -> str:
    share = format_share_of(finding.count, finding.compared)
    return format_count(finding.count) + (f" {f'({share})':>8}" if share else " " * 9)


@click.command()
@click.argument("id", type=click.IntRange(min=1))
@click.option("--examples", type=click.IntRange(min=0), default=3, show_default=True, help="At most so many examples.")
@click.option("--url", default="", help="For the curl lines: where to send the request, such as http://127.0.0.1:8002.")
@status_options
@click.option("--release", default="", help="With --fixed: the release of new that has the fix.  [default: the next]")
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
    out: Console, response: api.GetFindingResponse, current_time: dt.datetime, *, examples: int = 3, url: str = ""
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
                "drift", f"{format_quantity(explanation.pairs, 'pair')} more: {format_explanation(explanation)}"
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
        f"{format_difference(finding)} ({kind_name(finding.kind)})" if finding.summary else kind_name(finding.kind),
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
    rule_finding = next((entry for entry in rule.findings if entry.finding_id == finding_id), ExplainedFinding())
    unknown_text = (
        f"; {format_count(rule_finding.undetermined_pairs)} were judged before it"
        if rule_finding.undetermined_pairs
        else ""
    )
    return f"{format_rule_title(rule)}: {to_printable(rule.reason)}, {format_quantity(rule_finding.pairs, 'pair')}{unknown_text}"


def format_feature(request_feature: api.RequestFeature) -> str:
    coverage_text, precision_text = (
        format_share_of(round(1000 * share), 1000) for share in (request_feature.coverage, request_feature.precision)
    )
    return f"{to_printable(request_feature.text)}: {coverage_text} of the requests that show it, and {precision_text} of those with it show it"


def format_noise_state(finding: api.Finding) -> str:
    answer = {api.FINDING_STATE_REAL: "no", api.FINDING_STATE_NOISE: "yes"}.get(finding.state, "not decided yet")
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
                f"  and {other_count} other {'difference' if other_count == 1 else 'differences'} in this pair", "dim"
            )
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
