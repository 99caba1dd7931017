"""The converter between rules and their documents: YAML, dicts for JSON, messages of the API, and the JSON schema.

`Rule` declares each field once, with its type and documentation. Every document has the same fields, derived from it.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from abreast_sidecar.compare.rules import ACTIONS, MAX_RECURSIVE_WILDCARDS, Rule, RuleSet

MAX_RULES = 1000
JSON_FIELDS = ("old", "new")  # JSON texts in messages
SELECTOR_FIELDS = ("path", "header", "status", "part")  # a rule that explains differences needs one of these
WAIVER_FIELDS = frozenset({"name", "action", "endpoint", "service", "release", "reason", "owner", "expires"})
FIELDS_OF_ACTION = {"tolerate": ("absolute", "relative"), "keyed-by": ("by",), "expect": ("old", "new")}
REQUIRED_FIELDS = {"tolerate": ("absolute", "relative"), "keyed-by": ("by",)}  # at least one of them
ARRAY_ACTIONS = ("unordered", "keyed-by")  # need a path
HEADER_DESCRIPTION = "A response header. `*` stands for any characters. It takes the place of `part` and `path`."
EXACT_ENDPOINT_PATTERN = r"^[^*?\[]+$"
_PERCENT_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*%")

MessageT = TypeVar("MessageT")


class RuleError(ValueError):
    """A rule that can't be used. The message names file and line, if there are any, and says what to write instead."""


class RuleField(NamedTuple):
    type: Any  # with constraints, without None
    expected: str  # completes `<field> must be`
    default: Any
    schema: dict[str, Any]


def _read_fields() -> dict[str, RuleField]:
    hints = get_type_hints(Rule, include_extras=True)
    rule_fields: dict[str, RuleField] = {}
    for field in fields(Rule):
        declared, *metadata = get_args(hints[field.name])
        options = [option for option in get_args(declared) if option is not type(None)]
        field_type: Any = Annotated[options[0] if type(None) in get_args(declared) else declared, *metadata]
        plain_type, *metadata = get_args(field_type)
        expected = f"one of {', '.join(get_args(plain_type))}" if get_origin(plain_type) is Literal else ""
        extra: dict[str, Any] = {"expected": expected, "schema": {}}
        for meta in metadata:
            extra |= meta.extra or {}
        schema = {**msgspec.json.schema(field_type), **extra["schema"]}
        default = "" if field.default is MISSING else field.default
        rule_fields[field.name] = RuleField(field_type, extra["expected"], default, schema)
        if field.name == "path":
            rule_fields["header"] = rule_fields["path"]._replace(schema={**schema, "description": HEADER_DESCRIPTION})
    return rule_fields


RULE_FIELDS = _read_fields()


def parse_field(name: str, value: Any) -> Any:
    """Convert a field's value from YAML or JSON. Raise RuleError."""
    field = RULE_FIELDS[name]
    try:
        return msgspec.convert(_normalise(name, value), field.type)
    except ValueError:
        raise RuleError(f"{name} must be {field.expected}, got {value!r}") from None


def _normalise(name: str, value: Any) -> Any:
    """Bring the spellings of a value that people use into the field's type. Raise ValueError."""
    if name in JSON_FIELDS:
        if isinstance(value, (dt.date, bytes)):
            raise ValueError
    elif name in {"absolute", "relative"}:
        if isinstance(value, str) and name == "relative" and (percent := _PERCENT_PATTERN.fullmatch(value)):
            return float(percent[1]) / 100
        if value == float("inf"):
            raise ValueError
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # release: 2.0, status: 404
    elif isinstance(value, str):
        if name in {"path", "header"} and value.count("**") > MAX_RECURSIVE_WILDCARDS:
            raise ValueError
        return value.replace(" ", "") if name == "status" else value
    return value


def rule_from_dict(values: Mapping[str, Any]) -> Rule:
    """Build a rule from the fields of a document. Raise RuleError, which names the field."""
    if unknown_names := values.keys() - RULE_FIELDS.keys():
        raise RuleError(_unknown_field("a rule", min(unknown_names), RULE_FIELDS))
    parsed_values = {"name": "", **{name: parse_field(name, value) for name, value in values.items()}}
    try:
        return _build_rule(parsed_values)
    except RuleError as error:
        raise RuleError(f"the rule {error}") from None


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return the fields of a document that are set, as JSON values. `rule_from_dict` restores the rule."""
    values = {
        name: getattr(rule, name)
        for name, field in RULE_FIELDS.items()
        if name != "header" and getattr(rule, name) != field.default
    }
    if "path" in values and rule.part in {"body", "header"}:
        del values["part"]
    if "path" in values and rule.part == "header":
        values = {"header" if name == "path" else name: value for name, value in values.items()}
    if rule.expires is not None:
        values["expires"] = rule.expires.isoformat()
    return values


def message_to_dict(message: Any) -> dict[str, Any]:
    """Return the fields of a document from an `abreast.v1.Rule`, without `expires`. Raise RuleError for a bad value."""
    values: dict[str, Any] = {}
    for name, descriptor in message.DESCRIPTOR.fields_by_name.items():
        value = getattr(message, name)
        if name not in RULE_FIELDS or not (message.HasField(name) if descriptor.has_presence else value):
            continue
        if descriptor.enum_type is not None:
            enum_value = descriptor.enum_type.values_by_number.get(value)
            if enum_value is None:
                names = ", ".join(descriptor.enum_type.values_by_name)
                raise RuleError(f"{name} must be one of {names}, got {value}")
            value = enum_value.name.removeprefix(_enum_prefix(descriptor)).lower().replace("_", "-")
        elif name in JSON_FIELDS:
            try:
                value = json.loads(value)
            except ValueError:
                raise RuleError(f"{name} must be JSON text, got {value!r}") from None
        values[name] = value
    return values


def dict_to_message(values: Mapping[str, Any], message: MessageT) -> MessageT:
    """Set the fields of an `abreast.v1.Rule` from those of a document, without `expires`."""
    descriptors = message.DESCRIPTOR.fields_by_name  # type: ignore[attr-defined]  # a message: compare imports no protobuf
    for name, value in values.items():
        if name not in descriptors:
            continue
        if (enum_type := descriptors[name].enum_type) is not None:
            enum_name = _enum_prefix(descriptors[name]) + value.upper().replace("-", "_")
            setattr(message, name, enum_type.values_by_name[enum_name].number)
        else:
            setattr(message, name, json.dumps(value) if name in JSON_FIELDS else value)
    return message


def _enum_prefix(descriptor: Any) -> str:
    return str(descriptor.enum_type.values_by_number[0].name).removesuffix("UNSPECIFIED")


def parse_rules(text: str, file_name: str = "rules") -> RuleSet:
    """Read a YAML document of rules. `file_name` is for messages. Raise RuleError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{file_name}:{mark.line + 1}" if mark is not None else file_name
        raise RuleError(f"{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return RuleSet()
    return _YamlReader(file_name).read(root)


class _YamlReader:
    """Reads rules from nodes, since errors name the line of a node."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name

    def read(self, root: yaml.Node) -> RuleSet:
        entries = self.read_mapping(root, "the file", {"rules"})
        node = entries.get("rules", root)
        if "rules" not in entries or not isinstance(node, yaml.SequenceNode):
            raise self.error(node, "rules must be a list")
        if len(node.value) > MAX_RULES:
            raise self.error(node, f"rules must be at most {MAX_RULES}, got {len(node.value)}")
        rules_by_name: dict[str, Rule] = {}
        for index, rule_node in enumerate(node.value):
            rule = self.read_rule(rule_node, f"rule {index + 1}")
            if rule.name in rules_by_name:
                raise self.error(rule_node, f"two rules are named {rule.name!r}")
            rules_by_name[rule.name] = rule
        return RuleSet(tuple(rules_by_name.values()))

    def read_rule(self, node: yaml.Node, title: str) -> Rule:
        values = {"name": title}
        for name, value_node in self.read_mapping(node, title, RULE_FIELDS).items():
            if not isinstance(value_node, yaml.ScalarNode):
                raise self.error(value_node, f"{name} must be a single value")
            try:
                values[name] = parse_field(name, yaml.SafeLoader("").construct_object(value_node))
            except (yaml.YAMLError, ValueError) as error:
                raise self.error(value_node, str(error)) from None
        try:
            return _build_rule(values)
        except RuleError as error:
            raise self.error(node, f"rule {values['name']!r} {error}") from None

    def read_mapping(self, node: yaml.Node, title: str, names: Iterable[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{title} must be a mapping")
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in entries:
                raise self.error(key, f"{title} has a key twice, or a key that is not text")
            if key.value not in names:
                raise self.error(key, _unknown_field(title, key.value, names))
            entries[key.value] = value
        return entries

    def error(self, node: yaml.Node, message: str) -> RuleError:
        return RuleError(f"{self.file_name}:{node.start_mark.line + 1}: {message}")


def _unknown_field(title: str, name: str, names: Iterable[str]) -> str:
    return f"{title} has no field {name!r}; the fields are {', '.join(sorted(names))}"


def _build_rule(values: dict[str, Any]) -> Rule:
    """Check how the fields fit together. Raise RuleError, whose message continues `rule 'x'`."""
    action = values.get("action")
    if action is None:
        raise RuleError(f"needs an action: one of {', '.join(ACTIONS)}")
    if action == "waive-coverage":
        if not re.search(EXACT_ENDPOINT_PATTERN, values.get("endpoint", "")):
            raise RuleError("needs an endpoint without *, ? and [, such as GET /events: it waives coverage of that one")
        if foreign_names := sorted(values.keys() - WAIVER_FIELDS):
            raise RuleError(f"has {foreign_names[0]}, which does not belong to waive-coverage")
        return Rule(**values)
    if not any(name in values for name in SELECTOR_FIELDS):
        raise RuleError(f"covers everything: give it at least one of {', '.join(SELECTOR_FIELDS)}")
    if "header" in values and ("path" in values or values.get("part", "header") != "header"):
        raise RuleError("has a header and a path or another part: split it into two rules")
    _check_action_fields(action, values)
    if "header" in values:
        values["part"], values["path"] = "header", values.pop("header").lower()
    elif "path" in values:
        values.setdefault("part", "body")
    return Rule(**values)


def _check_action_fields(action: str, values: dict[str, Any]) -> None:
    for owner, names in FIELDS_OF_ACTION.items():
        if owner != action and (foreign_names := sorted(values.keys() & names)):
            raise RuleError(f"has {foreign_names[0]}, which belongs to {owner} and not to {action}")
    if action in REQUIRED_FIELDS and not any(name in values for name in REQUIRED_FIELDS[action]):
        raise RuleError(f"needs {' or '.join(REQUIRED_FIELDS[action])}")
    if action in ARRAY_ACTIONS and "path" not in values:
        raise RuleError("needs a path: the path of the array")


def build_schema() -> dict[str, Any]:
    """Return the JSON schema of a YAML document of rules, for editors. It accepts what `parse_rules` accepts.

    A schema can't express that names are unique, that a day exists, and how often `**` may occur.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rules of abreast",
        "description": "Known differences between the old and the new version of a service.",
        "type": "object",
        "additionalProperties": False,
        "required": ["rules"],
        "properties": {"rules": {"type": "array", "maxItems": MAX_RULES, "items": {"$ref": "#/$defs/rule"}}},
        "$defs": {
            "rule": {
                "type": "object",
                "additionalProperties": False,
                "required": ["action"],
                "properties": {name: field.schema for name, field in RULE_FIELDS.items()},
                "anyOf": [
                    *({"required": [name]} for name in SELECTOR_FIELDS),
                    {"properties": {"action": {"const": "waive-coverage"}}},
                ],
                "allOf": _build_conditions(),
            }
        },
    }


def _build_conditions() -> list[dict[str, Any]]:
    """State the checks of `_build_rule` as a schema."""
    conditions: list[dict[str, Any]] = [
        {"not": {"required": ["header", "path"]}},
        {"if": {"required": ["header"]}, "then": {"properties": {"part": {"const": "header"}}}},
    ]
    for action in ACTIONS:
        allowed = WAIVER_FIELDS if action == "waive-coverage" else RULE_FIELDS.keys()
        foreign = {name for owner, names in FIELDS_OF_ACTION.items() if owner != action for name in names}
        forbidden = sorted((RULE_FIELDS.keys() - allowed) | foreign)
        consequence: dict[str, Any] = {"properties": dict.fromkeys(forbidden, False)}
        if action in REQUIRED_FIELDS:
            consequence["anyOf"] = [{"required": [name]} for name in REQUIRED_FIELDS[action]]
        if action in ARRAY_ACTIONS:
            consequence["required"] = ["path"]
        if action == "waive-coverage":
            consequence["required"] = ["endpoint"]
            consequence["properties"]["endpoint"] = {"pattern": EXACT_ENDPOINT_PATTERN}
        conditions.append({"if": {"properties": {"action": {"const": action}}}, "then": consequence})
    return conditions
