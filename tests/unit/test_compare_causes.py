"""One cause yields one difference."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from abreast.protocol.capture import Answer, Body, Capture, Request, Version
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions

JSON, HTML, TEXT = (("content-type", kind) for kind in ("application/json", "text/html", "text/plain"))
PAGE = b"<html><body><h1>Oops</h1></body></html>"


def body(value: object) -> bytes:
    return json.dumps(value).encode()


def capture(
    version: Version, status: int, content: bytes, headers: tuple[tuple[str, str], ...], **fields: Any
) -> Capture:
    answer = Answer(status, headers, Body(content, len(content)))
    return Capture("p", "shop", version, "live", Request("GET", "/x", "", "/x"), answer, **fields)


OLD = capture("old", 200, body({"a": {"b": 1, "c": {"d": 2}}}), (JSON,))


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (capture("new", 200, PAGE, (HTML,)), [("body", "", "type", "breaking")]),
        (capture("new", 200, b"oops", (TEXT,)), [("body", "", "type", "breaking")]),
        (capture("new", 200, b"", ()), [("body", "", "removed", "breaking")]),
        (capture("new", 204, b"", ()), [("status", "200->204", "changed", "breaking")]),
        (capture("new", 200, OLD.answer.body.content, (TEXT,)), [("header", "content-type", "changed", "breaking")]),
        (capture("new", 200, body({}), (JSON,)), [("body", "$.a", "removed", "breaking")]),
        (capture("new", 200, body({"a": None}), (JSON,)), [("body", "$.a", "type", "breaking")]),
        (capture("new", 404, PAGE, (HTML,)), [("status", "200->404", "changed", "breaking")]),
        (
            capture("new", 500, b"Internal", (TEXT,), exception="KeyError"),
            [("status", "200->500", "changed", "breaking")],
        ),
        (
            capture("new", 200, b'{"a', (JSON,), exception="KeyError", complete=False),
            [("error", "unfinished", "removed", "breaking")],
        ),
        (
            capture("new", 200, gzip.compress(OLD.answer.body.content), (JSON, ("content-encoding", "gzip"))),
            [("header", "content-encoding", "added", "additive")],
        ),
    ],
    ids=["page", "text", "empty", "no-content", "wrong-type", "parent", "null", "missing", "raised", "cut", "gzip"],
)
def test_one_cause_yields_one_difference(new: Capture, expected: list[tuple[str, str, str, str]]) -> None:
    result = compare_pair([OLD, new], CompareOptions()).differences

    assert [(difference.part, difference.path, difference.kind, difference.impact) for difference in result] == expected


def test_independent_causes_yield_separate_differences() -> None:
    new = capture("new", 201, body({"a": {"b": "1", "c": {"d": 2}}}), (JSON, ("vary", "accept")))
    result = compare_pair([OLD, new], CompareOptions()).differences

    assert [(difference.part, difference.path) for difference in result] == [
        ("status", "200->201"),
        ("header", "vary"),
        ("body", "$.a.b"),
    ]
