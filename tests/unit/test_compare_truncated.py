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
from captures import capture

RULES = CompareOptions()
EVENTS: Headers = (("content-type", "text/event-stream"),)
LINES: Headers = (("content-type", "application/x-ndjson"),)
CSV: Headers = (("content-type", "text/csv; charset=utf-8"),)
BYTES: Headers = (("content-type", "application/octet-stream"),)
PLAIN: Headers = (("content-type", "text/plain"),)


def event(number: int, **more: Any) -> bytes:
    data = msgspec.json.encode({"number": number, **more})
    return b"id: %d\ndata: %b\n\n" % (number, data)


def stream(many: int, **more: Any) -> bytes:
    return b"".join(event(number, **more) for number in range(many))


def left(version: Any, body: bytes, headers: Headers = EVENTS, role: Role = "live", **more: Any) -> Capture:
    """Build an answer that ended when the client disconnected."""
    return capture(version, body, headers=headers, role=role, complete=False, client_left=True, **more)


def copy(body: bytes, headers: Headers = EVENTS, **more: Any) -> Capture:
    return capture("new", body, headers=headers, role="shadow", **more)


def seen(result: ComparisonResult) -> list[str]:
    return [
        f"{difference.part} {difference.path} {difference.kind}".replace("  ", " ") for difference in result.differences
    ]


def compared(old: Capture, new: Capture) -> ComparisonResult:
    return compare_pair([old, new], RULES)


def test_truncated_answer_with_equal_start_is_partial() -> None:
    result = compared(left("old", stream(5)), copy(stream(9)))

    assert (result.outcome, result.differences) == ("partial", ())
    assert result.reason.startswith(
        "the client disconnected before the answer was complete: compared were status, headers, "
    )


@pytest.mark.parametrize("equal", [True, False])
def test_streams_truncated_at_the_same_item_are_partial(equal: bool) -> None:
    both = stream(3)
    new = left("new", both if equal else both + b"data: 1", role="shadow")

    assert compared(left("old", both), new).outcome == "partial"


@pytest.mark.parametrize("cut_new", [False, True])
def test_truncated_streams_compare_common_items(cut_new: bool) -> None:
    longer = stream(2) + event(2, price=1) + stream(4)
    new = left("new", longer, role="shadow") if cut_new else copy(longer)
    result = compared(left("old", stream(3) + b"id: 3\nda"), new)

    assert (result.outcome, seen(result)) == ("partial", ["body events[*].data.price added"])


def test_truncated_item_is_ignored() -> None:
    result = compared(left("old", stream(3) + b'id: 3\ndata: {"num'), copy(stream(2) + event(2) + b"id: 4\n\n"))

    assert seen(result) == []
    assert result.reason.endswith("the first 3 events of both")


def test_complete_answer_shorter_than_truncated_one_lacks_items() -> None:
    result = compared(left("old", stream(4)), copy(stream(3)))

    assert seen(result) == ["body events[*] removed"]


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
    result = compared(left("old", old, headers), copy(new, headers))

    assert (result.outcome, seen(result)) == ("partial", [expected] if expected else [])


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
    result = compared(left("old", old, headers), copy(new, headers))

    assert (result.outcome, result.differences) == ("partial", ())
    assert "not the bodies" in result.reason


def test_truncated_answers_compare_status_and_headers() -> None:
    new = copy(b"[1, 2, 3]", (("content-type", "application/json"), ("cache-control", "no-store")), status=202)
    result = compared(left("old", b"", (("content-type", "application/json"),)), new)

    assert result.outcome == "partial"
    assert seen(result) == ["status 200->202 changed", "header cache-control added"]


def test_truncated_answer_with_other_status_class_reports_only_status() -> None:
    result = compared(left("old", stream(2)), copy(b"oops", (), status=500))

    assert (result.outcome, seen(result)) == ("mismatch", ["status 200->500 changed"])


def test_client_disconnect_hides_exceptions_trailers_and_effects() -> None:
    old = msgspec.structs.replace(left("old", stream(2), raised="ClientDisconnect"), effects=({"kind": "mail"},))

    assert compared(old, copy(stream(5))).differences == ()


def test_answer_that_never_started_aborts_the_pair() -> None:
    for old, new in (
        (left("old", b"", status=0), copy(stream(1))),
        (left("old", stream(1)), left("new", b"", status=0, role="shadow")),
    ):
        assert (compared(old, new).outcome, compared(old, new).differences) == ("aborted", ())


def test_two_broken_off_answers_match_or_are_partial() -> None:
    def broken(version: Any, body: bytes) -> Capture:
        return capture(version, body, headers=EVENTS, complete=False, raised="OSError")

    same, changed = (compared(broken("old", stream(3)), broken("new", body)) for body in (stream(3), event(0, price=1)))

    assert same.outcome == "match"
    assert (changed.outcome, seen(changed)) == ("partial", ["body events[*].data.price added"])
    assert changed.reason.startswith("both answers broke off: ")


def going_on(result: Capture, total_us: int = 8_000_000) -> Capture:
    return msgspec.structs.replace(result, complete=False, truncated_by_deadline=True, total_us=total_us)


def test_running_streams_compare_captured_items() -> None:
    old, new = going_on(copy(stream(80))), going_on(copy(stream(2, price=1)))
    result = compared(msgspec.structs.replace(old, version="old", role="live"), new)

    assert result.outcome == "partial"
    assert seen(result) == ["body events[*].data.price added"] * 2
    assert result.reason.startswith("the answer was not finished when it was captured: ")


def test_running_stream_and_disconnected_client_are_partial() -> None:
    result = compared(left("old", stream(3)), going_on(copy(stream(80))))

    assert (result.outcome, seen(result)) == ("partial", [])


@pytest.mark.parametrize(("took", "expected"), [(1_000_000, ["error unfinished removed"]), (7_900_000, [])])
def test_hung_answer_is_reported_as_unfinished(took: int, expected: list[str]) -> None:
    old = msgspec.structs.replace(capture("old", stream(3), headers=EVENTS), total_us=took)

    assert seen(compared(old, going_on(copy(stream(2))))) == expected


def test_body_over_the_capture_limit_compares_the_captured_part() -> None:
    def beyond(differences: Capture) -> Capture:
        body = msgspec.structs.replace(differences.answer.body, length=10_000, digest="0" * 32)
        return msgspec.structs.replace(differences, answer=msgspec.structs.replace(differences.answer, body=body))

    result = compared(beyond(left("old", stream(4))), beyond(copy(stream(2))))

    assert (result.outcome, seen(result)) == ("partial", [])
    assert Body(b"a", 2).is_complete is False


def test_baseline_of_truncated_stream_yields_noise() -> None:
    again = capture("old", stream(9, at=2), headers=EVENTS, role="baseline")
    result = compare_pair([left("old", stream(3, at=1)), copy(stream(9, at=3)), again], RULES)

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
    whole = b"".join(make(number) for number in numbers)
    result = compared(left("old", whole[:first], headers), left("new", whole[:second], headers, role="shadow"))

    assert (result.outcome, result.differences) == ("partial", ())
    assert compared(left("old", whole[:first], headers), copy(whole, headers)).differences == ()
