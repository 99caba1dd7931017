"""Records of the sidecar as messages of the API, and back: the fields whose names or units differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from abreast.protocol.capture import Capture, Request
from abreast.v1 import common_pb2, comparison_pb2, latency_pb2, rollout_pb2, rule_pb2, traffic_pb2
from abreast_sidecar.compare.pair import describe_effect
from abreast_sidecar.compare.rule_document import dict_to_message, rule_to_dict
from abreast_sidecar.compare.rules import Rule
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.serve.proto import MessageConverter, Source, read_attribute
from abreast_sidecar.stats.causes import Cause
from abreast_sidecar.stats.verdict import Budget, Measure, Reason, Verdict
from abreast_sidecar.store.records import Finding, StoredPairDetail
from abreast_sidecar.store.rules import RuleDraft, StoredRule
from abreast_sidecar.traffic.envoys import EnvoyFleet
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, Traffic

MAX_SUMMARY_VALUE_CHARS = 60
MAX_CAUSE_ENDPOINTS = 20
SPAN_ATTRIBUTES = ("kind", "name", "start_us", "duration_us", "note")


def summarise_finding(finding: Finding) -> str:
    """Describe the difference in one line: `200 became 500`, `removed, was "max-age=60"`, `p50 3.1 ms became 41.0 ms`."""
    detail = finding.detail
    if finding.part == "latency":
        old_us, new_us = detail.get("old_p50_us"), detail.get("new_p50_us")
        if old_us is None or new_us is None:
            return finding.kind
        return f"p50 {old_us / 1000:.1f} ms became {new_us / 1000:.1f} ms"
    if finding.part == "cache":
        old, new = detail.get("old"), detail.get("new")
        return finding.kind if old is None or new is None else f"{old:g} misses a request became {new:g}"
    if (finding.part, finding.path) == ("error", "no capture"):
        return "old answered, new left no capture in time"
    if finding.kind == "order":
        return "same elements in another order"
    old_text, new_text = _shorten(detail.get("old")), _shorten(detail.get("new"))
    if finding.kind == "added":
        return f"added {new_text}".rstrip()
    if finding.kind == "removed":
        return f"removed, was {old_text}" if old_text else "removed"
    if old_text and new_text:
        return f"{old_text} became {new_text}"
    return "another type" if finding.kind == "type" else finding.kind


def _shorten(value: str | None) -> str:
    limit = MAX_SUMMARY_VALUE_CHARS
    return "" if value is None else value if len(value) <= limit else value[: limit - 1] + "…"


def _find_rate(finding: Finding) -> Mapping[str, float] | None:
    interval = finding.rate
    if interval is None:
        return None
    return {
        "value": min(finding.count, finding.compared) / finding.compared,
        "low": interval.low,
        "high": interval.high,
    }


def _measure_to_rate(measure: Measure | None) -> comparison_pb2.Rate | None:
    if measure is None or measure.bounds is None or not measure.total:
        return None
    bounds = measure.bounds
    return comparison_pb2.Rate(value=measure.count / measure.total, low=bounds.low, high=bounds.high)


def _sort_outcomes(record: Any) -> list[tuple[str, int]]:
    """Return outcomes and their counts, the most frequent first."""
    return sorted(record.outcomes.items(), key=lambda item: (-item[1], item[0]))


def _get_request(detail: StoredPairDetail) -> Request:
    """Return the request as the version has it that read the most of its body."""
    requests = [capture.request for capture in detail.captures]
    return max(requests, key=lambda request: request.body.length, default=Request("", ""))


def _read_effects(capture: Capture) -> Iterable[Mapping[str, Any]]:
    for effect in capture.effects:
        yield {
            "kind": str(effect.get("kind", "")),
            "key": str(effect.get("key") or ""),
            "payload": render_value(describe_effect(effect)),
            "start_us": effect.get("at_us", 0),
            "error": str(effect.get("error") or ""),
            "note": bool(effect.get("note")),
        }


def to_cause_message(cause: Cause, lead: Finding | None) -> comparison_pb2.Cause:
    endpoints = cause.endpoints
    return to_message(
        comparison_pb2.Cause,
        cause,
        part=cause.lead.part,
        kind=cause.lead.kind,
        impact=cause.lead.impact,
        lead=lead,
        finding_count=len(cause.members),
        consequence_count=len(cause.consequences),
        endpoint_count=len(endpoints),
        endpoints=[
            to_message(comparison_pb2.CauseEndpoint, endpoint=member, finding_id=member.id, count=member.count)
            for member in endpoints[:MAX_CAUSE_ENDPOINTS]
        ],
    )


def _microseconds(value: float | None) -> timedelta | None:
    return None if value is None else timedelta(microseconds=value)


SOURCES: Mapping[type[Message], Mapping[str, Source]] = {
    common_pb2.Difference: {"explained_by": "rule_id"},
    comparison_pb2.GetSummaryResponse: {
        "outcomes": _sort_outcomes,
        "envoy_sampled": "sampled",
        "first_pair_time": "first",
        "last_pair_time": "last",
        "written": "accounts.written",
        "not_sent": "accounts.not_sent",
        "uncertain": "accounts.uncertain",
        "captures": "accounts",
        "ledger_clock_ahead": "clock_ahead_s",
    },
    comparison_pb2.DeadLetterCount: {"last_time": "last"},
    comparison_pb2.ListEndpointsResponse: {"endpoints": "rows", "next_page_token": "next_token"},
    comparison_pb2.EndpointSummary: {
        "outcomes": _sort_outcomes,
        "old_p50": lambda row: _microseconds(row.old_us and row.old_us[0]),
        "old_p99": lambda row: _microseconds(row.old_us and row.old_us[1]),
        "new_p50": lambda row: _microseconds(row.new_us and row.new_us[0]),
        "new_p99": lambda row: _microseconds(row.new_us and row.new_us[1]),
    },
    comparison_pb2.ListFindingsResponse: {"findings": "rows", "next_page_token": "next_token"},
    comparison_pb2.Finding: {"noise": "is_noise", "summary": summarise_finding, "rate": _find_rate},
    comparison_pb2.FindingExplanation: {"rule_id": "rule", "rule_name": "name"},
    comparison_pb2.FindingEvent: {"time": "at"},
    comparison_pb2.RequestFeature: {"text": str},
    comparison_pb2.ListPairsResponse: {"pairs": "rows", "next_page_token": "next_token"},
    comparison_pb2.Pair: {
        "time": "at",
        "old_time": "old_us",
        "new_time": "new_us",
        "finding_ids": "findings",
        "drift_finding_ids": "drift",
    },
    comparison_pb2.PairDetail: {
        "request_headers": lambda detail: _get_request(detail).headers,
        "request_body": lambda detail: _get_request(detail).body.content,
        "other_request_headers": lambda detail: _get_request(detail).other_headers,
        "request_body_length": lambda detail: _get_request(detail).body.length,
        "request_target": lambda detail: _get_request(detail).target,
    },
    comparison_pb2.CaptureDetail: {
        "start_time": lambda capture: datetime.fromtimestamp(capture.started_at, UTC),
        "status": "answer.status",
        "headers": "answer.headers",
        "body": "answer.body.content",
        "body_length": "answer.body.length",
        "spans": lambda capture: [dict(zip(SPAN_ATTRIBUTES, span, strict=True)) for span in capture.spans],
        "effects": _read_effects,
    },
    latency_pb2.PairedLatency: {
        "differences": "differences_us",
        "baseline_pairs": "copies",
        "unmatched_pairs": "unmatched",
    },
    latency_pb2.LatencyPercentile: {"quantile": "share"},
    latency_pb2.LatencyDifference: {
        "quantile": "share",
        "value": lambda interval: _microseconds(interval.value),
        "low": lambda interval: _microseconds(interval.low),
        "high": lambda interval: _microseconds(interval.high),
    },
    latency_pb2.LatencyRatio: {"quantile": "share"},
    rollout_pb2.Guard: {
        "update_time": "since",
        # If the guard is off, its last state is out of date.
        "state": lambda guard: "idle" if guard.policy.mode == "off" else guard.state,
        "message": lambda guard: "off" if guard.policy.mode == "off" else guard.message,
        "evaluate_time": "checked_at",
    },
    rollout_pb2.RampPlan: {"steps": lambda plan: [step / TOTAL_WEIGHT for step in read_attribute(plan, "steps")]},
    rollout_pb2.RampState: {
        "phase": "state",
        # The document of an event has the plan's attributes beside its own.
        "plan": lambda ramp: ramp if isinstance(ramp, Mapping) else ramp.plan,
    },
    rollout_pb2.Ramp: {
        "state": lambda ramp: ramp,
        "start_time": "started_at",
        "step_time": "step_at",
        "end_time": "ended_at",
        "evaluate_time": "checked_at",
    },
    rule_pb2.HiddenFinding: {
        "finding_id": "finding.id",
        "endpoint": "finding",
        "part": "finding.part",
        "path": "finding.path",
        "kind": "finding.kind",
        "confirmed": lambda preview: preview.finding.status == "confirmed",
    },
    traffic_pb2.Traffic: {
        "new_share": lambda traffic: traffic.shares.new_share / TOTAL_WEIGHT,
        "sample_safe": lambda traffic: traffic.shares.sample_safe / MILLION,
        "sample_unsafe": lambda traffic: traffic.shares.sample_unsafe / MILLION,
        "baseline_share": lambda traffic: traffic.shares.baseline_share / MILLION,
        "rolled_back": "shares.rolled_back",
        "drill_share": lambda traffic: traffic.shares.drill_share / TOTAL_WEIGHT,
        "rule_shares": lambda traffic: {name: share / MILLION for name, share in traffic.shares.rule_shares.items()},
        "update_time": "updated_at",
    },
    traffic_pb2.TrafficEvent: {
        "time": "at",
        "guard_before": "detail.guard_before",
        "guard_after": "detail.guard_after",
        "ramp_before": "detail.ramp_before",
        "ramp_after": "detail.ramp_after",
    },
}

_converter = MessageConverter(SOURCES)
to_message = _converter.to_message
from_message = _converter.from_message
read_fields = _converter.read_fields


def to_verdict_response(
    service: str, verdict: Verdict, budget: Budget, release: str | None
) -> comparison_pb2.GetVerdictResponse:
    """`release`: the release of new that the verdict is about; None for all releases."""
    # A verdict has three reasons for each endpoint, and the generic conversion takes five times as long.
    subjects, states = comparison_pb2.VerdictSubject, comparison_pb2.VerdictState

    def make_endpoint(name: str) -> common_pb2.Endpoint | None:
        method, _, route = name.partition(" ")
        return common_pb2.Endpoint(service=service, method=method, route=route) if name else None

    def convert_reasons(reasons: Iterable[Reason]) -> list[comparison_pb2.VerdictReason]:
        return [
            comparison_pb2.VerdictReason(
                subject=subjects.Value(f"VERDICT_SUBJECT_{reason.subject.upper()}"),
                endpoint=make_endpoint(reason.endpoint),
                state=states.Value(f"VERDICT_STATE_{reason.state}"),
                count=0 if reason.measure is None else reason.measure.count,
                total=None if reason.measure is None else reason.measure.total,
                rate=_measure_to_rate(reason.measure),
                limit=None if reason.measure is None else reason.measure.limit,
                pairs_to_pass=reason.pairs_needed.to_pass,
                pairs_to_fail=reason.pairs_needed.to_fail,
                text=reason.text,
            )
            for reason in reasons
        ]

    return to_message(
        comparison_pb2.GetVerdictResponse,
        service=service,
        state=verdict.state,
        reasons=convert_reasons(verdict.reasons),
        endpoints=[
            comparison_pb2.EndpointVerdict(
                endpoint=make_endpoint(item.endpoint),
                state=states.Value(f"VERDICT_STATE_{item.state}"),
                reasons=convert_reasons(item.reasons),
            )
            for item in verdict.endpoints
        ],
        pairs_needed=verdict.pairs_to_pass,
        budget=budget,
        release=release,
    )


def to_traffic_fields(fleet: EnvoyFleet, traffic: Traffic) -> dict[str, Any]:
    """Return the fields that all responses of TrafficService with settings have in common."""
    envoys = [
        to_message(traffic_pb2.EnvoyStatus, envoy, acknowledged_after=envoy.acknowledged_after(traffic))
        for envoy in fleet.sorted
    ]
    return {"traffic": traffic, "envoys": envoys, "peers_error": fleet.peers_error}


def to_rule_message(rule: Rule) -> rule_pb2.Rule:
    return dict_to_message(rule_to_dict(rule), rule_pb2.Rule())


def to_draft_message(draft: RuleDraft) -> rule_pb2.Rule:
    message = to_rule_message(draft.rule)
    message.owner, message.reason, message.source = draft.owner, draft.reason, draft.source
    message.expire_time.FromDatetime(draft.expires_at)
    return message


def to_stored_rule_message(rule: StoredRule) -> rule_pb2.Rule:
    state = "in_force" if rule.ended_at is None else "expired" if rule.is_expired else "deleted"
    message = to_draft_message(rule.draft)
    message.MergeFrom(
        to_message(
            rule_pb2.Rule,
            id=rule.id,
            creator=rule.created_by,
            create_time=rule.created_at,
            deleter=rule.ended_by,
            end_time=rule.ended_at,
            state=state,
            reapplied=rule.is_applied,
            pairs=rule.pairs,
            undetermined_pairs=rule.undetermined_pairs,
            findings=rule.findings,
        )
    )
    return message
