"""A gRPC server with prepared responses, for tests of the output of commands only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.message import Message

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast.v1 import traffic_pb2

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
SERVICES = {
    "abreast.v1.ComparisonService": api.DESCRIPTOR.services_by_name["ComparisonService"],
    "abreast.v1.TrafficService": traffic_pb2.DESCRIPTOR.services_by_name["TrafficService"],
}


def endpoint(route: str = "/products/{id}", method: str = "GET") -> common.Endpoint:
    return common.Endpoint(service="shop", method=method, route=route)


def finding(number: int = 12, **fields: Any) -> api.Finding:
    """Return a finding about a price that became a string, with `fields` replaced."""
    message = api.Finding(
        id=number,
        endpoint=endpoint(),
        part=common.PART_BODY,
        path="$.items[*].price",
        kind=common.KIND_TYPE,
        impact=common.IMPACT_BREAKING,
        count=83,
        compared=1204,
        summary='19.99 became "19.99"',
        state=api.FINDING_STATE_REAL,
        reason="new differs in 83 of 1204, old from itself in 0 of 120: more than chance",
    )
    message.first_seen.FromDatetime(NOW - timedelta(minutes=5))
    message.last_seen.FromDatetime(NOW - timedelta(seconds=2))
    message.MergeFrom(api.Finding(**fields))
    return message


def capture(
    version: common.Version.ValueType, body: bytes, *, role: common.Role.ValueType, after: float = 0.0
) -> api.CaptureDetail:
    """Return a capture. `after`: its arrival in seconds after NOW."""
    message = api.CaptureDetail(
        version=version,
        role=role,
        attempt=1,
        release="1.4.0",
        status=200,
        headers=[common.Header(name="content-type", value="application/json")],
        body=body,
        body_length=len(body),
    )
    message.start_time.FromDatetime(NOW + timedelta(seconds=after))
    message.first_byte.FromMicroseconds(2100)
    message.total.FromMicroseconds(3100)
    return message


OLD_BODY = b'{"id":7,"name":"Tea","items":[{"sku":"a1","price":19.99},{"sku":"b2","price":4.50}],"stock":3}'
NEW_BODY = b'{"id":7,"name":"Tea","items":[{"sku":"a1","price":"19.99"},{"sku":"b2","price":4.50}],"stock":3}'


def pair_detail() -> api.PairDetail:
    pair = api.Pair(
        id="0194b8a2-5f3e-4b7a-9a52-3c1f0d9e7b11",
        endpoint=endpoint(),
        outcome=common.OUTCOME_MISMATCH,
        live=common.VERSION_OLD,
        request="/products/7?currency=EUR&q=it's",
        old_status=200,
        new_status=200,
        old_release="1.4.0",
        new_release="2.0.0",
        finding_ids=[12],
    )
    pair.time.FromDatetime(NOW)
    pair.old_time.FromMicroseconds(3100)
    pair.new_time.FromMicroseconds(41_000)
    difference = common.Difference(
        part=common.PART_BODY,
        path="$.items[*].price",
        exact_path="$.items[0].price",
        kind=common.KIND_TYPE,
        impact=common.IMPACT_BREAKING,
        old="19.99",
        new='"19.99"',
    )
    return api.PairDetail(
        pair=pair,
        captures=[
            capture(common.VERSION_OLD, OLD_BODY, role=common.ROLE_LIVE),
            capture(common.VERSION_NEW, NEW_BODY, role=common.ROLE_SHADOW, after=0.0004),
            capture(common.VERSION_OLD, OLD_BODY, role=common.ROLE_BASELINE, after=0.0006),
        ],
        differences=[difference],
        request_headers=[
            common.Header(name="accept", value="application/json"),
            common.Header(name="authorization", value="hmac:0123456789abcdef"),
        ],
    )


def summary() -> api.GetSummaryResponse:
    message = api.GetSummaryResponse(
        service="shop",
        pairs=1293,
        outcomes=[
            api.OutcomeCount(outcome=common.OUTCOME_MATCH, count=1204),
            api.OutcomeCount(outcome=common.OUTCOME_MISMATCH, count=83),
            api.OutcomeCount(outcome=common.OUTCOME_ONLY_OLD, count=6),
        ],
        explained=12,
        envoy_sampled=1295,
        unaccounted=2,
        drops=[api.DropCount(stage="service", reason="queue_bytes", count=3)],
        pending=2,
        findings=7,
        written=1293,
        captures=api.CaptureCounts(received=2583, late=3, joined=1287, timed_out=6),
        dead_letters=[api.DeadLetterCount(reason="a capture of format 2 can't be read", count=4)],
    )
    message.first_pair_time.FromDatetime(NOW - timedelta(minutes=12))
    message.last_pair_time.FromDatetime(NOW - timedelta(seconds=2))
    return message


def cause(number: int = 12, **fields: Any) -> api.Cause:
    lead = finding(number)
    defaults: dict[str, Any] = {
        "id": number,
        "harm": api.HARM_LOST_CONTENT,
        "part": lead.part,
        "kind": lead.kind,
        "shape": "price",
        "transition": "number → string",
        "state": api.FINDING_STATE_REAL,
        "pairs": 83,
        "lead": lead,
        "finding_count": 1,
        "endpoint_count": 1,
        "endpoints": [api.CauseEndpoint(endpoint=endpoint(), finding_id=number, count=83)],
    }
    return api.Cause(**defaults | fields)


def verdict() -> api.GetVerdictResponse:
    text = "0 of 1,000 pairs have unexplained mismatches: 0% (0% to 0.4%; limit 0.1%)"
    rate = api.VerdictReason(
        subject=api.VERDICT_SUBJECT_MISMATCHES, state=api.VERDICT_STATE_INCONCLUSIVE, text=text, pairs_to_pass=2500
    )
    unseen = api.VerdictReason(
        subject=api.VERDICT_SUBJECT_COVERAGE,
        endpoint=endpoint(),
        state=api.VERDICT_STATE_INCONCLUSIVE,
        text="old answered 7 requests, new none",
    )
    return api.GetVerdictResponse(
        service="shop",
        state=api.VERDICT_STATE_INCONCLUSIVE,
        reasons=[unseen, rate],
        endpoints=[
            api.EndpointVerdict(endpoint=endpoint(), state=api.VERDICT_STATE_INCONCLUSIVE, reasons=[unseen, rate]),
            api.EndpointVerdict(
                endpoint=common.Endpoint(service="shop", method="GET", route="/"), state=api.VERDICT_STATE_PASS
            ),
        ],
        pairs_needed=2500,
    )


def traffic(version: int = 7, *, new_share: float = 0.25) -> traffic_pb2.Traffic:
    message = traffic_pb2.Traffic(
        service="shop", new_share=new_share, sample_safe=0.1, baseline_share=0.1, version=version
    )
    message.update_time.FromDatetime(NOW - timedelta(minutes=3))
    return message


def envoy(version: int = 7, **fields: Any) -> traffic_pb2.EnvoyStatus:
    """Return an Envoy that has acknowledged this version: version 8 is in force."""
    message = traffic_pb2.EnvoyStatus(node="edge-1", acknowledged_version=version, **fields)
    if version == 8:
        message.acknowledged_after.FromMicroseconds(2600)
    return message


def answers() -> dict[str, Message | list[Message] | grpc.StatusCode]:
    """Return the response of each method; a list is a stream."""
    change: dict[str, Any] = {"traffic": traffic(8, new_share=0.0), "envoys": [envoy(8)]}
    event = traffic_pb2.TrafficEvent(
        id=2,
        actor="ann@desk",
        action="update",
        reason="first users",
        before=traffic(6, new_share=0.1),
        after=traffic(7),
    )
    event.time.FromDatetime(NOW)
    summary_row = api.EndpointSummary(endpoint=endpoint(), pairs=1204, findings=2, outcomes=summary().outcomes[:2])
    summary_row.source = api.ENDPOINT_SOURCE_LEARNED
    summary_row.old_p50.FromMicroseconds(3100)
    summary_row.old_p99.FromMicroseconds(12_400)
    return {
        "GetSummary": summary(),
        "GetVerdict": verdict(),
        "ListEndpoints": api.ListEndpointsResponse(endpoints=[summary_row]),
        "ListCauses": api.ListCausesResponse(causes=[cause()], total_size=1, finding_count=1),
        "ListFindings": api.ListFindingsResponse(findings=[finding()]),
        "GetFinding": api.GetFindingResponse(finding=finding(), examples=[pair_detail()]),
        "GetPair": api.GetPairResponse(pair=pair_detail()),
        "WatchFindings": [api.WatchFindingsResponse(finding=finding()), api.WatchFindingsResponse(finding=finding(13))],
        "GetTraffic": traffic_pb2.GetTrafficResponse(
            traffic=traffic(),
            envoys=[envoy()],
            effective_sample=traffic_pb2.EffectiveSample(selected=2000, copied=1300),
        ),
        "UpdateTraffic": traffic_pb2.UpdateTrafficResponse(**change),
        "Rollback": traffic_pb2.RollbackResponse(**change),
        "ListPairs": api.ListPairsResponse(pairs=[pair_detail().pair]),
        "SetFindingStatus": api.SetFindingStatusResponse(finding=finding()),
        "Promote": traffic_pb2.PromoteResponse(**change),
        "ListTrafficEvents": traffic_pb2.ListTrafficEventsResponse(events=[event]),
    }


class Prepared(grpc.GenericRpcHandler):
    """Answers calls from a table, and keeps the requests in `requests`."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table
        self.requests: list[Any] = []

    def service(self, details: Any) -> Any:
        service, _, name = details.method.strip("/").partition("/")
        if service not in SERVICES or name not in self.table:
            return None
        method = SERVICES[service].methods_by_name[name]
        module = api if service.endswith("ComparisonService") else traffic_pb2
        parse = getattr(module, method.input_type.name).FromString
        kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        return kind(
            lambda request, context: self._answer(name, request, context),
            request_deserializer=parse,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _answer(self, name: str, request: Any, context: Any) -> Any:
        self.requests.append(request)
        answer = self.table[name]
        if isinstance(answer, tuple):
            context.abort(*answer)
        return iter(answer) if isinstance(answer, list) else answer


@contextlib.contextmanager
def serving(**changed: Any) -> Iterator[tuple[str, Prepared]]:
    """Yield the address and the handler. `changed` replaces responses by method; (code, text) is an error."""
    from concurrent.futures import ThreadPoolExecutor

    handler = Prepared({**answers(), **changed})
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler], options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", handler
    finally:
        server.stop(None).wait()
