from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from abreast_sidecar.serve.phrase import describe_location, summarise_finding
from abreast_sidecar.store.records import Endpoint, Finding

MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)


def finding(part: str, kind: str, path: str = "", **detail: Any) -> Finding:
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
    ("found", "where", "what"),
    [
        (finding("status", "changed", old="200", new="500"), "status", "200 became 500"),
        (finding("body", "type", "$.id", old="7", new='"7"'), "$.id", '7 became "7"'),
        (finding("body", "changed"), "body", "changed"),
        (finding("body", "added", "$.a", old=None, new="1"), "$.a", "added 1"),
        (finding("body", "added", "$.a"), "$.a", "added"),
        (finding("body", "order", "$.tags", old="[1,2]", new="[2,1]"), "$.tags", "same elements in another order"),
        (finding("header", "removed", "etag", old='"x"', new=None), "header etag", 'removed, was "x"'),
        (finding("header", "removed", "etag"), "header etag", "removed"),
        (finding("error", "changed", old="null", new='"KeyError"'), "the application failed", 'null became "KeyError"'),
        (finding("latency", "slower", old_p50_us=3100, new_p50_us=41_000), "time", "p50 3.1 ms became 41.0 ms"),
        (finding("latency", "slower"), "time", "slower"),
        (finding("body", "type", "$.a"), "$.a", "another type"),
        (finding("body", "changed", "$.a", old="x" * 99, new="y"), "$.a", "x" * 59 + "… became y"),
    ],
)
def test_a_finding_is_said_in_one_line(found: Finding, where: str, what: str) -> None:
    assert (describe_location(found), summarise_finding(found)) == (where, what)
