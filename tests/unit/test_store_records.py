"""Detect that new failed a user's request and old answered it, and which loads match."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from abreast.protocol.capture import Answer, Body, Capture
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.store.records import PairRecord
from support_captures import capture

OLD_COPY = capture("old", role="shadow")
OLD_AGAIN = capture("old", attempt=2)
NEW = capture("new", status=503)
NEW_COPY = capture("new", status=503, role="baseline")


@pytest.mark.parametrize(
    ("captures", "expected"),
    [
        ([OLD_COPY, NEW, OLD_AGAIN], True),  # new answered 503
        ([OLD_COPY, NEW, OLD_AGAIN, NEW_COPY], True),  # new also got a second copy
        ([OLD_COPY, OLD_AGAIN], True),  # new never answered
        ([OLD_COPY, capture("new")], False),  # new answered
        ([capture("old"), capture("new", role="shadow")], False),
        ([OLD_AGAIN, capture("new", role="shadow", status=500)], False),  # old itself was tried again
        ([OLD_AGAIN], False),  # the order of attempts is unknown
    ],
)
def test_compare_pair_detects_failover(captures: list[Capture], expected: bool) -> None:
    row = PairRecord("shop", "1-0", 1, "pair", compare_pair(captures, CompareOptions()), ()).to_row(1)

    assert row.get("failed_over", False) is expected


@pytest.mark.parametrize(("by_envoy", "expected"), [(True, True), (False, False)])
def test_baseline_copy_of_envoy_also_meets_the_live_requests_of_old(by_envoy: bool, expected: bool) -> None:
    old, new, baseline = (
        replace(made, in_flight=in_flight, wait_us=0, by_envoy=by_envoy)
        for made, in_flight in (
            (capture("old"), 3),
            (capture("new", role="shadow"), 4),
            (capture("old", role="baseline"), 1),
        )
    )
    result = ComparisonResult(
        outcome="match", method="GET", route="/", old=old, new=new, baseline=baseline, baseline_compared=True
    )

    assert PairRecord("shop", "1-0", 1, "pair", result, ()).to_row(1)["baseline_waits_match"] is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 900),
        ({"by_envoy": False}, 41_000),  # the middleware measures no network
        ({"complete": False}, 41_000),
        ({"answer": Answer(200, (("transfer-encoding", "chunked"),), Body(b"{}", 2))}, 41_000),
        ({"answer": Answer(200, (("content-length", "20000"),), Body(b"x" * 20_000, 20_000))}, 41_000),
    ],
)
def test_time_of_a_short_response_in_envoy_ends_at_its_head(change: dict[str, Any], expected: int) -> None:
    answer = Answer(200, (("content-length", "2"),), Body(b"{}", 2))
    times = {"by_envoy": True, "first_byte_us": 900, "total_us": 41_000, "answer": answer}
    old, new = replace(capture("old"), **times), replace(capture("new", role="shadow"), **{**times, **change})
    row = PairRecord("shop", "1-0", 1, "pair", compare_pair([old, new], CompareOptions()), ()).to_row(1)

    assert (row["old_us"], row["new_us"]) == (expected, expected), "both times are of the same kind"


@pytest.mark.parametrize(("code", "status"), [("0", 200), ("5", 404), ("13", 500), ("14", 503), ("99", 500)])
def test_failed_grpc_call_has_the_status_with_its_meaning(code: str, status: int) -> None:
    new = replace(capture("new"), answer=Answer(200, trailers=(("grpc-status", code),)))
    row = PairRecord("shop", "1-0", 1, "pair", compare_pair([capture("old"), new], CompareOptions()), ()).to_row(1)

    assert (row["old_status"], row["new_status"]) == (200, status)
