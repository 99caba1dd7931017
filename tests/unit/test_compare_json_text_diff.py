"""Differences between JSON texts: equal members are not parsed, and the result is that of parsing everything."""

from __future__ import annotations

import copy
import json
import random
from typing import Any
from unittest.mock import patch

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.json_diff import JsonDiff, JsonTextDiff
from abreast_sidecar.compare.values import NotJsonError, parse

NUMBERS = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | NUMBERS | st.text(max_size=5)
KEYS = st.sampled_from(["id", "name", "a", "1", "2", "3", "ü"]) | st.text(max_size=3)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=30
)
Row = tuple[str, str, str, str | None, str | None, str]


def to_rows(result: Any) -> list[Row]:
    return sorted(
        (
            (difference.path, difference.exact_path, difference.kind, difference.old, difference.new, difference.hint)
            for difference in result
        ),
        key=lambda difference: difference[:3],
    )


def by_texts(old: bytes, new: bytes) -> list[Row]:
    """Compare texts of any length."""
    with patch.multiple("abreast_sidecar.compare.json_diff", MIN_RAW_BYTES=0, MIN_FLAT_BYTES=0):
        return to_rows(JsonTextDiff(10_000).compare_texts(old, new))


def by_values(old: bytes, new: bytes) -> list[Row]:
    return to_rows(JsonDiff(10_000).compare(parse(old), parse(new)))


def changed(value: Any, dice: random.Random) -> Any:
    """Change, insert, remove or reorder one value."""
    if isinstance(value, list) and value and dice.random() < 0.8:
        copy: Any = list(value)
        place = dice.randrange(len(copy))
        match dice.randrange(5):
            case 0:
                del copy[place]
            case 1:
                copy.insert(place, dice.choice([1, {"id": 1}, None]))
            case 2:
                dice.shuffle(copy)
            case _:
                copy[place] = changed(copy[place], dice)
        return copy
    if isinstance(value, dict) and value and dice.random() < 0.8:
        copy = dict(value)
        key = dice.choice(sorted(copy))
        match dice.randrange(4):
            case 0:
                del copy[key]
            case 1:
                copy[f"{key}+"] = copy[key]
            case _:
                copy[key] = changed(copy[key], dice)
        return copy
    return dice.choice([0, 1, 1.0, True, "1", None, [], {}, [1], {"id": 1}, float(value) if type(value) is int else 2])


def dump(value: Any, how: int) -> bytes:
    separators = [(",", ":"), (", ", ": ")][how % 2]
    return json.dumps(value, separators=separators, ensure_ascii=how > 1).encode()


@given(JSON, JSON, st.integers(0, 3), st.integers(0, 3))
def test_text_diff_equals_value_diff(old: Any, new: Any, how: int, other: int) -> None:
    texts = dump(old, how), dump(new, other)

    assert by_texts(*texts) == by_values(*texts)


@given(JSON, st.integers(1, 4), st.randoms(use_true_random=False))
def test_text_diff_of_a_change_equals_value_diff(old: Any, times: int, dice: random.Random) -> None:
    new = copy.deepcopy(old)
    for _ in range(times):
        new = changed(new, dice)
    texts = dump({"rest": [old, 1], "it": old}, 0), dump({"rest": [old, 1], "it": new}, 0)

    assert by_texts(*texts) == by_values(*texts)


FLAT = st.dictionaries(
    KEYS | st.sampled_from(['",', ',"', "a,", '":', "a (repeated)"]),
    PLAIN | st.sampled_from([",", 'x,"', '",', '{"a":1', "9" * 20, 1.0, -0.0]),
    min_size=2,
    max_size=20,
)


@given(FLAT, st.integers(1, 4), st.randoms(use_true_random=False), st.sampled_from([b"", b',"a":1}', b',"a":1,"a":2}']))
def test_text_diff_of_plain_members_equals_value_diff(
    old: dict[str, Any], times: int, dice: random.Random, end: bytes
) -> None:
    new: Any = old
    for _ in range(times):
        new = changed(new, dice)
    texts = [dump(value, 2) for value in (old, new)]
    if end:
        texts = [text[:-1] + end if text.endswith(b"}") and text != b"{}" else text for text in texts]

    assert by_texts(*texts) == by_values(*texts)


ROWS = [{"id": number, "title": f"a title {number}", "tags": ["a", "b"]} for number in range(200)]


def parsed_bytes(old: bytes, new: bytes) -> int:
    """Count the bytes that are parsed."""
    total = 0

    def parse_and_record(body: bytes) -> Any:
        nonlocal total
        total += len(body)
        return parse(body)

    with patch("abreast_sidecar.compare.json_diff.parse", parse_and_record):
        JsonTextDiff(200).compare_texts(old, new)
    return total


@pytest.mark.parametrize("envelope", [False, True])
def test_text_diff_parses_only_changed_members(envelope: bool) -> None:
    other = copy.deepcopy(ROWS)
    other[7]["title"], other[99]["id"] = "new", 7
    documents = (ROWS, other) if not envelope else ({"data": {"items": rows}, "at": rows[7]} for rows in (ROWS, other))
    old, new = (orjson.dumps(difference) for difference in documents)

    assert parsed_bytes(old, new) < 600
    assert by_texts(old, new) == by_values(old, new)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'{"a":1,"b":2}', b'{"a":1,"a":1,"b":2}', [('$["a (repeated)"]', "added")]),
        (
            b'{"x":{"a":1,"b":2}}',
            b'{"x":{"a":1,"a":2,"b":2}}',
            [("$.x.a", "changed"), ('$.x["a (repeated)"]', "added")],
        ),
        (b'[{"n":[{"a":1}]},1]', b'[{"n":[{"a":1,"a":1}]},1]', [('$[*].n[*]["a (repeated)"]', "added")]),
        (b'{"id":18446744073709551617}', b'{"id":18446744073709551618}', [("$.id", "changed")]),
        (b'[1,{"id":0.12345678901234567890}]', b'[1,{"id":0.12345678901234567891}]', [("$[*].id", "changed")]),
        (b'{"a":NaN,"b":1}', b'{"a":NaN,"b":2}', [("$.b", "changed")]),
        (b'{"a":"\\ud800","b":1}', b'{"a":"\\ud800","b":2}', [("$.b", "changed")]),
        (b'{"a":1,"\\u0062":1}', b'{"a":1,"b":2}', [("$.b", "changed")]),
        (b'{"a":1,"b":{"c":1}}', b' {"b":{"c":1.0},"a":1}\r\n', [("$.b.c", "changed")]),
        (b'{"a":[1,true]}', b'{"a":[true,1]}', [("$.a", "order")]),
        (b'{"a":{}}', b'{"a":[]}', [("$.a", "type")]),
        (b"{}", b'{"a":1}', [("$.a", "added")]),
        (b'{"a": 1, "a": 2, "b": [3]}', b'{"a": 1, "a": 4, "b": [3]}', [("$.a", "changed")]),
        (b'{"a":1,"a":2,"b":3}', b'{"a":4,"a":2,"b":3}', [('$["a (repeated)"]', "changed")]),
        (b'{"a":"x,","b":",","c":1}', b'{"a":"x,","b":"y","c":1}', [("$.b", "changed")]),
        (b'{"a,":1,"b":1,"c":1}', b'{"a,":2,"b":1,"c":true}', [("$.c", "type"), ('$["a,"]', "changed")]),
        (b"[]", b"[1]", [("$[*]", "added")]),
        (b'"a"', b'"b"', [("$", "changed")]),
    ],
)
def test_text_diff_detects_details_that_parsers_lose(old: bytes, new: bytes, expected: list[tuple[str, str]]) -> None:
    assert [(path, kind) for path, _, kind, *_ in by_texts(old, new)] == expected
    assert by_texts(old, old) == by_texts(new, new) == []


@pytest.mark.parametrize(
    "damaged", [b'{"a":"\xff","b":%d}', b'{"a":tru,"b":%d}', b'{"a":1,"b":%d', b'{"a":1 "b":%d}', b'{"a":01,"b":%d}']
)
def test_text_diff_refuses_invalid_json_in_equal_members(damaged: bytes) -> None:
    with pytest.raises(NotJsonError):
        by_texts(damaged % 1, damaged % 2)


def test_text_diff_renders_equal_elements_of_reordered_array() -> None:
    (result,) = by_texts(b"[1,2,[3],4,5]", b"[1,2,[3],5,4]")

    assert result[2:5] == ("order", "[1,2,[3],4,5]", "[1,2,[3],5,4]")


@pytest.mark.parametrize("value", ["1", '"text"', "null", '{"n":1,"m":2}', "[1]", "true", "1.5"])
def test_text_diff_detects_maps_by_unparsed_members(value: str) -> None:
    members = ",".join(f'"name {chr(97 + number // 26)}{chr(97 + number % 26)}":{value}' for number in range(60))
    old, new = (f'{{{members},"name zz":{last}}}'.encode() for last in ('{"n":1,"m":2}', '{"n":2,"m":2}'))

    assert by_texts(old, new) == by_values(old, new)
