"""Rules as messages of the API, and the fields that a file has for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abreast.v1 import common_pb2 as common
from abreast.v1 import rule_pb2 as pb

MESSAGE_TEXT_FIELDS = ("name", "path", "header", "service", "endpoint", "status", "release", "by", "owner", "reason")
MESSAGE_NUMBER_FIELDS = ("absolute", "relative")
MESSAGE_JSON_FIELDS = ("old", "new")
MESSAGE_ENUM_FIELDS = (
    ("action", pb.RuleAction.DESCRIPTOR, "RULE_ACTION_"),
    ("part", common.Part.DESCRIPTOR, "PART_"),
    ("kind", common.Kind.DESCRIPTOR, "KIND_"),
)


def message_to_dict(rule: pb.Rule) -> dict[str, Any]:
    """What a file would say, without expires. Raise ValueError for a value that is no JSON text, or an unknown number."""
    fields: dict[str, Any] = {name: getattr(rule, name) for name in MESSAGE_TEXT_FIELDS if getattr(rule, name)}
    for name, kind, prefix in MESSAGE_ENUM_FIELDS:
        if number := getattr(rule, name):
            if number not in kind.values_by_number:
                raise ValueError(f"{name} must be one of {', '.join(kind.values_by_name)}, got {number}")
            value = kind.values_by_number[number].name.removeprefix(prefix)
            fields[name] = value.lower().replace("_", "-")
    fields |= {name: getattr(rule, name) for name in MESSAGE_NUMBER_FIELDS if rule.HasField(name)}  # type: ignore[arg-type]  # names of fields
    for name in MESSAGE_JSON_FIELDS:
        if rule.HasField(name):  # type: ignore[arg-type]  # a field's name
            try:
                fields[name] = json.loads(getattr(rule, name))
            except ValueError:
                raise ValueError(f"{name} must be JSON text, got {getattr(rule, name)!r}") from None
    return fields


def dict_to_message(fields: Mapping[str, Any]) -> pb.Rule:
    """The other way round; expires is left to the caller."""
    message = pb.Rule()
    for name, kind, prefix in MESSAGE_ENUM_FIELDS:
        if value := fields.get(name):
            number = kind.values_by_name[prefix + value.upper().replace("-", "_")].number
            setattr(message, name, number)
    for name in (*MESSAGE_TEXT_FIELDS, *MESSAGE_NUMBER_FIELDS):
        if name in fields:
            setattr(message, name, fields[name])
    for name in MESSAGE_JSON_FIELDS:
        if name in fields:
            setattr(message, name, json.dumps(fields[name]))
    return message
