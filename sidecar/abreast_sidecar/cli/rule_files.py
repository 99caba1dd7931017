"""Rules in a file, as messages and back."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path

import yaml

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.compare.rules import Rule
from abreast_sidecar.compare.rules_file import RuleError, parse_rules, rule_to_dict
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rule_messages import dict_to_message
from abreast_sidecar.rule_messages import message_to_dict as said_by


def read_rules(file: Path) -> list[api.Rule]:
    """Raise ArgumentError for what can't be imported."""
    try:
        document = parse_rules(file.read_text(), str(file))
    except RuleError as error:
        raise ArgumentError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} can't be read as text: {getattr(error, 'strerror', error)}") from error
    return [_to_rule_message(rule, file) for rule in document.rules]


def _to_rule_message(rule: Rule, file: Path) -> api.Rule:
    missing_fields = [name for name in ("owner", "reason", "expires") if not getattr(rule, name)]
    if missing_fields:
        raise ArgumentError(f"{file}: rule {rule.name!r} needs {' and '.join(missing_fields)} to be imported")
    assert rule.expires is not None
    if rule.expires <= dt.datetime.now(dt.UTC).date():
        raise ArgumentError(
            f"{file}: rule {rule.name!r} expired on {rule.expires}; remove it, or say until when it holds"
        )
    fields = {name: value for name, value in rule_to_dict(rule).items() if name != "expires"}
    message = dict_to_message(fields)
    message.expire_time.FromDatetime(to_utc_midnight(rule.expires))
    return message


def to_utc_midnight(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time(), dt.UTC)


def dump_rules_yaml(rules: Iterable[api.Rule]) -> str:
    """A moment within a day becomes the next day: a file knows days only."""
    entries: list[dict[str, object]] = []
    for rule in rules:
        if any(entry["name"] == rule.name for entry in entries):  # of another source
            rule.name = f"{rule.name} ({rule.id})"
        expires = rule.expire_time.ToDatetime(dt.UTC)
        day = expires.date() + dt.timedelta(days=expires > to_utc_midnight(expires.date()))
        entries.append({**said_by(rule), "expires": day})
    return yaml.safe_dump({"rules": entries}, sort_keys=False, allow_unicode=True)
