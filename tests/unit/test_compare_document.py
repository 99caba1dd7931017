"""Differences between JSON documents."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH, JsonDiff
from abreast_sidecar.compare.values import NotJsonError, encode_canonical, parse

# What a parser gives: NaN and infinities are Constants; minus zero is zero, and has another text.
NUMBERS = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6),
    max_leaves=30,
)
LIMIT = 100_000


def diff(old: Any, new: Any, limit: int = LIMIT) -> list[tuple[str, str]]:
    return [(found.exact_path, found.kind) for found in JsonDiff(limit).compare(old, new)]


def paths(old: Any, new: Any) -> set[str]:
    return {found.path for found in JsonDiff(LIMIT).compare(old, new)}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
        ({"a": 1}, {"a": 2}, [("$.a", "changed")]),
        ({"a": 1}, {"a": "1"}, [("$.a", "type")]),
        ({"a": 1}, {"a": 1.0}, [("$.a", "changed")]),
        ({"a": 1}, {"a": True}, [("$.a", "type")]),
        ({"a": 0}, {"a": False}, [("$.a", "type")]),
        ({"a": None}, {"a": 1}, [("$.a", "type")]),
        ({"a": None}, {}, [("$.a", "removed")]),
        ({}, {"a": None}, [("$.a", "added")]),
        ({"a": {"b": {}}}, {"a": {"b": []}}, [("$.a.b", "type")]),
        ([1, 2, 3], [3, 1, 2], [("$", "order")]),
        ([1, 2, 3], [0, 1, 2, 3], [("$[0]", "added")]),
        ([1, 2, 3], [1, 3], [("$[1]", "removed")]),
        ([{"p": 1}, {"p": 2}], [{"p": 1}, {"p": 3}], [("$[1].p", "changed")]),
        ([1, 1, 2], [1, 2, 2], [("$[1]", "changed")]),
        ([1, 2, 9], [2, 1, 8], [("$", "order"), ("$[2]", "changed")]),
        ({"a.b": 1}, {"a.b": 2}, [('$["a.b"]', "changed")]),
        ("x", "y", [("$", "changed")]),
        ([True], [1], [("$[0]", "type")]),
    ],
)
def test_each_kind_is_named_where_it_is(old: Any, new: Any, expected: list[tuple[str, str]]) -> None:
    assert diff(old, new) == expected


def test_indices_and_ids_are_generalised() -> None:
    old = {"items": [{"price": 1}, {"price": 2}], "by_id": {"17": {"n": 1}, "18": {"n": 1}}}
    new = {"items": [{"price": 3}, {"price": 4}], "by_id": {"17": {"n": 2}, "18": {"n": 2}}}

    assert paths(old, new) == {"$.items[*].price", "$.by_id.*.n"}


def test_integers_beyond_64_bits_are_told_apart() -> None:
    old, new = (parse(b'{"id": %d}' % number) for number in (2**64 + 1, 2**64 + 2))

    assert diff(old, new) == [("$.id", "changed")]


def test_not_a_number_is_neither_null_nor_different_from_itself() -> None:
    nan = parse(b"[NaN]")

    assert diff(nan, parse(b"[NaN]")) == []
    assert diff(nan, parse(b"[null]")) == [("$[0]", "type")]


def test_lone_surrogates_are_compared() -> None:
    assert diff(parse(rb'["\ud800"]'), parse(rb'["\ud801"]')) == [("$[0]", "changed")]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1,]", b"nope", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(NotJsonError):
        parse(body)


def test_the_number_of_differences_is_bounded() -> None:
    old = {f"field_{chr(97 + n // 26)}{chr(97 + n % 26)}": n for n in range(400)} | {"other": "text"}

    assert len(diff(old, {name: [value] for name, value in old.items()}, limit=50)) == 50


def test_many_differences_of_one_path_do_not_hide_another() -> None:
    old = {"list": list(range(1000)), "total": 1}
    new = {"list": [n + 5000 for n in range(1000)], "total": 2}

    assert diff(old, new, limit=200)[-1] == ("$.total", "changed")
    assert len(diff(old, new, limit=200)) == MAX_DIFFERENCES_PER_PATH + 1


def test_values_are_cut() -> None:
    found = JsonDiff(10).compare({"a": "x" * 10_000}, {"a": "y"})

    assert len(found[0].old or "") == 500


@given(JSON)
def test_nothing_differs_from_itself(value: Any) -> None:
    assert diff(value, json.loads(json.dumps(value))) == []


@given(JSON, JSON)
def test_it_differs_exactly_when_the_canonical_texts_do(old: Any, new: Any) -> None:
    assert bool(diff(old, new)) == (encode_canonical(old) != encode_canonical(new))


@given(JSON, JSON)
def test_swapping_the_sides_swaps_added_and_removed(old: Any, new: Any) -> None:
    swap = {"added": "removed", "removed": "added"}
    forth = sorted((found.path, found.kind) for found in JsonDiff(LIMIT).compare(old, new))
    back = sorted((found.path, swap.get(found.kind, found.kind)) for found in JsonDiff(LIMIT).compare(new, old))

    assert forth == back


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0.123456789012345678", b"0.123456789012345679"),
        (b"100000000000000000000.01", b"100000000000000000000.02"),
        (b"1e400", b"1e401"),
        (b"-1e400", b"1e400"),
        (b"1e99999999999999999999999", b"1e99999999999999999999998"),
        (b"0.1", b"0.1000000000000000055511151231257827"),
        (b"123456789012345678901234567890", b"123456789012345678901234567891"),
    ],
)
def test_numbers_that_no_float_holds_are_told_apart(old: bytes, new: bytes) -> None:
    for form in (b"%b", b'{"a": %b}', b"[[%b], 1]", b'[{"id": 1, "v": %b}, {"id": 2}]'):
        found = JsonDiff(10).compare(parse(form % old), parse(form % new))

        assert [(one.kind, one.impact) for one in found] == [("changed", "value")]
        assert JsonDiff(10).compare(parse(form % old), parse(form % old)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1.50000000000000000000", b"1.5"),
        (b"0.00012345678901234567", b"1.2345678901234567e-4"),
        (b"1.2345678901234567890e400", b"12.345678901234567890e399"),
        (b"-0.00000000000000000000", b"-0.0"),
    ],
)
def test_equal_numbers_are_equal_however_they_are_written(old: bytes, new: bytes) -> None:
    assert JsonDiff(10).compare(parse(b"[%b]" % old), parse(b"[%b]" % new)) == []
