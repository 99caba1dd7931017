"""The report as one HTML file. All that came from requests and answers is escaped, and can't steer the page."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli.findings import (
    format_cause,
    format_difference,
    format_explanation,
    format_feature,
    format_releases,
    status_name,
)
from abreast_sidecar.cli.options import connection_options
from abreast_sidecar.cli.pairs import build_curl_line
from abreast_sidecar.cli.verdict import format_pairs_to_pass, verdict_options
from abreast_sidecar.client.output import (
    MAX_TABLE_VALUE_CHARS,
    endpoint_name,
    format_count,
    format_duration,
    format_location,
    format_percent,
    impact_name,
    kind_name,
    outcome_name,
    to_printable,
)
from abreast_sidecar.client.sidecar_client import MAX_PAGE_ROWS, Calls, SidecarClient
from abreast_sidecar.errors import SettingError

MAX_WAIVED_ROWS = 1000  # rows shown; the JSON file has all
MAX_EXAMPLE_DIFFERENCES = 5  # of a finding, in its example
VERDICT_MEANINGS = {
    "PASS": "All that was tested is surely within the budget.",
    "FAIL": "Something is surely beyond the budget.",
    "INCONCLUSIVE": "Too little is known to let the new version take over, or to say that it must not.",
}


def render_html_report(evidence: ReportEvidence, written_at: dt.datetime) -> str:
    template = _build_template_environment().get_template("report.html.j2")
    undecided_endpoints = [
        endpoint for endpoint in evidence.verdict.endpoints if endpoint.state != api.VERDICT_STATE_PASS
    ]
    by_endpoint = {endpoint_name(endpoint.endpoint): endpoint for endpoint in evidence.verdict.endpoints}
    return template.render(
        found=evidence,
        now=written_at,
        version=version("abreast"),
        meaning=VERDICT_MEANINGS,
        doubtful=undecided_endpoints,
        by_endpoint=by_endpoint,
        most_waived=MAX_WAIVED_ROWS,
        most_places=MAX_EXAMPLE_DIFFERENCES,
    )


@cache
def _build_template_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abreast_sidecar.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clean=to_printable,
        number=format_count,
        percent=format_percent,
        time=_format_utc_time,
        endpoint=endpoint_name,
        state=_format_verdict_state,
        subject=_format_reason_subject,
        outcome=lambda one: outcome_name(one.outcome),
        impact=lambda one: impact_name(one.impact),
        kind=lambda one: kind_name(one.kind),
        place=_format_item_location,
        status=lambda one: status_name(one.status),
        cause=format_cause,
        why=format_explanation,
        command=lambda one: build_curl_line(one)[0],
        shown_by=_select_finding_differences,
        said=format_difference,
        releases=format_releases,
        feature=format_feature,
        to_pass=format_pairs_to_pass,
        value=lambda text: to_printable(text, MAX_TABLE_VALUE_CHARS),
        taken=_format_endpoint_percentile,
        covers=_format_rule_scope,
    )
    return environment


def _format_utc_time(moment: Timestamp) -> str:
    return f"{moment.ToDatetime(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _format_verdict_state(verdict: Any) -> str:
    return api.VerdictState.Name(verdict.state).removeprefix("VERDICT_STATE_")


def _format_reason_subject(reason: api.VerdictReason) -> str:
    return api.VerdictSubject.Name(reason.subject).removeprefix("VERDICT_SUBJECT_").lower()


def _format_item_location(item: api.Finding | common.Difference) -> str:
    exact = item.exact_path if isinstance(item, common.Difference) else ""
    return format_location(item.part, exact or item.path)


def _select_finding_differences(example: api.PairDetail, finding: api.Finding) -> list[common.Difference]:
    """Where the example shows the finding."""
    finding_key = (finding.part, finding.path, finding.kind)
    return [
        difference
        for difference in example.differences
        if (difference.part, difference.path, difference.kind) == finding_key
    ]


def _format_rule_scope(rule: rule_pb2.Rule) -> str:
    """What the rule says, as a person would write it."""
    action = rule_pb2.RuleAction.Name(rule.action).removeprefix("RULE_ACTION_").lower().replace("_", "-")
    fields = ("path", "header", "status", "endpoint", "release", "by")
    conditions = [f"{name} {getattr(rule, name)}" for name in fields if getattr(rule, name)]
    return to_printable(" ".join([action, *conditions]))


def _format_endpoint_percentile(endpoint: api.EndpointSummary, field: str) -> str:
    return format_duration(getattr(endpoint, field)) if endpoint.HasField(field) else "-"  # type: ignore[arg-type]  # names of fields


REPORT_FORMAT_VERSION = 1  # of the JSON file


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("abreast-report"),
    show_default=True,
    help="Where to write; .html and .json are added.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Findings that are shown with an example.",
)
@verdict_options
@connection_options
def report_command(link: SidecarClient, request: api.GetVerdictRequest, output: Path, examples: int) -> None:
    """The verdict with its evidence as two files, for a change ticket.

    One HTML file that needs nothing else, and one JSON file with the same.
    """
    written_at = dt.datetime.now(dt.UTC)
    evidence = link.call(lambda calls: collect_evidence(calls, request, examples))
    write_report_file(
        output, ".json", json.dumps(build_json_report(evidence, written_at), indent=2, ensure_ascii=True) + "\n"
    )
    write_report_file(output, ".html", render_html_report(evidence, written_at))


def write_report_file(output: Path, suffix: str, content: str) -> None:
    """At once: half a report is none."""
    target = output.with_name(output.name + suffix)
    draft = output.with_name(f".{output.name}{suffix}.part")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise SettingError(f"{target} can't be written, choose another --output: {error.strerror}") from error
    click.echo(str(target))


def build_json_report(evidence: ReportEvidence, written_at: dt.datetime) -> dict[str, Any]:
    from abreast_sidecar.client.output import message_to_json

    def to_plain(message: Any) -> Any:
        return json.loads(message_to_json(message, indent=None))

    return {
        "format": REPORT_FORMAT_VERSION,
        "written": written_at.isoformat(timespec="seconds"),
        "verdict": to_plain(evidence.verdict),
        "window": to_plain(evidence.request.window),
        "summary": to_plain(evidence.summary),
        "traffic": to_plain(evidence.traffic),
        "endpoints": [to_plain(item) for item in evidence.endpoints],
        "findings": [to_plain(item) for item in evidence.findings],
        "waived": [to_plain(item) for item in evidence.waived],
        "rules": [to_plain(item) for item in evidence.rules],
        "examples": {
            str(number): to_plain(item.examples[0]) for number, item in evidence.details.items() if item.examples
        },
        "features": {
            str(number): to_plain(item.feature) for number, item in evidence.details.items() if item.HasField("feature")
        },
        "traffic_events": [to_plain(item) for item in evidence.events],
    }


@dataclass(frozen=True)
class ReportEvidence:
    """`findings` count, `waived` don't: noise, and what people said is expected or fixed. `rules` hold for the service."""

    request: api.GetVerdictRequest
    verdict: api.GetVerdictResponse
    summary: api.GetSummaryResponse
    traffic: traffic_pb2.Traffic
    endpoints: list[api.EndpointSummary]
    findings: list[api.Finding]
    waived: list[api.Finding]
    rules: list[rule_pb2.Rule]
    details: dict[int, api.GetFindingResponse]  # by finding, each with its smallest example at most
    events: list[traffic_pb2.TrafficEvent]


async def collect_evidence(calls: Calls, request: api.GetVerdictRequest, example_limit: int) -> ReportEvidence:
    """`examples`: of so many findings."""
    comparison, traffic, timeout = calls.comparison, calls.traffic, calls.timeout_s
    verdict = await comparison.GetVerdict(request, timeout=timeout)
    service = verdict.service
    scope: dict[str, Any] = {"service": service}
    if request.HasField("window"):
        scope["window"] = request.window
    findings = await _fetch_all_rows(comparison.ListFindings, api.ListFindingsRequest(**scope), "findings", timeout)
    explained_request = api.ListFindingsRequest(**scope, only_explained=True)
    return ReportEvidence(
        request=request,
        verdict=verdict,
        summary=await comparison.GetSummary(api.GetSummaryRequest(**scope), timeout=timeout),
        traffic=await _fetch_traffic_state(calls, service),
        endpoints=await _fetch_all_rows(
            comparison.ListEndpoints, api.ListEndpointsRequest(**scope), "endpoints", timeout
        ),
        findings=findings,
        waived=await _fetch_all_rows(comparison.ListFindings, explained_request, "findings", timeout),
        rules=[
            rule
            for rule in await _fetch_all_rows(calls.rules.ListRules, rule_pb2.ListRulesRequest(), "rules", timeout)
            if rule.service in {"", service} or "*" in rule.service
        ],
        details=await _fetch_finding_details(calls, findings[:example_limit]),
        events=await _fetch_all_rows(
            traffic.ListTrafficEvents, traffic_pb2.ListTrafficEventsRequest(service=service), "events", timeout
        ),
    )


async def _fetch_all_rows(call: Callable[..., Awaitable[Any]], request: Any, field: str, timeout: float) -> list[Any]:
    items: list[Any] = []
    request.page_size = MAX_PAGE_ROWS
    while True:
        page = await call(request, timeout=timeout)
        items.extend(getattr(page, field))
        if not page.next_page_token:
            return items
        request.page_token = page.next_page_token


async def _fetch_traffic_state(calls: Calls, service: str) -> traffic_pb2.Traffic:
    request = traffic_pb2.GetTrafficRequest(service=service)
    return (await calls.traffic.GetTraffic(request, timeout=calls.timeout_s)).traffic


async def _fetch_finding_details(calls: Calls, findings: Iterable[api.Finding]) -> dict[int, api.GetFindingResponse]:
    """Without bodies: differences say what matters."""
    details = {}
    for finding in findings:
        request = api.GetFindingRequest(id=finding.id)
        details[finding.id] = detail = await calls.comparison.GetFinding(request, timeout=calls.timeout_s)
        del detail.examples[1:]
        for example in detail.examples:
            del example.captures[:]
    return details
