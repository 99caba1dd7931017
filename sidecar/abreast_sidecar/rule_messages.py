"""Rules as messages of the API, and the fields that a file has for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abreast.v1 import common_pb2 as common
from abreast.v1 import rule_pb2 as pb

TEXTS = ("name", "path", "header", "service", "endpoint", "status", "release", "by", "owner", "reason")
NUMBERS = ("absolute", "relative")
VALUES = ("old", "new")
ENUMS = (
    ("action", pb.RuleAction.DESCRIPTOR, "RULE_ACTION_"),
    ("part", common.Part.DESCRIPTOR, "PART_"),
    ("kind", common.Kind.DESCRIPTOR, "KIND_"),
)


def fields_of(rule: pb.Rule) -> dict[str, Any]:
    """What a file would say, without expires. Raise ValueError for a value that is no JSON text, or an unknown number."""
    said: dict[str, Any] = {name: getattr(rule, name) for name in TEXTS if getattr(rule, name)}
    for name, kind, prefix in ENUMS:
        if number := getattr(rule, name):
            if number not in kind.values_by_number:
                raise ValueError(f"{name} must be one of {', '.join(kind.values_by_name)}, got {number}")
            value = kind.values_by_number[number].name.removeprefix(prefix)
            said[name] = value.lower().replace("_", "-")
    said |= {name: getattr(rule, name) for name in NUMBERS if rule.HasField(name)}  # type: ignore[arg-type]  # names of fields
    for name in VALUES:
        if rule.HasField(name):  # type: ignore[arg-type]  # a field's name
            try:
                said[name] = json.loads(getattr(rule, name))
            except ValueError:
                raise ValueError(f"{name} must be JSON text, got {getattr(rule, name)!r}") from None
    return said


def message_of(fields: Mapping[str, Any]) -> pb.Rule:
    """The other way round; expires is left to the caller."""
    made = pb.Rule()
    for name, kind, prefix in ENUMS:
        if value := fields.get(name):
            number = kind.values_by_name[prefix + value.upper().replace("-", "_")].number
            setattr(made, name, number)
    for name in (*TEXTS, *NUMBERS):
        if name in fields:
            setattr(made, name, fields[name])
    for name in VALUES:
        if name in fields:
            setattr(made, name, json.dumps(fields[name]))
    return made
