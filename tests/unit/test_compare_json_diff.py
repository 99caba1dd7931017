"""Differences between JSON documents."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.json_diff import MAX_DIFFERENCES_PER_PATH, JsonDiff, JsonTextDiff
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
        ([{"id": 1, "p": 1}, {"id": 2, "p": 2}], [{"id": "2", "p": 2}], [("$[1].id", "type"), ("$[0]", "removed")]),
        (
            [{"id": 1, "p": 1}, {"id": 2, "p": 2}],
            [{"id": "2", "p": 2}, {"id": "1", "p": 1}],
            [("$", "order"), ("$[0].id", "type"), ("$[1].id", "type")],
        ),
        ([{"id": 1}, {"id": "1"}], [{"id": "1"}, {"id": 2}], [("$[0].id", "changed")]),
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


def make_fields(count: int) -> dict[str, int]:
    """Return an object whose keys are no ids."""
    return {f"field_{chr(97 + n // 26)}{chr(97 + n % 26)}": n for n in range(count)} | {"other": 0}


def test_json_diff_reports_each_path_beyond_its_limit() -> None:
    old = make_fields(400)

    assert len(diff(old, {name: [value] for name, value in old.items()}, limit=50)) == 401


def test_json_diff_counts_differences_beyond_the_largest_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abreast_sidecar.compare.json_diff.MAX_PLACES", 30)
    old = make_fields(100)
    walk = JsonDiff(200)
    walk.compare(old, {name: [value] for name, value in old.items()})

    assert (len(walk.differences), walk.omitted_count, walk.repeat_count) == (30, 71, 0)


def test_json_diff_keeps_one_difference_of_each_class() -> None:
    old, new = [0] * 500, [2] * 300 + [3] + [4] * 199
    walk = JsonDiff(200, classify=lambda difference: int(difference.new or 0) % 2)
    walk.compare(old, new)

    assert [difference.new for difference in walk.differences] == ["2"] * 20 + ["3"]
    assert (walk.repeat_count, walk.omitted_count) == (479, 0)


def test_json_diff_omits_differences_that_it_has_no_steps_to_classify() -> None:
    walk = JsonDiff(200, classify=lambda _: 0, max_work=1600)
    walk.compare([0] * 500, [2] * 500)

    assert len(walk.differences) == MAX_DIFFERENCES_PER_PATH
    assert walk.omitted_count + walk.repeat_count == 480
    assert walk.omitted_count > 300


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 40))
def test_json_diff_never_loses_a_class(values: list[int], limit: int) -> None:
    new = {"rows": [{"v": value + 10, "w": value} for value in values], "total": 1}
    old = {"rows": [{"v": 0, "w": -1} for _ in values], "total": 2}
    walk = JsonDiff(limit, classify=lambda difference: difference.new)
    walk.compare(old, new)
    expected = {("$.rows[*].v", str(value + 10)) for value in values} | {
        ("$.rows[*].w", str(value)) for value in values
    }

    assert {(difference.path, difference.new) for difference in walk.differences} == expected | {("$.total", "1")}
    assert len(walk.differences) + walk.repeat_count == 2 * len(values) + 1


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
        (b"9007199254740993.0", b"9007199254740992.0"),
        (b"1234567890123456.7", b"1234567890123456.8"),
        (b"0.10000000000000001", b"0.1"),
        (b"-9007199254740993.0", b"-9007199254740992.0"),
        (b"9007199254740993e3", b"9007199254740992e3"),
        (b"1.2345678901234567e300", b"1.2345678901234568e300"),
        (b"1.23456789012345671e5", b"1.2345678901234567e5"),
        (b"9007199254740993", b"9007199254740992"),
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
        (b"9007199254740992.00", b"9007199254740992.0"),
        (b"12345678901234567e-1", b"1234567890123456.7"),
        (b"0.30000000000000004", b"3.0000000000000004e-1"),
    ],
)
def test_equal_numbers_in_other_notation_are_equal(old: bytes, new: bytes) -> None:
    assert JsonDiff(10).compare(parse(b"[%b]" % old), parse(b"[%b]" % new)) == []


DECIMALS = st.from_regex(r"-?(0|[1-9][0-9]{0,20})\.[0-9]{1,20}([eE][-+]?[0-9]{1,2})?", fullmatch=True)


@given(DECIMALS, DECIMALS | st.none(), st.sampled_from(["{}", " {} ", '{{"a":{},"b":"é, x"}}', '[ {}, "\\u00e9" ]']))
def test_fractions_are_compared_exactly(old: str, new: str | None, form: str) -> None:
    new = new or f"{old[:-1]}{(int(old[-1]) + 1) % 10}"
    before, after = (parse(form.format(text).encode()) for text in (old, new))

    assert bool(diff(before, after)) == (Decimal(old) != Decimal(new))


def test_parse_reads_common_bodies_without_the_exact_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(body: bytes) -> Any:
        raise AssertionError(body)

    monkeypatch.setattr("abreast_sidecar.compare.values.parse_exact", fail)
    value = {
        "fractions": [0.1 + 0.2, 1 / 3, 1e-7 / 3, 123456789.12345678, 1e22, 5e-324],
        "ids": [2**63 - 1, 2**53 + 1, 1714564805123],
        "text": "é 1234567890123456789 2024-05-01T12:00:05.123456Z",
    }
    for body in (json.dumps(value), json.dumps(value, indent=1), json.dumps(value, separators=(",", ":"))):
        assert parse(body.encode()) == value


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (["a", "b", "c"], ["c", "b", "x"], {"changed", "order"}),
        (["a", "b", "c"], ["b", "c", "x"], {"changed"}),  # one is gone, and one is new
        (["a", "b", "c", "d"], ["x", "b", "c", "a"], {"changed", "order"}),
        (["a", "b", "c", "d"], ["x", "b", "c", "y"], {"changed"}),
    ],
)
def test_json_diff_reports_a_reorder_beside_a_replacement(old: list[str], new: list[str], kinds: set[str]) -> None:
    assert {difference.kind for difference in JsonDiff(100).compare(old, new)} == kinds


def row(identity: int, **changes: Any) -> dict[str, Any]:
    return {"id": identity, "name": f"name {identity}", "price": 2 * identity, "stock": 1} | changes


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([row(1), row(2), row(3)], [row(1), row(9), row(3)], [("$[1]", "removed"), ("$[1]", "added")]),
        ([row(1), row(2), row(3)], [row(3), row(2), row(9)], [("$", "order"), ("$[0]", "removed"), ("$[2]", "added")]),
        ([row(1), row(2), row(3)], [row(2), row(3), row(9)], [("$[0]", "removed"), ("$[2]", "added")]),
        ([row(1), row(2)], [row(1), row(2) | {"id": 9}], [("$[1].id", "changed")]),  # most members are equal
        # No row shows that ids are stable.
        ([row(1)], [row(9)], [("$[0].id", "changed"), ("$[0].name", "changed"), ("$[0].price", "changed")]),
        (
            [{"code": "A", "n": 1}, {"code": "A", "n": 2}],
            [{"code": "A", "n": 1}, {"code": "B", "n": 3}],
            [("$[1].code", "changed"), ("$[1].n", "changed")],
        ),
    ],
)
def test_json_diff_reports_a_replaced_row_as_removed_and_added(
    old: list[Any], new: list[Any], expected: list[tuple[str, str]]
) -> None:
    assert diff(old, new) == expected
    texts = [json.dumps(value, separators=(",", ":")).encode() for value in (old, new)]
    result = JsonTextDiff(LIMIT).compare_texts(texts[0], texts[1])
    assert [(difference.exact_path, difference.kind) for difference in result] == expected


def test_json_diff_names_added_values_by_indices_of_new_and_others_by_those_of_old() -> None:
    old = [row(1, tags=["a"]), row(2, tags=["b", "c"]), row(3, tags=["d"])]
    new = [row(0, tags=["z"]), row(3, tags=["d", "e"]), row(2, tags=["b"], price=7), row(1, tags=["a"])]

    assert diff(old, new) == [
        ("$", "order"), ("$[1].price", "changed"), ("$[1].tags[1]", "removed"), ("$[1].tags[1]", "added"), ("$[0]", "added"),
    ]  # fmt: skip


def test_long_number_differs_from_the_text_that_stands_for_it() -> None:
    number, text = b"9007199254740993.0", b'"number 9007199254740993e0"'

    for form in (b"%b", b"[%b]", b'{"a":{"b":[1,%b]}}', b"[[%b],[2]]"):
        assert [kind for _, kind in diff(parse(form % number), parse(form % text))] == ["type"]
