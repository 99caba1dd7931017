"""Implementations of the gRPC services."""

# ruff: noqa: ARG002, N802  # gRPC gives the signatures and names

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from abreast.v1 import (
    access_pb2,
    access_pb2_grpc,
    comparison_pb2,
    comparison_pb2_grpc,
    latency_pb2,
    latency_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    rule_pb2,
    rule_pb2_grpc,
    traffic_pb2,
    traffic_pb2_grpc,
)
from abreast_sidecar.compare.rules import CompareOptions, Rule
from abreast_sidecar.errors import ArgumentError, NotFoundError, OverbroadRuleError, StoppingError, VerdictError
from abreast_sidecar.jobs.reports import EnvoyError, describe_overrides
from abreast_sidecar.redis_client import PairBacklog
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.rules.attribution import FindingRef
from abreast_sidecar.rules.preview import list_objections, preview_rule
from abreast_sidecar.rules.reapply import load_findings
from abreast_sidecar.serve import validate
from abreast_sidecar.serve.convert import (
    to_cause_message,
    to_draft_message,
    to_message,
    to_rule_message,
    to_stored_rule_message,
    to_traffic_fields,
    to_verdict_response,
)
from abreast_sidecar.stats.latency import measure_paired_latency, split_cold_pairs
from abreast_sidecar.stats.verdict import Budget, Verdict
from abreast_sidecar.store.access import AuditLog, TokenStore
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import FindingFilter, LedgerReader, Listing, PairFilter, read_timings
from abreast_sidecar.store.records import Endpoint, Finding, Window, set_status
from abreast_sidecar.store.rules import MAX_ACTIVE_RULES, RuleDraft, RuleFilter, RuleStore
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.envoys import EnvoyFleet
from abreast_sidecar.traffic.model import MILLION, SAMPLING_ACTOR, AuditNote, Traffic, TrafficChange, find_rule_share

DEFAULT_CONFIDENCE = 0.95  # default of GetLatency
MAX_FINDING_RULES = 20  # in GetFindingResponse
OVERRIDES_WAIT_S = 0.1
WATCH_INTERVAL_S = 1.0
WATCH_SHARE = 0.9  # part of the interval, so that a watch does not miss every second read
FEED_EXPIRY_S = 60.0
MAX_LISTED_OBJECTIONS = 10  # in an error message
MAX_GATE_REASONS = 3  # in an error message


class VerdictGate:
    """Refuses to send more users to new while the verdict is FAIL, unless the caller forces it."""

    def __init__(self, reader: LedgerReader, backlog: PairBacklog) -> None:
        self.reader = reader
        self.backlog = backlog
        self._reads: dict[tuple[str, Budget], asyncio.Task[Verdict]] = {}

    async def _share_read(self, service: str, budget: Budget) -> Verdict:
        """Read the verdict. Concurrent calls share one read."""
        key = service, budget
        if key not in self._reads:
            self._reads[key] = task = asyncio.create_task(self._read_verdict(service, budget))
            task.add_done_callback(lambda _: self._reads.pop(key))
        return await asyncio.shield(self._reads[key])

    async def _read_verdict(self, service: str, budget: Budget) -> Verdict:
        pending = await self.backlog.count(service) or 0
        return await self.reader.read_verdict(service, Window(), budget, pending)

    async def check(self, service: str, budget: Budget, *, force: bool) -> list[str]:
        """Return warnings. Raise VerdictError for a FAIL without `force`."""
        verdict = await self._share_read(service, budget)
        if verdict.state == "PASS":
            return []
        reasons = [reason for reason in verdict.reasons if reason.state == verdict.state]
        texts = [f"{reason.endpoint}: {reason.text}" if reason.endpoint else reason.text for reason in reasons]
        more_text = f"; and {len(texts) - MAX_GATE_REASONS} more reasons" if len(texts) > MAX_GATE_REASONS else ""
        text = f"the verdict of {service} is {verdict.state}: {'; '.join(texts[:MAX_GATE_REASONS])}{more_text}"
        if verdict.state == "FAIL" and not force:
            raise VerdictError(f"{text}. Fix new, or use force if you accept this")
        return [text]


class ServiceResolver:
    """Base of servicers whose requests may leave out the name of the only service."""

    def __init__(self, control: TrafficController) -> None:
        self.control = control

    async def _resolve_service(self, request: Any) -> str:
        return await self.control.resolve_service(validate.check_text("service", request.service))


@dataclass(frozen=True, slots=True)
class MarkedFinding:
    """A finding, and what changes whenever the finding does."""

    mark: tuple[Any, ...]
    finding: Finding


class FindingFeed:
    """Reads the findings of a service once per WATCH_INTERVAL_S, however many watches there are."""

    def __init__(self, reader: LedgerReader) -> None:
        self._reader = reader
        self._reads: dict[str, tuple[float, asyncio.Task[Mapping[int, MarkedFinding]]]] = {}  # by service; start

    async def read(self, service: str) -> Mapping[int, MarkedFinding]:
        """Return the findings by id. All callers of one interval share a read, and its error."""
        now = time.monotonic()
        started, task = self._reads.get(service, (0.0, None))
        if task is None or (task.done() and now - started >= WATCH_INTERVAL_S * WATCH_SHARE):
            is_usable = task is not None and not task.cancelled() and task.exception() is None
            known = task.result() if task is not None and is_usable else {}
            self._reads = {
                name: read for name, read in self._reads.items() if now - read[0] < FEED_EXPIRY_S or name == service
            }
            task = asyncio.create_task(self._read(service, known))
            self._reads[service] = now, task
        return await asyncio.shield(task)

    async def _read(self, service: str, known: Mapping[int, MarkedFinding]) -> Mapping[int, MarkedFinding]:
        marks = await self._reader.read_finding_marks(service)
        changed_ids = [key for key, mark in marks.items() if key not in known or known[key].mark != mark]
        changed = {item.id: item for item in await self._reader.get_findings(changed_ids)} if changed_ids else {}
        return {
            key: MarkedFinding(mark, changed[key]) if key in changed else known[key]
            for key, mark in marks.items()
            if key in changed or key in known
        }


class ComparisonServicer(ServiceResolver, comparison_pb2_grpc.ComparisonServiceServicer):
    def __init__(self, reader: LedgerReader, control: TrafficController, backlog: PairBacklog) -> None:
        super().__init__(control)
        self.reader = reader
        self.rule_store = RuleStore(reader.database)
        self.backlog = backlog
        self.feed = FindingFeed(reader)

    async def _check_service(self, request: Any) -> None:
        """Raise NotFoundError for an unknown service: a misspelt name must not look like a service without findings."""
        if request.service and not await self.reader.is_known_service(request.service):
            await self._resolve_service(request)

    async def GetSummary(
        self, request: comparison_pb2.GetSummaryRequest, context: Any
    ) -> comparison_pb2.GetSummaryResponse:
        window = validate.parse_window(request)
        service = await self._resolve_service(request)
        summary = await self.reader.read_summary(service, window)
        return to_message(comparison_pb2.GetSummaryResponse, summary, pending=await self.backlog.count(service))

    async def GetVerdict(
        self, request: comparison_pb2.GetVerdictRequest, context: Any
    ) -> comparison_pb2.GetVerdictResponse:
        window, budget = validate.parse_window(request), validate.parse_budget(request)
        service = await self._resolve_service(request)
        release = validate.check_text("release", request.release)
        # Count the backlog before the rows: a pair that is compared in between then counts twice, not never.
        pending = await self.backlog.count(service)
        verdict = await self.reader.read_verdict(
            service, window, budget, pending or 0, release=release, all_releases=request.all_releases
        )
        return to_verdict_response(service, verdict, budget, verdict.release)

    async def ListEndpoints(
        self, request: comparison_pb2.ListEndpointsRequest, context: Any
    ) -> comparison_pb2.ListEndpointsResponse:
        service = validate.check_text("service", request.service)
        window, position = validate.parse_window(request), validate.parse_page(request)
        await self._check_service(request)
        page = await self.reader.list_endpoints(service, window, position)
        return to_message(comparison_pb2.ListEndpointsResponse, page)

    async def ListCauses(
        self, request: comparison_pb2.ListCausesRequest, context: Any
    ) -> comparison_pb2.ListCausesResponse:
        criteria, position = validate.parse_filter(FindingFilter, request), validate.parse_page(request)
        await self._check_service(request)
        page = await self.reader.list_causes(criteria, position)
        leads = {finding.id: finding for finding in await self.reader.get_findings([row.lead.id for row in page.rows])}
        return comparison_pb2.ListCausesResponse(
            causes=[to_cause_message(cause, leads.get(cause.lead.id)) for cause in page.rows],
            next_page_token=page.next_token,
            total_size=page.total_size,
            finding_count=page.finding_count,
        )

    async def ListFindings(
        self, request: comparison_pb2.ListFindingsRequest, context: Any
    ) -> comparison_pb2.ListFindingsResponse:
        validate.check_finding_id("cause_id", request.cause_id, minimum=0)
        criteria, position = validate.parse_filter(FindingFilter, request), validate.parse_page(request)
        await self._check_service(request)
        return to_message(comparison_pb2.ListFindingsResponse, await self.reader.list_findings(criteria, position))

    async def GetFinding(
        self, request: comparison_pb2.GetFindingRequest, context: Any
    ) -> comparison_pb2.GetFindingResponse:
        finding, examples = await self.reader.get_finding(validate.check_finding_id("id", request.id))
        rule_filter = RuleFilter(finding_id=finding.id, include_expired=False)
        rules = await self.rule_store.list_rules(rule_filter, limit=MAX_FINDING_RULES)
        return to_message(
            comparison_pb2.GetFindingResponse,
            finding=finding,
            examples=examples,
            feature=await self.reader.find_common_feature(finding),
            events=await self.reader.list_finding_events(finding.id),
            explained_by=[to_stored_rule_message(rule) for rule in rules],
        )

    async def SetFindingStatus(
        self, request: comparison_pb2.SetFindingStatusRequest, context: Any
    ) -> comparison_pb2.SetFindingStatusResponse:
        finding_id = validate.check_finding_id("id", request.id)
        change = validate.parse_status_change(request, context.peer())
        await set_status(self.reader.database, finding_id, change)
        (finding,) = await self.reader.get_findings([finding_id])
        return to_message(comparison_pb2.SetFindingStatusResponse, finding=finding)

    async def ListPairs(
        self, request: comparison_pb2.ListPairsRequest, context: Any
    ) -> comparison_pb2.ListPairsResponse:
        validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        criteria, position = validate.parse_filter(PairFilter, request), validate.parse_page(request)
        await self._check_service(request)
        return to_message(comparison_pb2.ListPairsResponse, await self.reader.list_pairs(criteria, position))

    async def GetPair(self, request: comparison_pb2.GetPairRequest, context: Any) -> comparison_pb2.GetPairResponse:
        return to_message(
            comparison_pb2.GetPairResponse, pair=await self.reader.get_pair(validate.check_pair_id(request.id))
        )

    async def WatchFindings(
        self, request: comparison_pb2.WatchFindingsRequest, context: Any
    ) -> AsyncIterator[comparison_pb2.WatchFindingsResponse]:
        service = validate.check_text("service", request.service)
        await self._check_service(request)
        await context.send_initial_metadata(())  # tells the client that the watch has begun, even without findings
        last_findings: Mapping[int, MarkedFinding] = {}
        while not self.control.shutdown.is_set():
            findings = await self.feed.read(service)
            for finding_id, marked in findings.items():
                last = last_findings.get(finding_id)
                if last is not None and last.mark == marked.mark:
                    continue
                finding = marked.finding
                if (finding.count and not finding.is_explained) or request.include_noise:
                    yield to_message(comparison_pb2.WatchFindingsResponse, finding=finding)
            last_findings = findings
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_INTERVAL_S):
                    await self.control.shutdown.wait()
        raise StoppingError


class LatencyServicer(ServiceResolver, latency_pb2_grpc.LatencyServiceServicer):
    def __init__(self, database: Database, control: TrafficController) -> None:
        super().__init__(control)
        self.database = database

    async def GetLatency(self, request: latency_pb2.GetLatencyRequest, context: Any) -> latency_pb2.GetLatencyResponse:
        window, confidence = validate.parse_window(request), request.confidence or DEFAULT_CONFIDENCE
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must be above 0 and below 1, got {confidence:g}")
        endpoint = Endpoint(
            await self._resolve_service(request),
            validate.check_text("method", request.method).upper(),
            validate.check_text("route", request.route),
        )
        timings, is_truncated = await read_timings(self.database, endpoint, window)
        cold, warm = split_cold_pairs(timings)
        return to_message(
            latency_pb2.GetLatencyResponse,
            endpoint=endpoint,
            warm=await asyncio.to_thread(measure_paired_latency, warm, confidence),
            cold=await asyncio.to_thread(measure_paired_latency, cold, confidence),
            confidence=confidence,
            truncated=is_truncated,
        )


class TrafficServicer(ServiceResolver, traffic_pb2_grpc.TrafficServiceServicer):
    def __init__(self, control: TrafficController, envoy_admin: Sequence[str], gate: VerdictGate) -> None:
        super().__init__(control)
        self.envoy_admin = envoy_admin
        self.gate = gate
        self._overrides: dict[tuple[str, str], str] = {}  # the last reading by admin address and service
        self._override_reads: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def GetTraffic(self, request: traffic_pb2.GetTrafficRequest, context: Any) -> traffic_pb2.GetTrafficResponse:
        traffic = await self.control.read(await self._resolve_service(request))
        fleet = await self.control.registry.list_all(traffic.service)
        warnings = [*self.control.list_warnings(traffic.service), *await self._list_overrides(traffic.service)]
        events = await self.control.repository.list_events(traffic.service, before_id=None, limit=1)
        warnings += [event.reason for event in events if event.actor == SAMPLING_ACTOR]
        return to_message(
            traffic_pb2.GetTrafficResponse,
            to_traffic_fields(fleet, traffic),
            warnings=warnings,
            effective_sample=await self.gate.reader.read_effective_sample(traffic.service),
            rules=await self._describe_rules(fleet, traffic),
        )

    async def _describe_rules(self, fleet: EnvoyFleet, traffic: Traffic) -> list[traffic_pb2.SampleRule]:
        counts = await self.gate.reader.read_rule_counts(traffic.service) if fleet.rules else {}
        return [
            traffic_pb2.SampleRule(
                name=rule.name,
                condition=rule.condition,
                share=find_rule_share(traffic.shares, rule) / MILLION,
                initial_share=rule.share,
                sampled=counts.get(f"rule.{rule.name}.sampled", 0),
                not_query=counts.get(f"rule.{rule.name}.not_query", 0),
            )
            for rule in fleet.rules
        ]

    async def _list_overrides(self, service: str) -> list[str]:
        """Describe values on the admin interfaces of the Envoys. An Envoy that does not answer in time has its last ones.

        Concurrent calls share one read of an Envoy, which goes on after the calls.
        """
        keys = [(address, service) for address in self.envoy_admin]
        for key in keys:
            if key not in self._override_reads:
                self._override_reads[key] = asyncio.create_task(self._read_overrides(key))
        if keys:
            await asyncio.wait([self._override_reads[key] for key in keys], timeout=OVERRIDES_WAIT_S)
        return [text for key in keys if (text := self._overrides.get(key))]

    async def _read_overrides(self, key: tuple[str, str]) -> None:
        try:
            self._overrides[key] = await describe_overrides(*key)
        except EnvoyError:
            self._overrides.pop(key, None)
        finally:
            del self._override_reads[key]

    async def UpdateTraffic(
        self, request: traffic_pb2.UpdateTrafficRequest, context: Any
    ) -> traffic_pb2.UpdateTrafficResponse:
        change = validate.parse_traffic_change(request)
        if change.rule_shares:
            traffic = await self.control.read(await self._resolve_service(request))
            fleet = await self.control.registry.list_all(traffic.service)
            rule_shares = validate.resolve_rule_shares(change.rule_shares, fleet.rules, traffic.shares.rule_shares)
            change = replace(change, rule_shares=rule_shares)
        fields = await self._change(request, change, context)
        return to_message(traffic_pb2.UpdateTrafficResponse, fields)

    async def Rollback(self, request: traffic_pb2.RollbackRequest, context: Any) -> traffic_pb2.RollbackResponse:
        wait_s = validate.parse_wait(request)
        note = validate.parse_note(request, context.peer())
        result = await self.control.rollback(validate.check_text("service", request.service), note)
        if result.unrecorded_reason:
            await self.control.connections.wait_acknowledged(result.traffic, wait_s)
            fleet = self.control.registry.list_local(
                result.traffic.service, "the ledger, which lists them, can't be reached"
            )
        else:
            fleet = await self.control.registry.wait_acknowledged(result.traffic, wait_s)
        return to_message(
            traffic_pb2.RollbackResponse,
            **to_traffic_fields(fleet, result.traffic),
            previous=result.previous,
            recording_error=result.unrecorded_reason,
        )

    async def Promote(self, request: traffic_pb2.PromoteRequest, context: Any) -> traffic_pb2.PromoteResponse:
        change = replace(TrafficChange.promote(), expected_version=validate.parse_expected_version(request))
        return to_message(traffic_pb2.PromoteResponse, await self._change(request, change, context))

    async def WatchTraffic(
        self, request: traffic_pb2.WatchTrafficRequest, context: Any
    ) -> AsyncIterator[traffic_pb2.WatchTrafficResponse]:
        service = await self._resolve_service(request)
        await self.control.read(service)
        last_traffic = None
        while not self.control.shutdown.is_set():
            current = self.control.current(service)
            if current is None or current.traffic == last_traffic:
                await self.control.change_notifier.wait()
                continue
            last_traffic = current.traffic
            fleet = await self.control.registry.list_all(service)
            yield to_message(traffic_pb2.WatchTrafficResponse, to_traffic_fields(fleet, last_traffic))
        raise StoppingError

    async def ListTrafficEvents(
        self, request: traffic_pb2.ListTrafficEventsRequest, context: Any
    ) -> traffic_pb2.ListTrafficEventsResponse:
        page = validate.parse_page(request)
        service = await self._resolve_service(request)
        listing = Listing("events", {"service": service}, page)
        (before_id,) = listing.decode_position(1)
        events = await self.control.repository.list_events(service, before_id=before_id, limit=listing.limit)
        result = listing.make_page(events, lambda event: event, lambda event: [event.id])
        return to_message(traffic_pb2.ListTrafficEventsResponse, events=result.rows, next_page_token=result.next_token)

    async def _change(self, request: Any, change: TrafficChange, context: Any) -> dict[str, Any]:
        wait_s = validate.parse_wait(request)
        note = validate.parse_note(request, context.peer())
        service = await self._resolve_service(request)
        await self.control.pending_rollbacks.flush(service)
        warnings: list[str] = []
        if change.new_share is not None and change.new_share > (await self.control.read(service)).shares.new_share:
            warnings = await self.gate.check(service, Budget(), force=request.force)
        traffic = await self.control.change(service, change, note)
        fleet = await self.control.registry.wait_acknowledged(traffic, wait_s)
        return {**to_traffic_fields(fleet, traffic), "warnings": warnings}


class RolloutServicer(ServiceResolver, rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(self, control: TrafficController, rollout: RolloutService, gate: VerdictGate) -> None:
        super().__init__(control)
        self.rollout = rollout
        self.gate = gate

    async def GetGuard(self, request: rollout_pb2.GetGuardRequest, context: Any) -> rollout_pb2.GetGuardResponse:
        guard = await self.rollout.get_guard(await self._resolve_service(request))
        return to_message(rollout_pb2.GetGuardResponse, guard=guard)

    async def SetGuard(self, request: rollout_pb2.SetGuardRequest, context: Any) -> rollout_pb2.SetGuardResponse:
        note = validate.parse_note(request, context.peer())
        change = validate.parse_policy_change(request.policy)
        guard = await self.rollout.set_guard(await self._resolve_service(request), change, note)
        return to_message(rollout_pb2.SetGuardResponse, guard=guard)

    async def GetRamp(self, request: rollout_pb2.GetRampRequest, context: Any) -> rollout_pb2.GetRampResponse:
        service = await self._resolve_service(request)
        return to_message(rollout_pb2.GetRampResponse, service=service, ramp=await self.rollout.get_ramp(service))

    async def StartRamp(self, request: rollout_pb2.StartRampRequest, context: Any) -> rollout_pb2.StartRampResponse:
        note, plan = validate.parse_note(request, context.peer()), validate.parse_plan(request.plan)
        service = await self._resolve_service(request)
        await self.control.pending_rollbacks.flush(service)
        warnings = await self.gate.check(service, plan.budget, force=request.force)
        ramp = await self.rollout.start_ramp(service, plan, note, requires_drill=request.require_drill)
        return to_message(rollout_pb2.StartRampResponse, ramp=ramp, warnings=warnings)

    async def PauseRamp(self, request: rollout_pb2.PauseRampRequest, context: Any) -> rollout_pb2.PauseRampResponse:
        ramp = await self.rollout.pause_ramp(*await self._parse_request(request, context))
        return to_message(rollout_pb2.PauseRampResponse, ramp=ramp)

    async def ResumeRamp(self, request: rollout_pb2.ResumeRampRequest, context: Any) -> rollout_pb2.ResumeRampResponse:
        ramp = await self.rollout.resume_ramp(*await self._parse_request(request, context))
        return to_message(rollout_pb2.ResumeRampResponse, ramp=ramp)

    async def AbortRamp(self, request: rollout_pb2.AbortRampRequest, context: Any) -> rollout_pb2.AbortRampResponse:
        ramp = await self.rollout.abort_ramp(*await self._parse_request(request, context))
        return to_message(rollout_pb2.AbortRampResponse, ramp=ramp)

    async def GetDrill(self, request: rollout_pb2.GetDrillRequest, context: Any) -> rollout_pb2.GetDrillResponse:
        traffic = await self.control.read(await self._resolve_service(request))
        return rollout_pb2.GetDrillResponse(drill=await self._describe_drill(traffic))

    async def StartDrill(self, request: rollout_pb2.StartDrillRequest, context: Any) -> rollout_pb2.StartDrillResponse:
        drill = validate.parse_drill(request)
        service, note = await self._parse_request(request, context)
        traffic = await self.rollout.start_drill(service, drill, note)
        return rollout_pb2.StartDrillResponse(drill=await self._describe_drill(traffic))

    async def EndDrill(self, request: rollout_pb2.EndDrillRequest, context: Any) -> rollout_pb2.EndDrillResponse:
        service, note = await self._parse_request(request, context)
        traffic = await self.rollout.end_drill(service, note, is_passed=request.passed)
        return rollout_pb2.EndDrillResponse(drill=await self._describe_drill(traffic))

    async def _describe_drill(self, traffic: Traffic) -> rollout_pb2.Drill:
        counts = await self.rollout.count_users(traffic.service)
        return rollout_pb2.Drill(service=traffic.service, active=traffic.shares.drill_share > 0, **counts)

    async def _parse_request(self, request: Any, context: Any) -> tuple[str, AuditNote]:
        note = validate.parse_note(request, context.peer())
        return await self._resolve_service(request), note


class RuleServicer(rule_pb2_grpc.RuleServiceServicer):
    def __init__(self, store: RuleStore, base_rules: CompareOptions) -> None:
        """`base_rules`: the options from settings, which apply besides the rules of the ledger."""
        self.store = store
        self.base_rules = base_rules

    async def CreateRule(self, request: rule_pb2.CreateRuleRequest, context: Any) -> rule_pb2.CreateRuleResponse:
        actor = validate.parse_actor(request, context.peer())
        rule, finding = await self._parse_rule(request)
        draft = validate.parse_draft(request.rule, rule)
        if not request.force:
            previews = await preview_rule(self.store.database, self.base_rules, rule)
            raise_if_overbroad(list_objections(previews, rule, finding))
        (rule_id,) = await self.store.replace_rules([draft], [], actor)
        return rule_pb2.CreateRuleResponse(rule=to_stored_rule_message(await self.store.get(rule_id)))

    async def ListRules(self, request: rule_pb2.ListRulesRequest, context: Any) -> rule_pb2.ListRulesResponse:
        page = validate.parse_page(request)
        source = validate.check_text("source", request.source) if request.HasField("source") else None
        finding_id = validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        filters = {"source": source, "finding_id": finding_id, "include_deleted": request.include_deleted}
        listing = Listing("rules", filters, page)
        (after_id,) = listing.decode_position(1)
        rule_filter = RuleFilter(source, finding_id, include_ended=request.include_deleted)
        rules = await self.store.list_rules(rule_filter, after_id=after_id, limit=listing.limit)
        result = listing.make_page(rules, to_stored_rule_message, lambda rule: [rule.id])
        return rule_pb2.ListRulesResponse(rules=result.rows, next_page_token=result.next_token)

    async def DeleteRule(self, request: rule_pb2.DeleteRuleRequest, context: Any) -> rule_pb2.DeleteRuleResponse:
        actor = validate.parse_actor(request, context.peer())
        if request.id < 1:
            raise ArgumentError(f"id must be the id of a rule from ListRules, got {request.id}")
        return rule_pb2.DeleteRuleResponse(rule=to_stored_rule_message(await self.store.delete(request.id, actor)))

    async def PreviewRule(self, request: rule_pb2.PreviewRuleRequest, context: Any) -> rule_pb2.PreviewRuleResponse:
        rule, finding = await self._parse_rule(request)
        previews = await preview_rule(self.store.database, self.base_rules, rule)
        return rule_pb2.PreviewRuleResponse(
            rule=to_rule_message(rule),
            findings=[to_message(rule_pb2.HiddenFinding, preview) for preview in previews],
            objections=list_objections(previews, rule, finding),
        )

    async def ApplyRules(self, request: rule_pb2.ApplyRulesRequest, context: Any) -> rule_pb2.ApplyRulesResponse:
        actor = validate.parse_actor(request, context.peer())
        source, drafts = validate.parse_drafts(request)
        rule_filter = RuleFilter(source=source, include_expired=False)
        active_rules = await self.store.list_rules(rule_filter, limit=MAX_ACTIVE_RULES + 1)
        active_drafts = [rule.draft for rule in active_rules]
        deleted = [rule for rule in active_rules if rule.draft not in drafts]
        new_drafts = [draft for draft in drafts if draft not in active_drafts]
        objections = [] if request.force else await self._collect_objections(new_drafts)
        if request.dry_run:
            created = [to_draft_message(draft) for draft in new_drafts]
        else:
            raise_if_overbroad(objections)
            ids = await self.store.replace_rules(new_drafts, [rule.id for rule in deleted], actor)
            created_rules = await self.store.list_rules(ids=ids, limit=len(ids)) if ids else []
            created = [to_stored_rule_message(rule) for rule in created_rules]
        return rule_pb2.ApplyRulesResponse(
            created=created,
            deleted=map(to_stored_rule_message, deleted),
            unchanged=[to_stored_rule_message(rule) for rule in active_rules if rule.draft in drafts],
            objections=objections,
        )

    async def _collect_objections(self, drafts: Sequence[RuleDraft]) -> list[str]:
        objections = []
        for draft in drafts:
            previews = await preview_rule(self.store.database, self.base_rules, draft.rule)
            objections += [
                f"rule {draft.rule.name!r}: {objection}" for objection in list_objections(previews, draft.rule, None)
            ]
        return objections

    async def _parse_rule(self, request: Any) -> tuple[Rule, FindingRef | None]:
        """Read the rule of a request, narrowed to its finding."""
        finding_id = validate.check_finding_id("finding_id", request.finding_id, minimum=0)
        if not finding_id:
            return validate.parse_rule(request.rule), None
        if request.rule.action == rule_pb2.RULE_ACTION_WAIVE_COVERAGE:
            raise ArgumentError("finding_id must be unset: a rule that waives coverage explains no finding")
        async with self.store.database.connection() as connection:
            finding = (await load_findings(connection, [finding_id])).get(finding_id)
        if finding is None:
            raise NotFoundError(
                f"the ledger has no finding {finding_id} of single pairs; list the findings with ListFindings"
            )
        rule = validate.parse_narrowed_rule(request.rule, finding)
        if not (
            rule.applies_to(finding.service, finding.endpoint)
            and rule.may_match(finding.part, finding.path, finding.kind)
        ):
            raise ArgumentError(
                f"the rule does not cover finding {finding_id} ({finding.part} {finding.path} {finding.kind} of "
                f"{finding.endpoint}); remove the conditions that exclude it, or choose another action"
            )
        return rule, finding


class AccessServicer(access_pb2_grpc.AccessServiceServicer):
    def __init__(self, tokens: TokenStore, audit: AuditLog) -> None:
        self.tokens = tokens
        self.audit = audit

    async def CreateToken(self, request: access_pb2.CreateTokenRequest, context: Any) -> access_pb2.CreateTokenResponse:
        draft = validate.parse_token(request, context.peer())
        token, secret = await self.tokens.create(draft)
        return to_message(access_pb2.CreateTokenResponse, token=token, secret=secret)

    async def ListTokens(self, request: access_pb2.ListTokensRequest, context: Any) -> access_pb2.ListTokensResponse:
        listing = Listing("tokens", {}, validate.parse_page(request))
        (before_id,) = listing.decode_position(1)
        rows = await self.tokens.list_tokens(before_id=before_id, limit=listing.limit)
        result = listing.make_page(rows, lambda row: row[1], lambda row: [row[0]])
        return to_message(access_pb2.ListTokensResponse, tokens=result.rows, next_page_token=result.next_token)

    async def RevokeToken(self, request: access_pb2.RevokeTokenRequest, context: Any) -> access_pb2.RevokeTokenResponse:
        token = await self.tokens.revoke(validate.check_text("name", request.name))
        return to_message(access_pb2.RevokeTokenResponse, token=token)

    async def ListAuditEvents(
        self, request: access_pb2.ListAuditEventsRequest, context: Any
    ) -> access_pb2.ListAuditEventsResponse:
        window = validate.parse_window(request)
        actor = validate.check_text("actor_filter", request.actor_filter)
        filters = {"actor": actor, "window": [str(window.start), str(window.end)]}
        listing = Listing("audit", filters, validate.parse_page(request))
        (before_id,) = listing.decode_position(1)
        events = await self.audit.list_events(window, actor=actor, before_id=before_id, limit=listing.limit)
        result = listing.make_page(events, lambda event: event, lambda event: [event.id])
        return to_message(access_pb2.ListAuditEventsResponse, events=result.rows, next_page_token=result.next_token)


@dataclass(frozen=True, slots=True)
class Servicers:
    access: AccessServicer
    comparison: ComparisonServicer
    latency: LatencyServicer
    traffic: TrafficServicer
    rollout: RolloutServicer
    rules: RuleServicer


def raise_if_overbroad(objections: Sequence[str]) -> None:
    if not objections:
        return
    more = len(objections) - MAX_LISTED_OBJECTIONS
    raise OverbroadRuleError(
        f"the rule is too broad: {'; '.join(objections[:MAX_LISTED_OBJECTIONS])}"
        f"{f'; and {more} more' if more > 0 else ''}. Narrow it, or use force if you want all of this"
    )
