"""The work of a comparison in counted calls: linear in the size of a body, and bounded."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import random
import string
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from abreast.protocol.capture import Answer, Body, Headers
from abreast_sidecar.compare import documents
from abreast_sidecar.compare.body import BodyResult, compare_bodies
from abreast_sidecar.compare.content import parse_media_type
from abreast_sidecar.compare.json_diff import JsonDiff
from abreast_sidecar.compare.rules import CompareOptions

SMALL, LARGE = 500, 1000  # items of a body
LINEAR = 1.3  # tolerance above twice the steps for twice the items
CALLS_A_BYTE = 6  # function calls, for both bodies
Make = Callable[[random.Random, int], str]


def word(dice: random.Random, length: int = 6) -> str:
    return "".join(dice.choices(string.ascii_lowercase, k=length))


def shuffled(dice: random.Random, count: int) -> str:
    rows = [{"id": number, "value": number} for number in range(count)]
    dice.shuffle(rows)
    return json.dumps(rows)


def shuffled_plain(dice: random.Random, count: int) -> str:
    return json.dumps(dice.sample(range(count), count))


def shuffled_lists(dice: random.Random, count: int) -> str:
    return json.dumps([dice.sample(range(10), 10) for _ in range(count)])


def other_objects(dice: random.Random, count: int) -> str:
    return json.dumps([{"id": word(dice), "value": dice.random()} for _ in range(count)])


def other_keys(dice: random.Random, count: int) -> str:
    return json.dumps({word(dice): {word(dice, 2): 1, "b": 2} for _ in range(count)})


def one_key(dice: random.Random, count: int) -> str:
    return "{" + ",".join(f'"a": {dice.random()}' for _ in range(count)) + "}"


def deep(dice: random.Random, count: int) -> str:
    return "[" * 150 + ",".join(str(dice.random()) for _ in range(count)) + "]" * 150


def arrays_in_arrays(dice: random.Random, count: int) -> str:
    def nest(depth: int) -> object:
        return [nest(depth - 1), nest(depth - 1)] if depth else dice.random()

    return json.dumps([nest(10) for _ in range(count // 250)])


def divisions(dice: random.Random, count: int) -> str:
    return "<html>" + "".join(f"<div class='{word(dice)}'><p>{word(dice)}</div>" for _ in range(count)) + "</html>"


def never_closed(dice: random.Random, count: int) -> str:
    return "".join(f"<i a='{word(dice)}'>" for _ in range(140)) + "".join(f"<p>{word(dice)}" for _ in range(count))


def closed_too_often(dice: random.Random, count: int) -> str:
    return "<html>" + "<i>" * 140 + "".join(f"</{word(dice)}>a" for _ in range(count)) + word(dice)


def broken_tags(dice: random.Random, count: int) -> str:
    return f"<p>{word(dice)}</p>" + "<a x='" * count + word(dice)


def elements(dice: random.Random, count: int) -> str:
    return "<r>" + "".join(f"<k a='{word(dice)}'>{word(dice)}</k>" for _ in range(count)) + "</r>"


def lines(dice: random.Random, count: int) -> str:
    return "\n".join(word(dice) for _ in range(count))


def two_lines(dice: random.Random, count: int) -> str:
    return "\n".join(dice.choices("ab", k=count))


def json_lines(dice: random.Random, count: int) -> str:
    return "\n".join(json.dumps({"id": word(dice), "value": dice.random()}) for _ in range(count))


def events(dice: random.Random, count: int) -> str:
    return "".join(f'id: {word(dice)}\ndata: {{"a": "{word(dice)}"}}\n\n' for _ in range(count))


def fields(dice: random.Random, count: int) -> str:
    return "&".join(f"{word(dice)}={word(dice)}" for _ in range(count))


def parts(dice: random.Random, count: int) -> str:
    head = "--b\r\ncontent-disposition: form-data; name="
    return "".join(f"{head}{word(dice)}\r\n\r\n{word(dice)}\r\n" for _ in range(min(count, 990))) + "--b--"


BODIES: list[tuple[Make, str]] = [
    *((make, "application/json") for make in (shuffled, shuffled_plain, shuffled_lists, other_objects, other_keys)),
    *((make, "application/json") for make in (one_key, deep, arrays_in_arrays)),
    *((make, "text/html") for make in (divisions, never_closed, closed_too_often, broken_tags)),
    *((make, "text/plain") for make in (lines, two_lines)),
    (elements, "application/xml"),
    (json_lines, "application/x-ndjson"),
    (events, "text/event-stream"),
    (fields, "application/x-www-form-urlencoded"),
    (parts, "multipart/form-data; boundary=b"),
]
each_body = pytest.mark.parametrize(("make", "kind"), BODIES, ids=[make.__name__ for make, _ in BODIES])


def answer(body: str, kind: str) -> Answer:
    return Answer(200, (("content-type", kind),), Body(body.encode(), len(body.encode())))


def make_answers(make: Make, kind: str, count: int) -> tuple[Answer, Answer]:
    dice = random.Random(count)
    return answer(make(dice, count), kind), answer(make(dice, count), kind)


def count_calls(old: Answer, new: Answer, rules: CompareOptions | None = None) -> tuple[int, BodyResult]:
    """Count the calls of Python and C functions, which are the same on every machine."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    compare_bodies(old, new, rules or CompareOptions())  # caches are full
    sys.setprofile(count)
    try:
        result = compare_bodies(old, new, rules or CompareOptions())
    finally:
        sys.setprofile(None)
    return calls, result


@functools.cache
def count_calls_for_large_bodies(make: Make, kind: str) -> tuple[int, BodyResult]:
    return count_calls(*make_answers(make, kind, LARGE))


@each_body
def test_compare_bodies_takes_linear_work(make: Make, kind: str) -> None:
    few, _ = count_calls(*make_answers(make, kind, SMALL))
    count, result = count_calls_for_large_bodies(make, kind)

    assert result.differences
    assert count <= 2 * LINEAR * few


@each_body
def test_equal_bodies_are_not_parsed(make: Make, kind: str) -> None:
    old, same = answer(make(random.Random(1), LARGE), kind), answer(make(random.Random(1), LARGE), kind)
    calls, result = count_calls(old, same)

    assert result == BodyResult([])
    assert calls <= 12


@each_body
def test_work_budget_limits_the_comparison(make: Make, kind: str) -> None:
    old, new = make_answers(make, kind, LARGE)
    exact, _ = count_calls_for_large_bodies(make, kind)
    calls, result = count_calls(old, new, CompareOptions(max_work=300))

    assert result.differences
    assert calls < exact
    assert calls < 3000
    if not result.note:  # the bodies fit into the budget
        assert exact < 3000


@each_body
def test_work_per_byte_is_bounded(make: Make, kind: str) -> None:
    old, new = make_answers(make, kind, LARGE)
    calls, _ = count_calls_for_large_bodies(make, kind)

    assert calls <= CALLS_A_BYTE * (old.body.length + new.body.length)


def test_changes_of_a_wide_object_take_few_calls() -> None:
    fields = {f"{first}_{second}": "value" for first in string.ascii_lowercase for second in string.ascii_lowercase}
    old, new = (
        answer(json.dumps(value, separators=(",", ":")), "application/json")
        for value in (fields, fields | {"k_k": 1, "z_z": ""})
    )
    calls, result = count_calls(old, new)

    assert [(difference.exact_path, difference.kind) for difference in result.differences] == [
        ("$.k_k", "type"),
        ("$.z_z", "changed"),
    ]
    assert calls < 200


def test_json_diff_over_budget_compares_values_as_a_whole() -> None:
    rows = [{"id": number, "tags": list(range(20))} for number in range(50)]
    other = [{"id": number, "tags": list(range(1, 21))} for number in range(50)]
    walk = JsonDiff(1000, max_work=300)
    result = walk.compare(rows, other)

    assert walk.budget_exceeded
    assert walk.work <= 300 + 100  # elements that were started are finished
    assert {difference.path for difference in result} == {"$[*].tags[*]", "$[*].tags", "$[*]"}


def test_equal_values_over_budget_are_no_difference() -> None:
    rows = {"rows": list(range(1000)), "name": "a"}
    other = {"name": "b", "rows": list(range(1000))}
    result = compare_bodies(
        answer(json.dumps(rows), "application/json"),
        answer(json.dumps(other), "application/json"),
        CompareOptions(max_work=500),
    )

    assert [difference.path for difference in result.differences] == ["$.name"]
    assert result.note == ""


def test_compressed_body_with_millions_of_values_is_compared_by_bytes() -> None:
    def packed(last: int) -> Answer:
        body = gzip.compress(b"[" + b"1," * 4_000_000 + b"%d]" % last)
        headers: Headers = (("content-type", "application/json"), ("content-encoding", "gzip"))
        return Answer(200, headers, Body(body, len(body)))

    calls, result = count_calls(packed(1), packed(2))

    assert result.is_too_large
    assert "too much work" in result.note
    assert calls < 1000


@pytest.mark.parametrize("parameters", ["x" * 100_000, 'x="' * 50_000, ';x="a"b' * 20_000, '"' * 100_000])
def test_long_content_type_is_parsed_in_linear_time(parameters: str) -> None:
    """A quadratic parser takes minutes."""
    assert parse_media_type(f"text/html;{parameters}").format == "html"


def test_html_over_budget_is_compared_by_lines() -> None:
    page = "<html>" + "<p>same</p>\n" * 30_000 + "<b>{}</b></html>"
    result = compare_bodies(answer(page.format(1), "text/html"), answer(page.format(2), "text/html"), CompareOptions())

    assert [difference.path for difference in result.differences] == ["lines[*]"]
    assert result.note == "the html is compared by its lines: parsing it is too much work"


def count_backtracking_runs(pattern: str) -> int:
    """Count the unbounded runs of single characters that can give characters back when the match fails after them."""
    parser: Any = importlib.import_module("re._parser")

    def count(items: Any) -> int:
        total = 0
        for operation, argument in items:
            if str(operation) in {"MAX_REPEAT", "MIN_REPEAT"}:
                _, maximum, inner = argument
                is_run = len(inner) == 1 and str(inner[0][0]) in {"IN", "NOT_LITERAL", "ANY"}
                total += (is_run and maximum == parser.MAXREPEAT) + count(inner)
            elif str(operation) == "POSSESSIVE_REPEAT":
                total += count(argument[2])
            elif str(operation) == "SUBPATTERN":
                total += count(argument[-1])
            elif str(operation) == "BRANCH":
                total += sum(map(count, argument[1]))
        return total

    return count(parser.parse(pattern))


def test_html_tag_patterns_never_scan_a_run_twice() -> None:
    assert count_backtracking_runs('<a([^>"]|"[^"]*")*>') == 1
    assert count_backtracking_runs(documents._TAG.pattern) == 0
    assert count_backtracking_runs(documents._ATTRIBUTE.pattern) == 0


def test_html_tags_without_an_end_are_text() -> None:
    element = documents.read_html("<p>x</p>" + ("<" + "a" * 2000) * 8)

    assert ([child.tag for child in element.children], "".join(element.texts).count("<")) == (["p"], 8)
