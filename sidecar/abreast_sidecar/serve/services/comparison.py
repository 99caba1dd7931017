"""ComparisonService and LatencyService."""

# ruff: noqa: ARG002, N802  # gRPC gives the signatures and names

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from abreast.v1 import comparison_pb2 as pb
from abreast.v1 import comparison_pb2_grpc, latency_pb2_grpc
from abreast.v1 import latency_pb2 as latency_pb
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.serve import validate
from abreast_sidecar.serve.convert import to_message, to_verdict_response
from abreast_sidecar.serve.errors import StoppingError
from abreast_sidecar.serve.health import PairBacklog
from abreast_sidecar.serve.rule_arguments import to_stored_rule_message
from abreast_sidecar.stats.latency import measure_paired_latency, split_cold_pairs
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, set_status
from abreast_sidecar.store.rules import RuleFilter, RuleStore
from abreast_sidecar.traffic.control import TrafficController

DEFAULT_CONFIDENCE = 0.95  # default of GetLatency
MAX_FINDING_RULES = 20  # in GetFindingResponse
WATCH_INTERVAL_S = 1.0


class ComparisonServicer(comparison_pb2_grpc.ComparisonServiceServicer):
    def __init__(self, reader: LedgerReader, control: TrafficController, backlog: PairBacklog) -> None:
        self.reader = reader
        self.rule_store = RuleStore(reader.database)
        self.control = control
        self.backlog = backlog

    async def GetSummary(self, request: pb.GetSummaryRequest, context: Any) -> pb.GetSummaryResponse:
        window = validate.parse_window(request)
        service = await self._resolve_service(request)
        summary = await self.reader.read_summary(service, window)
        return to_message(pb.GetSummaryResponse, summary, pending=await self.backlog.count(service))

    async def GetVerdict(self, request: pb.GetVerdictRequest, context: Any) -> pb.GetVerdictResponse:
        window, budget = validate.parse_window(request), validate.parse_budget(request)
        service = await self._resolve_service(request)
        release = validate.check_text("release", request.release)
        # Count the backlog before the rows: a pair that is compared in between then counts twice, not never.
        pending = await self.backlog.count(service)
        verdict = await self.reader.read_verdict(
            service, window, budget, pending or 0, release=release, all_releases=request.all_releases
        )
        return to_verdict_response(service, verdict, budget, verdict.release)

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        service = validate.check_text("service", request.service)
        page = await self.reader.list_endpoints(service, validate.parse_window(request), validate.parse_page(request))
        return to_message(pb.ListEndpointsResponse, page)

    async def ListFindings(self, request: pb.ListFindingsRequest, context: Any) -> pb.ListFindingsResponse:
        criteria = validate.parse_filter(FindingFilter, request)
        return to_message(
            pb.ListFindingsResponse, await self.reader.list_findings(criteria, validate.parse_page(request))
        )

    async def GetFinding(self, request: pb.GetFindingRequest, context: Any) -> pb.GetFindingResponse:
        finding, examples = await self.reader.get_finding(validate.check_finding_id("id", request.id))
        rule_filter = RuleFilter(finding_id=finding.id, include_expired=False)
        rules = await self.rule_store.list_rules(rule_filter, limit=MAX_FINDING_RULES)
        return to_message(
            pb.GetFindingResponse,
            finding=finding,
            examples=examples,
            feature=await self.reader.find_common_feature(finding),
            events=await self.reader.list_finding_events(finding.id),
            explained_by=[to_stored_rule_message(rule) for rule in rules],
        )

    async def SetFindingStatus(self, request: pb.SetFindingStatusRequest, context: Any) -> pb.SetFindingStatusResponse:
        finding_id = validate.check_finding_id("id", request.id)
        change = validate.parse_status_change(request, context.peer())
        await set_status(self.reader.database, finding_id, change)
        (finding,) = await self.reader.get_findings([finding_id])
        return to_message(pb.SetFindingStatusResponse, finding=finding)

    async def ListPairs(self, request: pb.ListPairsRequest, context: Any) -> pb.ListPairsResponse:
        validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        criteria = validate.parse_filter(PairFilter, request)
        return to_message(pb.ListPairsResponse, await self.reader.list_pairs(criteria, validate.parse_page(request)))

    async def GetPair(self, request: pb.GetPairRequest, context: Any) -> pb.GetPairResponse:
        return to_message(pb.GetPairResponse, pair=await self.reader.get_pair(validate.check_pair_id(request.id)))

    async def WatchFindings(
        self, request: pb.WatchFindingsRequest, context: Any
    ) -> AsyncIterator[pb.WatchFindingsResponse]:
        service = validate.check_text("service", request.service)
        await context.send_initial_metadata(())  # tells the client that the watch has begun, even without findings
        last_marks: dict[int, tuple[Any, ...]] = {}
        while not self.control.shutdown.is_set():
            marks = await self.reader.read_finding_marks(service)
            changed_ids = [finding_id for finding_id, mark in marks.items() if last_marks.get(finding_id) != mark]
            for finding in await self.reader.get_findings(changed_ids) if changed_ids else ():
                if (finding.count and not finding.is_explained) or request.include_noise:
                    yield to_message(pb.WatchFindingsResponse, finding=finding)
            last_marks = marks
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self.control.shutdown.wait()
        raise StoppingError

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(validate.check_text("service", request.service))


class LatencyServicer(latency_pb2_grpc.LatencyServiceServicer):
    def __init__(self, database: Database, control: TrafficController) -> None:
        self.database = database
        self.control = control

    async def GetLatency(self, request: latency_pb.GetLatencyRequest, context: Any) -> latency_pb.GetLatencyResponse:
        window, confidence = validate.parse_window(request), request.confidence or DEFAULT_CONFIDENCE
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must be above 0 and below 1, got {confidence:g}")
        endpoint = Endpoint(
            await self.control.resolve_service(validate.check_text("service", request.service)),
            validate.check_text("method", request.method).upper(),
            validate.check_text("route", request.route),
        )
        timings, is_truncated = await read_timings(self.database, endpoint, window)
        cold, warm = split_cold_pairs(timings)
        return to_message(
            latency_pb.GetLatencyResponse,
            endpoint=endpoint,
            warm=await asyncio.to_thread(measure_paired_latency, warm, confidence),
            cold=await asyncio.to_thread(measure_paired_latency, cold, confidence),
            confidence=confidence,
            truncated=is_truncated,
        )
