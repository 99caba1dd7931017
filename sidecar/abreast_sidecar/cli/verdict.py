"""`abreast verdict` and `abreast report`: whether the new version can take over, and the evidence."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import grpc.aio
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.cli.options import (
    ParserParamType,
    PrintingClient,
    api_options,
    budget_options,
    connection_options,
    option_group,
    parse_span,
    service_option,
    window_options,
)
from abreast_sidecar.cli.pairs import format_curl_lines
from abreast_sidecar.client.output import (
    Console,
    endpoint_name,
    enum_name,
    format_count,
    format_quantity,
    format_recommendation,
    make_grid,
    make_table,
    message_to_json,
    style_text,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import Calls, SidecarClient, fetch_pages
from abreast_sidecar.errors import SettingError

EXIT_BY_VERDICT = {
    api.VERDICT_STATE_PASS: ExitCode.OK,
    api.VERDICT_STATE_FAIL: ExitCode.CHECK_FAILED,
    api.VERDICT_STATE_INCONCLUSIVE: ExitCode.INCONCLUSIVE,
}
REPORT_FORMAT_VERSION = 1  # version of the JSON file's format
VERDICT_POLL_S = 2.0  # with --wait
JUNIT_TAGS = {api.VERDICT_STATE_FAIL: "failure", api.VERDICT_STATE_INCONCLUSIVE: "error"}
MAX_REASON_ROWS, MAX_ENDPOINT_ROWS = 8, 8  # so that a verdict fits on a screen
MAX_WAIVED_ROWS = 1000  # in the HTML file; the JSON file has all
MAX_EXAMPLE_DIFFERENCES = 5  # shown per example


def build_verdict_request(
    service: str, budget: api.Budget, release: str, all_releases: bool, window: common.TimeWindow | None
) -> api.GetVerdictRequest:
    return api.GetVerdictRequest(
        service=service, window=window, budget=budget, release=release, all_releases=all_releases
    )


verdict_options = option_group(
    "request",
    build_verdict_request,
    service=service_option,
    budget=budget_options,
    release=click.option("--release", default="", help="Release of new to evaluate.  [default: the newest]"),
    all_releases=click.option("--all-releases", is_flag=True, help="Evaluate all releases of new together."),
    window=window_options,
)


@click.command()
@verdict_options
@click.option(
    "--wait",
    type=ParserParamType("span", parse_span),
    default=None,
    help="Wait up to this time, such as 30m, for PASS or FAIL.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write the reasons to this file as JUnit XML."
)
@api_options
def verdict_command(
    link: PrintingClient, request: api.GetVerdictRequest, wait: dt.timedelta | None, junit: Path | None
) -> int:
    """Decide whether the new version can take over.

    Exits with 0 for PASS, 1 for FAIL and 10 for INCONCLUSIVE. By default, the verdict covers the pairs of new's newest
    release. The confidence holds however often you look.
    """
    response = link.show(lambda calls: wait_for_verdict(calls, request, wait or dt.timedelta()), print_verdict)
    if junit is not None:
        write_file(junit, render_junit(response), option="--junit")
    return EXIT_BY_VERDICT.get(response.state, ExitCode.REFUSED)


async def wait_for_verdict(calls: Calls, request: api.GetVerdictRequest, limit: dt.timedelta) -> api.GetVerdictResponse:
    """Ask until the verdict is PASS or FAIL, or the time is over. Before the first traffic, no service is known."""
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        remaining_s = deadline - time.monotonic()
        try:
            response: api.GetVerdictResponse = await calls.comparison.GetVerdict(request)
            if response.state != api.VERDICT_STATE_INCONCLUSIVE or remaining_s <= 0:
                return response
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND or remaining_s <= 0:
                raise
        await asyncio.sleep(min(VERDICT_POLL_S, max(remaining_s, 0)))


def render_junit(response: api.GetVerdictResponse) -> str:
    """Return one test case per reason: a failure for FAIL, an error for INCONCLUSIVE."""
    suite = ET.Element("testsuite", name=f"abreast verdict of {response.service}", tests=str(len(response.reasons)))
    counts = Counter(reason.state for reason in response.reasons)
    suite.set("failures", str(counts[api.VERDICT_STATE_FAIL]))
    suite.set("errors", str(counts[api.VERDICT_STATE_INCONCLUSIVE]))
    for reason in response.reasons:
        endpoint = endpoint_name(reason.endpoint) if reason.HasField("endpoint") else "all endpoints"
        subject, text = enum_name(api.VerdictSubject, reason.subject), to_printable(reason.text)
        case = ET.SubElement(suite, "testcase", classname=to_printable(response.service), name=f"{subject}: {endpoint}")
        if tag := JUNIT_TAGS.get(reason.state):
            ET.SubElement(case, tag, message=text)
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def print_verdict(out: Console, response: api.GetVerdictResponse) -> None:
    heading = style_verdict_state(response.state)
    heading.append(f"  {to_printable(response.service)}", "bold")
    if response.release:
        heading.append(f"  release {to_printable(response.release)}")
    if more_pairs_text := format_pairs_to_pass(response):
        heading.append(f"  {more_pairs_text}")
    out.print(heading)
    out.print(build_reasons_grid(response.reasons[:MAX_REASON_ROWS]))
    if (more_count := len(response.reasons) - MAX_REASON_ROWS) > 0:
        out.print(f"and {format_quantity(more_count, 'more reason')} (--json has all)", style="dim")
    undecided_endpoints = [endpoint for endpoint in response.endpoints if endpoint.state != api.VERDICT_STATE_PASS]
    if len(response.endpoints) > 1:
        pass_count = len(response.endpoints) - len(undecided_endpoints)
        out.print(f"\nendpoints that pass on their own: {pass_count} of {len(response.endpoints)}", style="dim")
    if undecided_endpoints and len(response.endpoints) > 1:
        out.print(build_verdict_endpoints_table(undecided_endpoints[:MAX_ENDPOINT_ROWS]))
        if (more_count := len(undecided_endpoints) - MAX_ENDPOINT_ROWS) > 0:
            out.print(f"and {format_quantity(more_count, 'more endpoint')} (--json has all)", style="dim")


def format_pairs_to_pass(response: api.GetVerdictResponse) -> str:
    if response.state != api.VERDICT_STATE_INCONCLUSIVE:
        return ""
    if not response.HasField("pairs_needed"):
        return "more traffic alone can't make it pass"
    pairs_needed = response.pairs_needed
    return f"about {format_count(pairs_needed)} more pairs to pass, at these rates" if pairs_needed else ""


def build_reasons_grid(reasons: Iterable[api.VerdictReason]) -> Table:
    rows = []
    for reason in reasons:
        endpoint_text = f"{endpoint_name(reason.endpoint)}: " if reason.HasField("endpoint") else ""
        subject = enum_name(api.VerdictSubject, reason.subject)
        rows.append((style_verdict_state(reason.state), subject, f"{endpoint_text}{to_printable(reason.text)}"))
    return make_grid(rows)


def build_verdict_endpoints_table(verdicts: list[api.EndpointVerdict]) -> Table:
    table = make_table("endpoint", "verdict", "reason")
    for verdict in verdicts:
        first_reason = next((reason.text for reason in verdict.reasons if reason.state == verdict.state), "")
        table.add_row(endpoint_name(verdict.endpoint), style_verdict_state(verdict.state), to_printable(first_reason))
    return table


def style_verdict_state(state: api.VerdictState.ValueType) -> Text:
    style = {api.VERDICT_STATE_PASS: "ok", api.VERDICT_STATE_FAIL: "fail"}.get(state, "warn")
    return style_text(enum_name(api.VerdictState, state).upper(), style)


@dataclass(frozen=True)
class ReportEvidence:
    """The responses of the API that a report shows.

    `findings` count against the verdict. `waived` are noise, or have the status expected or fixed. `rules` apply to
    the service.
    """

    request: api.GetVerdictRequest
    verdict: api.GetVerdictResponse
    summary: api.GetSummaryResponse
    traffic: traffic_pb2.Traffic
    endpoints: Sequence[api.EndpointSummary]
    causes: Sequence[api.Cause]
    findings: Sequence[api.Finding]
    waived: Sequence[api.Finding]
    rules: Sequence[rule_pb2.Rule]
    details: dict[int, api.GetFindingResponse]  # by finding, each with at most its smallest example
    events: Sequence[traffic_pb2.TrafficEvent]


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("abreast-report"),
    show_default=True,
    help="Path of the files, without .html and .json.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Number of findings that have an example.",
)
@verdict_options
@connection_options
def report_command(link: SidecarClient, request: api.GetVerdictRequest, output: Path, examples: int) -> None:
    """Write the verdict and its evidence to two files, for a change ticket.

    The HTML file needs no other file. The JSON file has the same content.
    """
    written_at = dt.datetime.now(dt.UTC)
    evidence = link.call(lambda calls: collect_evidence(calls, request, examples))
    document = json.dumps(build_json_report(evidence, written_at), indent=2, ensure_ascii=True)
    write_report_file(output, ".json", document + "\n")
    write_report_file(output, ".html", render_html_report(evidence, written_at))


def write_report_file(output: Path, suffix: str, content: str) -> None:
    target = output.with_name(output.name + suffix)
    write_file(target, content, option="--output")
    click.echo(str(target))


def write_file(target: Path, content: str, *, option: str) -> None:
    """Write the file in one step, so that an error leaves no partial file. Only its owner can read it."""
    draft = target.with_name(f".{target.name}.part")
    try:
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600, exist_ok=False)
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise SettingError(f"can't write {target}, choose another {option}: {error.strerror}") from error


def render_html_report(evidence: ReportEvidence, written_at: dt.datetime) -> str:
    from markupsafe import Markup

    from abreast_sidecar.serve.render import read_stylesheet, render  # slow to import

    return render(
        "report",
        evidence=evidence,
        now=written_at,
        version=version("abreast"),
        style=Markup(read_stylesheet()),  # noqa: S704  # part of the package
        recommendation=format_recommendation(evidence.verdict),
        pairs_to_pass=format_pairs_to_pass(evidence.verdict),
        pass_state=api.VERDICT_STATE_PASS,
        curl_lines={
            id_: format_curl_lines(item.examples[0]) for id_, item in evidence.details.items() if item.examples
        },
        max_waived_rows=MAX_WAIVED_ROWS,
        max_example_differences=MAX_EXAMPLE_DIFFERENCES,
    )


def build_json_report(evidence: ReportEvidence, written_at: dt.datetime) -> dict[str, Any]:
    def to_plain(message: Any) -> Any:
        return json.loads(message_to_json(message, indent=None))

    details = evidence.details.items()
    return {
        "format": REPORT_FORMAT_VERSION,
        "written": written_at.isoformat(timespec="seconds"),
        "verdict": to_plain(evidence.verdict),
        "window": to_plain(evidence.request.window),
        "summary": to_plain(evidence.summary),
        "traffic": to_plain(evidence.traffic),
        "endpoints": [to_plain(item) for item in evidence.endpoints],
        "causes": [to_plain(item) for item in evidence.causes],
        "findings": [to_plain(item) for item in evidence.findings],
        "waived": [to_plain(item) for item in evidence.waived],
        "rules": [to_plain(item) for item in evidence.rules],
        "examples": {str(id_): to_plain(item.examples[0]) for id_, item in details if item.examples},
        "features": {str(id_): to_plain(item.feature) for id_, item in details if item.HasField("feature")},
        "traffic_events": [to_plain(item) for item in evidence.events],
    }


async def collect_evidence(calls: Calls, request: api.GetVerdictRequest, example_limit: int) -> ReportEvidence:
    """Read all pages of the evidence, and the examples of the first `example_limit` findings."""
    comparison, traffic = calls.comparison, calls.traffic
    verdict = await comparison.GetVerdict(request)
    service = verdict.service
    scope: dict[str, Any] = {"service": service}
    if request.HasField("window"):
        scope["window"] = request.window
    findings = (await fetch_pages(comparison.ListFindings, api.ListFindingsRequest(**scope))).findings
    waived_request = api.ListFindingsRequest(**scope, only_explained=True)
    rules = (await fetch_pages(calls.rules.ListRules, rule_pb2.ListRulesRequest())).rules
    events_request = traffic_pb2.ListTrafficEventsRequest(service=service)
    return ReportEvidence(
        request=request,
        verdict=verdict,
        summary=await comparison.GetSummary(api.GetSummaryRequest(**scope)),
        traffic=(await traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service))).traffic,
        endpoints=(await fetch_pages(comparison.ListEndpoints, api.ListEndpointsRequest(**scope))).endpoints,
        causes=(await fetch_pages(comparison.ListCauses, api.ListCausesRequest(**scope))).causes,
        findings=findings,
        waived=(await fetch_pages(comparison.ListFindings, waived_request)).findings,
        rules=[rule for rule in rules if rule.service in {"", service} or "*" in rule.service],
        details=await _fetch_finding_details(calls, findings[:example_limit]),
        events=(await fetch_pages(traffic.ListTrafficEvents, events_request)).events,
    )


async def _fetch_finding_details(calls: Calls, findings: Iterable[api.Finding]) -> dict[int, api.GetFindingResponse]:
    """Fetch each finding with one example, without bodies: the differences contain the relevant values."""
    details = {}
    for finding in findings:
        details[finding.id] = detail = await calls.comparison.GetFinding(api.GetFindingRequest(id=finding.id))
        del detail.examples[1:]
        for example in detail.examples:
            del example.captures[:]
    return details
