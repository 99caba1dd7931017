"""Rules from YAML. `rules.schema.json` says the same to editors; a test holds the two together."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import yaml

from abreast_sidecar.compare.difference import Kind, Part
from abreast_sidecar.compare.rules import ACTIONS, MAX_ANY_DEPTH, MAX_PATTERN, Rule, RuleSet

MAX_RULES = 1000
MAX_TEXT = 500  # characters of a field
_STATUS = re.compile(r"([1-5x][0-9x]{2}|\*)(->([1-5x][0-9x]{2}|\*))?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_COVERS = ("path", "header", "status", "part")
_WILD = frozenset("*?[")
_OF_WAIVERS = frozenset({"name", "action", "endpoint", "service", "release", "reason", "owner", "expires"})


class RuleError(ValueError):
    """Says the file, the line, and what to write instead."""


def load(text: str, name: str = "rules") -> RuleSet:
    """`name`: of the file, for messages. Raise RuleError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{name}:{mark.line + 1}" if mark is not None else name
        raise RuleError(f"{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return RuleSet()
    reader = _Reader(name)
    top = reader.mapping(root, "the file")
    reader.only(top, {"rules"}, "the file")
    listed = top.get("rules")
    if listed is None or not isinstance(listed[1], yaml.SequenceNode):
        raise reader.error(listed[1] if listed else root, "rules must be a list")
    if len(listed[1].value) > MAX_RULES:
        raise reader.error(listed[1], f"at most {MAX_RULES} rules, got {len(listed[1].value)}")
    return RuleSet(tuple(reader.rule(node, place) for place, node in enumerate(listed[1].value)))


def from_fields(fields: Mapping[str, Any]) -> Rule:
    """A rule from the fields that it would have in a file. Raise RuleError, which names the field."""
    said = {}
    for name, value in fields.items():
        if name not in {*_FIELDS, "header"}:
            raise RuleError(
                f"a rule has no field {name!r}; known are {', '.join(sorted({*_FIELDS, 'header'}))}"
            )
        said[name] = _field(name, value)
    said.setdefault("name", "")
    try:
        return _made(said)
    except RuleError as error:
        raise RuleError(f"the rule {error}") from None


def fields_of(rule: Rule) -> dict[str, Any]:
    """What a file would say of it, without what is not set; `from_fields` makes the same rule of it."""
    header = rule.part == "header" and rule.path
    said: dict[str, Any] = {
        "name": rule.name,
        "action": rule.action,
        "part": None if header or (rule.part == "body" and rule.path) else rule.part,
        "header" if header else "path": rule.path,
        **{name: getattr(rule, name) for name in ("kind", "service", "endpoint", "status", "release", "by")},
        **{name: getattr(rule, name) for name in ("absolute", "relative", "reason", "owner")},
        "expires": rule.expires and rule.expires.isoformat(),
    }
    said = {name: value for name, value in said.items() if value is not None and value != ""}
    said |= {"old": rule.old} if rule.has_old else {}
    return said | ({"new": rule.new} if rule.has_new else {})


def _field(name: str, value: Any) -> Any:
    try:
        return _FIELDS["path" if name == "header" else name](value)
    except RuleError as error:
        raise RuleError(f"{name} must be {error}, got {value!r}") from None


Entry = tuple[yaml.Node, yaml.Node]  # a key and its value


@dataclass(slots=True)
class _Reader:
    name: str
    names: set[str] = field(default_factory=set)

    def error(self, node: yaml.Node, message: str) -> RuleError:
        return RuleError(f"{self.name}:{node.start_mark.line + 1}: {message}")

    def mapping(self, node: yaml.Node, what: str) -> dict[str, Entry]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what} must be a mapping")
        found: dict[str, Entry] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in found:
                raise self.error(key, f"{what} has a key twice, or one that is no text")
            found[key.value] = (key, value)
        return found

    def only(self, entries: dict[str, Entry], known: set[str], what: str) -> None:
        for name, (key, _) in entries.items():
            if name not in known:
                raise self.error(key, f"{what} has no field {name!r}; known are {', '.join(sorted(known))}")

    def rule(self, node: yaml.Node, place: int) -> Rule:
        entries = self.mapping(node, f"rule {place + 1}")
        self.only(entries, {*_FIELDS, "header"}, f"rule {place + 1}")
        said = {name: self._read(name, value) for name, (_, value) in entries.items()}
        said.setdefault("name", f"rule {place + 1}")
        if said["name"] in self.names:
            raise self.error(node, f"two rules are named {said['name']!r}")
        self.names.add(said["name"])
        try:
            return _made(said)
        except RuleError as error:
            raise self.error(node, f"rule {said['name']!r} {error}") from None

    def _read(self, name: str, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, f"{name} must be a single value")
        value = yaml.SafeLoader("").construct_object(node, deep=True)
        try:
            return _FIELDS["path" if name == "header" else name](value)
        except RuleError as error:
            raise self.error(node, f"{name} must be {error}, got {node.value!r}") from None


def _text(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # release: 2.0, status: 404
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT:
        raise RuleError(f"text of 1 to {MAX_TEXT} characters")
    return value


def _pattern(value: Any) -> str:
    text = _text(value)
    if len(text) > MAX_PATTERN or text.count("**") > MAX_ANY_DEPTH:
        raise RuleError(f"a pattern of at most {MAX_PATTERN} characters and {MAX_ANY_DEPTH} times **")
    return text


def _one_of(*known: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            raise RuleError(f"one of {', '.join(known)}")
        return str(value)

    return read


def _status(value: Any) -> str:
    text = _text(value).replace(" ", "")
    if not _STATUS.fullmatch(text):
        raise RuleError("a status such as 404, 4xx or 404->200")
    return text


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RuleError("a number that is not negative")
    return float(value)


def share(value: Any) -> float:
    percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if percent:
        return float(percent[1]) / 100
    if isinstance(value, str):
        raise RuleError("a share such as 0.01 or 1%")
    return _amount(value)


def _day(value: Any) -> dt.date:
    if isinstance(value, str):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            raise RuleError("a day such as 2030-01-31") from None
    if isinstance(value, dt.datetime) or not isinstance(value, dt.date):
        raise RuleError("a day such as 2030-01-31")
    return value


def _any(value: Any) -> Any:
    if isinstance(value, (dt.date, bytes)):
        raise RuleError("a JSON value; quote what looks like a date")
    return value


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "name": _text,
    "action": _one_of(*ACTIONS),
    "part": _one_of(*get_args(Part)),
    "path": _pattern,
    "kind": _one_of(*get_args(Kind)),
    "service": _text,
    "endpoint": _text,
    "status": _status,
    "release": _text,
    "by": _text,
    "absolute": _amount,
    "relative": share,
    "old": _any,
    "new": _any,
    "reason": _text,
    "owner": _text,
    "expires": _day,
}


def _made(said: dict[str, Any]) -> Rule:
    action = said.get("action")
    if action is None:
        raise RuleError(f"needs an action: one of {', '.join(ACTIONS)}")
    if action == "waive-coverage":
        return _waiver(said)
    if not any(name in said for name in _COVERS):
        raise RuleError(f"covers everything: give it at least one of {', '.join(_COVERS)}")
    if "header" in said and ("path" in said or said.get("part", "header") != "header"):
        raise RuleError("has a header and a path or another part; make two rules of it")
    _check_fields(action, said)
    if "header" in said:
        said["part"], said["path"] = "header", said.pop("header").lower()
    elif "path" in said:
        said.setdefault("part", "body")
    return Rule(has_old="old" in said, has_new="new" in said, **said)


def _waiver(said: dict[str, Any]) -> Rule:
    """Of one endpoint: what may come later has to be looked at first."""
    endpoint = said.get("endpoint", "")
    if not endpoint or _WILD.intersection(endpoint):
        raise RuleError(
            "needs an endpoint without *, ? and [, such as GET /events: it waives coverage of that one"
        )
    if wrong := sorted(said.keys() - _OF_WAIVERS):
        raise RuleError(f"has {wrong[0]}, which does not belong to waive-coverage")
    return Rule(**said)


# Fields that belong to one action only, and those of which it needs one.
_OWN = {"tolerate": {"absolute", "relative"}, "keyed-by": {"by"}, "expect": {"old", "new"}}
_NEEDS = {"tolerate": ("absolute", "relative"), "keyed-by": ("by",)}


def _check_fields(action: str, said: dict[str, Any]) -> None:
    for other, names in _OWN.items():
        if other != action and (wrong := sorted(names & said.keys())):
            raise RuleError(f"has {wrong[0]}, which belongs to {other} and not to {action}")
    if action in _NEEDS and not any(name in said for name in _NEEDS[action]):
        raise RuleError(f"needs {' or '.join(_NEEDS[action])}")
    if action in {"unordered", "keyed-by"} and "path" not in said:
        raise RuleError("needs a path: that of the array")
