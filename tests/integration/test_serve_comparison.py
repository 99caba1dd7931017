"""ComparisonService over gRPC, from a ledger whose rows are written by hand."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace
from psycopg.types.json import Jsonb

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from captures import capture
from support_serve import NOON, Ledger, Refused, Running, packed, refused, running

pytestmark = pytest.mark.postgres

HOUR = dt.timedelta(hours=1)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url) as found:
        yield found


@pytest.fixture
def ledger(sidecar: Running) -> Ledger:
    return sidecar.ledger()


def window(start: dt.datetime | None = None, end: dt.datetime | None = None) -> common.TimeWindow:
    found = common.TimeWindow()
    if start:
        found.start.FromDatetime(start)
    if end:
        found.end.FromDatetime(end)
    return found


def outcomes(counts: Any) -> dict[str, int]:
    return {common.Outcome.Name(one.outcome): one.count for one in counts}


async def test_a_summary_counts_outcomes_and_what_explains_them(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    regression = ledger.finding(shown, "$.price")
    additive = ledger.finding(shown, "$.colour", kind="added", impact="additive")
    noise = ledger.finding(shown, "$.id", baseline_count=3)
    ledger.pair(shown)
    ledger.pair(shown, regression, additive)
    ledger.pair(shown, additive)
    ledger.pair(shown, noise, at=NOON + HOUR)
    ledger.pair(shown, outcome="only_old", new_status=None, new_us=None)
    ledger.pair(ledger.endpoint("till"), outcome="shed")

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="shop"))

    assert found.pairs == 5
    assert outcomes(found.outcomes) == {"OUTCOME_MISMATCH": 3, "OUTCOME_MATCH": 1, "OUTCOME_ONLY_OLD": 1}
    assert found.explained == 2
    assert found.findings == 1
    assert found.pending == 0
    assert not found.HasField("envoy_sampled")
    assert not found.HasField("unaccounted")
    assert found.first_pair_time.ToDatetime(dt.UTC) == NOON
    assert found.last_pair_time.ToDatetime(dt.UTC) == NOON + HOUR


async def test_a_field_that_is_noise_can_break_in_another_way(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    changed = ledger.finding(shown, "$.id", baseline_count=2)
    emptied = ledger.finding(shown, "$.id", kind="type")
    ledger.pair(shown, changed)
    ledger.pair(shown, emptied)

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="shop"))
    listed = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(include_noise=True))

    assert (found.findings, found.explained) == (1, 1)
    assert {(one.kind, one.noise, one.state) for one in listed.findings} == {
        (common.KIND_CHANGED, True, pb.FINDING_STATE_NOISE),
        (common.KIND_TYPE, False, pb.FINDING_STATE_REAL),
    }


async def test_what_is_undecided_is_listed_with_the_reason(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    ledger.pair(shown, ledger.finding(shown, "$.id", state="undecided", reason="too few"))

    (found,) = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert (found.state, found.reason, found.noise) == (pb.FINDING_STATE_UNDECIDED, "too few", False)


async def test_a_summary_of_a_window_counts_only_what_is_inside(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    finding = ledger.finding(shown, "$.price")
    ledger.pair(shown, finding, at=NOON)
    ledger.pair(shown, at=NOON + HOUR)
    ledger.pair(shown, at=NOON + 2 * HOUR)

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON + HOUR, NOON + 2 * HOUR)))

    assert found.service == "shop"
    assert outcomes(found.outcomes) == {"OUTCOME_MATCH": 1}
    assert found.findings == 0


async def test_the_ledger_is_held_against_envoys_count(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    ledger.pair(shown)
    ledger.pair(shown)
    for node, sampled in (("edge-1", 5), ("edge-2", 2)):
        ledger.execute(
            "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values (%s, 'shop', now(), %s, %s)",
            *(node, Jsonb({"sampled": sampled}), Jsonb({})),
        )

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())
    inside = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON)))

    assert (found.envoy_sampled, found.unaccounted) == (7, 5)
    assert (inside.envoy_sampled, inside.unaccounted) == (7, 5)  # nobody wrote down when it counted


async def test_drops_are_told_by_place_and_reason(sidecar: Running, ledger: Ledger) -> None:
    ledger.endpoint()
    for process, dropped in (("a", {"queue_bytes": 3, "redis": 0}), ("b", {"queue_bytes": 4})):
        ledger.execute(
            "insert into abreast.process_report (id, service, seen, report) values (%s, 'shop', now(), %s)",
            *(process, Jsonb({"dropped": dropped, "sent": 9, "late_effects": 1})),
        )
    ledger.execute(
        "insert into abreast.shard_report (service, shard, seen, report) values ('shop', 0, now(), %s)",
        Jsonb({"rejected_pairs": 2, "late": 5, "duplicate": 1, "received": 100}),
    )

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(drop.stage, drop.reason, drop.count) for drop in found.drops] == [
        ("redis", "rejected_pairs", 2),
        ("service", "late_effects", 2),
        ("service", "queue_bytes", 7),
    ]
    assert (found.captures.received, found.captures.late, found.captures.duplicate) == (100, 5, 1)


async def test_what_redis_refused_is_told_once(sidecar: Running, ledger: Ledger) -> None:
    """The process that had sent it counts it too. Of a Redis that lost its data the processes know more."""
    ledger.endpoint()
    odd = {"redis_rejected_pairs": 6, "redis_rejected_bytes": 1, "shutdown": "many"}
    ledger.execute(
        "insert into abreast.process_report (id, service, seen, report) values ('a', 'shop', now(), %s), ('b', 'shop', now(), %s)",
        *(Jsonb({"dropped": odd}), Jsonb({"dropped": "none"})),
    )
    ledger.execute(
        "insert into abreast.shard_report (service, shard, seen, report) values ('shop', 0, now(), %s)",
        Jsonb({"rejected_pairs": 2, "rejected_bytes": 3}),
    )

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(drop.stage, drop.reason, drop.count) for drop in found.drops] == [
        ("redis", "rejected_bytes", 3),
        ("redis", "rejected_pairs", 6),
    ]


async def test_what_was_put_apart_is_told_with_the_reason(sidecar: Running, ledger: Ledger) -> None:
    ledger.endpoint()
    for entry, reason in (("1-1", "format 2"), ("1-2", "format 2"), ("1-3", "it ends the process")):
        ledger.execute(
            "insert into abreast.dead_letter (at, service, entry, reason, content) values (now(), 'shop', %s, %s, '')",
            *(entry, reason),
        )

    found = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(one.reason, one.count) for one in found.dead_letters] == [("format 2", 2), ("it ends the process", 1)]


async def test_endpoints_have_outcomes_and_percentiles(sidecar: Running, ledger: Ledger) -> None:
    shown, quiet = ledger.endpoint(), ledger.endpoint(route="/quiet")
    finding = ledger.finding(shown, "$.price")
    for old, new in ((1000, 2000), (2000, 4000), (3000, 60_000)):
        ledger.pair(shown, old_us=old, new_us=new)
    ledger.pair(shown, finding, old_us=None, new_us=None)
    assert quiet

    (found,) = (await sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest())).endpoints

    assert (found.endpoint.service, found.endpoint.method, found.endpoint.route) == ("shop", "GET", "/products/{id}")
    assert found.pairs == 4
    assert outcomes(found.outcomes) == {"OUTCOME_MATCH": 3, "OUTCOME_MISMATCH": 1}
    assert found.findings == 1
    assert found.old_p50 == Duration(nanos=2_000_000)
    assert found.new_p50 == Duration(nanos=4_000_000)
    assert 50_000_000 < found.new_p99.nanos <= 60_000_000


async def test_endpoints_without_times_have_none(sidecar: Running, ledger: Ledger) -> None:
    ledger.pair(ledger.endpoint(), outcome="only_old", new_us=None)

    (found,) = (await sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest(service="shop"))).endpoints

    assert found.HasField("old_p50")
    assert not found.HasField("new_p50")
    assert not found.HasField("new_p99")


async def test_findings_are_ordered_by_impact_then_frequency(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    added = ledger.finding(shown, "$.a", kind="added", impact="additive")
    rare = ledger.finding(shown, "$.b")
    often = ledger.finding(shown, "$.c")
    gone = ledger.finding(shown, "$.d", kind="removed", impact="breaking")
    ledger.finding(shown, "$.never")
    for findings in ((added, rare), (added, often), (added, often), (added, gone)):
        ledger.pair(shown, *findings)

    found = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert [(one.id, one.count, one.compared) for one in found] == [
        (gone, 1, 4),
        (often, 2, 4),
        (rare, 1, 4),
        (added, 4, 4),
    ]


@pytest.mark.parametrize(
    ("request_", "paths"),
    [
        (pb.ListFindingsRequest(service="till"), ["$.till"]),
        (pb.ListFindingsRequest(method="post"), ["$.post"]),
        (pb.ListFindingsRequest(route="/cart"), ["$.post"]),
        (pb.ListFindingsRequest(parts=[common.PART_HEADER]), ["etag"]),
        (pb.ListFindingsRequest(kinds=[common.KIND_TYPE, common.KIND_ORDER]), ["$.type"]),
        (pb.ListFindingsRequest(impacts=[common.IMPACT_ADDITIVE]), ["$.added"]),
        (pb.ListFindingsRequest(window=window(NOON + HOUR)), ["$.late"]),
        (pb.ListFindingsRequest(service="nowhere"), []),
    ],
)
async def test_findings_are_filtered(
    sidecar: Running, ledger: Ledger, request_: pb.ListFindingsRequest, paths: list[str]
) -> None:
    shop, cart, till = (ledger.endpoint(), ledger.endpoint(method="POST", route="/cart"), ledger.endpoint("till"))
    ledger.pair(till, ledger.finding(till, "$.till"))
    ledger.pair(cart, ledger.finding(cart, "$.post"))
    ledger.pair(shop, ledger.finding(shop, "etag", part="header"))
    ledger.pair(shop, ledger.finding(shop, "$.type", kind="type"))
    ledger.pair(shop, ledger.finding(shop, "$.added", kind="added", impact="additive"))
    ledger.pair(shop, ledger.finding(shop, "$.late"), at=NOON + HOUR)

    found = await sidecar.comparison.ListFindings(request_)

    assert [one.path for one in found.findings] == paths


async def test_slowness_is_of_a_time_not_of_pairs(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    slow = ledger.finding(
        shown, "", part="latency", kind="slower", count=40, detail={"old_p50_us": 1000, "new_p50_us": 9000}
    )

    async def listed(bounds: common.TimeWindow) -> list[tuple[int, int, str]]:
        found = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(window=bounds))
        return [(one.id, one.count, one.summary) for one in found.findings]

    said = [(slow, 40, "p50 1.0 ms became 9.0 ms")]
    assert await listed(window()) == await listed(window(NOON - HOUR, NOON + HOUR)) == said
    assert await listed(window(NOON + HOUR)) == await listed(window(end=NOON)) == []
    assert (await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON)))).findings == 1
    assert (await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON + HOUR)))).findings == 0


async def test_noise_is_listed_only_when_asked_for(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    noise = ledger.finding(shown, "$.id", baseline_count=1)
    ledger.pair(shown, noise)

    hidden = await sidecar.comparison.ListFindings(pb.ListFindingsRequest())
    found = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(include_noise=True))

    assert not hidden.findings
    assert [(one.id, one.noise) for one in found.findings] == [(noise, True)]


async def test_a_finding_comes_with_its_examples_the_smallest_first(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    finding = ledger.finding(shown, "$.price", detail={"old": "12.5", "new": "12.49"})
    differences = [
        {
            "part": "body",
            "path": "$.price",
            "exact_path": "$.price",
            "kind": "changed",
            "impact": "value",
            "old": "12.5",
            "new": "12.49",
        }
    ]
    large, small = ledger.pair(shown, finding), ledger.pair(shown, finding)
    kept = packed(capture("old", {"price": 12.5}), capture("new", {"price": 12.49}, role="shadow"))
    ledger.example(large, {finding: 900}, kept, differences)
    ledger.example(small, {finding: 30}, kept, differences)

    found = await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding))

    assert found.finding.count == 2
    assert found.finding.summary == "12.5 became 12.49"
    assert [one.pair.id for one in found.examples] == [small, large]
    assert [(one.version, one.body) for one in found.examples[0].captures] == [
        (common.VERSION_OLD, b'{"price": 12.5}'),
        (common.VERSION_NEW, b'{"price": 12.49}'),
    ]
    (difference,) = found.examples[0].differences
    assert (difference.exact_path, difference.old, difference.new, difference.noise) == (
        "$.price",
        "12.5",
        "12.49",
        False,
    )


async def test_a_pair_that_is_an_example_has_captures_and_differences(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    noise = ledger.finding(shown, "$.id", kind="added", impact="additive", baseline_count=1)
    number = ledger.pair(shown, noise, request="/products/7?full=1", reason="because")
    differences = [
        {
            "part": "body",
            "path": "$.id",
            "exact_path": "$.id",
            "kind": "added",
            "impact": "additive",
            "old": None,
            "new": "1",
        }
    ]
    mail = {"kind": "email.send", "key": "a", "payload": {"to": "b"}, "at_us": 7, "error": "OSError"}
    old = replace(capture("old", {}), effects=(mail, {"digest": "ab", "length": 9, "note": True}), effects_dropped=3)
    kept = packed(old, capture("new", {"id": 1}, role="shadow", status=201))
    ledger.example(number, {noise: 5}, kept, differences)

    found = (await sidecar.comparison.GetPair(pb.GetPairRequest(id=number.upper()))).pair

    assert (found.pair.id, found.pair.request, found.pair.reason) == (number, "/products/7?full=1", "because")
    assert found.pair.live == common.VERSION_OLD
    assert found.pair.finding_ids == [noise]
    assert found.pair.old_time == Duration(nanos=1_500_000)
    assert [(one.role, one.status) for one in found.captures] == [(common.ROLE_LIVE, 200), (common.ROLE_SHADOW, 201)]
    assert found.captures[0].effects_dropped == 3
    assert list(found.captures[0].effects) == [
        pb.Effect(kind="email.send", key="a", payload='{"to":"b"}', start=Duration(nanos=7000), error="OSError"),
        pb.Effect(payload='{"digest":"ab","length":9}', start=Duration(), note=True),
    ]
    (difference,) = found.differences
    assert not difference.HasField("old")
    assert difference.new == "1"
    assert difference.noise


async def test_a_finding_says_which_requests_show_it(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    yen, spread = ledger.finding(shown, "$.price"), ledger.finding(shown, "$.stock")
    for number in range(20):
        findings = [yen] if number % 2 else []
        findings += [spread] if number % 4 < 2 else []
        currency = "JPY" if number % 2 else "EUR"
        ledger.pair(shown, *findings, request=f"/products/{number}?page={number}&currency={currency}")

    told, untold = [await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding)) for finding in (yen, spread)]

    assert (told.feature.text, told.feature.coverage, told.feature.precision) == ("query.currency=JPY", 1, 1)
    assert not untold.HasField("feature")


async def test_a_pair_without_example_is_its_row(sidecar: Running, ledger: Ledger) -> None:
    number = ledger.pair(ledger.endpoint(), outcome="only_old", new_status=None, new_us=None, live=None)

    found = (await sidecar.comparison.GetPair(pb.GetPairRequest(id=number))).pair

    assert found.pair.outcome == common.OUTCOME_ONLY_OLD
    assert (found.pair.old_status, found.pair.new_status) == (200, 0)
    assert found.pair.live == common.VERSION_UNSPECIFIED
    assert not found.pair.HasField("new_time")
    assert not found.captures


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        (pb.ListPairsRequest(), 4),
        (pb.ListPairsRequest(service="shop"), 3),
        (pb.ListPairsRequest(method="POST"), 1),
        (pb.ListPairsRequest(route="/cart"), 1),
        (pb.ListPairsRequest(outcomes=[common.OUTCOME_SHED, common.OUTCOME_ONLY_NEW]), 1),
        (pb.ListPairsRequest(finding_id=1), 1),
        (pb.ListPairsRequest(window=window(end=NOON)), 0),
        (pb.ListPairsRequest(window=window(NOON, NOON + HOUR)), 3),
    ],
)
async def test_pairs_are_filtered(sidecar: Running, ledger: Ledger, request_: pb.ListPairsRequest, count: int) -> None:
    shop, cart, till = (ledger.endpoint(), ledger.endpoint(method="POST", route="/cart"), ledger.endpoint("till"))
    assert ledger.finding(shop, "$.price") == 1
    ledger.pair(shop, 1)
    ledger.pair(cart)
    ledger.pair(till)
    ledger.pair(shop, outcome="shed", at=NOON + HOUR)

    found = await sidecar.comparison.ListPairs(request_)

    assert len(found.pairs) == count


async def pages(call: Callable[[Any], Any], request: Any, field: str) -> list[list[Any]]:
    found = []
    while True:
        answer = await call(request)
        found.append(list(getattr(answer, field)))
        if not answer.next_page_token:
            return found
        request.page_token = answer.next_page_token


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_pages_of_pairs_are_complete_and_without_doubles(sidecar: Running, ledger: Ledger, size: int) -> None:
    """Many share one moment, and new ones arrive meanwhile."""
    shown = ledger.endpoint()
    written = [ledger.pair(shown, at=NOON + HOUR * (number // 4)) for number in range(13)]

    async def call(request: pb.ListPairsRequest) -> pb.ListPairsResponse:
        answer: pb.ListPairsResponse = await sidecar.comparison.ListPairs(request)
        ledger.pair(shown, at=NOON + 100 * HOUR)
        return answer

    found = await pages(call, pb.ListPairsRequest(page_size=size), "pairs")

    assert all(len(page) == size for page in found[:-1])
    ids = [pair.id for page in found for pair in page]
    assert sorted(ids) == sorted(written)
    times = [pair.time.ToDatetime() for page in found for pair in page]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("bounds", [window(), window(NOON - HOUR)])
async def test_pages_of_findings_fit_together_while_counts_grow(
    sidecar: Running, ledger: Ledger, bounds: common.TimeWindow
) -> None:
    """What was seen since the first page changes nothing in the next ones: the least frequent becomes the most."""
    shown = ledger.endpoint()
    findings = [ledger.finding(shown, f"$.f{number}") for number in range(7)]
    for number, finding in enumerate(findings):
        for _ in range(number // 2 + 1):
            ledger.pair(shown, finding)
    later = dt.datetime.now(dt.UTC) + HOUR

    async def call(request: pb.ListFindingsRequest) -> pb.ListFindingsResponse:
        answer: pb.ListFindingsResponse = await sidecar.comparison.ListFindings(request)
        for _ in range(3):
            ledger.pair(shown, findings[0], at=later)
        ledger.pair(shown, ledger.finding(shown, f"$.new{request.page_token}"), at=later)
        return answer

    found = await pages(call, pb.ListFindingsRequest(page_size=2, window=bounds), "findings")

    ids = [finding.id for page in found for finding in page]
    assert sorted(ids) == sorted(findings)
    assert [finding.count for page in found for finding in page] == [4, 3, 3, 2, 2, 1, 1]


async def test_pages_of_endpoints_are_complete_and_ordered(sidecar: Running, ledger: Ledger) -> None:
    for service in ("till", "shop"):
        for route in ("/b", "/a"):
            for method in ("POST", "GET"):
                ledger.pair(ledger.endpoint(service, method, route))

    found = await pages(sidecar.comparison.ListEndpoints, pb.ListEndpointsRequest(page_size=3), "endpoints")

    keys = [(one.endpoint.service, one.endpoint.route, one.endpoint.method) for page in found for one in page]
    assert len(keys) == 8
    assert keys == sorted(set(keys))


UNKNOWN: Any = 99  # enums are open on the wire
UNSAID: Any = 0


def timestamp(seconds: int) -> Timestamp:
    return Timestamp(seconds=seconds)


BAD: list[tuple[str, Any, str]] = [
    ("GetSummary", pb.GetSummaryRequest(window=window(NOON, NOON - HOUR)), "window.end must not be before"),
    ("GetSummary", pb.GetSummaryRequest(service="a\0b"), "service must not contain a NUL"),
    ("GetSummary", pb.GetSummaryRequest(service="x" * 301), "service must have at most 300"),
    (
        "GetSummary",
        pb.GetSummaryRequest(window=common.TimeWindow(start=timestamp(10**13))),
        "window.start must be a time",
    ),
    ("ListEndpoints", pb.ListEndpointsRequest(page_size=-1), "page_size must be 1 to 1000"),
    ("ListEndpoints", pb.ListEndpointsRequest(page_token="rubbish"), "page_token must be"),
    ("ListFindings", pb.ListFindingsRequest(page_size=1001), "page_size must be 1 to 1000"),
    ("ListFindings", pb.ListFindingsRequest(page_token="%%%"), "page_token must be"),
    ("ListFindings", pb.ListFindingsRequest(parts=[UNSAID]), "parts must be one of PART_BODY"),
    ("ListFindings", pb.ListFindingsRequest(kinds=[UNKNOWN]), "kinds must be one of KIND_ADDED"),
    ("ListFindings", pb.ListFindingsRequest(impacts=[UNKNOWN]), "impacts must be one of IMPACT_ADDITIVE"),
    ("GetFinding", pb.GetFindingRequest(), "id must be the id of a finding"),
    ("GetFinding", pb.GetFindingRequest(id=-5), "id must be the id of a finding"),
    ("ListPairs", pb.ListPairsRequest(outcomes=[UNKNOWN]), "outcomes must be one of OUTCOME_ABORTED"),
    ("ListPairs", pb.ListPairsRequest(finding_id=-1), "finding_id must be the id of a finding"),
    ("ListPairs", pb.ListPairsRequest(route="/\0"), "route must not contain a NUL"),
    ("GetPair", pb.GetPairRequest(id="rubbish"), "id must be the id of a pair"),
    ("GetPair", pb.GetPairRequest(), "id must be the id of a pair"),
]


async def refusal(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refused(caught.value)


async def test_bad_arguments_are_refused_with_what_to_do(sidecar: Running, ledger: Ledger) -> None:
    ledger.endpoint()
    for method, request, message in BAD:
        found = await refusal(getattr(sidecar.comparison, method)(request))

        assert (found.code, found.reason, found.domain) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "BAD_ARGUMENT",
            "abreast",
        ), (method, request)
        assert message in found.message


async def test_a_token_of_other_filters_is_refused(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    ledger.pair(shown)
    ledger.pair(shown)
    first = await sidecar.comparison.ListPairs(pb.ListPairsRequest(page_size=1))

    found = await refusal(
        sidecar.comparison.ListPairs(pb.ListPairsRequest(service="shop", page_token=first.next_page_token))
    )

    assert found.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_not_there_is_not_found(sidecar: Running, ledger: Ledger) -> None:
    nobody = await refusal(sidecar.comparison.GetSummary(pb.GetSummaryRequest()))
    ledger.endpoint()
    calls = [
        sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="till")),
        sidecar.comparison.GetFinding(pb.GetFindingRequest(id=2**63 - 1)),
        sidecar.comparison.GetPair(pb.GetPairRequest(id="0d7c1e3a-0000-4000-8000-000000000001")),
    ]

    for found in (nobody, *[await refusal(call) for call in calls]):
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def test_an_empty_service_is_ambiguous_where_there_are_several(sidecar: Running, ledger: Ledger) -> None:
    ledger.endpoint("shop")
    ledger.endpoint("till")

    found = await refusal(sidecar.comparison.GetSummary(pb.GetSummaryRequest()))

    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "shop, till" in found.message
    assert "--service" in found.message


async def test_a_watch_tells_present_findings_then_new_and_grown_ones(sidecar: Running, ledger: Ledger) -> None:
    shown = ledger.endpoint()
    first = ledger.finding(shown, "$.a")
    ledger.finding(shown, "$.noise", count=1, baseline_count=1)
    ledger.pair(shown, first)

    async with asyncio.timeout(20):
        watch = sidecar.comparison.WatchFindings(pb.WatchFindingsRequest(service="shop"))
        told = [(await anext(aiter(watch))).finding]
        ledger.pair(shown, first)
        told.append((await anext(aiter(watch))).finding)
        second = ledger.finding(shown, "$.b")
        ledger.pair(shown, second)
        told.append((await anext(aiter(watch))).finding)
        watch.cancel()

    assert [(one.id, one.count) for one in told] == [(first, 1), (first, 2), (second, 1)]


async def test_a_cancelled_watch_ends_cleanly(sidecar: Running) -> None:
    watch = sidecar.comparison.WatchFindings(pb.WatchFindingsRequest())
    await watch.wait_for_connection()
    watch.cancel()

    with pytest.raises(asyncio.CancelledError):
        await anext(aiter(watch))
    assert "abreast_rpcs_total" in (await sidecar.http.get("/metrics")).text
