"""Rules from YAML. `rules.schema.json` says the same to editors; a test holds the two together."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import yaml

from abreast_sidecar.compare.model import Kind, Part
from abreast_sidecar.compare.rules import ACTIONS, MAX_PATTERN_CHARS, MAX_RECURSIVE_WILDCARDS, Rule, RuleSet

MAX_RULES = 1000
MAX_FIELD_CHARS = 500  # characters of a field
_STATUS_PATTERN = re.compile(r"([1-5x][0-9x]{2}|\*)(->([1-5x][0-9x]{2}|\*))?", re.IGNORECASE)
_PERCENT_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_COVERAGE_FIELDS = ("path", "header", "status", "part")
_WILDCARDS = frozenset("*?[")
_WAIVER_FIELDS = frozenset({"name", "action", "endpoint", "service", "release", "reason", "owner", "expires"})


class RuleError(ValueError):
    """Says the file, the line, and what to write instead."""


def parse_rules(text: str, file_name: str = "rules") -> RuleSet:
    """`name`: of the file, for messages. Raise RuleError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{file_name}:{mark.line + 1}" if mark is not None else file_name
        raise RuleError(f"{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return RuleSet()
    reader = _DocumentReader(file_name)
    entries = reader.read_mapping(root, "the file")
    reader.check_fields(entries, {"rules"}, "the file")
    rules_entry = entries.get("rules")
    if rules_entry is None or not isinstance(rules_entry[1], yaml.SequenceNode):
        raise reader.error(rules_entry[1] if rules_entry else root, "rules must be a list")
    if len(rules_entry[1].value) > MAX_RULES:
        raise reader.error(rules_entry[1], f"at most {MAX_RULES} rules, got {len(rules_entry[1].value)}")
    return RuleSet(tuple(reader.read_rule(node, index) for index, node in enumerate(rules_entry[1].value)))


def rule_from_dict(fields: Mapping[str, Any]) -> Rule:
    """A rule from the fields that it would have in a file. Raise RuleError, which names the field."""
    values = {}
    for name, value in fields.items():
        if name not in {*_FIELD_PARSERS, "header"}:
            raise RuleError(f"a rule has no field {name!r}; known are {', '.join(sorted({*_FIELD_PARSERS, 'header'}))}")
        values[name] = _parse_field(name, value)
    values.setdefault("name", "")
    try:
        return _make_rule(values)
    except RuleError as error:
        raise RuleError(f"the rule {error}") from None


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """What a file would say of it, without what is not set; `from_fields` makes the same rule of it."""
    header = rule.part == "header" and rule.path
    values: dict[str, Any] = {
        "name": rule.name,
        "action": rule.action,
        "part": None if header or (rule.part == "body" and rule.path) else rule.part,
        "header" if header else "path": rule.path,
        **{name: getattr(rule, name) for name in ("kind", "service", "endpoint", "status", "release", "by")},
        **{name: getattr(rule, name) for name in ("absolute", "relative", "reason", "owner")},
        "expires": rule.expires and rule.expires.isoformat(),
    }
    values = {name: value for name, value in values.items() if value is not None and value != ""}
    values |= {"old": rule.old} if rule.has_old else {}
    return values | ({"new": rule.new} if rule.has_new else {})


def _parse_field(name: str, value: Any) -> Any:
    try:
        return _FIELD_PARSERS["path" if name == "header" else name](value)
    except RuleError as error:
        raise RuleError(f"{name} must be {error}, got {value!r}") from None


NodeEntry = tuple[yaml.Node, yaml.Node]  # a key and its value


@dataclass(slots=True)
class _DocumentReader:
    file_name: str
    rule_names: set[str] = field(default_factory=set)

    def error(self, node: yaml.Node, message: str) -> RuleError:
        return RuleError(f"{self.file_name}:{node.start_mark.line + 1}: {message}")

    def read_mapping(self, node: yaml.Node, description: str) -> dict[str, NodeEntry]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{description} must be a mapping")
        entries: dict[str, NodeEntry] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in entries:
                raise self.error(key, f"{description} has a key twice, or one that is no text")
            entries[key.value] = (key, value)
        return entries

    def check_fields(self, entries: dict[str, NodeEntry], allowed: set[str], description: str) -> None:
        for name, (key, _) in entries.items():
            if name not in allowed:
                raise self.error(key, f"{description} has no field {name!r}; known are {', '.join(sorted(allowed))}")

    def read_rule(self, node: yaml.Node, index: int) -> Rule:
        entries = self.read_mapping(node, f"rule {index + 1}")
        self.check_fields(entries, {*_FIELD_PARSERS, "header"}, f"rule {index + 1}")
        values = {name: self._read_field(name, value) for name, (_, value) in entries.items()}
        values.setdefault("name", f"rule {index + 1}")
        if values["name"] in self.rule_names:
            raise self.error(node, f"two rules are named {values['name']!r}")
        self.rule_names.add(values["name"])
        try:
            return _make_rule(values)
        except RuleError as error:
            raise self.error(node, f"rule {values['name']!r} {error}") from None

    def _read_field(self, name: str, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"{name} must be a single value")
        value = yaml.SafeLoader("").construct_object(node, deep=True)
        try:
            return _FIELD_PARSERS["path" if name == "header" else name](value)
        except RuleError as error:
            raise self.error(node, f"{name} must be {error}, got {node.value!r}") from None


def _parse_text(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # release: 2.0, status: 404
    if not isinstance(value, str) or not value or len(value) > MAX_FIELD_CHARS:
        raise RuleError(f"text of 1 to {MAX_FIELD_CHARS} characters")
    return value


def _parse_pattern(value: Any) -> str:
    text = _parse_text(value)
    if len(text) > MAX_PATTERN_CHARS or text.count("**") > MAX_RECURSIVE_WILDCARDS:
        raise RuleError(f"a pattern of at most {MAX_PATTERN_CHARS} characters and {MAX_RECURSIVE_WILDCARDS} times **")
    return text


def _make_choice_parser(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise RuleError(f"one of {', '.join(choices)}")
        return str(value)

    return parse


def _parse_status(value: Any) -> str:
    text = _parse_text(value).replace(" ", "")
    if not _STATUS_PATTERN.fullmatch(text):
        raise RuleError("a status such as 404, 4xx or 404->200")
    return text


def _parse_amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RuleError("a number that is not negative")
    return float(value)


def parse_share(value: Any) -> float:
    percent = _PERCENT_PATTERN.fullmatch(value) if isinstance(value, str) else None
    if percent:
        return float(percent[1]) / 100
    if isinstance(value, str):
        raise RuleError("a share such as 0.01 or 1%")
    return _parse_amount(value)


def _parse_day(value: Any) -> dt.date:
    if isinstance(value, str):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            raise RuleError("a day such as 2030-01-31") from None
    if isinstance(value, dt.datetime) or not isinstance(value, dt.date):
        raise RuleError("a day such as 2030-01-31")
    return value


def _parse_json_value(value: Any) -> Any:
    if isinstance(value, (dt.date, bytes)):
        raise RuleError("a JSON value; quote what looks like a date")
    return value


_FIELD_PARSERS: dict[str, Callable[[Any], Any]] = {
    "name": _parse_text,
    "action": _make_choice_parser(*ACTIONS),
    "part": _make_choice_parser(*get_args(Part)),
    "path": _parse_pattern,
    "kind": _make_choice_parser(*get_args(Kind)),
    "service": _parse_text,
    "endpoint": _parse_text,
    "status": _parse_status,
    "release": _parse_text,
    "by": _parse_text,
    "absolute": _parse_amount,
    "relative": parse_share,
    "old": _parse_json_value,
    "new": _parse_json_value,
    "reason": _parse_text,
    "owner": _parse_text,
    "expires": _parse_day,
}


def _make_rule(values: dict[str, Any]) -> Rule:
    action = values.get("action")
    if action is None:
        raise RuleError(f"needs an action: one of {', '.join(ACTIONS)}")
    if action == "waive-coverage":
        return _make_waiver(values)
    if not any(name in values for name in _COVERAGE_FIELDS):
        raise RuleError(f"covers everything: give it at least one of {', '.join(_COVERAGE_FIELDS)}")
    if "header" in values and ("path" in values or values.get("part", "header") != "header"):
        raise RuleError("has a header and a path or another part; make two rules of it")
    _check_action_fields(action, values)
    if "header" in values:
        values["part"], values["path"] = "header", values.pop("header").lower()
    elif "path" in values:
        values.setdefault("part", "body")
    return Rule(has_old="old" in values, has_new="new" in values, **values)


def _make_waiver(values: dict[str, Any]) -> Rule:
    """Of one endpoint: what may come later has to be looked at first."""
    endpoint = values.get("endpoint", "")
    if not endpoint or _WILDCARDS.intersection(endpoint):
        raise RuleError("needs an endpoint without *, ? and [, such as GET /events: it waives coverage of that one")
    if foreign_fields := sorted(values.keys() - _WAIVER_FIELDS):
        raise RuleError(f"has {foreign_fields[0]}, which does not belong to waive-coverage")
    return Rule(**values)


# Fields that belong to one action only, and those of which it needs one.
_FIELDS_OF_ACTION = {"tolerate": {"absolute", "relative"}, "keyed-by": {"by"}, "expect": {"old", "new"}}
_REQUIRED_FIELDS = {"tolerate": ("absolute", "relative"), "keyed-by": ("by",)}


def _check_action_fields(action: str, values: dict[str, Any]) -> None:
    for other, names in _FIELDS_OF_ACTION.items():
        if other != action and (foreign_fields := sorted(names & values.keys())):
            raise RuleError(f"has {foreign_fields[0]}, which belongs to {other} and not to {action}")
    if action in _REQUIRED_FIELDS and not any(name in values for name in _REQUIRED_FIELDS[action]):
        raise RuleError(f"needs {' or '.join(_REQUIRED_FIELDS[action])}")
    if action in {"unordered", "keyed-by"} and "path" not in values:
        raise RuleError("needs a path: that of the array")
