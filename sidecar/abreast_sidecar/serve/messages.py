"""Results of the ledger and of control as messages of the API."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from abreast.capture import Capture
from abreast.v1 import common_pb2, comparison_pb2, traffic_pb2
from abreast_sidecar.compare.effects import said
from abreast_sidecar.compare.feature import Feature
from abreast_sidecar.compare.value import shown
from abreast_sidecar.control import MILLION, WEIGHTS, EnvoyState, Event, Roll, Traffic
from abreast_sidecar.serve import steering_messages
from abreast_sidecar.serve.phrase import phrase
from abreast_sidecar.serve.values import duration, number, timestamp
from abreast_sidecar.store.results import (
    Difference,
    Endpoint,
    EndpointSummary,
    Explanation,
    Finding,
    FindingEvent,
    Pair,
    PairDetail,
    Summary,
)

OUTCOME = common_pb2.Outcome.DESCRIPTOR
PART = common_pb2.Part.DESCRIPTOR
KIND = common_pb2.Kind.DESCRIPTOR
IMPACT = common_pb2.Impact.DESCRIPTOR
STATE = comparison_pb2.FindingState.DESCRIPTOR
STATUS = comparison_pb2.FindingStatus.DESCRIPTOR
CAUSE = comparison_pb2.ExplanationCause.DESCRIPTOR
VERSION = common_pb2.Version.DESCRIPTOR
ROLE = common_pb2.Role.DESCRIPTOR
GUARDS = ("guard_before", "guard_after")
RAMPS = ("ramp_before", "ramp_after")


def outcomes(counts: Mapping[str, int]) -> list[comparison_pb2.OutcomeCount]:
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        comparison_pb2.OutcomeCount(outcome=number(OUTCOME, name), count=count)  # type: ignore[arg-type]  # an int is one
        for name, count in most_first
    ]


def endpoint(found: Endpoint) -> common_pb2.Endpoint:
    return common_pb2.Endpoint(service=found.service, method=found.method, route=found.route)


def summary(found: Summary, *, pending: int | None) -> comparison_pb2.GetSummaryResponse:
    accounts = found.accounts
    return comparison_pb2.GetSummaryResponse(
        service=found.service,
        pairs=found.pairs,
        outcomes=outcomes(found.outcomes),
        explained=found.explained,
        envoy_sampled=found.sampled,
        unaccounted=found.unaccounted,
        drops=[
            comparison_pb2.DropCount(place=drop.place, reason=drop.reason, count=drop.count)
            for drop in found.drops
        ],
        pending=pending,
        findings=found.findings,
        first=timestamp(found.first),
        last=timestamp(found.last),
        written=accounts.written,
        not_sent=accounts.not_sent,
        captures=comparison_pb2.CaptureCounts(
            received=accounts.received,
            duplicate=accounts.duplicate,
            late=accounts.late,
            joined=accounts.joined,
            swept=accounts.timed_out,
        ),
        poison=[
            comparison_pb2.PoisonCount(reason=one.reason, count=one.count, last=timestamp(one.last))
            for one in found.poison
        ],
        ledger_clock_ahead=duration(found.clock_ahead * 1e6),
    )


def endpoint_summary(found: EndpointSummary) -> comparison_pb2.EndpointSummary:
    old_p50, old_p99 = found.old_us or (None, None)
    new_p50, new_p99 = found.new_us or (None, None)
    return comparison_pb2.EndpointSummary(
        endpoint=endpoint(found.endpoint),
        pairs=found.pairs,
        outcomes=outcomes(found.outcomes),
        findings=found.findings,
        old_p50=duration(old_p50),
        old_p99=duration(old_p99),
        new_p50=duration(new_p50),
        new_p99=duration(new_p99),
    )


def finding(found: Finding) -> comparison_pb2.Finding:
    return comparison_pb2.Finding(
        id=found.id,
        endpoint=endpoint(found.endpoint),
        part=number(PART, found.part),  # type: ignore[arg-type]  # an int is one
        path=found.path,
        kind=number(KIND, found.kind),  # type: ignore[arg-type]  # an int is one
        impact=number(IMPACT, found.impact),  # type: ignore[arg-type]  # an int is one
        count=found.count,
        compared=found.compared,
        noise=found.noise,
        baseline_count=found.baseline_count,
        first_seen=timestamp(found.first_seen),
        last_seen=timestamp(found.last_seen),
        summary=phrase(found),
        state=number(STATE, found.state),  # type: ignore[arg-type]  # an int is one
        reason=found.reason,
        status=number(STATUS, found.status),  # type: ignore[arg-type]  # an int is one
        rate=rate(found),
        old_releases=found.old_releases,
        new_releases=found.new_releases,
        status_reason=found.status_reason,
        explanations=[explanation(one) for one in found.explanations],
    )


def explanation(found: Explanation) -> comparison_pb2.FindingExplanation:
    return comparison_pb2.FindingExplanation(
        cause=number(CAUSE, found.cause),  # type: ignore[arg-type]  # an int is one
        pairs=found.pairs,
        reason=found.reason,
        rule_id=found.rule,
        rule_name=found.name,
        owner=found.owner,
    )


def rate(found: Finding) -> comparison_pb2.Rate | None:
    between = found.rate
    if between is None:
        return None
    value = min(found.count, found.compared) / found.compared
    return comparison_pb2.Rate(value=value, low=between.low, high=between.high)


def finding_event(found: FindingEvent) -> comparison_pb2.FindingEvent:
    return comparison_pb2.FindingEvent(
        time=timestamp(found.at),
        actor=found.actor,
        before=number(STATUS, found.before),  # type: ignore[arg-type]  # an int is one
        after=number(STATUS, found.after),  # type: ignore[arg-type]  # an int is one
        release=found.release,
        reason=found.reason,
    )


def feature(found: Feature | None) -> comparison_pb2.RequestFeature | None:
    if found is None:
        return None
    return comparison_pb2.RequestFeature(text=str(found), coverage=found.coverage, precision=found.precision)


def pair(found: Pair) -> comparison_pb2.Pair:
    return comparison_pb2.Pair(
        id=found.id,
        endpoint=endpoint(found.endpoint),
        time=timestamp(found.at),
        outcome=number(OUTCOME, found.outcome),  # type: ignore[arg-type]  # an int is one
        live=number(VERSION, found.live),  # type: ignore[arg-type]  # an int is one
        request=found.request,
        old_status=found.old_status,
        new_status=found.new_status,
        old_time=duration(found.old_us),
        new_time=duration(found.new_us),
        old_release=found.old_release,
        new_release=found.new_release,
        finding_ids=found.findings,
        reason=found.reason,
        explained=[
            comparison_pb2.Explanation(finding_id=finding, rule_id=rule) for finding, rule in found.explained
        ],
        drift_finding_ids=found.drift,
    )


def headers(found: tuple[tuple[str, str], ...]) -> list[common_pb2.Header]:
    return [common_pb2.Header(name=name, value=value) for name, value in found]


def capture(found: Capture) -> comparison_pb2.CaptureDetail:
    return comparison_pb2.CaptureDetail(
        version=number(VERSION, found.version),  # type: ignore[arg-type]  # an int is one
        role=number(ROLE, found.role),  # type: ignore[arg-type]  # an int is one
        attempt=found.attempt,
        release=found.release,
        started=timestamp(datetime.fromtimestamp(found.started, UTC)),
        first_byte=duration(found.first_byte_us),
        total=duration(found.total_us),
        status=found.answer.status,
        headers=headers(found.answer.headers),
        body=found.answer.body.held,
        body_length=found.answer.body.length,
        raised=found.raised,
        client_left=found.client_left,
        hops=[
            comparison_pb2.Hop(
                kind=kind, name=name, start=duration(at_us), duration=duration(took_us), note=note
            )
            for kind, name, at_us, took_us, note in found.hops
        ],
        effects=[effect(one) for one in found.effects],
        effects_dropped=found.effects_dropped,
    )


def effect(found: Mapping[str, Any]) -> comparison_pb2.Effect:
    return comparison_pb2.Effect(
        kind=str(found.get("kind", "")),
        key=str(found.get("key", "")),
        payload=shown(said(found)),
        start=duration(found.get("at_us", 0)),
        error=str(found.get("error", "")),
        note=bool(found.get("note")),
    )


def difference(found: Difference) -> common_pb2.Difference:
    return common_pb2.Difference(
        part=number(PART, found.part),  # type: ignore[arg-type]  # an int is one
        path=found.path,
        place=found.place,
        kind=number(KIND, found.kind),  # type: ignore[arg-type]  # an int is one
        impact=number(IMPACT, found.impact),  # type: ignore[arg-type]  # an int is one
        old=found.old,
        new=found.new,
        noise=found.noise,
        explained_by=found.rule,
        drift=found.drift,
    )


def pair_detail(found: PairDetail) -> comparison_pb2.PairDetail:
    request = found.captures[0].request if found.captures else None
    return comparison_pb2.PairDetail(
        pair=pair(found.pair),
        captures=[capture(one) for one in found.captures],
        differences=[difference(one) for one in found.differences],
        request_headers=headers(request.headers) if request else (),
        request_body=request.body.held if request else b"",
    )


def traffic(found: Traffic) -> traffic_pb2.Traffic:
    shares = found.shares
    return traffic_pb2.Traffic(
        service=found.service,
        new_share=shares.new_share / WEIGHTS,
        sample_safe=shares.sample_safe / MILLION,
        sample_unsafe=shares.sample_unsafe / MILLION,
        baseline_share=shares.baseline_share / MILLION,
        rolled_back=shares.rolled_back,
        version=found.version,
        update_time=timestamp(found.updated_at),
    )


def roll(found: Roll, about: Traffic) -> dict[str, Any]:
    """What answers about traffic have in common."""
    return {
        "traffic": traffic(about),
        "envoys": [envoy(state) for state in found.states(about)],
        "others_unknown": found.unknown,
    }


def envoy(found: EnvoyState) -> traffic_pb2.EnvoyState:
    after = found.acknowledged_after
    return traffic_pb2.EnvoyState(
        node=found.node,
        acknowledged_version=found.acknowledged_version,
        acknowledged_after=None if after is None else duration(after * 1e6),
        error=found.error,
        peer=found.peer,
        sidecar=found.sidecar,
    )


def event(found: Event) -> traffic_pb2.TrafficEvent:
    told: dict[str, Any] = {
        name: show(found.detail[name])
        for names, show in ((GUARDS, steering_messages.policy), (RAMPS, steering_messages.ramp_state))
        for name in names
        if name in found.detail
    }
    return traffic_pb2.TrafficEvent(
        id=found.id,
        time=timestamp(found.at),
        actor=found.actor,
        action=found.action,
        reason=found.reason,
        before=None if found.before is None else traffic(found.before),
        after=traffic(found.after),
        **told,
    )
