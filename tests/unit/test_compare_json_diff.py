"""Differences between JSON documents."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH, JsonDiff
from abreast_sidecar.compare.values import NotJsonError, encode_canonical, parse

# Adding 0.0 turns minus zero into zero, which has another text.
NUMBERS = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6),
    max_leaves=30,
)
LIMIT = 100_000


def diff(old: Any, new: Any, limit: int = LIMIT) -> list[tuple[str, str]]:
    return [(difference.exact_path, difference.kind) for difference in JsonDiff(limit).compare(old, new)]


def paths(old: Any, new: Any) -> set[str]:
    return {difference.path for difference in JsonDiff(LIMIT).compare(old, new)}


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
def test_json_diff_reports_path_and_kind(old: Any, new: Any, expected: list[tuple[str, str]]) -> None:
    assert diff(old, new) == expected


def test_json_diff_generalises_indices_and_ids() -> None:
    old = {"items": [{"price": 1}, {"price": 2}], "by_id": {"17": {"n": 1}, "18": {"n": 1}}}
    new = {"items": [{"price": 3}, {"price": 4}], "by_id": {"17": {"n": 2}, "18": {"n": 2}}}

    assert paths(old, new) == {"$.items[*].price", "$.by_id.*.n"}


def test_integers_beyond_64_bits_differ() -> None:
    old, new = (parse(b'{"id": %d}' % number) for number in (2**64 + 1, 2**64 + 2))

    assert diff(old, new) == [("$.id", "changed")]


def test_nan_equals_itself_and_not_null() -> None:
    nan = parse(b"[NaN]")

    assert diff(nan, parse(b"[NaN]")) == []
    assert diff(nan, parse(b"[null]")) == [("$[0]", "type")]


def test_lone_surrogates_differ() -> None:
    assert diff(parse(rb'["\ud800"]'), parse(rb'["\ud801"]')) == [("$[0]", "changed")]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1,]", b"nope", b"[" * 100_000])
def test_parse_refuses_invalid_json(body: bytes) -> None:
    with pytest.raises(NotJsonError):
        parse(body)


def test_json_diff_limits_the_number_of_differences() -> None:
    old = {f"field_{chr(97 + n // 26)}{chr(97 + n % 26)}": n for n in range(400)} | {"other": "text"}

    assert len(diff(old, {name: [value] for name, value in old.items()}, limit=50)) == 50


def test_json_diff_limits_differences_per_path() -> None:
    old = {"list": list(range(1000)), "total": 1}
    new = {"list": [n + 5000 for n in range(1000)], "total": 2}

    assert diff(old, new, limit=200)[-1] == ("$.total", "changed")
    assert len(diff(old, new, limit=200)) == MAX_DIFFERENCES_PER_PATH + 1


def test_difference_truncates_values() -> None:
    result = JsonDiff(10).compare({"a": "x" * 10_000}, {"a": "y"})

    assert len(result[0].old or "") == 500


@given(JSON)
def test_json_diff_of_equal_values_is_empty(value: Any) -> None:
    assert diff(value, json.loads(json.dumps(value))) == []


@given(JSON, JSON)
def test_json_diff_agrees_with_canonical_texts(old: Any, new: Any) -> None:
    assert bool(diff(old, new)) == (encode_canonical(old) != encode_canonical(new))


@given(JSON, JSON)
def test_json_diff_with_swapped_sides_swaps_added_and_removed(old: Any, new: Any) -> None:
    swap = {"added": "removed", "removed": "added"}
    forth = sorted((difference.path, difference.kind) for difference in JsonDiff(LIMIT).compare(old, new))
    back = sorted(
        (difference.path, swap.get(difference.kind, difference.kind))
        for difference in JsonDiff(LIMIT).compare(new, old)
    )

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
def test_numbers_beyond_float_precision_differ(old: bytes, new: bytes) -> None:
    for form in (b"%b", b'{"a": %b}', b"[[%b], 1]", b'[{"id": 1, "v": %b}, {"id": 2}]'):
        result = JsonDiff(10).compare(parse(form % old), parse(form % new))

        assert [(difference.kind, difference.impact) for difference in result] == [("changed", "value")]
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
def test_equal_numbers_in_other_notation_are_equal(old: bytes, new: bytes) -> None:
    assert JsonDiff(10).compare(parse(b"[%b]" % old), parse(b"[%b]" % new)) == []
