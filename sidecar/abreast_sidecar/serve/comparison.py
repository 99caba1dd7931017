# ruff: noqa: ARG002, N802  # names and shapes are the API's
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from abreast.v1 import comparison_pb2 as pb
from abreast.v1 import comparison_pb2_grpc
from abreast_sidecar.compare.verdict import decide
from abreast_sidecar.control import Control
from abreast_sidecar.serve import arguments, messages, verdicts
from abreast_sidecar.serve.pending import Pending
from abreast_sidecar.serve.rule_arguments import message
from abreast_sidecar.serve.status import StoppingError
from abreast_sidecar.serve.verdicts import ledger
from abreast_sidecar.store.queries import FindingFilter, PairFilter, Queries
from abreast_sidecar.store.rules import RuleFilter, RuleStore
from abreast_sidecar.store.statuses import set_status

MOST_RULES = 20  # that are named with a finding
WATCH_EVERY = 1.0  # seconds


class Comparison(comparison_pb2_grpc.ComparisonServiceServicer):
    def __init__(self, queries: Queries, control: Control, pending: Pending) -> None:
        self.queries = queries
        self.rules = RuleStore(queries.database)
        self.control = control
        self.pending = pending

    async def GetSummary(self, request: pb.GetSummaryRequest, context: Any) -> pb.GetSummaryResponse:
        window = arguments.window(request)
        service = await self.control.resolve(arguments.text("service", request.service))
        found = await self.queries.summary(service, window)
        return messages.summary(found, pending=await self.pending.count(service))

    async def GetVerdict(self, request: pb.GetVerdictRequest, context: Any) -> pb.GetVerdictResponse:
        window, budget = arguments.window(request), arguments.budget(request)
        service = await self.control.resolve(arguments.text("service", request.service))
        pending = await self.pending.count(service)  # first: what arrives meanwhile is no hole
        release = arguments.text("release", request.release)
        found = await self.queries.evidence(
            service, window, budget.max_slower, release=release, all_releases=request.all_releases
        )
        verdict = decide(found.endpoints, ledger(found, pending or 0), budget)
        return verdicts.response(service, verdict, budget, found.release)

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        found = await self.queries.endpoints(
            arguments.text("service", request.service), arguments.window(request), arguments.page(request)
        )
        return pb.ListEndpointsResponse(
            endpoints=[messages.endpoint_summary(row) for row in found.rows], next_page_token=found.next_token
        )

    async def ListFindings(self, request: pb.ListFindingsRequest, context: Any) -> pb.ListFindingsResponse:
        wanted = FindingFilter(
            service=arguments.text("service", request.service),
            method=arguments.text("method", request.method).upper(),
            route=arguments.text("route", request.route),
            parts=arguments.part_names(request.parts),
            kinds=arguments.kinds(request.kinds),
            impacts=arguments.impacts(request.impacts),
            include_noise=request.include_noise,
            include_settled=request.include_settled,
            only_explained=request.only_explained,
            release=arguments.text("release", request.release),
            window=arguments.window(request),
        )
        found = await self.queries.findings(wanted, arguments.page(request))
        return pb.ListFindingsResponse(
            findings=[messages.finding(row) for row in found.rows], next_page_token=found.next_token
        )

    async def GetFinding(self, request: pb.GetFindingRequest, context: Any) -> pb.GetFindingResponse:
        found, examples = await self.queries.finding(arguments.finding_id("id", request.id))
        explains = RuleFilter(finding_id=found.id, include_expired=False)
        return pb.GetFindingResponse(
            finding=messages.finding(found),
            examples=[messages.pair_detail(one) for one in examples],
            feature=messages.feature(await self.queries.separating(found)),
            events=[messages.finding_event(one) for one in await self.queries.finding_events(found.id)],
            explained_by=[message(one) for one in await self.rules.listed(explains, limit=MOST_RULES)],
        )

    async def SetFindingStatus(
        self, request: pb.SetFindingStatusRequest, context: Any
    ) -> pb.SetFindingStatusResponse:
        finding_id, said = arguments.finding_id("id", request.id), arguments.said(request, context.peer())
        await set_status(self.queries.database, finding_id, said)
        (found,) = await self.queries.findings_by_id([finding_id])
        return pb.SetFindingStatusResponse(finding=messages.finding(found))

    async def ListPairs(self, request: pb.ListPairsRequest, context: Any) -> pb.ListPairsResponse:
        wanted = PairFilter(
            service=arguments.text("service", request.service),
            method=arguments.text("method", request.method).upper(),
            route=arguments.text("route", request.route),
            outcomes=arguments.outcomes(request.outcomes),
            finding_id=arguments.finding_id("finding_id", request.finding_id, least=0),
            window=arguments.window(request),
        )
        found = await self.queries.pairs(wanted, arguments.page(request))
        return pb.ListPairsResponse(
            pairs=[messages.pair(row) for row in found.rows], next_page_token=found.next_token
        )

    async def GetPair(self, request: pb.GetPairRequest, context: Any) -> pb.GetPairResponse:
        found = await self.queries.pair(arguments.pair_id(request.id))
        return pb.GetPairResponse(pair=messages.pair_detail(found))

    async def WatchFindings(
        self, request: pb.WatchFindingsRequest, context: Any
    ) -> AsyncIterator[pb.WatchFindingsResponse]:
        service = arguments.text("service", request.service)
        await context.send_initial_metadata(
            ()
        )  # the watch has begun, also where there is nothing to tell yet
        seen: dict[int, tuple[Any, ...]] = {}
        while not self.control.closing.is_set():
            marks = await self.queries.finding_marks(service)
            changed = [number for number, mark in marks.items() if seen.get(number) != mark]
            for found in await self.queries.findings_by_id(changed) if changed else ():
                if (found.count and not found.explained) or request.include_noise:
                    yield pb.WatchFindingsResponse(finding=messages.finding(found))
            seen = marks
            await self._pause()
        raise StoppingError

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(WATCH_EVERY):
                await self.control.closing.wait()
        except TimeoutError:
            return
