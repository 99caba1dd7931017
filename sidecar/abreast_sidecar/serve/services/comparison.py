from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from abreast.v1 import common_pb2, comparison_pb2_grpc, latency_pb2_grpc
from abreast.v1 import comparison_pb2 as pb
from abreast.v1 import latency_pb2 as latency_pb
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.serve import messages, verdicts
from abreast_sidecar.serve import validate as arguments
from abreast_sidecar.serve.errors import StoppingError
from abreast_sidecar.serve.http import PairBacklog
from abreast_sidecar.serve.rule_arguments import to_stored_rule_message
from abreast_sidecar.serve.values import to_duration
from abreast_sidecar.stats.latency import PairedLatency, measure_paired_latency, split_cold_pairs
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, set_status
from abreast_sidecar.store.rules import RuleFilter, RuleStore
from abreast_sidecar.traffic.control import TrafficController

# ruff: noqa: ARG002, N802  # names and shapes are the API's


DEFAULT_CONFIDENCE = 0.95


class LatencyServicer(latency_pb2_grpc.LatencyServiceServicer):
    def __init__(self, database: Database, control: TrafficController) -> None:
        self.database = database
        self.control = control

    async def GetLatency(self, request: latency_pb.GetLatencyRequest, context: Any) -> latency_pb.GetLatencyResponse:
        window, confidence = arguments.parse_window(request), request.confidence or DEFAULT_CONFIDENCE
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must lie above 0 and below 1, got {confidence:g}")
        endpoint = Endpoint(
            await self.control.resolve_service(arguments.check_text("service", request.service)),
            arguments.check_text("method", request.method).upper(),
            arguments.check_text("route", request.route),
        )
        pair_timings, is_truncated = await read_timings(self.database, endpoint, window)
        cold, warm = split_cold_pairs(pair_timings)
        return latency_pb.GetLatencyResponse(
            endpoint=common_pb2.Endpoint(service=endpoint.service, method=endpoint.method, route=endpoint.route),
            warm=_to_latency_message(await asyncio.to_thread(measure_paired_latency, warm, confidence)),
            cold=_to_latency_message(await asyncio.to_thread(measure_paired_latency, cold, confidence)),
            confidence=confidence,
            truncated=is_truncated,
        )


def _to_latency_message(latency: PairedLatency) -> latency_pb.PairedLatency:
    return latency_pb.PairedLatency(
        pairs=latency.pairs,
        percentiles=[
            latency_pb.LatencyPercentile(
                quantile=quantile.share, old=to_duration(quantile.old_us), new=to_duration(quantile.new_us)
            )
            for quantile in latency.percentiles
        ],
        differences=[
            latency_pb.LatencyDifference(
                quantile=quantile.share,
                value=to_duration(quantile.value),
                low=to_duration(quantile.low),
                high=to_duration(quantile.high),
            )
            for quantile in latency.differences_us
        ],
        ratios=[
            latency_pb.LatencyRatio(quantile=quantile.share, value=quantile.value, low=quantile.low, high=quantile.high)
            for quantile in latency.ratios
        ],
        baseline_pairs=latency.copies,
    )


# ruff: noqa: ARG002, N802  # names and shapes are the API's


MAX_FINDING_RULES = 20  # that are named with a finding
WATCH_INTERVAL_S = 1.0  # seconds


class ComparisonServicer(comparison_pb2_grpc.ComparisonServiceServicer):
    def __init__(self, reader: LedgerReader, control: TrafficController, backlog: PairBacklog) -> None:
        self.reader = reader
        self.rule_store = RuleStore(reader.database)
        self.control = control
        self.backlog = backlog

    async def GetSummary(self, request: pb.GetSummaryRequest, context: Any) -> pb.GetSummaryResponse:
        window = arguments.parse_window(request)
        service = await self.control.resolve_service(arguments.check_text("service", request.service))
        summary = await self.reader.read_summary(service, window)
        return messages.to_summary_response(summary, pending=await self.backlog.count(service))

    async def GetVerdict(self, request: pb.GetVerdictRequest, context: Any) -> pb.GetVerdictResponse:
        window, budget = arguments.parse_window(request), arguments.parse_budget(request)
        service = await self.control.resolve_service(arguments.check_text("service", request.service))
        pending = await self.backlog.count(service)  # first: what arrives meanwhile is no hole
        release = arguments.check_text("release", request.release)
        verdict = await self.reader.read_verdict(
            service, window, budget, pending or 0, release=release, all_releases=request.all_releases
        )
        return verdicts.to_verdict_response(service, verdict, budget)

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        page = await self.reader.list_endpoints(
            arguments.check_text("service", request.service),
            arguments.parse_window(request),
            arguments.parse_page(request),
        )
        return pb.ListEndpointsResponse(
            endpoints=[messages.to_endpoint_summary_message(row) for row in page.rows], next_page_token=page.next_token
        )

    async def ListFindings(self, request: pb.ListFindingsRequest, context: Any) -> pb.ListFindingsResponse:
        finding_filter = FindingFilter(
            service=arguments.check_text("service", request.service),
            method=arguments.check_text("method", request.method).upper(),
            route=arguments.check_text("route", request.route),
            parts=arguments.parse_parts(request.parts),
            kinds=arguments.parse_kinds(request.kinds),
            impacts=arguments.parse_impacts(request.impacts),
            include_noise=request.include_noise,
            include_settled=request.include_settled,
            only_explained=request.only_explained,
            release=arguments.check_text("release", request.release),
            window=arguments.parse_window(request),
        )
        page = await self.reader.list_findings(finding_filter, arguments.parse_page(request))
        return pb.ListFindingsResponse(
            findings=[messages.to_finding_message(row) for row in page.rows], next_page_token=page.next_token
        )

    async def GetFinding(self, request: pb.GetFindingRequest, context: Any) -> pb.GetFindingResponse:
        finding, examples = await self.reader.get_finding(arguments.check_finding_id("id", request.id))
        rule_filter = RuleFilter(finding_id=finding.id, include_expired=False)
        return pb.GetFindingResponse(
            finding=messages.to_finding_message(finding),
            examples=[messages.to_pair_detail_message(row) for row in examples],
            feature=messages.to_feature_message(await self.reader.find_common_feature(finding)),
            events=[
                messages.to_finding_event_message(row) for row in await self.reader.list_finding_events(finding.id)
            ],
            explained_by=[
                to_stored_rule_message(row)
                for row in await self.rule_store.list_rules(rule_filter, limit=MAX_FINDING_RULES)
            ],
        )

    async def SetFindingStatus(self, request: pb.SetFindingStatusRequest, context: Any) -> pb.SetFindingStatusResponse:
        finding_id, status_change = (
            arguments.check_finding_id("id", request.id),
            arguments.parse_status_change(request, context.peer()),
        )
        await set_status(self.reader.database, finding_id, status_change)
        (finding,) = await self.reader.get_findings([finding_id])
        return pb.SetFindingStatusResponse(finding=messages.to_finding_message(finding))

    async def ListPairs(self, request: pb.ListPairsRequest, context: Any) -> pb.ListPairsResponse:
        pair_filter = PairFilter(
            service=arguments.check_text("service", request.service),
            method=arguments.check_text("method", request.method).upper(),
            route=arguments.check_text("route", request.route),
            outcomes=arguments.parse_outcomes(request.outcomes),
            finding_id=arguments.check_finding_id("finding_id", request.finding_id, minimum=0),
            window=arguments.parse_window(request),
        )
        page = await self.reader.list_pairs(pair_filter, arguments.parse_page(request))
        return pb.ListPairsResponse(
            pairs=[messages.to_pair_message(row) for row in page.rows], next_page_token=page.next_token
        )

    async def GetPair(self, request: pb.GetPairRequest, context: Any) -> pb.GetPairResponse:
        detail = await self.reader.get_pair(arguments.parse_pair_id(request.id))
        return pb.GetPairResponse(pair=messages.to_pair_detail_message(detail))

    async def WatchFindings(
        self, request: pb.WatchFindingsRequest, context: Any
    ) -> AsyncIterator[pb.WatchFindingsResponse]:
        service = arguments.check_text("service", request.service)
        await context.send_initial_metadata(())  # the watch has begun, also where there is nothing to tell yet
        seen_marks: dict[int, tuple[Any, ...]] = {}
        while not self.control.shutdown.is_set():
            marks = await self.reader.read_finding_marks(service)
            changed_ids = [finding_id for finding_id, mark in marks.items() if seen_marks.get(finding_id) != mark]
            for finding in await self.reader.get_findings(changed_ids) if changed_ids else ():
                if (finding.count and not finding.is_explained) or request.include_noise:
                    yield pb.WatchFindingsResponse(finding=messages.to_finding_message(finding))
            seen_marks = marks
            await self._wait_interval()
        raise StoppingError

    async def _wait_interval(self) -> None:
        try:
            async with asyncio.timeout(WATCH_INTERVAL_S):
                await self.control.shutdown.wait()
        except TimeoutError:
            return
