"""`abreast report`: the verdict and its evidence as an HTML file and a JSON file."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli.options import connection_options
from abreast_sidecar.cli.pairs import build_curl_line
from abreast_sidecar.cli.verdict import format_pairs_to_pass, verdict_options
from abreast_sidecar.client.output import message_to_json
from abreast_sidecar.client.sidecar_client import MAX_PAGE_ROWS, Calls, SidecarClient
from abreast_sidecar.errors import SettingError

REPORT_FORMAT_VERSION = 1  # version of the JSON file's format
MAX_WAIVED_ROWS = 1000  # in the HTML file; the JSON file has all
MAX_EXAMPLE_DIFFERENCES = 5  # shown per example
VERDICT_MEANINGS = {
    "PASS": "All tested rates are within the budget.",
    "FAIL": "At least one rate exceeds the budget.",
    "INCONCLUSIVE": "There is too little evidence for PASS and for FAIL.",
}


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
    endpoints: list[api.EndpointSummary]
    findings: list[api.Finding]
    waived: list[api.Finding]
    rules: list[rule_pb2.Rule]
    details: dict[int, api.GetFindingResponse]  # by finding, each with at most its smallest example
    events: list[traffic_pb2.TrafficEvent]


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
    """Write the file in one step, so that an error leaves no partial report."""
    target = output.with_name(output.name + suffix)
    draft = output.with_name(f".{output.name}{suffix}.part")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise SettingError(f"can't write {target}, choose another --output: {error.strerror}") from error
    click.echo(str(target))


def render_html_report(evidence: ReportEvidence, written_at: dt.datetime) -> str:
    from markupsafe import Markup

    from abreast_sidecar.serve.render import read_stylesheet, render  # slow to import

    return render(
        "report",
        evidence=evidence,
        now=written_at,
        version=version("abreast"),
        style=Markup(read_stylesheet()),  # noqa: S704  # part of the package
        meanings=VERDICT_MEANINGS,
        pairs_to_pass=format_pairs_to_pass(evidence.verdict),
        pass_state=api.VERDICT_STATE_PASS,
        curl_lines={
            id_: build_curl_line(item.examples[0])[0] for id_, item in evidence.details.items() if item.examples
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
        "findings": [to_plain(item) for item in evidence.findings],
        "waived": [to_plain(item) for item in evidence.waived],
        "rules": [to_plain(item) for item in evidence.rules],
        "examples": {str(id_): to_plain(item.examples[0]) for id_, item in details if item.examples},
        "features": {str(id_): to_plain(item.feature) for id_, item in details if item.HasField("feature")},
        "traffic_events": [to_plain(item) for item in evidence.events],
    }


async def collect_evidence(calls: Calls, request: api.GetVerdictRequest, example_limit: int) -> ReportEvidence:
    """Read all pages of the evidence, and the examples of the first `example_limit` findings."""
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
        traffic=(await traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service), timeout=timeout)).traffic,
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


async def _fetch_finding_details(calls: Calls, findings: Iterable[api.Finding]) -> dict[int, api.GetFindingResponse]:
    """Fetch each finding with one example, without bodies: the differences contain the relevant values."""
    details = {}
    for finding in findings:
        request = api.GetFindingRequest(id=finding.id)
        details[finding.id] = detail = await calls.comparison.GetFinding(request, timeout=calls.timeout_s)
        del detail.examples[1:]
        for example in detail.examples:
            del example.captures[:]
    return details
