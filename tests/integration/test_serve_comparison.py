"""ComparisonService over gRPC, on a ledger with rows from SQL."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace
from psycopg.types.json import Jsonb

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from support_captures import capture
from support_serve import NOON, Ledger, Refused, RunningSidecar, packed, refused

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

HOUR = dt.timedelta(hours=1)


@pytest.fixture
def sidecar(query_sidecar: RunningSidecar) -> RunningSidecar:
    return query_sidecar


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    return sidecar.ledger()


def window(start: dt.datetime | None = None, end: dt.datetime | None = None) -> common.TimeWindow:
    bounds = common.TimeWindow()
    if start:
        bounds.start.FromDatetime(start)
    if end:
        bounds.end.FromDatetime(end)
    return bounds


def outcomes(counts: Any) -> dict[str, int]:
    return {common.Outcome.Name(item.outcome): item.count for item in counts}


async def test_summary_counts_outcomes_and_explained_mismatches(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    regression = ledger.finding(endpoint, "$.price")
    additive = ledger.finding(endpoint, "$.colour", kind="added", impact="additive")
    noise = ledger.finding(endpoint, "$.id", baseline_count=3)
    ledger.pair(endpoint)
    ledger.pair(endpoint, regression, additive)
    ledger.pair(endpoint, additive)
    ledger.pair(endpoint, noise, at=NOON + HOUR)
    ledger.pair(endpoint, outcome="only_old", new_status=None, new_us=None)
    ledger.pair(ledger.endpoint("till"), outcome="shed")

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="shop"))

    assert response.pairs == 5
    assert outcomes(response.outcomes) == {"OUTCOME_MISMATCH": 3, "OUTCOME_MATCH": 1, "OUTCOME_ONLY_OLD": 1}
    assert response.explained == 2
    assert response.findings == 1
    assert response.pending == 0
    assert not response.HasField("envoy_sampled")
    assert not response.HasField("unaccounted")
    assert response.first_pair_time.ToDatetime(dt.UTC) == NOON
    assert response.last_pair_time.ToDatetime(dt.UTC) == NOON + HOUR


async def test_noise_of_one_kind_does_not_hide_another_kind(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    changed = ledger.finding(endpoint, "$.id", baseline_count=2)
    emptied = ledger.finding(endpoint, "$.id", kind="type")
    ledger.pair(endpoint, changed)
    ledger.pair(endpoint, emptied)

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="shop"))
    findings_response = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(include_noise=True))

    assert (response.findings, response.explained) == (1, 1)
    assert {(item.kind, item.noise, item.state) for item in findings_response.findings} == {
        (common.KIND_CHANGED, True, pb.FINDING_STATE_NOISE),
        (common.KIND_TYPE, False, pb.FINDING_STATE_REAL),
    }


async def test_undecided_finding_is_listed_with_its_reason(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    ledger.pair(endpoint, ledger.finding(endpoint, "$.id", state="undecided", reason="too few"))

    (response,) = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert (response.state, response.reason, response.noise) == (pb.FINDING_STATE_UNDECIDED, "too few", False)


async def test_summary_counts_only_pairs_in_the_window(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    finding = ledger.finding(endpoint, "$.price")
    ledger.pair(endpoint, finding, at=NOON)
    ledger.pair(endpoint, at=NOON + HOUR)
    ledger.pair(endpoint, at=NOON + 2 * HOUR)

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON + HOUR, NOON + 2 * HOUR)))

    assert response.service == "shop"
    assert outcomes(response.outcomes) == {"OUTCOME_MATCH": 1}
    assert response.findings == 0


async def test_summary_compares_rows_with_envoys_count(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    ledger.pair(endpoint)
    ledger.pair(endpoint)
    for node, sampled in (("edge-1", 5), ("edge-2", 2)):
        ledger.execute(
            "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values (%s, 'shop', now(), %s, %s)",
            *(node, Jsonb({"sampled": sampled}), Jsonb({})),
        )

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())
    inside = await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON)))

    assert (response.envoy_sampled, response.unaccounted) == (7, 5)
    assert (inside.envoy_sampled, inside.unaccounted) == (7, 5)  # the count has no history yet


async def test_summary_lists_drops_by_stage_and_reason(sidecar: RunningSidecar, ledger: Ledger) -> None:
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
    ledger.execute(
        "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values ('e', 'shop', now(), %s, '{}')",
        Jsonb({"captures_sent": 90, "captures_undelivered": 8, "captures_over_memory": 0}),
    )

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(drop.stage, drop.reason, drop.count) for drop in response.drops] == [
        ("envoy", "undelivered", 8),
        ("redis", "rejected_pairs", 2),
        ("service", "late_effects", 2),
        ("service", "queue_bytes", 7),
    ]
    assert (response.captures.received, response.captures.late, response.captures.duplicate) == (100, 5, 1)


async def test_summary_counts_rejected_captures_once(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """Redis and the sending process both count them. If Redis lost its data, the process has the larger count."""
    ledger.endpoint()
    drops = {"redis_rejected_pairs": 6, "redis_rejected_bytes": 1, "shutdown": "many"}
    ledger.execute(
        "insert into abreast.process_report (id, service, seen, report) values ('a', 'shop', now(), %s), ('b', 'shop', now(), %s)",
        *(Jsonb({"dropped": drops}), Jsonb({"dropped": "none"})),
    )
    ledger.execute(
        "insert into abreast.shard_report (service, shard, seen, report) values ('shop', 0, now(), %s)",
        Jsonb({"rejected_pairs": 2, "rejected_bytes": 3}),
    )

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(drop.stage, drop.reason, drop.count) for drop in response.drops] == [
        ("redis", "rejected_bytes", 3),
        ("redis", "rejected_pairs", 6),
    ]


async def test_summary_lists_dead_letters_by_reason(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.endpoint()
    for entry, reason in (("1-1", "format 2"), ("1-2", "format 2"), ("1-3", "it ends the process")):
        ledger.execute(
            "insert into abreast.dead_letter (at, service, entry, reason, content) values (now(), 'shop', %s, %s, '')",
            *(entry, reason),
        )

    response = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert [(item.reason, item.count) for item in response.dead_letters] == [
        ("format 2", 2),
        ("it ends the process", 1),
    ]


async def test_list_endpoints_returns_outcomes_and_percentiles(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint, quiet = ledger.endpoint(), ledger.endpoint(route="/quiet")
    finding = ledger.finding(endpoint, "$.price")
    for old, new in ((1000, 2000), (2000, 4000), (3000, 60_000)):
        ledger.pair(endpoint, old_us=old, new_us=new)
    ledger.pair(endpoint, finding, old_us=None, new_us=None)
    assert quiet

    (response,) = (await sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest())).endpoints

    assert (response.endpoint.service, response.endpoint.method, response.endpoint.route) == (
        "shop",
        "GET",
        "/products/{id}",
    )
    assert response.pairs == 4
    assert outcomes(response.outcomes) == {"OUTCOME_MATCH": 3, "OUTCOME_MISMATCH": 1}
    assert response.findings == 1
    assert response.old_p50 == Duration(nanos=2_000_000)
    assert response.new_p50 == Duration(nanos=4_000_000)
    assert 50_000_000 < response.new_p99.nanos <= 60_000_000


async def test_list_endpoints_omits_percentiles_without_times(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.pair(ledger.endpoint(), outcome="only_old", new_us=None)

    (response,) = (await sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest(service="shop"))).endpoints

    assert response.HasField("old_p50")
    assert not response.HasField("new_p50")
    assert not response.HasField("new_p99")


async def test_list_findings_orders_by_impact_then_frequency(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    added = ledger.finding(endpoint, "$.a", kind="added", impact="additive")
    rare = ledger.finding(endpoint, "$.b")
    often = ledger.finding(endpoint, "$.c")
    removed = ledger.finding(endpoint, "$.d", kind="removed", impact="breaking")
    ledger.finding(endpoint, "$.never")
    for findings in ((added, rare), (added, often), (added, often), (added, removed)):
        ledger.pair(endpoint, *findings)

    response = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    assert [(item.id, item.count, item.compared) for item in response] == [
        (removed, 1, 4),
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
        (pb.ListFindingsRequest(route="/nowhere"), []),
    ],
)
async def test_list_findings_applies_filters(
    sidecar: RunningSidecar, ledger: Ledger, request_: pb.ListFindingsRequest, paths: list[str]
) -> None:
    shop, cart, till = (ledger.endpoint(), ledger.endpoint(method="POST", route="/cart"), ledger.endpoint("till"))
    ledger.pair(till, ledger.finding(till, "$.till"))
    ledger.pair(cart, ledger.finding(cart, "$.post"))
    ledger.pair(shop, ledger.finding(shop, "etag", part="header"))
    ledger.pair(shop, ledger.finding(shop, "$.type", kind="type"))
    ledger.pair(shop, ledger.finding(shop, "$.added", kind="added", impact="additive"))
    ledger.pair(shop, ledger.finding(shop, "$.late"), at=NOON + HOUR)

    response = await sidecar.comparison.ListFindings(request_)

    assert [item.path for item in response.findings] == paths


async def test_latency_finding_belongs_to_windows_in_which_it_was_seen(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    slow = ledger.finding(
        endpoint, "", part="latency", kind="slower", count=40, detail={"old_p50_us": 1000, "new_p50_us": 9000}
    )

    async def list_counts(bounds: common.TimeWindow) -> list[tuple[int, int, str]]:
        response = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(window=bounds))
        return [(item.id, item.count, item.summary) for item in response.findings]

    expected = [(slow, 40, "p50 1.0 ms became 9.0 ms")]
    assert await list_counts(window()) == await list_counts(window(NOON - HOUR, NOON + HOUR)) == expected
    assert await list_counts(window(NOON + HOUR)) == await list_counts(window(end=NOON)) == []
    assert (await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON)))).findings == 1
    assert (await sidecar.comparison.GetSummary(pb.GetSummaryRequest(window=window(NOON + HOUR)))).findings == 0


async def test_list_findings_omits_noise_by_default(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    noise = ledger.finding(endpoint, "$.id", baseline_count=1)
    ledger.pair(endpoint, noise)

    default_response = await sidecar.comparison.ListFindings(pb.ListFindingsRequest())
    response = await sidecar.comparison.ListFindings(pb.ListFindingsRequest(include_noise=True))

    assert not default_response.findings
    assert [(item.id, item.noise) for item in response.findings] == [(noise, True)]


async def test_get_finding_returns_examples_smallest_first(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    finding = ledger.finding(endpoint, "$.price", detail={"old": "12.5", "new": "12.49"})
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
    large, small = ledger.pair(endpoint, finding), ledger.pair(endpoint, finding)
    captures = packed(capture("old", {"price": 12.5}), capture("new", {"price": 12.49}, role="shadow"))
    ledger.example(large, {finding: 900}, captures, differences)
    ledger.example(small, {finding: 30}, captures, differences)

    response = await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding))

    assert response.finding.count == 2
    assert response.finding.summary == "12.5 became 12.49"
    assert [item.pair.id for item in response.examples] == [small, large]
    assert [(item.version, item.body) for item in response.examples[0].captures] == [
        (common.VERSION_OLD, b'{"price": 12.5}'),
        (common.VERSION_NEW, b'{"price": 12.49}'),
    ]
    (difference,) = response.examples[0].differences
    assert (difference.exact_path, difference.old, difference.new, difference.noise) == (
        "$.price",
        "12.5",
        "12.49",
        False,
    )


async def test_get_pair_returns_captures_and_differences_of_example(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    noise = ledger.finding(endpoint, "$.id", kind="added", impact="additive", baseline_count=1)
    number = ledger.pair(endpoint, noise, request="/products/7?full=1", reason="because")
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
    captures = packed(old, capture("new", {"id": 1}, role="shadow", status=201))
    ledger.example(number, {noise: 5}, captures, differences)

    response = (await sidecar.comparison.GetPair(pb.GetPairRequest(id=number.upper()))).pair

    assert (response.pair.id, response.pair.request, response.pair.reason) == (number, "/products/7?full=1", "because")
    assert response.pair.live == common.VERSION_OLD
    assert response.pair.finding_ids == [noise]
    assert response.pair.old_time == Duration(nanos=1_500_000)
    assert [(item.role, item.status) for item in response.captures] == [
        (common.ROLE_LIVE, 200),
        (common.ROLE_SHADOW, 201),
    ]
    assert response.captures[0].effects_dropped == 3
    assert list(response.captures[0].effects) == [
        pb.Effect(kind="email.send", key="a", payload='{"to":"b"}', start=Duration(nanos=7000), error="OSError"),
        pb.Effect(payload='{"digest":"ab","length":9}', start=Duration(), note=True),
    ]
    (difference,) = response.differences
    assert not difference.HasField("old")
    assert difference.new == "1"
    assert difference.noise


async def test_get_finding_returns_common_feature_of_its_requests(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    yen, spread = ledger.finding(endpoint, "$.price"), ledger.finding(endpoint, "$.stock")
    for number in range(20):
        findings = [yen] if number % 2 else []
        findings += [spread] if number % 4 < 2 else []
        currency = "JPY" if number % 2 else "EUR"
        ledger.pair(endpoint, *findings, request=f"/products/{number}?page={number}&currency={currency}")

    specific, general = [
        await sidecar.comparison.GetFinding(pb.GetFindingRequest(id=finding)) for finding in (yen, spread)
    ]

    assert (specific.feature.text, specific.feature.coverage, specific.feature.precision) == (
        "query.currency=JPY",
        1,
        1,
    )
    assert not general.HasField("feature")


async def test_get_pair_without_example_returns_its_row(sidecar: RunningSidecar, ledger: Ledger) -> None:
    number = ledger.pair(ledger.endpoint(), outcome="only_old", new_status=None, new_us=None, live=None)

    response = (await sidecar.comparison.GetPair(pb.GetPairRequest(id=number))).pair

    assert response.pair.outcome == common.OUTCOME_ONLY_OLD
    assert (response.pair.old_status, response.pair.new_status) == (200, 0)
    assert response.pair.live == common.VERSION_UNSPECIFIED
    assert not response.pair.HasField("new_time")
    assert not response.captures


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
async def test_list_pairs_applies_filters(
    sidecar: RunningSidecar, ledger: Ledger, request_: pb.ListPairsRequest, count: int
) -> None:
    shop, cart, till = (ledger.endpoint(), ledger.endpoint(method="POST", route="/cart"), ledger.endpoint("till"))
    assert ledger.finding(shop, "$.price") == 1
    ledger.pair(shop, 1)
    ledger.pair(cart)
    ledger.pair(till)
    ledger.pair(shop, outcome="shed", at=NOON + HOUR)

    response = await sidecar.comparison.ListPairs(request_)

    assert len(response.pairs) == count


async def pages(call: Callable[[Any], Any], request: Any, field: str) -> list[list[Any]]:
    all_rows = []
    while True:
        response = await call(request)
        all_rows.append(list(getattr(response, field)))
        if not response.next_page_token:
            return all_rows
        request.page_token = response.next_page_token


@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_list_pairs_pages_are_complete_and_disjoint(sidecar: RunningSidecar, ledger: Ledger, size: int) -> None:
    """Several pairs have the same time, and new pairs arrive between pages."""
    endpoint = ledger.endpoint()
    pairs = [ledger.pair(endpoint, at=NOON + HOUR * (number // 4)) for number in range(13)]

    async def call(request: pb.ListPairsRequest) -> pb.ListPairsResponse:
        answer: pb.ListPairsResponse = await sidecar.comparison.ListPairs(request)
        ledger.pair(endpoint, at=NOON + 100 * HOUR)
        return answer

    all_pages = await pages(call, pb.ListPairsRequest(page_size=size), "pairs")

    assert all(len(page) == size for page in all_pages[:-1])
    ids = [pair.id for page in all_pages for pair in page]
    assert sorted(ids) == sorted(pairs)
    times = [pair.time.ToDatetime() for page in all_pages for pair in page]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("bounds", [window(), window(NOON - HOUR)])
async def test_list_findings_pages_are_consistent_while_counts_grow(
    sidecar: RunningSidecar, ledger: Ledger, bounds: common.TimeWindow
) -> None:
    """Pairs after the first page don't affect later pages, even if the rarest finding becomes the most frequent."""
    endpoint = ledger.endpoint()
    findings = [ledger.finding(endpoint, f"$.f{number}") for number in range(7)]
    for number, finding in enumerate(findings):
        for _ in range(number // 2 + 1):
            ledger.pair(endpoint, finding)
    later = dt.datetime.now(dt.UTC) + HOUR

    async def call(request: pb.ListFindingsRequest) -> pb.ListFindingsResponse:
        answer: pb.ListFindingsResponse = await sidecar.comparison.ListFindings(request)
        for _ in range(3):
            ledger.pair(endpoint, findings[0], at=later)
        ledger.pair(endpoint, ledger.finding(endpoint, f"$.new{request.page_token}"), at=later)
        return answer

    all_pages = await pages(call, pb.ListFindingsRequest(page_size=2, window=bounds), "findings")

    ids = [finding.id for page in all_pages for finding in page]
    assert sorted(ids) == sorted(findings)
    assert [finding.count for page in all_pages for finding in page] == [4, 3, 3, 2, 2, 1, 1]


async def test_list_endpoints_pages_are_complete_and_ordered(sidecar: RunningSidecar, ledger: Ledger) -> None:
    for service in ("till", "shop"):
        for route in ("/b", "/a"):
            for method in ("POST", "GET"):
                ledger.pair(ledger.endpoint(service, method, route))

    all_pages = await pages(sidecar.comparison.ListEndpoints, pb.ListEndpointsRequest(page_size=3), "endpoints")

    keys = [(item.endpoint.service, item.endpoint.route, item.endpoint.method) for page in all_pages for item in page]
    assert len(keys) == 8
    assert keys == sorted(set(keys))


async def test_list_endpoints_returns_the_number_on_all_pages(sidecar: RunningSidecar, ledger: Ledger) -> None:
    for number in range(5):
        ledger.pair(ledger.endpoint("shop", "GET", f"/{number}"))
    ledger.pair(ledger.endpoint("till", "GET", "/other"))

    first = await sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest(service="shop", page_size=2))
    request = pb.ListEndpointsRequest(service="shop", page_size=2, page_token=first.next_page_token)
    second = await sidecar.comparison.ListEndpoints(request)

    assert (first.total_size, second.total_size) == (5, 5)


UNKNOWN: Any = 99  # enums are open on the wire
UNSPECIFIED: Any = 0


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
    ("ListEndpoints", pb.ListEndpointsRequest(page_size=-1), "page_size must be at least 1"),
    ("ListEndpoints", pb.ListEndpointsRequest(page_token="rubbish"), "page_token must be"),
    ("ListFindings", pb.ListFindingsRequest(order_by="price"), "order_by must be one of count desc, first_seen desc"),
    ("ListFindings", pb.ListFindingsRequest(page_token="%%%"), "page_token must be"),
    ("ListFindings", pb.ListFindingsRequest(parts=[UNSPECIFIED]), "parts must be one of PART_BODY"),
    ("ListFindings", pb.ListFindingsRequest(kinds=[UNKNOWN]), "kinds must be one of KIND_ADDED"),
    ("ListFindings", pb.ListFindingsRequest(impacts=[UNKNOWN]), "impacts must be one of IMPACT_ADDITIVE"),
    ("GetFinding", pb.GetFindingRequest(), "id must be the id of a finding"),
    ("GetFinding", pb.GetFindingRequest(id=-5), "id must be the id of a finding"),
    ("ListPairs", pb.ListPairsRequest(outcomes=[UNKNOWN]), "outcomes must be one of OUTCOME_ABORTED"),
    ("ListPairs", pb.ListPairsRequest(finding_id=-1), "finding_id must be the id of a finding"),
    ("ListPairs", pb.ListPairsRequest(route="/\0"), "route must not contain a NUL"),
    ("GetPair", pb.GetPairRequest(id="rubbish"), "id must be the UUID of a pair"),
    ("GetPair", pb.GetPairRequest(), "id must be the UUID of a pair"),
]


async def refusal(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return refused(error.value)


async def test_invalid_argument_names_the_field_and_valid_values(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.endpoint()
    for method, request, message in BAD:
        error = await refusal(getattr(sidecar.comparison, method)(request))

        assert (error.code, error.reason, error.domain) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "BAD_ARGUMENT",
            "abreast.v1",
        ), (method, request)
        assert message in error.message
        assert error.field == error.message.split()[0]


async def test_invalid_field_of_a_part_has_its_path(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.endpoint()
    request = pb.GetVerdictRequest(budget=pb.Budget(max_error=1e-9))
    invalid = await refusal(sidecar.comparison.GetVerdict(request))
    missing = await refusal(sidecar.comparison.GetFinding(pb.GetFindingRequest(id=404)))

    assert (invalid.field, missing.field) == ("budget.max_error", "")


@pytest.mark.parametrize(
    ("order", "paths"),
    [
        ("", ["$.a", "$.c", "$.b"]),
        ("count desc", ["$.c", "$.b", "$.a"]),
        ("first_seen desc", ["$.b", "$.a", "$.c"]),
        ("last_seen desc", ["$.a", "$.c", "$.b"]),
    ],
)
async def test_list_findings_has_the_requested_order(
    sidecar: RunningSidecar, ledger: Ledger, order: str, paths: list[str]
) -> None:
    endpoint = ledger.endpoint()
    for path, impact, count, first, last in (
        ("$.a", "breaking", 1, 2, 9),
        ("$.b", "value", 2, 3, 4),
        ("$.c", "value", 3, 1, 5),
    ):
        finding = ledger.finding(endpoint, path, impact=impact, count=count)
        times = (f"{NOON + first * HOUR}", f"{NOON + last * HOUR}")
        ledger.execute("update abreast.finding set first_seen = %s, last_seen = %s where id = %s", *times, finding)

    request = pb.ListFindingsRequest(page_size=2, order_by=order)
    all_pages = await pages(sidecar.comparison.ListFindings, request, "findings")
    first_page = await sidecar.comparison.ListFindings(request)

    assert [finding.path for page in all_pages for finding in page] == paths
    assert first_page.total_size == 3


async def test_page_token_of_other_filters_is_refused(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    ledger.pair(endpoint)
    ledger.pair(endpoint)
    first = await sidecar.comparison.ListPairs(pb.ListPairsRequest(page_size=1))

    error = await refusal(
        sidecar.comparison.ListPairs(pb.ListPairsRequest(service="shop", page_token=first.next_page_token))
    )

    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_ids_are_not_found(sidecar: RunningSidecar, ledger: Ledger) -> None:
    nobody = await refusal(sidecar.comparison.GetSummary(pb.GetSummaryRequest()))
    ledger.endpoint()
    calls = [
        sidecar.comparison.GetSummary(pb.GetSummaryRequest(service="till")),
        sidecar.comparison.ListEndpoints(pb.ListEndpointsRequest(service="till")),
        sidecar.comparison.ListCauses(pb.ListCausesRequest(service="till")),
        sidecar.comparison.ListFindings(pb.ListFindingsRequest(service="till")),
        sidecar.comparison.ListPairs(pb.ListPairsRequest(service="till")),
        sidecar.comparison.ListCauses(pb.ListCausesRequest(service="shop", release="1.9")),
        sidecar.comparison.ListFindings(pb.ListFindingsRequest(release="1.9")),
        sidecar.comparison.GetFinding(pb.GetFindingRequest(id=2**63 - 1)),
        sidecar.comparison.GetPair(pb.GetPairRequest(id="0d7c1e3a-0000-4000-8000-000000000001")),
    ]

    for error in (nobody, *[await refusal(call) for call in calls]):
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def test_empty_service_is_refused_if_there_are_several(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.endpoint("shop")
    ledger.endpoint("till")

    error = await refusal(sidecar.comparison.GetSummary(pb.GetSummaryRequest()))

    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "shop, till" in error.message
    assert "--service" in error.message


async def test_watch_streams_existing_then_new_and_grown_findings(sidecar: RunningSidecar, ledger: Ledger) -> None:
    endpoint = ledger.endpoint()
    first = ledger.finding(endpoint, "$.a")
    ledger.finding(endpoint, "$.noise", count=1, baseline_count=1)
    ledger.pair(endpoint, first)

    async with asyncio.timeout(20):
        watch = sidecar.comparison.WatchFindings(pb.WatchFindingsRequest(service="shop"))
        updates = [(await anext(aiter(watch))).finding]
        ledger.pair(endpoint, first)
        updates.append((await anext(aiter(watch))).finding)
        second = ledger.finding(endpoint, "$.b")
        ledger.pair(endpoint, second)
        updates.append((await anext(aiter(watch))).finding)
        watch.cancel()

    assert [(item.id, item.count) for item in updates] == [(first, 1), (first, 2), (second, 1)]


async def test_watch_of_an_unknown_service_is_refused(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.pair(ledger.endpoint("shop"))

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await anext(aiter(sidecar.comparison.WatchFindings(pb.WatchFindingsRequest(service="shpo"))))

    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert "'shpo'" in (error.value.details() or "")


async def test_cancelled_watch_ends_cleanly(sidecar: RunningSidecar) -> None:
    watch = sidecar.comparison.WatchFindings(pb.WatchFindingsRequest())
    await watch.wait_for_connection()
    watch.cancel()

    with pytest.raises(asyncio.CancelledError):
        await anext(aiter(watch))
    assert "abreast_rpcs_total" in (await sidecar.http.get("/metrics")).text
