"""Rules, their documents, and the differences that they explain."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import fields
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from msgspec.structs import replace

from abreast.v1 import rule_pb2
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rule_document import (
    RuleError,
    build_schema,
    dict_to_message,
    message_to_dict,
    parse_rules,
    rule_from_dict,
    rule_to_dict,
)
from abreast_sidecar.compare.rules import (
    ACTIONS,
    MAX_CACHED_SCOPES,
    CompareOptions,
    Rule,
    RuleScope,
    RuleSet,
    compile_path_pattern,
    matches_statuses,
)
from support_captures import capture

SCHEMA = build_schema()


def declared(*rules: dict[str, Any]) -> RuleSet:
    return parse_rules(json.dumps({"rules": rules}))


def compare(rules: RuleSet, old: Any, new: Any) -> ComparisonResult:
    return compare_pair([capture("old", old), capture("new", new)], CompareOptions(rule_set=rules))


def list_paths(result: ComparisonResult) -> list[str]:
    return [f"{difference.path} {difference.kind}" for difference in result.differences]


def explained(result: ComparisonResult) -> list[tuple[str, str]]:
    return [(difference.path, difference.explained_by) for difference in result.explained_differences]


def test_empty_rule_set_explains_nothing() -> None:
    result = compare(RuleSet(), {"a": 1}, {"a": 2})

    assert (result.outcome, explained(result)) == ("mismatch", [])


def test_ignored_difference_names_its_rule() -> None:
    rules = declared({"name": "ids", "action": "ignore", "path": "$.meta.id"})
    result = compare(rules, {"meta": {"id": 1}, "a": 1}, {"meta": {"id": 2}, "a": 1})

    assert (result.outcome, list_paths(result), explained(result)) == ("match", [], [("$.meta.id", "ids")])


def test_rule_leaves_other_differences_unexplained() -> None:
    rules = declared({"action": "ignore", "path": "$.meta"})
    result = compare(rules, {"meta": {"id": 1}, "a": 1}, {"meta": {"id": 2}, "a": 2})

    assert (result.outcome, list_paths(result)) == ("mismatch", ["$.a changed"])
    assert explained(result) == [("$.meta.id", "rule 1")]


@pytest.mark.parametrize(
    ("pattern", "path", "below", "matches"),
    [
        ("$.a", "$.a", True, True),
        ("$.a", "$.ab", True, False),
        ("$.a", "$.a.b[*].c", True, True),
        ("$.a", "$.a.b", False, False),
        ("$.items[*].price", "$.items[*].price", True, True),
        ("$.items[0].price", "$.items[*].price", True, True),
        ("$.items[].price", "$.items[*].price", True, True),
        ("$.*.price", "$.*.price", True, True),
        ("$.*.price", "$.tea.price", True, True),
        ("$.*.price", "$.tea.cup.price", True, False),
        ("$.**.price", "$.tea[*].cup.price", True, True),
        ("$.**.price", "$.price", True, True),
        ("$.**", "$.a", True, True),
        ('$["a.b"]', '$["a.b"].c', True, True),
        ("$.a+", "$.aa", True, False),
        ("lines[*]", "lines[*]", True, True),
        ("events[*].data", "events[*].data.eur", True, True),
    ],
)
def test_path_pattern_matches_paths(pattern: str, path: str, below: bool, matches: bool) -> None:
    assert bool(compile_path_pattern(pattern, include_descendants=below).fullmatch(path)) == matches


STEPS = st.sampled_from([".a", ".aa", ".b", "[*]", ".*", '["a.b"]'])
PATTERN_STEPS = st.sampled_from([".a", ".aa", ".b", "[*]", ".*", ".**", '["a.b"]'])


def matches_steps(pattern: list[str], path: list[str]) -> bool:
    """Match steps without regular expressions."""
    if not pattern or not path:
        return not path and set(pattern) <= {".**"}
    if pattern[0] == ".**":
        return matches_steps(pattern[1:], path) or matches_steps(pattern, path[1:])
    return pattern[0] in {path[0], ".*"} and matches_steps(pattern[1:], path[1:])


@given(st.lists(PATTERN_STEPS, max_size=7), st.lists(STEPS, max_size=7), st.booleans())
def test_path_pattern_matches_step_by_step(pattern: list[str], path: list[str], below: bool) -> None:
    compiled = compile_path_pattern("$" + "".join(pattern), include_descendants=below)
    expected = matches_steps([*pattern, *([".**"] if below else [])], path)

    assert bool(compiled.fullmatch("$" + "".join(path))) == expected


@pytest.mark.parametrize("below", [True, False])
def test_path_pattern_with_many_wildcards_takes_linear_time(below: bool) -> None:
    """A pattern that backtracks over all its wildcards takes hours."""
    pattern = compile_path_pattern("$.**.a" * 4 + ".**.a.a.b" * 40, include_descendants=below)

    assert not pattern.fullmatch("$" + ".a" * 5000)
    assert not pattern.fullmatch("$" + '["a.a"].a[*]' * 2000)


@pytest.mark.parametrize(
    ("rule", "old", "new", "expected"),
    [
        ({"absolute": 0.01}, 1.0, 1.01, "match"),
        ({"absolute": 0.01}, 1.0, 1.02, "mismatch"),
        ({"relative": "1%"}, 200, 202, "match"),
        ({"relative": 0.01}, 200, 203, "mismatch"),
        ({"relative": 0.01}, -200, -202, "match"),
        ({"absolute": 0.01}, "12.50", "12.5", "match"),
        ({"absolute": 5}, "2031-01-01T00:00:00Z", "2031-01-01T01:00:04+01:00", "match"),
        ({"absolute": 5}, "2031-01-01T00:00:00Z", "2031-01-01T00:00:06Z", "mismatch"),
        ({"absolute": 5}, 1, "1", "mismatch"),
        ({"absolute": 5}, 1, None, "mismatch"),
        ({"absolute": 5}, True, False, "mismatch"),
        ({"absolute": 5}, "a", "b", "mismatch"),
        ({"absolute": 5}, "x" * 600, "y" * 600, "mismatch"),
    ],
)
def test_tolerate_rule_accepts_close_values(rule: dict[str, Any], old: Any, new: Any, expected: str) -> None:
    rules = declared({"action": "tolerate", "path": "$.v", **rule})

    assert compare(rules, {"v": old}, {"v": new}).outcome == expected


def test_unordered_rule_explains_only_order() -> None:
    rules = declared({"action": "unordered", "path": "$.tags"})

    assert compare(rules, {"tags": [1, 2, 3]}, {"tags": [3, 1, 2]}).outcome == "match"
    assert list_paths(compare(rules, {"tags": [1, 2, 3]}, {"tags": [3, 1]})) == ["$.tags[*] removed"]
    assert list_paths(compare(rules, {"other": [1, 2]}, {"other": [2, 1]})) == ["$.other order"]


def test_keyed_by_rule_matches_elements_by_its_field() -> None:
    rules = declared({"action": "keyed-by", "path": "$.rows", "by": "nr"})
    old = {"rows": [{"nr": 1, "v": 1}, {"nr": 2, "v": 2}, {"nr": 3, "v": 3}]}
    new = {"rows": [{"nr": 3, "v": 9}, {"nr": 1, "v": 1}, {"nr": 4, "v": 4}]}
    result = compare(rules, old, new)

    assert sorted(list_paths(result)) == ["$.rows[*] added", "$.rows[*] removed", "$.rows[*].v changed"]
    assert explained(result) == [("$.rows", "rule 1")]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"path": "$.a"}, "match"),
        ({"path": "$.a", "kind": "changed"}, "match"),
        ({"path": "$.a", "kind": "removed"}, "mismatch"),
        ({"path": "$.a", "old": 1, "new": 2}, "match"),
        ({"path": "$.a", "new": 3}, "mismatch"),
        ({"path": "$.a", "new": 2.0}, "mismatch"),
        ({"path": "$.a", "release": "2.*"}, "match"),
        ({"path": "$.a", "release": "3.*"}, "mismatch"),
        ({"path": "$.a", "endpoint": "GET /products/{id}"}, "match"),
        ({"path": "$.a", "endpoint": "* /products/*"}, "match"),
        ({"path": "$.a", "endpoint": "POST /products/*"}, "mismatch"),
        ({"path": "$.a", "service": "shop"}, "match"),
        ({"path": "$.a", "service": "billing"}, "mismatch"),
        ({"path": "$.a", "status": 200}, "match"),
        ({"path": "$.a", "status": "2xx"}, "match"),
        ({"path": "$.a", "status": 404}, "mismatch"),
        ({"part": "body"}, "match"),
        ({"header": "x-*"}, "mismatch"),
    ],
)
def test_rule_is_limited_by_its_fields(rule: dict[str, Any], expected: str) -> None:
    rules = declared({"action": "expect", **rule})
    old, new = capture("old", {"a": 1}), replace(capture("new", {"a": 2}), release="2.1")

    assert compare_pair([old, new], CompareOptions(rule_set=rules)).outcome == expected


def test_rule_set_caches_rules_by_scope() -> None:
    rules = declared({"action": "ignore", "path": "$.a", "endpoint": "GET /a*"}, {"action": "ignore", "path": "$.b"})
    first, second = (rules.for_scope(RuleScope("shop", "GET /a", "1", "2", (200, 200))) for _ in range(2))
    other = rules.for_scope(RuleScope("shop", "GET /b", "1", "2", (200, 200)))

    assert first is second
    assert (len(first.rules), len(other.rules)) == (2, 1)
    for number in range(MAX_CACHED_SCOPES + 10):
        rules.for_scope(RuleScope("shop", f"GET /{number}"))
    assert len(rules._by_scope) <= MAX_CACHED_SCOPES


def test_rules_explain_headers_and_statuses() -> None:
    rules = declared(
        {"name": "gone", "action": "expect", "header": "X-Old", "kind": "removed"},
        {"name": "made", "action": "expect", "status": "200->201", "part": "status"},
    )
    old = capture("old", headers=(("x-old", "1"), ("x-b", "1")))
    result = compare_pair([old, capture("new", status=201, headers=())], CompareOptions(rule_set=rules))

    assert explained(result) == [("200->201", "made"), ("x-old", "gone")]
    assert list_paths(result) == ["x-b removed"]


@pytest.mark.parametrize(
    ("pattern", "statuses", "matches"),
    [
        ("404", (404, 404), True),
        ("404", (404, 200), False),
        ("404->200", (404, 200), True),
        ("4xx->*", (410, 500), True),
        ("4xx", (200, 200), False),
        ("*", (200, 500), True),
    ],
)
def test_status_pattern_matches_statuses(pattern: str, statuses: tuple[int, int], matches: bool) -> None:
    assert matches_statuses(pattern, statuses) == matches


def test_rule_expires_on_its_day() -> None:
    quoted = declared({"action": "ignore", "path": "$.a", "expires": "2031-01-31"})
    rules = parse_rules("rules:\n- {action: ignore, path: $.a, expires: 2031-01-31}\n")

    assert rules == quoted
    assert len(rules.active_on(dt.date(2031, 1, 30)).rules) == 1
    assert not rules.active_on(dt.date(2031, 1, 31))


BROKEN = [
    ("rules: 1", "rules.yaml:1: rules must be a list"),
    ("- a", "rules.yaml:1: the file must be a mapping"),
    ("rulez: []", "rules.yaml:1: the file has no field 'rulez'"),
    ("rules:\n- action: hide\n  path: $.a", "rules.yaml:2: action must be one of ignore, tolerate"),
    ("rules:\n- path: $.a", "rules.yaml:2: rule 'rule 1' needs an action"),
    ("rules:\n- action: ignore", "rules.yaml:2: rule 'rule 1' covers everything"),
    ("rules:\n- action: ignore\n  paths: $.a", "rules.yaml:3: rule 1 has no field 'paths'"),
    ("rules:\n- action: tolerate\n  path: $.a", "rules.yaml:2: rule 'rule 1' needs absolute or relative"),
    ("rules:\n- action: ignore\n  path: $.a\n  absolute: 1", "rules.yaml:2: rule 'rule 1' has absolute, which"),
    ("rules:\n- action: tolerate\n  path: $.a\n  absolute: x", "rules.yaml:4: absolute must be a number"),
    ("rules:\n- action: tolerate\n  path: $.a\n  relative: 1x", "rules.yaml:4: relative must be a share such as"),
    ("rules:\n- action: keyed-by\n  path: $.a", "rules.yaml:2: rule 'rule 1' needs by"),
    ("rules:\n- action: unordered\n  part: body", "rules.yaml:2: rule 'rule 1' needs a path"),
    ("rules:\n- action: waive-coverage", "rules.yaml:2: rule 'rule 1' needs an endpoint"),
    ("rules:\n- action: waive-coverage\n  endpoint: GET /*", "rules.yaml:2: rule 'rule 1' needs an endpoint"),
    (
        "rules:\n- action: waive-coverage\n  endpoint: GET /\n  kind: changed",
        "rules.yaml:2: rule 'rule 1' has kind, which does not belong to waive-coverage",
    ),
    ("rules:\n- action: ignore\n  status: abc", "rules.yaml:3: status must be a status such as 404"),
    ("rules:\n- action: ignore\n  path: $.a\n  header: b", "rules.yaml:2: rule 'rule 1' has a header and a path"),
    ("rules:\n- action: ignore\n  path: [a]", "rules.yaml:3: path must be a single value"),
    ("rules:\n- {name: a, action: ignore, path: $}\n- {name: a, action: ignore, path: $}", "rules.yaml:3: two rules"),
    ("rules:\n- action: ignore\n  path: $.a\n  path: $.b", "rules.yaml:4: rule 1 has a key twice"),
    ("rules:\n- action: ignore\n  path: $.a\n  expires: soon", "rules.yaml:4: expires must be a day"),
    ("rules:\n- action: expect\n  path: $.a\n  new: 2031-01-01", "rules.yaml:4: new must be a JSON value"),
    ("rules: [", "rules.yaml:1: not valid YAML"),
    ("a: &a [*a]\nrules: *b", "rules.yaml:2: not valid YAML"),
    ("[" * 600, "rules.yaml: not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_parse_rules_reports_line_and_problem(text: str, message: str) -> None:
    with pytest.raises(RuleError) as error:
        parse_rules(text, "rules.yaml")

    assert str(error.value).startswith(message)


def test_parse_rules_accepts_an_empty_document() -> None:
    assert not parse_rules("")
    assert not parse_rules("rules: []")


FIELDS: dict[str, list[Any]] = {
    "name": ["a", 7, "", None],
    "action": [*ACTIONS, "hide", 1],
    "part": ["status", "header", "body", "nowhere"],
    "path": ["$.a", "$.a[*].b", "", [], "x" * 501],
    "header": ["x-a", "x-*", ""],
    "kind": ["added", "order", "slower", "gone"],
    "service": ["shop", ""],
    "endpoint": ["GET /a", 1],
    "status": ["404", 404],
    "release": ["2.*", 2.1, True],
    "by": ["id", ""],
    "absolute": [0, 0.5, -1, "1"],
    "relative": [0.1, "1%", "0.5 %", "1", -1],
    "old": [None, 1, "a", [1], {}],
    "new": [True, 1.5, {"a": 1}],
    "reason": ["r", ""],
    "owner": ["o", []],
    "expires": ["2031-01-31"],
    "other": [1],
}


def test_schema_documents_every_field_of_a_rule() -> None:
    properties = SCHEMA["$defs"]["rule"]["properties"]

    Draft202012Validator.check_schema(SCHEMA)
    assert properties.keys() == {*(field.name for field in fields(Rule)), "header"}
    assert all(schema["description"] for schema in properties.values())
    assert properties["relative"] == {
        "description": "tolerate: the largest distance, as a share of the old number.",
        "type": ["number", "string"],
        "minimum": 0,
        "pattern": r"^[0-9]+(\.[0-9]+)?\s*%$",
    }


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in FIELDS.items()}))
@settings(max_examples=400, deadline=None)
def test_schema_agrees_with_parse_rules(rule: dict[str, Any]) -> None:
    try:
        declared(rule)
        read = True
    except RuleError:
        read = False

    assert Draft202012Validator(SCHEMA).is_valid({"rules": [rule]}) == read


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in FIELDS.items()}))
@settings(max_examples=300, deadline=None)
def test_rule_survives_conversion_to_dict_and_message(rule: dict[str, Any]) -> None:
    try:
        restored_rule = rule_from_dict({**rule, "expires": "2031-01-31"})
    except RuleError:
        return
    document = rule_to_dict(restored_rule)

    assert rule_from_dict(document) == restored_rule
    message = message_to_dict(dict_to_message(document, rule_pb2.Rule()))
    assert rule_from_dict({**message, "expires": document["expires"]}) == restored_rule


ACCEPTED: list[dict[str, Any]] = [
    {"action": "ignore", "path": "$.a"},
    {"action": "ignore", "header": "x-*", "service": "shop", "release": 2.1},
    {"action": "tolerate", "path": "$.a", "relative": "0.5 %", "reason": "r", "owner": "o"},
    {"action": "keyed-by", "path": "$.a", "by": "id"},
    {"action": "unordered", "path": "$.a", "status": "404->2xx", "endpoint": "GET /"},
    {"action": "waive-coverage", "endpoint": "GET /events", "service": "shop", "release": "2.*"},
    {"action": "expect", "part": "status", "status": 404, "kind": "changed"},
    {"action": "expect", "path": "$.a", "old": None, "new": True},
]


@pytest.mark.parametrize("rule", ACCEPTED)
def test_schema_accepts_valid_rules(rule: dict[str, Any]) -> None:
    jsonschema.validate({"rules": [rule]}, SCHEMA)

    assert len(declared(rule).rules) == 1


@pytest.mark.parametrize(
    ("text", "message"), [case for case in BROKEN if "two rules" not in case[1] and "twice" not in case[1]]
)
def test_schema_refuses_invalid_documents(text: str, message: str) -> None:
    try:
        document = json.loads(json.dumps(yaml.safe_load(text), default=str))
    except (yaml.YAMLError, RecursionError, ValueError):
        return  # not YAML
    if any(word in message for word in ("expires must", "JSON value")):
        return  # formats that jsonschema does not check

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)
