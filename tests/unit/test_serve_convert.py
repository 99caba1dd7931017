"""Records survive the way through their messages."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from abreast.protocol.capture import Capture
from abreast.v1 import common_pb2, comparison_pb2, latency_pb2, rollout_pb2
from abreast_sidecar.rollout.guard import GuardPolicy, GuardRule
from abreast_sidecar.rollout.ramp import RampPlan
from abreast_sidecar.serve.convert import from_message, summarise_finding, to_message
from abreast_sidecar.serve.render import format_place
from abreast_sidecar.stats.latency import QuantileInterval, VersionPercentiles
from abreast_sidecar.stats.verdict import Budget
from abreast_sidecar.store.reader import FindingFilter, PairFilter
from abreast_sidecar.store.records import (
    CaptureAccounting,
    DeadLetterCount,
    Drop,
    Endpoint,
    Explanation,
    Finding,
    FindingEvent,
    StatusChange,
    StoredDifference,
    StoredPair,
    Window,
)
from support_captures import capture

MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
IDS = st.integers(0, 2**31 - 1)
TEXTS = st.text(max_size=20)
SHARES = st.floats(0, 1)
MOMENTS = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))  # noqa: DTZ001
MILLISECONDS = st.integers(0, 10**9).map(lambda value: value / 1000)
ENDPOINTS = st.builds(Endpoint, service=TEXTS, method=TEXTS, route=TEXTS)
PARTS = st.sampled_from(["status", "header", "body", "error", "latency", "effect", "cache"])
KINDS = st.sampled_from(["added", "removed", "changed", "type", "order", "slower", "format", "range"])
IMPACTS = st.sampled_from(["breaking", "value", "additive"])
OUTCOMES = st.sampled_from(["match", "mismatch", "only_old", "only_new", "not_compared"])
STATUSES = st.sampled_from(["open", "confirmed", "expected", "fixed", "reopened"])
WINDOWS = st.builds(Window, start=st.none() | MOMENTS, end=st.none() | MOMENTS)
GUARD_RULES = st.builds(
    GuardRule,
    limit=SHARES,
    min_pairs=st.integers(1, 1000),
    window=st.integers(10, 86_400).map(float),
    cooldown=MILLISECONDS.filter(lambda value: value < 86_400),
)
EXPLANATIONS = st.builds(
    Explanation,
    cause=st.sampled_from(["noise", "shape", "rule", "drift", "expected", "fixed"]),
    pairs=IDS,
    reason=TEXTS,
    rule=IDS,
    name=TEXTS,
    owner=TEXTS,
)
FINDINGS = st.builds(
    Finding,
    id=IDS,
    endpoint=ENDPOINTS,
    part=PARTS,
    path=TEXTS,
    kind=KINDS,
    impact=IMPACTS,
    count=IDS,
    compared=IDS,
    baseline_count=IDS,
    state=st.sampled_from(["real", "noise", "undecided"]),
    reason=TEXTS,
    first_seen=MOMENTS,
    last_seen=MOMENTS,
    detail=st.just({}),
    status=STATUSES,
    status_reason=TEXTS,
    old_releases=st.tuples(TEXTS),
    new_releases=st.lists(TEXTS, max_size=3).map(tuple),
    explanations=st.lists(EXPLANATIONS, max_size=2).map(tuple),
)
PAIRS = st.builds(
    StoredPair,
    id=TEXTS,
    endpoint=ENDPOINTS,
    at=MOMENTS,
    outcome=OUTCOMES,
    live=st.sampled_from(["", "old", "new"]),
    request=TEXTS,
    old_status=IDS,
    new_status=IDS,
    old_us=st.none() | IDS,
    new_us=IDS,
    old_release=TEXTS,
    new_release=TEXTS,
    findings=st.lists(IDS, max_size=3).map(tuple),
    reason=TEXTS,
    explained=st.lists(st.tuples(IDS, IDS), max_size=2).map(tuple),
    drift=st.lists(IDS, max_size=2).map(tuple),
)
DIFFERENCES = st.builds(
    StoredDifference,
    part=PARTS,
    path=TEXTS,
    exact_path=TEXTS,
    kind=KINDS,
    impact=IMPACTS,
    old=st.none() | TEXTS,
    new=st.none() | TEXTS,
    is_noise=st.booleans(),
    rule_id=IDS,
    is_drift=st.booleans(),
)
# Message, records, and the attributes that the message lacks.
ROUND_TRIPS: list[tuple[type[Message], st.SearchStrategy[Any], tuple[str, ...]]] = [
    (common_pb2.TimeWindow, WINDOWS, ()),
    (common_pb2.Endpoint, ENDPOINTS, ()),
    (common_pb2.Difference, DIFFERENCES, ()),
    (
        comparison_pb2.Budget,
        st.builds(
            Budget,
            max_mismatch=SHARES,
            max_error=SHARES,
            max_slower=SHARES,
            min_completeness=SHARES,
            confidence=st.floats(0.5, 0.99),
        ),
        (),
    ),
    (comparison_pb2.Finding, FINDINGS, ("detail",)),
    (comparison_pb2.FindingExplanation, EXPLANATIONS, ()),
    (
        comparison_pb2.FindingEvent,
        st.builds(FindingEvent, at=MOMENTS, actor=TEXTS, before=STATUSES, after=STATUSES, release=TEXTS, reason=TEXTS),
        (),
    ),
    (comparison_pb2.Pair, PAIRS, ()),
    (comparison_pb2.DropCount, st.builds(Drop, service=TEXTS, stage=TEXTS, reason=TEXTS, count=IDS), ("service",)),
    (comparison_pb2.DeadLetterCount, st.builds(DeadLetterCount, reason=TEXTS, count=IDS, last=MOMENTS), ()),
    (
        comparison_pb2.CaptureCounts,
        st.builds(
            CaptureAccounting,
            service=TEXTS,
            envoy_sampled=st.none(),
            not_sent=IDS,
            written=IDS,
            received=IDS,
            duplicate=IDS,
            late=IDS,
            joined=IDS,
            timed_out=IDS,
            dead_letters=IDS,
        ),
        ("service", "envoy_sampled", "not_sent", "written", "dead_letters"),
    ),
    (latency_pb2.LatencyPercentile, st.builds(VersionPercentiles, share=SHARES, old_us=IDS, new_us=IDS), ()),
    (
        latency_pb2.LatencyRatio,
        st.builds(QuantileInterval, share=SHARES, value=SHARES, low=st.none() | SHARES, high=st.none() | SHARES),
        (),
    ),
    (rollout_pb2.GuardRule, GUARD_RULES, ()),
    (
        rollout_pb2.GuardPolicy,
        st.builds(
            GuardPolicy,
            mode=st.sampled_from(["off", "watching", "acting"]),
            errors=GUARD_RULES,
            mismatches=GUARD_RULES,
            slower=GUARD_RULES,
            min_completeness=SHARES,
            confidence=st.floats(0.5, 0.99),
        ),
        (),
    ),
    (
        rollout_pb2.RampPlan,
        st.builds(
            RampPlan,
            steps=st.sets(st.integers(1, 10_000), min_size=1).map(lambda steps: tuple(sorted(steps))),
            hold=MILLISECONDS,
            min_pairs=st.integers(1, 1000),
            budget=st.builds(Budget, max_error=SHARES),
        ),
        ("steps",),
    ),
]


@pytest.mark.parametrize(
    ("message_type", "records", "missing"), ROUND_TRIPS, ids=[row[0].DESCRIPTOR.name for row in ROUND_TRIPS]
)
def test_record_survives_round_trip(
    message_type: type[Message], records: st.SearchStrategy[Any], missing: tuple[str, ...]
) -> None:
    @settings(max_examples=25, deadline=None)
    @given(records)
    def check(record: Any) -> None:
        message = message_type.FromString(to_message(message_type, record).SerializeToString())
        values = {name: getattr(record, name) for name in missing}
        assert from_message(type(record), message, **values) == record

    check()


@given(st.sampled_from([capture("old", {"a": 1}), capture("new", b"x", role="shadow", status=500)]))
def test_capture_is_converted_with_all_fields(item: Capture) -> None:
    message = to_message(comparison_pb2.CaptureDetail, item)

    assert common_pb2.Version.Name(message.version) == f"VERSION_{item.version.upper()}"
    assert (message.status, message.body) == (item.answer.status, item.answer.body.content)
    assert message.total.ToMicroseconds() == item.total_us
    assert message.HasField("first_byte") == (item.first_byte_us is not None)
    assert [(header.name, header.value) for header in message.headers] == list(item.answer.headers)


def test_to_message_rejects_record_without_field() -> None:
    with pytest.raises(AttributeError, match="Endpoint has no attribute for the field start of"):
        to_message(common_pb2.TimeWindow, Endpoint("shop", "GET", "/"))


def test_to_message_rejects_unknown_value() -> None:
    with pytest.raises(AttributeError, match="TimeWindow has no field begin"):
        to_message(common_pb2.TimeWindow, begin=MONDAY)


def test_to_message_leaves_unknown_enum_names_unspecified() -> None:
    assert to_message(common_pb2.Difference, {"kind": "of a later version"}).kind == common_pb2.KIND_UNSPECIFIED


def test_from_message_reads_filters() -> None:
    request = comparison_pb2.ListFindingsRequest(service="shop", kinds=[common_pb2.KIND_TYPE], include_noise=True)

    assert from_message(FindingFilter, request) == FindingFilter("shop", kinds=["type"], include_noise=True)
    assert from_message(PairFilter, comparison_pb2.ListPairsRequest(finding_id=7)) == PairFilter(finding_id=7)


@pytest.mark.parametrize(
    ("record_type", "message", "text"),
    [
        (FindingFilter, comparison_pb2.ListFindingsRequest(kinds=[0]), r"kinds must be one of KIND_ADDED, .*, got 0"),  # type: ignore[list-item]  # as on the wire
        (StatusChange, comparison_pb2.SetFindingStatusRequest(status=99), r"status must be one of .*, got 99"),  # type: ignore[arg-type]  # as on the wire
        (RampPlan, rollout_pb2.RampPlan(budget={"confidence": 1.5}), r"^budget\.confidence must be"),  # type: ignore[arg-type]  # a mapping works
    ],
)
def test_from_message_names_the_bad_field(record_type: type[Any], message: Message, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        from_message(record_type, message)


def make_finding(part: str, kind: str, path: str = "", **detail: Any) -> Finding:
    return Finding(
        id=1,
        endpoint=Endpoint("shop", "GET", "/"),
        part=part,
        path=path,
        kind=kind,
        impact="value",
        count=1,
        compared=1,
        baseline_count=0,
        state="real",
        reason="because",
        first_seen=MONDAY,
        last_seen=MONDAY,
        detail=detail,
    )


@pytest.mark.parametrize(
    ("finding", "place", "summary"),
    [
        (make_finding("status", "changed", old="200", new="500"), "status", "200 became 500"),
        (make_finding("body", "type", "$.id", old="7", new='"7"'), "$.id", '7 became "7"'),
        (make_finding("body", "changed"), "body", "changed"),
        (make_finding("body", "added", "$.a", old=None, new="1"), "$.a", "added 1"),
        (make_finding("body", "added", "$.a"), "$.a", "added"),
        (make_finding("body", "order", "$.tags", old="[1,2]", new="[2,1]"), "$.tags", "same elements in another order"),
        (make_finding("header", "removed", "etag", old='"x"', new=None), "header etag", 'removed, was "x"'),
        (make_finding("header", "removed", "etag"), "header etag", "removed"),
        (make_finding("error", "changed", old="null", new='"KeyError"'), "error", 'null became "KeyError"'),
        (
            make_finding("error", "removed", "no capture"),
            "error no capture",
            "old answered, new left no capture in time",
        ),
        (make_finding("latency", "slower", old_p50_us=3100, new_p50_us=41_000), "latency", "p50 3.1 ms became 41.0 ms"),
        (make_finding("latency", "slower"), "latency", "slower"),
        (make_finding("cache", "changed", "misses", old=1, new=2.5), "cache misses", "1 misses a request became 2.5"),
        (make_finding("body", "type", "$.a"), "$.a", "another type"),
        (make_finding("body", "changed", "$.a", old="x" * 99, new="y"), "$.a", "x" * 59 + "… became y"),
    ],
)
def test_summarise_finding(finding: Finding, place: str, summary: str) -> None:
    message = to_message(comparison_pb2.Finding, finding)

    assert (format_place(message), message.summary, summarise_finding(finding)) == (place, summary, summary)
