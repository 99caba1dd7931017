"""What a report is made of, asked for page by page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli.connection import MAX_PAGE_ROWS, Calls


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


async def collect_evidence(
    calls: Calls, request: api.GetVerdictRequest, example_limit: int
) -> ReportEvidence:
    """`examples`: of so many findings."""
    comparison, traffic, timeout = calls.comparison, calls.traffic, calls.timeout_s
    verdict = await comparison.GetVerdict(request, timeout=timeout)
    service = verdict.service
    scope: dict[str, Any] = {"service": service}
    if request.HasField("window"):
        scope["window"] = request.window
    findings = await _fetch_all_rows(
        comparison.ListFindings, api.ListFindingsRequest(**scope), "findings", timeout
    )
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
            for rule in await _fetch_all_rows(
                calls.rules.ListRules, rule_pb2.ListRulesRequest(), "rules", timeout
            )
            if rule.service in {"", service} or "*" in rule.service
        ],
        details=await _fetch_finding_details(calls, findings[:example_limit]),
        events=await _fetch_all_rows(
            traffic.ListTrafficEvents,
            traffic_pb2.ListTrafficEventsRequest(service=service),
            "events",
            timeout,
        ),
    )


async def _fetch_all_rows(
    call: Callable[..., Awaitable[Any]], request: Any, field: str, timeout: float
) -> list[Any]:
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


async def _fetch_finding_details(
    calls: Calls, findings: Iterable[api.Finding]
) -> dict[int, api.GetFindingResponse]:
    """Without bodies: differences say what matters."""
    details = {}
    for finding in findings:
        request = api.GetFindingRequest(id=finding.id)
        details[finding.id] = detail = await calls.comparison.GetFinding(request, timeout=calls.timeout_s)
        del detail.examples[1:]
        for example in detail.examples:
            del example.captures[:]
    return details
