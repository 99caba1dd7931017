"""Truncated answers: the parts that both captures have are compared."""

from __future__ import annotations

import gzip
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.protocol.capture import Body, Capture, Headers, Role
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from support_captures import capture

RULES = CompareOptions()
EVENTS: Headers = (("content-type", "text/event-stream"),)
LINES: Headers = (("content-type", "application/x-ndjson"),)
CSV: Headers = (("content-type", "text/csv; charset=utf-8"),)
BYTES: Headers = (("content-type", "application/octet-stream"),)
PLAIN: Headers = (("content-type", "text/plain"),)


def event(number: int, **fields: Any) -> bytes:
    data = msgspec.json.encode({"number": number, **fields})
    return b"id: %d\ndata: %b\n\n" % (number, data)


def stream(count: int, **fields: Any) -> bytes:
    return b"".join(event(number, **fields) for number in range(count))


def truncated(version: Any, body: bytes, headers: Headers = EVENTS, role: Role = "live", **fields: Any) -> Capture:
    """Build an answer that ended when the client disconnected."""
    return capture(version, body, headers=headers, role=role, complete=False, client_left=True, **fields)


def copy(body: bytes, headers: Headers = EVENTS, **fields: Any) -> Capture:
    return capture("new", body, headers=headers, role="shadow", **fields)


def list_differences(result: ComparisonResult) -> list[str]:
    return [
        f"{difference.part} {difference.path} {difference.kind}".replace("  ", " ") for difference in result.differences
    ]


def compare(old: Capture, new: Capture) -> ComparisonResult:
    return compare_pair([old, new], RULES)


def test_truncated_answer_with_equal_start_is_partial() -> None:
    result = compare(truncated("old", stream(5)), copy(stream(9)))

    assert (result.outcome, result.differences) == ("partial", ())
    assert result.reason.startswith(
        "the client disconnected before the answer was complete: compared were status, headers, "
    )


@pytest.mark.parametrize("equal", [True, False])
def test_streams_truncated_at_the_same_item_are_partial(equal: bool) -> None:
    content = stream(3)
    new = truncated("new", content if equal else content + b"data: 1", role="shadow")

    assert compare(truncated("old", content), new).outcome == "partial"


@pytest.mark.parametrize("cut_new", [False, True])
def test_truncated_streams_compare_common_items(cut_new: bool) -> None:
    longer = stream(2) + event(2, price=1) + stream(4)
    new = truncated("new", longer, role="shadow") if cut_new else copy(longer)
    result = compare(truncated("old", stream(3) + b"id: 3\nda"), new)

    assert (result.outcome, list_differences(result)) == ("partial", ["body events[*].data.price added"])


def test_truncated_item_is_ignored() -> None:
    result = compare(truncated("old", stream(3) + b'id: 3\ndata: {"num'), copy(stream(2) + event(2) + b"id: 4\n\n"))

    assert list_differences(result) == []
    assert result.reason.endswith("the first 3 events of both")


def test_complete_answer_shorter_than_truncated_one_lacks_items() -> None:
    result = compare(truncated("old", stream(4)), copy(stream(3)))

    assert list_differences(result) == ["body events[*] removed"]


@pytest.mark.parametrize(
    ("headers", "old", "new", "expected"),
    [
        (LINES, b'{"a":1}\n{"a":2}\n{"a"', b'{"a":1}\n{"a":3}\n{"a":4}\n', "body $[*].a changed"),
        (LINES, b'{"a":1}\r\n{"a"', b'{"a": 1}\n{"a":3}\n', ""),
        (CSV, b"id,name\n1,ann\n2,b", b"id,name\n1,bob\n2,bob\n", "body lines[*] changed"),
        (CSV, b"id,name\r\n1,ann\r\n2,b", b"id,name\n1,ann\n2,x\n", ""),
        (CSV, b"id\n1\n2\n", b"id\n1", "body lines[*] removed"),
        (BYTES, b"\x00\x01\x02\x03", b"\x00\x01\x02\x03\x04\x05", ""),
        (BYTES, b"\x00\x01\x02\x03", b"\x00\x01\x07\x03\x04\x05", "body changed"),
        (BYTES, b"\x00\x01\x02\x03", b"\x00\x01", "body changed"),
        (PLAIN, b"", b"whatever", ""),
    ],
    ids=["changed", "spaces", "csv", "line ends", "no more lines", "bytes", "other bytes", "fewer", "nothing"],
)  # fmt: skip
def test_truncated_body_is_compared_by_format(headers: Headers, old: bytes, new: bytes, expected: str) -> None:
    result = compare(truncated("old", old, headers), copy(new, headers))

    assert (result.outcome, list_differences(result)) == ("partial", [expected] if expected else [])


@pytest.mark.parametrize(
    ("headers", "old", "new"),
    [
        ((("content-type", "application/json"),), b'{"a": 1, "b', b'{"b": 2, "a": 1}'),
        ((("content-type", "text/html"),), b"<p>a<p", b"<p >a</p>"),
        ((*LINES, ("content-encoding", "gzip")), gzip.compress(b'{"a":1}\n')[:-3], gzip.compress(b'{"b":1}\n')),
        (LINES, b"no json\nat all", b"none\nhere\n"),
    ],
    ids=["json", "html", "gzip", "not what it says"],
)  # fmt: skip
def test_truncated_body_without_items_is_not_compared(headers: Headers, old: bytes, new: bytes) -> None:
    result = compare(truncated("old", old, headers), copy(new, headers))

    assert (result.outcome, result.differences) == ("partial", ())
    assert "not the bodies" in result.reason


def test_truncated_answers_compare_status_and_headers() -> None:
    new = copy(b"[1, 2, 3]", (("content-type", "application/json"), ("cache-control", "no-store")), status=202)
    result = compare(truncated("old", b"", (("content-type", "application/json"),)), new)

    assert result.outcome == "partial"
    assert list_differences(result) == ["status 200->202 changed", "header cache-control added"]


def test_truncated_answer_with_other_status_class_reports_only_status() -> None:
    result = compare(truncated("old", stream(2)), copy(b"oops", (), status=500))

    assert (result.outcome, list_differences(result)) == ("mismatch", ["status 200->500 changed"])


def test_client_disconnect_hides_exceptions_trailers_and_effects() -> None:
    old = msgspec.structs.replace(
        truncated("old", stream(2), exception="ClientDisconnect"), effects=({"kind": "mail"},)
    )

    assert compare(old, copy(stream(5))).differences == ()


def test_answer_that_never_started_aborts_the_pair() -> None:
    for old, new in (
        (truncated("old", b"", status=0), copy(stream(1))),
        (truncated("old", stream(1)), truncated("new", b"", status=0, role="shadow")),
    ):
        assert (compare(old, new).outcome, compare(old, new).differences) == ("aborted", ())


def test_two_broken_off_answers_match_or_are_partial() -> None:
    def broken(version: Any, body: bytes) -> Capture:
        return capture(version, body, headers=EVENTS, complete=False, exception="OSError")

    same, changed = (compare(broken("old", stream(3)), broken("new", body)) for body in (stream(3), event(0, price=1)))

    assert same.outcome == "match"
    assert (changed.outcome, list_differences(changed)) == ("partial", ["body events[*].data.price added"])
    assert changed.reason.startswith("both answers broke off: ")


def going_on(result: Capture, total_us: int = 8_000_000) -> Capture:
    return msgspec.structs.replace(result, complete=False, truncated_by_deadline=True, total_us=total_us)


def test_running_streams_compare_captured_items() -> None:
    old, new = going_on(copy(stream(80))), going_on(copy(stream(2, price=1)))
    result = compare(msgspec.structs.replace(old, version="old", role="live"), new)

    assert result.outcome == "partial"
    assert list_differences(result) == ["body events[*].data.price added"] * 2
    assert result.reason.startswith("the answer was not finished when it was captured: ")


def test_running_stream_and_disconnected_client_are_partial() -> None:
    result = compare(truncated("old", stream(3)), going_on(copy(stream(80))))

    assert (result.outcome, list_differences(result)) == ("partial", [])


@pytest.mark.parametrize(("duration_us", "expected"), [(1_000_000, ["error unfinished removed"]), (7_900_000, [])])
def test_hung_answer_is_reported_as_unfinished(duration_us: int, expected: list[str]) -> None:
    old = msgspec.structs.replace(capture("old", stream(3), headers=EVENTS), total_us=duration_us)

    assert list_differences(compare(old, going_on(copy(stream(2))))) == expected


def test_body_over_the_capture_limit_compares_the_captured_part() -> None:
    def beyond(differences: Capture) -> Capture:
        body = msgspec.structs.replace(differences.answer.body, length=10_000, digest="0" * 32)
        return msgspec.structs.replace(differences, answer=msgspec.structs.replace(differences.answer, body=body))

    result = compare(beyond(truncated("old", stream(4))), beyond(copy(stream(2))))

    assert (result.outcome, list_differences(result)) == ("partial", [])
    assert Body(b"a", 2).is_complete is False


def test_baseline_of_truncated_stream_yields_noise() -> None:
    baseline = capture("old", stream(9, at=2), headers=EVENTS, role="baseline")
    result = compare_pair([truncated("old", stream(3, at=1)), copy(stream(9, at=3)), baseline], RULES)

    assert result.baseline_compared
    assert {(difference.path, difference.kind) for difference in result.noise} == {("events[*].data.at", "changed")}


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 400), st.integers(0, 400), st.data())
def test_one_stream_truncated_anywhere_has_no_differences(
    numbers: list[int], first: int, second: int, data: st.DataObject
) -> None:
    headers, make = data.draw(
        st.sampled_from(
            [
                (EVENTS, event),
                (LINES, lambda number: b'{"a": %d}\n' % number),
                (PLAIN, lambda number: b"line %d\n" % number),
                (BYTES, lambda number: b"\x00" * number),
            ]
        )
    )
    content = b"".join(make(number) for number in numbers)
    result = compare(
        truncated("old", content[:first], headers), truncated("new", content[:second], headers, role="shadow")
    )

    assert (result.outcome, result.differences) == ("partial", ())
    assert compare(truncated("old", content[:first], headers), copy(content, headers)).differences == ()


def test_digests_of_envoy_and_of_a_middleware_say_nothing_about_each_other() -> None:
    """A pair of both ways of capture has two kinds of digests."""
    part = b"x" * 100

    def compare(old: Body, new: Body) -> ComparisonResult:
        sides = (capture("old", headers=BYTES), capture("new", headers=BYTES))
        return compare_pair(
            [
                msgspec.structs.replace(side, answer=msgspec.structs.replace(side.answer, body=body))
                for side, body in zip(sides, (old, new), strict=True)
            ],
            RULES,
        )

    by_envoy, by_middleware = Body(part, 500, "envoy:0123456789abcdef"), Body(part, 500, "0123456789abcdef")

    assert compare(by_envoy, by_envoy).outcome == "match"
    assert compare(by_envoy, by_middleware).outcome == "partial"
    assert compare(*[Body(part, 500, "envoy:part:0123456789abcdef")] * 2).outcome == "partial"
    assert compare(by_envoy, Body(part, 501, "0123456789abcdef")).outcome == "oversize"
    assert compare(by_envoy, Body(b"y" * 100, 500, "0123456789abcdef")).outcome == "oversize"
    assert compare(by_envoy, Body(part, 500, "envoy:fedcba9876543210")).outcome == "oversize"


@pytest.mark.parametrize(("digests", "outcome"), [(("a", "a"), "match"), (("a", "b"), "oversize")])
def test_digests_with_different_keys_prove_nothing(digests: tuple[str, str], outcome: str) -> None:
    def pair(*key_ids: str) -> list[Capture]:
        captures = capture("old", b"", headers=BYTES), copy(b"", headers=BYTES)
        return [
            msgspec.structs.replace(
                side,
                answer=msgspec.structs.replace(side.answer, body=Body(b"", 1000, f"hmac:{key_id}:{digit * 32}")),
                redaction_key_id=key_id,
            )
            for side, key_id, digit in zip(captures, key_ids, digests, strict=True)
        ]

    assert compare_pair(pair("00000001", "00000001"), RULES).outcome == outcome
    result = compare_pair(pair("00000001", "00000002"), RULES)
    assert (result.outcome, result.differences) == ("partial", ())
    assert "different keys; set ABREAST_REDACT_KEY" in result.reason
