"""Results of the ledger and of control as messages of the API."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from abreast.protocol.capture import Capture
from abreast.v1 import common_pb2, comparison_pb2, traffic_pb2
from abreast_sidecar.compare.effects import describe_effect
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.serve import rollout_messages as steering_messages
from abreast_sidecar.serve.phrase import summarise_finding
from abreast_sidecar.serve.values import to_duration, to_enum_number, to_timestamp
from abreast_sidecar.stats.features import Feature
from abreast_sidecar.store.records import (
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    FindingEvent,
    LedgerSummary,
    StoredDifference,
    StoredPair,
    StoredPairDetail,
)
from abreast_sidecar.traffic.envoys import EnvoyFleet, EnvoyStatus
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, Traffic
from abreast_sidecar.traffic.repository import TrafficEvent

OUTCOME_ENUM = common_pb2.Outcome.DESCRIPTOR
PART_ENUM = common_pb2.Part.DESCRIPTOR
KIND_ENUM = common_pb2.Kind.DESCRIPTOR
IMPACT_ENUM = common_pb2.Impact.DESCRIPTOR
FINDING_STATE_ENUM = comparison_pb2.FindingState.DESCRIPTOR
FINDING_STATUS_ENUM = comparison_pb2.FindingStatus.DESCRIPTOR
EXPLANATION_CAUSE_ENUM = comparison_pb2.ExplanationCause.DESCRIPTOR
VERSION_ENUM = common_pb2.Version.DESCRIPTOR
ROLE_ENUM = common_pb2.Role.DESCRIPTOR
GUARD_DETAIL_KEYS = ("guard_before", "guard_after")
RAMP_DETAIL_KEYS = ("ramp_before", "ramp_after")


def to_outcome_counts(counts: Mapping[str, int]) -> list[comparison_pb2.OutcomeCount]:
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        comparison_pb2.OutcomeCount(outcome=to_enum_number(OUTCOME_ENUM, name), count=count)  # type: ignore[arg-type]  # an int is one
        for name, count in most_first
    ]


def to_endpoint_message(endpoint: Endpoint) -> common_pb2.Endpoint:
    return common_pb2.Endpoint(service=endpoint.service, method=endpoint.method, route=endpoint.route)


def to_summary_response(summary: LedgerSummary, *, pending: int | None) -> comparison_pb2.GetSummaryResponse:
    accounts = summary.accounts
    return comparison_pb2.GetSummaryResponse(
        service=summary.service,
        pairs=summary.pairs,
        outcomes=to_outcome_counts(summary.outcomes),
        explained=summary.explained,
        envoy_sampled=summary.sampled,
        unaccounted=summary.unaccounted,
        drops=[
            comparison_pb2.DropCount(stage=drop.stage, reason=drop.reason, count=drop.count) for drop in summary.drops
        ],
        pending=pending,
        findings=summary.findings,
        first_pair_time=to_timestamp(summary.first),
        last_pair_time=to_timestamp(summary.last),
        written=accounts.written,
        not_sent=accounts.not_sent,
        captures=comparison_pb2.CaptureCounts(
            received=accounts.received,
            duplicate=accounts.duplicate,
            late=accounts.late,
            joined=accounts.joined,
            timed_out=accounts.timed_out,
        ),
        dead_letters=[
            comparison_pb2.DeadLetterCount(
                reason=dead_letter.reason, count=dead_letter.count, last_time=to_timestamp(dead_letter.last)
            )
            for dead_letter in summary.dead_letters
        ],
        ledger_clock_ahead=to_duration(summary.clock_ahead_s * 1e6),
    )


def to_endpoint_summary_message(summary: EndpointSummary) -> comparison_pb2.EndpointSummary:
    old_p50, old_p99 = summary.old_us or (None, None)
    new_p50, new_p99 = summary.new_us or (None, None)
    return comparison_pb2.EndpointSummary(
        endpoint=to_endpoint_message(summary.endpoint),
        pairs=summary.pairs,
        outcomes=to_outcome_counts(summary.outcomes),
        findings=summary.findings,
        old_p50=to_duration(old_p50),
        old_p99=to_duration(old_p99),
        new_p50=to_duration(new_p50),
        new_p99=to_duration(new_p99),
    )


def to_finding_message(finding: Finding) -> comparison_pb2.Finding:
    return comparison_pb2.Finding(
        id=finding.id,
        endpoint=to_endpoint_message(finding.endpoint),
        part=to_enum_number(PART_ENUM, finding.part),  # type: ignore[arg-type]  # an int is one
        path=finding.path,
        kind=to_enum_number(KIND_ENUM, finding.kind),  # type: ignore[arg-type]  # an int is one
        impact=to_enum_number(IMPACT_ENUM, finding.impact),  # type: ignore[arg-type]  # an int is one
        count=finding.count,
        compared=finding.compared,
        noise=finding.is_noise,
        baseline_count=finding.baseline_count,
        first_seen=to_timestamp(finding.first_seen),
        last_seen=to_timestamp(finding.last_seen),
        summary=summarise_finding(finding),
        state=to_enum_number(FINDING_STATE_ENUM, finding.state),  # type: ignore[arg-type]  # an int is one
        reason=finding.reason,
        status=to_enum_number(FINDING_STATUS_ENUM, finding.status),  # type: ignore[arg-type]  # an int is one
        rate=to_rate_message(finding),
        old_releases=finding.old_releases,
        new_releases=finding.new_releases,
        status_reason=finding.status_reason,
        explanations=[to_explanation_message(item) for item in finding.explanations],
    )


def to_explanation_message(explanation: Explanation) -> comparison_pb2.FindingExplanation:
    return comparison_pb2.FindingExplanation(
        cause=to_enum_number(EXPLANATION_CAUSE_ENUM, explanation.cause),  # type: ignore[arg-type]  # an int is one
        pairs=explanation.pairs,
        reason=explanation.reason,
        rule_id=explanation.rule,
        rule_name=explanation.name,
        owner=explanation.owner,
    )


def to_rate_message(finding: Finding) -> comparison_pb2.Rate | None:
    interval = finding.rate
    if interval is None:
        return None
    value = min(finding.count, finding.compared) / finding.compared
    return comparison_pb2.Rate(value=value, low=interval.low, high=interval.high)


def to_finding_event_message(event: FindingEvent) -> comparison_pb2.FindingEvent:
    return comparison_pb2.FindingEvent(
        time=to_timestamp(event.at),
        actor=event.actor,
        before=to_enum_number(FINDING_STATUS_ENUM, event.before),  # type: ignore[arg-type]  # an int is one
        after=to_enum_number(FINDING_STATUS_ENUM, event.after),  # type: ignore[arg-type]  # an int is one
        release=event.release,
        reason=event.reason,
    )


def to_feature_message(feature: Feature | None) -> comparison_pb2.RequestFeature | None:
    if feature is None:
        return None
    return comparison_pb2.RequestFeature(text=str(feature), coverage=feature.coverage, precision=feature.precision)


def to_pair_message(pair: StoredPair) -> comparison_pb2.Pair:
    return comparison_pb2.Pair(
        id=pair.id,
        endpoint=to_endpoint_message(pair.endpoint),
        time=to_timestamp(pair.at),
        outcome=to_enum_number(OUTCOME_ENUM, pair.outcome),  # type: ignore[arg-type]  # an int is one
        live=to_enum_number(VERSION_ENUM, pair.live),  # type: ignore[arg-type]  # an int is one
        request=pair.request,
        old_status=pair.old_status,
        new_status=pair.new_status,
        old_time=to_duration(pair.old_us),
        new_time=to_duration(pair.new_us),
        old_release=pair.old_release,
        new_release=pair.new_release,
        finding_ids=pair.findings,
        reason=pair.reason,
        explained=[comparison_pb2.Explanation(finding_id=finding, rule_id=rule) for finding, rule in pair.explained],
        drift_finding_ids=pair.drift,
    )


def to_header_messages(headers: tuple[tuple[str, str], ...]) -> list[common_pb2.Header]:
    return [common_pb2.Header(name=name, value=value) for name, value in headers]


def to_capture_message(capture: Capture) -> comparison_pb2.CaptureDetail:
    return comparison_pb2.CaptureDetail(
        version=to_enum_number(VERSION_ENUM, capture.version),  # type: ignore[arg-type]  # an int is one
        role=to_enum_number(ROLE_ENUM, capture.role),  # type: ignore[arg-type]  # an int is one
        attempt=capture.attempt,
        release=capture.release,
        start_time=to_timestamp(datetime.fromtimestamp(capture.started_at, UTC)),
        first_byte=to_duration(capture.first_byte_us),
        total=to_duration(capture.total_us),
        status=capture.answer.status,
        headers=to_header_messages(capture.answer.headers),
        body=capture.answer.body.content,
        body_length=capture.answer.body.length,
        exception=capture.exception,
        client_left=capture.client_left,
        spans=[
            comparison_pb2.Span(
                kind=kind, name=name, start=to_duration(at_us), duration=to_duration(took_us), note=note
            )
            for kind, name, at_us, took_us, note in capture.spans
        ],
        effects=[to_effect_message(item) for item in capture.effects],
        effects_dropped=capture.effects_dropped,
    )


def to_effect_message(effect: Mapping[str, Any]) -> comparison_pb2.Effect:
    return comparison_pb2.Effect(
        kind=str(effect.get("kind", "")),
        key=str(effect.get("key", "")),
        payload=render_value(describe_effect(effect)),
        start=to_duration(effect.get("at_us", 0)),
        error=str(effect.get("error", "")),
        note=bool(effect.get("note")),
    )


def to_difference_message(difference: StoredDifference) -> common_pb2.Difference:
    return common_pb2.Difference(
        part=to_enum_number(PART_ENUM, difference.part),  # type: ignore[arg-type]  # an int is one
        path=difference.path,
        exact_path=difference.exact_path,
        kind=to_enum_number(KIND_ENUM, difference.kind),  # type: ignore[arg-type]  # an int is one
        impact=to_enum_number(IMPACT_ENUM, difference.impact),  # type: ignore[arg-type]  # an int is one
        old=difference.old,
        new=difference.new,
        noise=difference.is_noise,
        explained_by=difference.rule_id,
        drift=difference.is_drift,
    )


def to_pair_detail_message(detail: StoredPairDetail) -> comparison_pb2.PairDetail:
    request = detail.captures[0].request if detail.captures else None
    return comparison_pb2.PairDetail(
        pair=to_pair_message(detail.pair),
        captures=[to_capture_message(item) for item in detail.captures],
        differences=[to_difference_message(item) for item in detail.differences],
        request_headers=to_header_messages(request.headers) if request else (),
        request_body=request.body.content if request else b"",
    )


def to_traffic_message(traffic: Traffic) -> traffic_pb2.Traffic:
    shares = traffic.shares
    return traffic_pb2.Traffic(
        service=traffic.service,
        new_share=shares.new_share / TOTAL_WEIGHT,
        sample_safe=shares.sample_safe / MILLION,
        sample_unsafe=shares.sample_unsafe / MILLION,
        baseline_share=shares.baseline_share / MILLION,
        rolled_back=shares.rolled_back,
        version=traffic.version,
        update_time=to_timestamp(traffic.updated_at),
    )


def to_traffic_fields(fleet: EnvoyFleet, current_traffic: Traffic) -> dict[str, Any]:
    """What answers about traffic have in common."""
    return {
        "traffic": to_traffic_message(current_traffic),
        "envoys": [to_envoy_message(envoy, current_traffic) for envoy in fleet.sorted],
        "peers_error": fleet.peers_error,
    }


def to_envoy_message(envoy: EnvoyStatus, traffic: Traffic) -> traffic_pb2.EnvoyStatus:
    after = envoy.acknowledged_after(traffic)
    return traffic_pb2.EnvoyStatus(
        node=envoy.node,
        acknowledged_version=envoy.acknowledged_version,
        acknowledged_after=None if after is None else to_duration(after * 1e6),
        error=envoy.error,
        peer=envoy.peer,
        sidecar=envoy.sidecar,
    )


def to_traffic_event_message(event: TrafficEvent) -> traffic_pb2.TrafficEvent:
    details: dict[str, Any] = {
        name: show(event.detail[name])
        for names, show in (
            (GUARD_DETAIL_KEYS, steering_messages.to_policy_message),
            (RAMP_DETAIL_KEYS, steering_messages.to_ramp_state_message),
        )
        for name in names
        if name in event.detail
    }
    return traffic_pb2.TrafficEvent(
        id=event.id,
        time=to_timestamp(event.at),
        actor=event.actor,
        action=event.action,
        reason=event.reason,
        before=None if event.before is None else to_traffic_message(event.before),
        after=to_traffic_message(event.after),
        **details,
    )
