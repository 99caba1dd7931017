"""Answers that were cut: what both have is compared, and nothing is said of the rest."""

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
    """Its user left, or its copy ended with the user's."""
    return capture(version, body, headers=headers, role=role, complete=False, client_left=True, **more)


def copy(body: bytes, headers: Headers = EVENTS, **more: Any) -> Capture:
    return capture("new", body, headers=headers, role="shadow", **more)


def seen(judgement: ComparisonResult) -> list[str]:
    return [f"{one.part} {one.path} {one.kind}".replace("  ", " ") for one in judgement.differences]


def compared(old: Capture, new: Capture) -> ComparisonResult:
    return compare_pair([old, new], RULES)


def test_equal_beginnings_are_no_match() -> None:
    judgement = compared(left("old", stream(5)), copy(stream(9)))

    assert (judgement.outcome, judgement.differences) == ("partial", ())
    assert judgement.reason.startswith("the client left before the answer was whole: compared were status, headers, ")


@pytest.mark.parametrize("equal", [True, False])
def test_streams_that_were_cut_at_the_same_place_are_no_match(equal: bool) -> None:
    both = stream(3)
    new = left("new", both if equal else both + b"data: 1", role="shadow")

    assert compared(left("old", both), new).outcome == "partial"


@pytest.mark.parametrize("cut_new", [False, True])
def test_items_are_compared_as_far_as_both_have_them(cut_new: bool) -> None:
    longer = stream(2) + event(2, price=1) + stream(4)
    new = left("new", longer, role="shadow") if cut_new else copy(longer)
    judgement = compared(left("old", stream(3) + b"id: 3\nda"), new)

    assert (judgement.outcome, seen(judgement)) == ("partial", ["body events[*].data.price added"])


def test_an_item_that_was_cut_is_no_difference() -> None:
    judgement = compared(left("old", stream(3) + b'id: 3\ndata: {"num'), copy(stream(2) + event(2) + b"id: 4\n\n"))

    assert seen(judgement) == []
    assert judgement.reason.endswith("the first 3 events of both")


def test_an_answer_that_ended_before_the_one_that_was_left_lacks_the_rest() -> None:
    judgement = compared(left("old", stream(4)), copy(stream(3)))

    assert seen(judgement) == ["body events[*] removed"]


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
def test_what_is_compared_of_a_format(headers: Headers, old: bytes, new: bytes, expected: str) -> None:
    judgement = compared(left("old", old, headers), copy(new, headers))

    assert (judgement.outcome, seen(judgement)) == ("partial", [expected] if expected else [])


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
def test_what_can_t_be_told_in_part_is_no_difference(headers: Headers, old: bytes, new: bytes) -> None:
    judgement = compared(left("old", old, headers), copy(new, headers))

    assert (judgement.outcome, judgement.differences) == ("partial", ())
    assert "not the bodies" in judgement.reason


def test_status_and_headers_are_compared_in_any_case() -> None:
    new = copy(b"[1, 2, 3]", (("content-type", "application/json"), ("cache-control", "no-store")), status=202)
    judgement = compared(left("old", b"", (("content-type", "application/json"),)), new)

    assert judgement.outcome == "partial"
    assert seen(judgement) == ["status 200->202 changed", "header cache-control added"]


def test_another_status_class_is_all_there_is_to_say() -> None:
    judgement = compared(left("old", stream(2)), copy(b"oops", (), status=500))

    assert (judgement.outcome, seen(judgement)) == ("mismatch", ["status 200->500 changed"])


def test_what_follows_from_a_user_who_left_is_no_difference() -> None:
    """Exceptions, trailers and effects among it."""
    old = msgspec.structs.replace(left("old", stream(2), raised="ClientDisconnect"), effects=({"kind": "mail"},))

    assert compared(old, copy(stream(5))).differences == ()


def test_nothing_is_compared_of_an_answer_that_had_not_begun() -> None:
    for old, new in (
        (left("old", b"", status=0), copy(stream(1))),
        (left("old", stream(1)), left("new", b"", status=0, role="shadow")),
    ):
        assert (compared(old, new).outcome, compared(old, new).differences) == ("aborted", ())


def test_two_answers_that_broke_off_by_themselves_are_compared_in_part_unless_they_are_equal() -> None:
    def broken(version: Any, body: bytes) -> Capture:
        return capture(version, body, headers=EVENTS, complete=False, raised="OSError")

    same, changed = (compared(broken("old", stream(3)), broken("new", body)) for body in (stream(3), event(0, price=1)))

    assert same.outcome == "match"
    assert (changed.outcome, seen(changed)) == ("partial", ["body events[*].data.price added"])
    assert changed.reason.startswith("both answers broke off: ")


def going_on(found: Capture, total_us: int = 8_000_000) -> Capture:
    return msgspec.structs.replace(found, complete=False, truncated_by_deadline=True, total_us=total_us)


def test_streams_that_go_on_are_compared_in_what_came() -> None:
    old, new = going_on(copy(stream(80))), going_on(copy(stream(2, price=1)))
    judgement = compared(msgspec.structs.replace(old, version="old", role="live"), new)

    assert judgement.outcome == "partial"
    assert seen(judgement) == ["body events[*].data.price added"] * 2
    assert judgement.reason.startswith("the answer still went on when it was captured: ")


def test_an_answer_that_goes_on_beside_one_that_its_user_left_says_nothing_of_its_end() -> None:
    judgement = compared(left("old", stream(3)), going_on(copy(stream(80))))

    assert (judgement.outcome, seen(judgement)) == ("partial", [])


@pytest.mark.parametrize(("took", "expected"), [(1_000_000, ["error unfinished removed"]), (7_900_000, [])])
def test_one_that_hangs_within_its_answer_is_unfinished(took: int, expected: list[str]) -> None:
    """Not one that merely takes as long as there is time to capture it."""
    old = msgspec.structs.replace(capture("old", stream(3), headers=EVENTS), total_us=took)

    assert seen(compared(old, going_on(copy(stream(2))))) == expected


def test_of_a_body_beyond_the_limit_only_what_is_held_is_compared() -> None:
    def beyond(found: Capture) -> Capture:
        body = msgspec.structs.replace(found.answer.body, length=10_000, digest="0" * 32)
        return msgspec.structs.replace(found, answer=msgspec.structs.replace(found.answer, body=body))

    judgement = compared(beyond(left("old", stream(4))), beyond(copy(stream(2))))

    assert (judgement.outcome, seen(judgement)) == ("partial", [])
    assert Body(b"a", 2).is_complete is False


def test_copies_to_old_teach_what_differs_in_a_stream_by_itself() -> None:
    again = capture("old", stream(9, at=2), headers=EVENTS, role="baseline")
    judgement = compare_pair([left("old", stream(3, at=1)), copy(stream(9, at=3)), again], RULES)

    assert judgement.baseline_compared
    assert {(one.path, one.kind) for one in judgement.noise} == {("events[*].data.at", "changed")}


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 400), st.integers(0, 400), st.data())
def test_one_stream_that_is_cut_anywhere_differs_in_nothing(
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
    judgement = compared(left("old", whole[:first], headers), left("new", whole[:second], headers, role="shadow"))

    assert (judgement.outcome, judgement.differences) == ("partial", ())
    assert compared(left("old", whole[:first], headers), copy(whole, headers)).differences == ()
