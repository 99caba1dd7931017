"""What a report is made of, asked for page by page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from abreast.v1 import comparison_pb2 as api
from abreast.v1 import rule_pb2, traffic_pb2
from abreast_sidecar.cli.connection import LARGEST_PAGE, Calls


@dataclass(frozen=True)
class Collected:
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


async def collect(calls: Calls, request: api.GetVerdictRequest, examples: int) -> Collected:
    """`examples`: of so many findings."""
    comparison, traffic, timeout = calls.comparison, calls.traffic, calls.timeout
    verdict = await comparison.GetVerdict(request, timeout=timeout)
    service = verdict.service
    asked: dict[str, Any] = {"service": service}
    if request.HasField("window"):
        asked["window"] = request.window
    findings = await _all(comparison.ListFindings, api.ListFindingsRequest(**asked), "findings", timeout)
    explained = api.ListFindingsRequest(**asked, only_explained=True)
    return Collected(
        request=request,
        verdict=verdict,
        summary=await comparison.GetSummary(api.GetSummaryRequest(**asked), timeout=timeout),
        traffic=await _traffic(calls, service),
        endpoints=await _all(
            comparison.ListEndpoints, api.ListEndpointsRequest(**asked), "endpoints", timeout
        ),
        findings=findings,
        waived=await _all(comparison.ListFindings, explained, "findings", timeout),
        rules=[
            one
            for one in await _all(calls.rules.ListRules, rule_pb2.ListRulesRequest(), "rules", timeout)
            if one.service in {"", service} or "*" in one.service
        ],
        details=await _details(calls, findings[:examples]),
        events=await _all(
            traffic.ListTrafficEvents,
            traffic_pb2.ListTrafficEventsRequest(service=service),
            "events",
            timeout,
        ),
    )


async def _all(call: Callable[..., Awaitable[Any]], request: Any, rows: str, timeout: float) -> list[Any]:
    found: list[Any] = []
    request.page_size = LARGEST_PAGE
    while True:
        page = await call(request, timeout=timeout)
        found.extend(getattr(page, rows))
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _traffic(calls: Calls, service: str) -> traffic_pb2.Traffic:
    request = traffic_pb2.GetTrafficRequest(service=service)
    return (await calls.traffic.GetTraffic(request, timeout=calls.timeout)).traffic


async def _details(calls: Calls, findings: Iterable[api.Finding]) -> dict[int, api.GetFindingResponse]:
    """Without bodies: differences say what matters."""
    found = {}
    for finding in findings:
        request = api.GetFindingRequest(id=finding.id)
        found[finding.id] = detail = await calls.comparison.GetFinding(request, timeout=calls.timeout)
        del detail.examples[1:]
        for example in detail.examples:
            del example.captures[:]
    return found
