"""`abreast findings`, `abreast finding` and `abreast watch`: differences, one cause each."""

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
    print_json,
    print_list,
    print_response,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, build_time_window
from abreast_sidecar.errors import ArgumentError

MIN_UNSTACKED_COLUMNS = 110  # a narrower terminal shows the endpoint and the location in one column
UNCOUNTED_CAUSES = {api.EXPLANATION_CAUSE_RULE, api.EXPLANATION_CAUSE_DRIFT}  # a finding's count omits their pairs
STATUS_HELP = {
    "confirmed": "Mark as a regression. It counts even if it looks like noise.",
    "expected": "Mark as an intended change. It counts as explained.",
    "fixed": "Mark as fixed. It reopens if a later release shows it.",
    "open": "Remove the status.",
}


noise_option = click.option(
    "--noise", is_flag=True, help="Include noise: differences that old also shows against itself."
)


@click.command()
@service_option
@click.option("--method", default="", help="Only this method, such as GET.")
@click.option("--route", default="", help="Only this route template, such as /products/{id}.")
@click.option("--part", "parts", multiple=True, type=EnumParamType("PART"), help="Only this part (repeatable).")
@click.option("--kind", "kinds", multiple=True, type=EnumParamType("KIND"), help="Only this kind (repeatable).")
@click.option("--impact", "impacts", multiple=True, type=EnumParamType("IMPACT"), help="Only this impact (repeatable).")
@noise_option
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Include noise, findings marked expected or fixed, and findings that rules or drift explain.",
)
@click.option("--explained", is_flag=True, help="Only explained differences, one row per reason.")
@click.option("--release", default="", help="Count only pairs with this release of new.")
@since_option
@until_option
@limit_option
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the list is not empty.")
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
    """List the findings, one cause per row: breaking ones first, then the most frequent.

    For one finding with examples, use `abreast finding ID`.
    """
    request = api.ListFindingsRequest(
        service=service,
        method=method.upper(),
        route=route,
        parts=parts,
        kinds=kinds,
        impacts=impacts,
        include_noise=noise or everything,
        include_settled=everything,
        only_explained=explained,
        release=release,
        window=build_time_window(since, until),
    )
    response = link.list_rows(
        lambda calls: calls.comparison.ListFindings(request, timeout=calls.timeout_s), request, limit
    )
    print_response(
        response, lambda out, message: print_findings(out, message, only_explained=explained), as_json=as_json
    )
    return ExitCode.CHECK_FAILED if exit_code and response.findings else ExitCode.OK


def print_findings(out: Console, response: api.ListFindingsResponse, *, only_explained: bool = False) -> None:
    if only_explained:
        empty, table = "no difference is explained", build_explanations_table(response.findings)
    else:
        empty = "no differences"
        table = build_findings_table(response, is_stacked=out.width < MIN_UNSTACKED_COLUMNS)
    empty += " in the compared requests (for their number: abreast status)"
    print_list(out, response, response.findings, table, empty=empty, item="finding")


def build_findings_table(response: api.ListFindingsResponse, *, is_stacked: bool) -> Table:
    services = {finding.endpoint.service for finding in response.findings}
    location_columns = ("location",) if is_stacked else ("endpoint", "location")
    table = make_table(
        "id", "impact", "requests", *location_columns, "difference", numeric_columns=frozenset({"id", "requests"})
    )
    for finding in response.findings:
        endpoint = endpoint_name(finding.endpoint)
        if len(services) > 1:
            endpoint = f"{to_printable(finding.endpoint.service)}: {endpoint}"
        location = format_location(finding.part, finding.path)
        share = format_share_of(finding.count, finding.compared)
        table.add_row(
            str(finding.id),
            format_finding_label(finding),
            format_count(finding.count) + (f" {f'({share})':>8}" if share else " " * 9),
            *((f"{endpoint}\n  {location}",) if is_stacked else (endpoint, location)),
            format_remarked_difference(finding),
        )
    return table


def build_explanations_table(findings: Iterable[api.Finding]) -> Table:
    """Build a table with one row per explanation."""
    table = make_table(
        "id", "cause", "requests", "endpoint", "location", "reason", numeric_columns=frozenset({"id", "requests"})
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


def format_cause(explanation: api.FindingExplanation) -> str:
    return api.ExplanationCause.Name(explanation.cause).removeprefix("EXPLANATION_CAUSE_").lower()


def format_explanation(explanation: api.FindingExplanation) -> str:
    """Return `rule 7 (cents), shop: rounding` for a rule, or else the reason."""
    if explanation.cause == api.EXPLANATION_CAUSE_RULE:
        return to_printable(
            f"rule {explanation.rule_id} ({explanation.rule_name}), {explanation.owner}: {explanation.reason}"
        )
    return to_printable(explanation.reason)


def count_explained_pairs(finding: api.Finding) -> int:
    """Count the pairs that show the finding but are explained by a rule or drift."""
    return sum(explanation.pairs for explanation in finding.explanations if explanation.cause in UNCOUNTED_CAUSES)


def format_finding_label(finding: api.Finding) -> Text:
    """Return the cause that explains the finding, or else its impact on clients."""
    if finding.explanations and (not finding.count or format_cause(finding.explanations[0]) not in {"rule", "drift"}):
        return style_text(format_cause(finding.explanations[0]), "dim")
    return style_text(impact_name(finding.impact))


def format_remarked_difference(finding: api.Finding) -> str:
    """Describe the difference, with its status and explanations in parentheses."""
    remarks = []
    if (status := status_name(finding.status)) in {"confirmed", "reopened"}:
        remarks.append(status)
    elif finding.state == api.FINDING_STATE_UNDECIDED and finding.count:
        remarks.append("may be noise")
    if format_finding_label(finding).plain == impact_name(finding.impact):
        if explained_pairs := count_explained_pairs(finding):
            remarks.append(f"{format_count(explained_pairs)} more explained")
    else:
        remarks += map(format_explanation, finding.explanations)
    return f"{format_difference(finding)} ({'; '.join(remarks)})" if any(remarks) else format_difference(finding)


def format_difference(finding: api.Finding) -> str:
    """Return the summary, or the kind if there is no summary."""
    return to_printable(finding.summary, 120) or kind_name(finding.kind)


def status_options(command: click.decorators.FC) -> click.decorators.FC:
    for status, line in reversed(STATUS_HELP.items()):
        command = click.option(f"--{status}", "status", flag_value=status, help=line)(command)
    return command


@click.command()
@click.argument("id", type=click.IntRange(min=1))
@click.option(
    "--examples", type=click.IntRange(min=0), default=3, show_default=True, help="Maximum number of examples."
)
@click.option("--url", default="", help="Address for the curl lines, such as http://127.0.0.1:8002.")
@status_options
@click.option(
    "--release", default="", help="With --fixed: the release of new that contains the fix.  [default: the next]"
)
@click.option("--reason", default="", help="Reason for the audit log; required with a status.")
@actor_option
@json_option
@connection_options
def finding_command(
    link: SidecarClient,
    id: int,  # noqa: A002  # the argument's name
    examples: int,
    url: str,
    status: str | None,
    release: str,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """Show one finding with examples, or set its status.

    The curl lines send the request to "$URL". Set this variable to the address of old or new, or use --url.
    """
    status_request = parse_status_options(id, status, reason, actor, release)

    async def set_status_and_fetch(calls: Calls) -> api.GetFindingResponse:
        if status_request is not None:
            await calls.comparison.SetFindingStatus(status_request, timeout=calls.timeout_s)
        return await calls.comparison.GetFinding(api.GetFindingRequest(id=id), timeout=calls.timeout_s)

    def print_text(out: Console, response: api.GetFindingResponse) -> None:
        print_finding(out, response, dt.datetime.now(dt.UTC), examples=examples, url=url)

    print_response(link.call(set_status_and_fetch), print_text, as_json=as_json)


def parse_status_options(
    finding_id: int, status: str | None, reason: str, actor: str | None, release: str
) -> api.SetFindingStatusRequest | None:
    """Return None if no status is set. Raise ArgumentError for options that don't fit together."""
    if status is None:
        if reason or actor or release:
            raise ArgumentError("--reason, --actor and --release go with one of --" + ", --".join(STATUS_HELP))
        return None
    if not reason.strip():
        raise ArgumentError(f"--{status} needs a --reason, which is kept with the finding")
    return api.SetFindingStatusRequest(
        id=finding_id,
        status=api.FindingStatus.Value(f"FINDING_STATUS_{status.upper()}"),
        reason=reason,
        actor=default_actor(actor),
        release=release,
    )


def print_finding(
    out: Console, response: api.GetFindingResponse, current_time: dt.datetime, *, examples: int = 3, url: str = ""
) -> None:
    finding = response.finding
    heading = style_text(f"#{finding.id}  ", "bold")
    heading.append(style_text(impact_name(finding.impact)))
    heading.append(f"  {endpoint_name(finding.endpoint)}  {format_location(finding.part, finding.path)}")
    out.print(heading)
    out.print(build_finding_grid(response, current_time))
    visible_examples = response.examples[:examples]
    for number, example in enumerate(visible_examples, 1):
        out.print()
        out.print(style_text(f"example {number} of {len(response.examples)}", "bold"))
        print_example(out, example, finding, url)
    if not response.examples:
        out.print("\nno example of this finding is stored any more")
    print_status_history(out, response.events, current_time)


def build_finding_grid(response: api.GetFindingResponse, current_time: dt.datetime) -> Table:
    finding = response.finding
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("service", to_printable(finding.endpoint.service))
    grid.add_row(
        "difference",
        f"{format_difference(finding)} ({kind_name(finding.kind)})" if finding.summary else kind_name(finding.kind),
    )
    rate = format_rate(finding)
    compared_text = f" of {format_count(finding.compared)} compared ({rate})" if rate else ""
    grid.add_row("requests", f"{format_count(finding.count)}{compared_text}")
    grid.add_row(
        "seen",
        f"first {format_age(finding.first_seen, current_time)}, last {format_age(finding.last_seen, current_time)}",
    )
    if labels := format_releases(finding):
        grid.add_row("releases", labels)
    if finding.count or finding.baseline_count:
        grid.add_row("noise", format_noise_state(finding))
    grid.add_row("status", format_status(finding, response.events, current_time))
    if response.HasField("feature"):
        grid.add_row("only with", format_feature(response.feature))
    for rule in response.explained_by:
        grid.add_row("explained by", format_explaining_rule(rule, finding.id))
    for explanation in finding.explanations:
        if explanation.cause == api.EXPLANATION_CAUSE_DRIFT:
            pairs = format_quantity(explanation.pairs, "pair")
            grid.add_row("drift", f"{pairs} more: {format_explanation(explanation)}")
    return grid


def format_rate(finding: api.Finding) -> str:
    """Return `6.9%; with 95% confidence 5.1% to 9.2%`. The interval stays valid however often you look."""
    share = format_share_of(finding.count, finding.compared)
    if not share or not finding.HasField("rate"):
        return share
    return f"{share}; with 95% confidence {format_percent(finding.rate.low)} to {format_percent(finding.rate.high)}"


def format_releases(finding: api.Finding) -> str:
    """List the releases that show the finding, latest first."""
    sides = (("new", finding.new_releases), ("old", finding.old_releases))
    labels_by_side = [(side, [to_printable(label) for label in labels if label]) for side, labels in sides]
    return "; ".join(f"{side} {', '.join(labels)}" for side, labels in labels_by_side if labels)


def format_explaining_rule(rule: Rule, finding_id: int) -> str:
    """Return `rule 7 (cents): rounding, 1,204 pairs`."""
    rule_finding = next((entry for entry in rule.findings if entry.finding_id == finding_id), ExplainedFinding())
    text = f"{format_rule_title(rule)}: {to_printable(rule.reason)}, {format_quantity(rule_finding.pairs, 'pair')}"
    if rule_finding.undetermined_pairs:
        text += f"; {format_count(rule_finding.undetermined_pairs)} were compared before the rule existed"
    return text


def format_feature(request_feature: api.RequestFeature) -> str:
    coverage, precision = (
        format_share_of(round(1000 * share), 1000) for share in (request_feature.coverage, request_feature.precision)
    )
    return (
        f"{to_printable(request_feature.text)}: in {coverage} of the requests that show the finding; "
        f"{precision} of the requests with it show the finding"
    )


def format_noise_state(finding: api.Finding) -> str:
    answer = {api.FINDING_STATE_REAL: "no", api.FINDING_STATE_NOISE: "yes"}.get(finding.state, "not decided yet")
    return f"{answer}: {to_printable(finding.reason)}" if finding.reason else answer


def format_status(finding: api.Finding, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> str:
    """Return the status, with the reason and the actor of the last change."""
    name = status_name(finding.status)
    if not events:
        return name
    last = events[0]
    release = f" in release {to_printable(last.release)}" if last.release else ""
    actor_text = f"{to_printable(last.actor)}, {format_age(last.time, current_time)}"
    return f"{name}{release}: {to_printable(last.reason)} ({actor_text})"


def status_name(value: api.FindingStatus.ValueType) -> str:
    return api.FindingStatus.Name(value).removeprefix("FINDING_STATUS_").lower()


def print_status_history(out: Console, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> None:
    """Print the changes of the status before the last one."""
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
    out.print(style_text("\nearlier status", "bold"))
    out.print(grid)


def print_example(out: Console, example: api.PairDetail, finding: api.Finding, url: str) -> None:
    pair = example.pair
    line, omissions = build_curl_line(example, url)
    out.print(f"  {to_printable(line)}", soft_wrap=True)  # one line, to be copied
    for omission in omissions:
        out.print(style_text(f"  without {omission}", "dim"))
    old, new = (summarise_answer(example, version) for version in (common.VERSION_OLD, common.VERSION_NEW))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row("  responses", f"old {old}, new {new}; the user got {version_name(pair.live)}'s")
    grid.add_row("  details", f"abreast pair {to_printable(pair.id)}")
    out.print(grid)
    finding_differences = [
        difference
        for difference in example.differences
        if (difference.part, difference.path, difference.kind) == (finding.part, finding.path, finding.kind)
    ]
    if finding_differences:
        out.print(build_differences_table(finding_differences))
    if other_count := len(example.differences) - len(finding_differences):
        out.print(style_text(f"  and {format_quantity(other_count, 'other difference')} in this pair", "dim"))


@click.command()
@service_option
@noise_option
@json_option
@connection_options
def watch_command(link: SidecarClient, service: str, noise: bool, as_json: bool) -> None:
    """Print the current findings, then each change, until Ctrl-C.

    With --json, each line is a JSON object.
    """
    request = api.WatchFindingsRequest(service=service, include_noise=noise)
    out = make_console()

    async def print_updates(calls: Calls) -> None:
        async for message in calls.comparison.WatchFindings(request):
            if as_json:
                print_json(message, indent=None)
            else:
                print_finding_line(out, message.finding)

    link.call(print_updates)


def print_finding_line(out: Console, finding: api.Finding) -> None:
    """Print one line, which may wrap but is never cut off."""
    text = style_text(dt.datetime.now().strftime("%H:%M:%S"), "dim")  # noqa: DTZ005  # local time
    text.append(f"  #{finding.id}  ")
    text.append(style_text("noise" if finding.noise else impact_name(finding.impact)))
    text.append(
        f"  {format_count(finding.count)} of {format_count(finding.compared)}  {endpoint_name(finding.endpoint)}  "
    )
    text.append(f"{format_location(finding.part, finding.path)}  {format_difference(finding)}")
    out.print(text, soft_wrap=True)
