"""`abreast findings`, `abreast finding` and `abreast watch`: differences by cause, and one by one."""

from __future__ import annotations

import datetime as dt
import functools
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1.rule_pb2 import ExplainedFinding, Rule
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    PrintingClient,
    actor_option,
    api_options,
    combine_options,
    default_actor,
    endpoint_options,
    enum_type,
    limit_option,
    service_option,
    window_options,
)
from abreast_sidecar.cli.pairs import print_curl_line, summarise_response
from abreast_sidecar.cli.rules import format_rule_title
from abreast_sidecar.client.output import (
    Console,
    build_differences_table,
    describe_feature,
    endpoint_name,
    enum_name,
    format_age,
    format_count,
    format_location,
    format_percent,
    format_quantity,
    format_share_of,
    impact_label,
    kind_name,
    kind_phrase,
    make_console,
    make_grid,
    make_table,
    print_json,
    print_list,
    style_text,
    to_printable,
    version_name,
)
from abreast_sidecar.client.sidecar_client import Calls
from abreast_sidecar.errors import ArgumentError

MIN_UNSTACKED_COLUMNS = 110  # a narrower terminal shows the endpoint and the location in one column
UNCOUNTED_CAUSES = {api.EXPLANATION_CAUSE_RULE, api.EXPLANATION_CAUSE_DRIFT}  # a finding's count omits their pairs
harm_name = functools.partial(enum_name, api.Harm)
INVISIBLE_TEXT = "no response shows this difference: compare the effects and exceptions in `abreast pair`"
EMPTY_LIST_TEXT = "{} in the compared requests (for their number: abreast status)"
HARM_STYLES = {
    api.HARM_SERVER_ERROR: "breaking",
    api.HARM_STATUS_CHANGE: "breaking",
    api.HARM_LOST_CONTENT: "breaking",
    api.HARM_SLOWER: "value",
    api.HARM_CHANGED_VALUE: "value",
    api.HARM_CACHING: "dim",
    api.HARM_ADDITION: "additive",
}
STATUS_HELP = {
    "confirmed": "Mark as a regression. It counts even if it looks like noise.",
    "expected": "Mark as an intended change. It counts as explained.",
    "fixed": "Mark as fixed. It reopens if a later release shows it.",
    "open": "Remove the status.",
}
status_options = combine_options(
    *(click.option(f"--{status}", "status", flag_value=status, help=line) for status, line in STATUS_HELP.items())
)
noise_option = click.option(
    "--noise", is_flag=True, help="Include noise: differences that old also shows against itself."
)


@click.command()
@service_option
@endpoint_options
@click.option("--part", "parts", multiple=True, type=enum_type(common.Part), help="Only this part (repeatable).")
@click.option("--kind", "kinds", multiple=True, type=enum_type(common.Kind), help="Only this kind (repeatable).")
@click.option(
    "--impact", "impacts", multiple=True, type=enum_type(common.Impact), help="Only this impact (repeatable)."
)
@noise_option
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="One row per finding, with noise, findings marked expected or fixed, and findings that rules or drift explain.",
)
@click.option("--explained", is_flag=True, help="Only explained differences, one row per reason.")
@click.option("--each", is_flag=True, help="One row per finding instead of one per cause.")
@click.option(
    "--cause",
    "cause_id",
    type=click.IntRange(min=1),
    default=None,
    help="Only the findings of this cause, one per row.",
)
@click.option("--release", default="", help="Count only pairs with this release of new.")
@window_options
@limit_option
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the list is not empty.")
@api_options
def findings_command(
    link: PrintingClient,
    noise: bool,
    everything: bool,
    explained: bool,
    each: bool,
    cause_id: int | None,
    limit: int,
    exit_code: bool,
    **filters: Any,
) -> int:
    """List the differences by cause, the most harmful to users first.

    A cause is one change that shows at one or more endpoints. For the findings of a cause, use --cause ID. For one
    finding with examples, use `abreast finding ID`.
    """
    filters |= {"include_noise": noise or everything, "include_settled": everything}
    if each or explained or everything or cause_id:
        request = api.ListFindingsRequest(only_explained=explained, cause_id=cause_id or 0, **filters)
        print_text = functools.partial(print_findings, only_explained=explained)
        is_empty = not link.show_rows(lambda calls: calls.comparison.ListFindings, request, limit, print_text).findings
    else:
        causes_request = api.ListCausesRequest(**filters)
        is_empty = not link.show_rows(
            lambda calls: calls.comparison.ListCauses, causes_request, limit, print_causes
        ).causes
    return ExitCode.OK if is_empty or not exit_code else ExitCode.CHECK_FAILED


def print_causes(out: Console, response: api.ListCausesResponse) -> None:
    """Print one row per cause, and the numbers of causes and findings, also those that are not shown."""
    if not response.causes:
        out.print(EMPTY_LIST_TEXT.format("no differences"))
        return
    out.print(build_causes_table(response, is_stacked=out.width < MIN_UNSTACKED_COLUMNS))
    count_text = (
        f"{format_quantity(response.total_size, 'cause')} of {format_quantity(response.finding_count, 'finding')}"
    )
    if more_count := response.total_size - len(response.causes):
        count_text += f"; {format_count(more_count)} more not shown: raise --limit, or add a filter"
    first = response.causes[0]
    out.print(f"\n{count_text}", style="dim")
    out.print(
        f"Endpoints of a cause: abreast findings --cause {first.id}. Examples: abreast finding {first.lead.id}",
        style="dim",
    )


def build_causes_table(response: api.ListCausesResponse, *, is_stacked: bool) -> Table:
    services = {cause.lead.endpoint.service for cause in response.causes}
    columns = ("cause", "harm", "requests", *(("place",) if is_stacked else ("endpoints", "place")), "difference")
    table = make_table(*columns, numeric_columns={"cause", "requests"})
    for cause in response.causes:
        endpoint = format_cause_endpoints(cause, with_service=len(services) > 1)
        place = format_cause_place(cause)
        table.add_row(
            str(cause.id),
            style_text("explained" if cause.explained else harm_name(cause.harm), HARM_STYLES.get(cause.harm, "")),
            format_count(cause.pairs),
            *((f"{endpoint}\n  {place}",) if is_stacked else (endpoint, place)),
            format_cause_difference(cause),
        )
    return table


def format_cause_endpoints(cause: api.Cause, *, with_service: bool = False) -> str:
    """Return `GET /a` or `GET /a and 3 more`."""
    if not cause.endpoints:
        return ""
    first = cause.endpoints[0].endpoint
    service_text = f"{to_printable(first.service)}: " if with_service else ""
    more = cause.endpoint_count - 1
    return f"{service_text}{endpoint_name(first)}" + (f" and {format_count(more)} more" if more else "")


def format_cause_place(cause: api.Cause) -> str:
    """Return the place of the lead, or the shape if the findings have different places."""
    is_wide = cause.shape in {"*", "access-control-*"} or cause.shape.startswith("error page")
    if cause.finding_count == 1 or not is_wide:
        return format_location(cause.lead.part, cause.lead.path)
    if cause.shape == "*":
        others = "headers" if cause.lead.part == common.PART_HEADER else "members"
        return f"{format_location(cause.lead.part, cause.lead.path)} and other {others}"
    return to_printable(cause.shape)


def format_cause_difference(cause: api.Cause) -> str:
    """Describe the transition and an example, with the remarks in parentheses."""
    example = format_difference(cause.lead)
    text = f"{to_printable(cause.transition)}: {example}" if cause.transition else example
    remarks = ["may be noise"] if cause.state == api.FINDING_STATE_UNDECIDED and not cause.explained else []
    if cause.finding_count > cause.endpoint_count:
        remarks.append(format_quantity(cause.finding_count, "place"))
    if cause.consequence_count:
        remarks.append(f"with {format_quantity(cause.consequence_count, 'consequence')}")
    return f"{text} ({'; '.join(remarks)})" if remarks else text


def print_findings(out: Console, response: api.ListFindingsResponse, *, only_explained: bool = False) -> None:
    if only_explained:
        subject, table = "no difference is explained", build_explanations_table(response.findings)
    else:
        subject = "no differences"
        table = build_findings_table(response, is_stacked=out.width < MIN_UNSTACKED_COLUMNS)
    print_list(out, response, response.findings, table, empty=EMPTY_LIST_TEXT.format(subject), item="finding")


def build_findings_table(response: api.ListFindingsResponse, *, is_stacked: bool) -> Table:
    services = {finding.endpoint.service for finding in response.findings}
    location_columns = ("location",) if is_stacked else ("endpoint", "location")
    columns = ("id", "impact", "requests", *location_columns, "difference")
    table = make_table(*columns, numeric_columns={"id", "requests"})
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
    columns = ("id", "cause", "requests", "endpoint", "location", "reason")
    table = make_table(*columns, numeric_columns={"id", "requests"})
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
    return enum_name(api.ExplanationCause, explanation.cause)


def format_explanation(explanation: api.FindingExplanation) -> str:
    """Return `rule 7 (cents), shop: rounding` for a rule, or else the reason."""
    if explanation.cause == api.EXPLANATION_CAUSE_RULE:
        return to_printable(
            f"rule {explanation.rule_id} ({explanation.rule_name}), {explanation.owner}: {explanation.reason}"
        )
    return to_printable(explanation.reason)


def format_finding_label(finding: api.Finding) -> Text:
    """Return the cause that explains the finding, or else its impact on clients."""
    if finding.explanations and (not finding.count or format_cause(finding.explanations[0]) not in {"rule", "drift"}):
        return style_text(format_cause(finding.explanations[0]), "dim")
    return style_text(impact_label(finding.impact))


def format_remarked_difference(finding: api.Finding) -> str:
    """Describe the difference, with its status and explanations in parentheses."""
    remarks = []
    if (status := status_name(finding.status)) in {"confirmed", "reopened"}:
        remarks.append(status)
    elif finding.state == api.FINDING_STATE_UNDECIDED and finding.count:
        remarks.append("may be noise")
    if format_finding_label(finding).plain == impact_label(finding.impact):
        explained_pairs = sum(
            explanation.pairs for explanation in finding.explanations if explanation.cause in UNCOUNTED_CAUSES
        )
        if explained_pairs:
            remarks.append(f"{format_count(explained_pairs)} more explained")
    else:
        remarks += map(format_explanation, finding.explanations)
    return f"{format_difference(finding)} ({'; '.join(remarks)})" if any(remarks) else format_difference(finding)


def format_difference(finding: api.Finding) -> str:
    """Return the summary, or the kind if there is no summary."""
    return to_printable(finding.summary, 120) or kind_name(finding.kind)


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
@api_options
def finding_command(
    link: PrintingClient,
    id: int,  # noqa: A002  # the argument's name
    examples: int,
    url: str,
    status: str | None,
    release: str,
    reason: str,
    actor: str | None,
) -> None:
    """Show one finding with examples, or set its status.

    The curl lines send the request to "$URL". Set this variable to the address of old or new, or use --url.
    """
    if status is None and (reason or actor or release):
        raise ArgumentError("--reason, --actor and --release go with one of --" + ", --".join(STATUS_HELP))
    if status is not None and not reason.strip():
        raise ArgumentError(f"--{status} needs a --reason, which is kept with the finding")

    async def set_status_and_fetch(calls: Calls) -> api.GetFindingResponse:
        if status is not None:
            status_number = api.FindingStatus.Value(f"FINDING_STATUS_{status.upper()}")
            await calls.comparison.SetFindingStatus(
                api.SetFindingStatusRequest(
                    id=id, status=status_number, reason=reason, actor=default_actor(actor), release=release
                )
            )
        return await calls.comparison.GetFinding(api.GetFindingRequest(id=id))

    link.show(
        set_status_and_fetch,
        lambda out, response: print_finding(out, response, dt.datetime.now(dt.UTC), examples=examples, url=url),
    )


def print_finding(
    out: Console, response: api.GetFindingResponse, current_time: dt.datetime, *, examples: int = 3, url: str = ""
) -> None:
    finding = response.finding
    heading = style_text(f"#{finding.id}  ", "bold")
    heading.append(style_text(impact_label(finding.impact)))
    heading.append(f"  {endpoint_name(finding.endpoint)}  {format_location(finding.part, finding.path)}")
    out.print(heading)
    out.print(build_finding_grid(response, current_time))
    for number, example in enumerate(response.examples[:examples], 1):
        out.print()
        out.print(style_text(f"example {number} of {len(response.examples)}", "bold"))
        print_example(out, example, finding, url)
    if finding.part in {common.PART_LATENCY, common.PART_CACHE}:
        method, route = finding.endpoint.method, finding.endpoint.route
        times = f"abreast endpoint {to_printable(method)} {shlex.quote(to_printable(route))}"
        out.print(f"\nno single request shows this finding; all times of the endpoint: {times}")
    elif not response.examples:
        out.print("\nno example of this finding is stored any more")
    print_status_history(out, response.events, current_time)


def build_finding_grid(response: api.GetFindingResponse, current_time: dt.datetime) -> Table:
    finding, kind, rate = response.finding, kind_phrase(response.finding.kind), format_rate(response.finding)
    first_age, last_age = (format_age(moment, current_time) for moment in (finding.first_seen, finding.last_seen))
    compared_text = f" of {format_count(finding.compared)} compared ({rate})" if rate else ""
    drifts = [item for item in finding.explanations if item.cause == api.EXPLANATION_CAUSE_DRIFT]
    return make_grid(
        [
            ("service", to_printable(finding.endpoint.service)),
            ("difference", f"{kind}: {format_difference(finding)}" if finding.summary else kind),
            ("requests", f"{format_count(finding.count)}{compared_text}"),
            ("seen", f"first {first_age}, last {last_age}"),
            ("releases", format_releases(finding) or None),
            ("real or noise", format_noise_state(finding) if finding.count or finding.baseline_count else None),
            ("status", format_status(finding, response.events, current_time)),
            ("who", describe_feature(response.feature) if response.HasField("feature") else None),
            *(("explained by", format_explaining_rule(rule, finding.id)) for rule in response.explained_by),
            *(
                ("drift", f"{format_quantity(drift.pairs, 'pair')} more: {format_explanation(drift)}")
                for drift in drifts
            ),
        ]
    )


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


def format_noise_state(finding: api.Finding) -> str:
    states = {api.FINDING_STATE_REAL: "real", api.FINDING_STATE_NOISE: "noise"}
    state = states.get(finding.state, "not sure yet")
    return f"{state}: {to_printable(finding.reason)}" if finding.reason else state


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
    return enum_name(api.FindingStatus, value)


def print_status_history(out: Console, events: Sequence[api.FindingEvent], current_time: dt.datetime) -> None:
    """Print the changes of the status before the last one."""
    if len(events) < 2:
        return
    rows = []
    for event in events[1:]:
        release = f" in {to_printable(event.release)}" if event.release else ""
        age, status_text = format_age(event.time, current_time), f"{status_name(event.after)}{release}"
        rows.append((age, to_printable(event.actor), status_text, to_printable(event.reason)))
    out.print(style_text("\nearlier status", "bold"))
    out.print(make_grid(rows))


def print_example(out: Console, example: api.PairDetail, finding: api.Finding, url: str) -> None:
    pair = example.pair
    print_curl_line(out, example, url, indent="  ")
    if finding.part == common.PART_EFFECT or (finding.part, finding.path) == (common.PART_ERROR, "raised"):
        out.print(style_text(f"  {INVISIBLE_TEXT}", "dim"))
    old, new = (summarise_response(example, version) for version in (common.VERSION_OLD, common.VERSION_NEW))
    responses_text = f"old {old}, new {new}; the user got {version_name(pair.live)}'s"
    out.print(make_grid([("  responses", responses_text), ("  details", f"abreast pair {to_printable(pair.id)}")]))
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
@api_options
def watch_command(link: PrintingClient, service: str, noise: bool) -> None:
    """Print the current findings, then each change, until Ctrl-C.

    With --json, each line is a JSON object.
    """
    request = api.WatchFindingsRequest(service=service, include_noise=noise)
    out = make_console()

    async def print_updates(calls: Calls) -> None:
        async for message in calls.comparison.WatchFindings(request):
            if link.as_json:
                print_json(message, indent=None)
            else:
                print_finding_line(out, message.finding)

    link.call(print_updates)


def print_finding_line(out: Console, finding: api.Finding) -> None:
    """Print one line, which may wrap but is never cut off."""
    text = style_text(dt.datetime.now().strftime("%H:%M:%S"), "dim")  # noqa: DTZ005  # local time
    text.append(f"  #{finding.id}  ")
    text.append(style_text("noise" if finding.noise else impact_label(finding.impact)))
    text.append(f"  {format_count(finding.count)} of {format_count(finding.compared)}")
    text.append(f"  {endpoint_name(finding.endpoint)}  {format_location(finding.part, finding.path)}")
    text.append(f"  {format_difference(finding)}")
    out.print(text, soft_wrap=True)
