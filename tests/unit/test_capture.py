from __future__ import annotations

import contextlib
from typing import get_args

import msgspec.structs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.errors import CaptureError
from abreast.protocol.capture import Answer, Body, Capture, Request, Role, Version, decode, digest, merge_times
from support_captures import capture, encode

LATIN = st.text(st.characters(max_codepoint=255), max_size=30)
HEADERS = st.lists(st.tuples(LATIN, LATIN), max_size=5).map(tuple)
COUNT = st.integers(0, 2**53)


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    content = draw(st.binary(max_size=200))
    missing = draw(st.integers(0, 10_000))
    return Body(content, len(content) + missing, digest(content) if missing else "")


CAPTURES = st.builds(
    Capture,
    pair=LATIN,
    service=LATIN,
    version=st.sampled_from(get_args(Version)),
    role=st.sampled_from(get_args(Role)),
    request=st.builds(Request, LATIN, LATIN.map("/".__add__), LATIN, LATIN, HEADERS, bodies()),
    answer=st.builds(Answer, st.integers(0, 999), HEADERS, bodies(), HEADERS),
    attempt=COUNT,
    expected_captures=st.sampled_from([2, 3]),
    release=LATIN,
    started_at=st.floats(0, 1e10),
    first_byte_us=st.none() | COUNT,
    total_us=COUNT,
    client_left=st.booleans(),
    complete=st.booleans(),
    exception=LATIN,
    effects=st.lists(st.dictionaries(LATIN, st.integers(-9, 9) | LATIN | st.none(), max_size=3), max_size=3).map(tuple),
)


@given(CAPTURES)
def test_decode_returns_the_encoded_capture(capture: Capture) -> None:
    assert decode(encode(capture)) == capture


@given(st.binary(max_size=300))
def test_decode_rejects_bytes_that_are_no_capture(blob: bytes) -> None:
    with pytest.raises(CaptureError):
        decode(blob)


@given(CAPTURES, st.data())
def test_decode_of_a_damaged_capture_raises_only_capture_error(capture: Capture, data: st.DataObject) -> None:
    blob = bytearray(encode(capture))
    position = data.draw(st.integers(0, len(blob) - 1))
    blob[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CaptureError):
        assert decode(bytes(blob)).version in {"old", "new"}


@given(CAPTURES, st.integers(1, 50))
def test_decode_rejects_a_truncated_capture(capture: Capture, length: int) -> None:
    blob = encode(capture)

    with pytest.raises(CaptureError):
        decode(blob[: max(0, len(blob) - length)])


@given(CAPTURES)
def test_decode_rejects_a_head_without_a_field(capture: Capture) -> None:
    line, _, bodies = encode(capture).partition(b"\n")
    head = orjson.loads(line)
    for part in head.keys() - {"effects_dropped"}:
        less = {name: value for name, value in head.items() if name != part}

        with pytest.raises(CaptureError):
            decode(orjson.dumps(less) + b"\n" + bodies)


def test_decode_accepts_a_head_without_optional_fields() -> None:
    capture = Capture("p", "s", "new", "shadow", Request("GET", "/"), Answer(200))
    head = orjson.loads(encode(capture))
    head.pop("effects_dropped", None)

    assert decode(orjson.dumps(head) + b"\n") == capture


def test_decode_names_a_newer_format() -> None:
    with pytest.raises(CaptureError, match="must have format 1, got format 2"):
        decode(b'{"v":2}\n')


def test_slot_has_version_role_and_attempt() -> None:
    capture = Capture("p", "s", "new", "shadow", Request("GET", "/"), Answer(200), attempt=3)

    assert capture.slot == "new:shadow:3"


def test_times_of_envoy_replace_those_of_the_process_only_next_to_another_capture_of_envoy() -> None:
    old, new = capture("old"), capture("new", role="shadow")
    times = replace(new, is_times=True, by_envoy=True, total_us=9000, in_flight=3)
    old_of_envoy = replace(old, by_envoy=True)

    assert merge_times([old, new, times]) == [old, new]
    assert merge_times([times, old_of_envoy, new]) == [
        old_of_envoy,
        replace(new, by_envoy=True, total_us=9000, in_flight=3),
    ]
    assert merge_times([times]) == []


def test_body_is_complete_if_no_bytes_are_missing() -> None:
    assert Body(b"abc", 3).is_complete
    assert not Body(b"abc", 4, "x").is_complete
    assert Body(b"abc", 3).fingerprint() == digest(b"abc")
    assert msgspec.structs.replace(Body(b"abc", 3), digest="d").fingerprint() == "d"


@pytest.mark.parametrize("sizes", [(-1, 1), (1, -1)])
def test_decode_refuses_negative_body_sizes(sizes: tuple[int, int]) -> None:
    head = orjson.loads(encode(Capture("p", "s", "new", "shadow", Request("GET", "/"), Answer(200))))
    head["request"]["body"][0], head["answer"]["body"][0] = sizes

    with pytest.raises(CaptureError, match="damaged"):
        decode(orjson.dumps(head) + b"\n")
