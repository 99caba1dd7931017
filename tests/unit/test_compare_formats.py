"""Properties of all formats: symmetric, without false differences, without errors, and no change is missed."""

from __future__ import annotations

import gzip
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abreast.protocol.capture import Answer, Body
from abreast_sidecar.compare.body import BodyResult, compare_bodies
from abreast_sidecar.compare.rules import CompareOptions

# Bodies with a placeholder for a word.
PLACES: dict[str, list[str]] = {
    "application/json": ['{"a":%s}', '["%s"]', '[{"id":1,"v":["x","%s"]},2]', '{"%s":1}', '{"a":1,"a":"%s","a":2}'],
    "application/problem+json": ['{"detail":"%s"}'],
    "application/x-ndjson": ['{"a":1}\n{"a":"%s"}\n', '"%s"'],
    "text/event-stream": ["data: %s\n\n", "event: %s\n\n", "id: %s\ndata: 1\n\n", 'data: {"a":"%s"}\n\n'],
    "application/x-www-form-urlencoded": ["a=1&b=%s", "%s=1", "a=1&a=%s"],
    "multipart/form-data; boundary=b": [
        '--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n%s\r\n--b--',
        '--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n1\r\n--b--',
        '--b\r\ncontent-disposition: form-data; name="a"; filename="%s"\r\n\r\n1\r\n--b--',
        '--b\r\ncontent-disposition: form-data; name="a"\r\ncontent-type: text/%s\r\n\r\n1\r\n--b--',
        '--b\r\ncontent-disposition: form-data; name="a"\r\nx-more: %s\r\n\r\n1\r\n--b--',
    ],
    "text/html": [
        "<p>%s</p>",
        "<p>a <b>%s</b> c</p>",
        '<a href="%s">x</a>',
        "<%s>x</%s>",
        "<a %s=1>x</a>",
        "<script>%s</script><p>x</p>",
        "<pre>a\n  %s</pre>",
        "<ul><li>1<li>%s</ul>",
    ],
    "application/xml": [
        "<r>%s</r>",
        "<r a='%s'/>",
        "<r><%s/></r>",
        "<r %s='1'/>",
        "<r xmlns='%s'/>",
        "<r><![CDATA[%s]]></r>",
        "<r>1<b/>%s</r>",
    ],
    "text/plain": ["%s", "one\n%s\nthree\n"],
    "text/csv": ["a,b\n1,%s\n"],
    "application/octet-stream": ["\x00%s"],
    "image/png": ["\x89PNG%s"],
    "": ['{"a":"%s"}', "<html><p>%s</p></html>", "%s"],
}
each_format = pytest.mark.parametrize(
    ("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places]
)
WORDS = ("anna", "otto", "77", "78", "anna2")
SWAPPED = {"added": "removed", "removed": "added"}


def answer(body: bytes, kind: str, coding: str = "") -> Answer:
    headers = [("content-type", kind)] if kind else []
    if coding:
        headers.append(("content-encoding", coding))
    return Answer(200, tuple(headers), Body(body, len(body)))


def compare(old: bytes, new: bytes, kind: str) -> BodyResult:
    return compare_bodies(answer(old, kind), answer(new, kind), CompareOptions())


def filled(place: str, word: str) -> bytes:
    return place.replace("%s", word).encode("latin-1")


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("text/csv", b'"1;2";3\n', b"1;2;3\n"),
        ("text/csv", b'"1\t2"\t3\n', b"1\t2\t3\n"),
        ("text/html", b"Pay <b>5</b> not <i>6</i>", b"Pay not <b>5</b> <i>6</i>"),
        ("text/html", b"<html><p>a</p>Pay <b>5</b> not <i>6</i>", b"<html><p>a</p>Pay not <b>5</b> <i>6</i>"),
    ],
)
def test_compare_detects_a_moved_part_of_a_text(kind: str, old: bytes, new: bytes) -> None:
    assert compare(old, new, kind).differences
    assert not compare(old, bytes(bytearray(old)), kind).differences


@each_format
def test_compare_detects_a_changed_word_in_every_format(kind: str, place: str) -> None:
    words = [word for word in WORDS if not word.isdigit() or ("<%s" not in place and "<r %s" not in place)]
    for old, new in pairwise(words):
        assert compare(filled(place, old), filled(place, new), kind).differences, (old, new)


@each_format
@settings(max_examples=25)
@given(st.data())
def test_compare_of_damaged_bodies_is_symmetric(kind: str, place: str, data: st.DataObject) -> None:
    old, new = (damaged(filled(place, "anna"), data) for _ in range(2))
    forward, backward = compare(old, new, kind), compare(new, old, kind)

    assert compare(old, bytes(bytearray(old)), kind).differences == []
    assert (forward.is_unreadable, forward.is_too_large) == (backward.is_unreadable, backward.is_too_large)
    assert sorted((difference.path, difference.kind) for difference in forward.differences) == sorted(
        (difference.path, SWAPPED.get(difference.kind, difference.kind)) for difference in backward.differences
    )


def damaged(body: bytes, data: st.DataObject) -> bytes:
    """Insert, remove or change up to three bytes."""
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(body)))
        put = data.draw(st.binary(max_size=2))
        body = body[:position] + put + body[position + data.draw(st.integers(0, 2)) :]
    return body


@each_format
def test_compressed_body_is_compared_like_a_plain_one(kind: str, place: str) -> None:
    plain = [filled(place, word) for word in WORDS[:2]]
    old, new = (answer(gzip.compress(body), kind, "gzip") for body in plain)
    result, expected = compare_bodies(old, new, CompareOptions()), compare(plain[0], plain[1], kind)

    assert [difference.path for difference in result.differences] == [
        difference.path for difference in expected.differences
    ]
