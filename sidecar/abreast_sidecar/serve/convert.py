"""Records of the sidecar as messages of the API, and back: the fields whose names or units differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from abreast.protocol.capture import Capture
from abreast.v1 import common_pb2, comparison_pb2, latency_pb2, rollout_pb2, rule_pb2, traffic_pb2
from abreast_sidecar.compare.effects import describe_effect
from abreast_sidecar.compare.values import render_value
from abreast_sidecar.rollout.transitions import Guard
from abreast_sidecar.serve.proto import MessageConverter, Source, read_attribute
from abreast_sidecar.stats.verdict import Budget, Reason, Verdict
from abreast_sidecar.store.records import Finding, StoredPairDetail
from abreast_sidecar.traffic.envoys import EnvoyFleet
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT, Traffic
from abreast_sidecar.traffic.repository import TrafficEvent

MAX_SUMMARY_VALUE_CHARS = 60
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


def _sort_outcomes(record: Any) -> list[tuple[str, int]]:
    """Return outcomes and their counts, the most frequent first."""
    return sorted(record.outcomes.items(), key=lambda item: (-item[1], item[0]))


def _read_effects(capture: Capture) -> Iterable[Mapping[str, Any]]:
    for effect in capture.effects:
        yield {
            "kind": str(effect.get("kind", "")),
            "key": str(effect.get("key", "")),
            "payload": render_value(describe_effect(effect)),
            "start_us": effect.get("at_us", 0),
            "error": str(effect.get("error", "")),
            "note": bool(effect.get("note")),
        }


def _share(name: str, unit: int) -> Callable[[Traffic], float]:
    return lambda traffic: getattr(traffic.shares, name) / unit


def _microseconds(name: str) -> Callable[[Any], timedelta | None]:
    def read(record: Any) -> timedelta | None:
        value = getattr(record, name)
        return None if value is None else timedelta(microseconds=value)

    return read


def _percentile(name: str, index: int) -> Callable[[Any], timedelta | None]:
    def read(record: Any) -> timedelta | None:
        values = getattr(record, name)
        return None if values is None else timedelta(microseconds=values[index])

    return read


def _event_detail(name: str) -> Callable[[TrafficEvent], Any]:
    return lambda event: event.detail.get(name)


def _read_request(name: str) -> Callable[[StoredPairDetail], Any]:
    """Read an attribute of the request that all captures of a pair share."""

    def read(detail: StoredPairDetail) -> Any:
        if not detail.captures:
            return None
        request = detail.captures[0].request
        return request.headers if name == "headers" else request.body.content

    return read


def _itself(record: Any) -> Any:
    return record


def _off_or(name: str, text: str) -> Callable[[Guard], str]:
    """Read an attribute of a guard. If the guard is off, its last state is out of date."""
    return lambda guard: text if guard.policy.mode == "off" else getattr(guard, name)


SOURCES: Mapping[type[Message], Mapping[str, Source]] = {
    common_pb2.Difference: {"explained_by": "rule_id"},
    comparison_pb2.GetSummaryResponse: {
        "outcomes": _sort_outcomes,
        "envoy_sampled": "sampled",
        "first_pair_time": "first",
        "last_pair_time": "last",
        "written": "accounts.written",
        "not_sent": "accounts.not_sent",
        "captures": "accounts",
        "ledger_clock_ahead": "clock_ahead_s",
    },
    comparison_pb2.DeadLetterCount: {"last_time": "last"},
    comparison_pb2.ListEndpointsResponse: {"endpoints": "rows", "next_page_token": "next_token"},
    comparison_pb2.EndpointSummary: {
        "outcomes": _sort_outcomes,
        "old_p50": _percentile("old_us", 0),
        "old_p99": _percentile("old_us", 1),
        "new_p50": _percentile("new_us", 0),
        "new_p99": _percentile("new_us", 1),
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
    comparison_pb2.PairDetail: {"request_headers": _read_request("headers"), "request_body": _read_request("body")},
    comparison_pb2.CaptureDetail: {
        "start_time": lambda capture: datetime.fromtimestamp(capture.started_at, UTC),
        "status": "answer.status",
        "headers": "answer.headers",
        "body": "answer.body.content",
        "body_length": "answer.body.length",
        "spans": lambda capture: [dict(zip(SPAN_ATTRIBUTES, span, strict=True)) for span in capture.spans],
        "effects": _read_effects,
    },
    latency_pb2.PairedLatency: {"differences": "differences_us", "baseline_pairs": "copies"},
    latency_pb2.LatencyPercentile: {"quantile": "share"},
    latency_pb2.LatencyDifference: {
        "quantile": "share",
        "value": _microseconds("value"),
        "low": _microseconds("low"),
        "high": _microseconds("high"),
    },
    latency_pb2.LatencyRatio: {"quantile": "share"},
    rollout_pb2.Guard: {
        "update_time": "since",
        "state": _off_or("state", "idle"),
        "message": _off_or("message", "off"),
        "evaluate_time": "checked_at",
    },
    rollout_pb2.RampPlan: {"steps": lambda plan: [step / TOTAL_WEIGHT for step in read_attribute(plan, "steps")]},
    rollout_pb2.RampState: {
        "phase": "state",
        # The document of an event has the plan's attributes beside its own.
        "plan": lambda ramp: ramp if isinstance(ramp, Mapping) else ramp.plan,
    },
    rollout_pb2.Ramp: {
        "state": _itself,
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
        "new_share": _share("new_share", TOTAL_WEIGHT),
        "sample_safe": _share("sample_safe", MILLION),
        "sample_unsafe": _share("sample_unsafe", MILLION),
        "baseline_share": _share("baseline_share", MILLION),
        "rolled_back": "shares.rolled_back",
        "update_time": "updated_at",
    },
    traffic_pb2.TrafficEvent: {
        "time": "at",
        "guard_before": _event_detail("guard_before"),
        "guard_after": _event_detail("guard_after"),
        "ramp_before": _event_detail("ramp_before"),
        "ramp_after": _event_detail("ramp_after"),
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

    def split_endpoint(name: str) -> tuple[str, str, str] | None:
        method, _, route = name.partition(" ")
        return (service, method, route) if name else None

    def convert_reasons(reasons: Iterable[Reason]) -> list[comparison_pb2.VerdictReason]:
        return [
            to_message(
                comparison_pb2.VerdictReason,
                reason,
                endpoint=split_endpoint(reason.endpoint),
                pairs_to_pass=reason.pairs_needed.to_pass,
                pairs_to_fail=reason.pairs_needed.to_fail,
            )
            for reason in reasons
        ]

    return to_message(
        comparison_pb2.GetVerdictResponse,
        service=service,
        state=verdict.state,
        reasons=convert_reasons(verdict.reasons),
        endpoints=[
            to_message(
                comparison_pb2.EndpointVerdict,
                endpoint=split_endpoint(item.endpoint),
                state=item.state,
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
