"""Rules in a file, as messages and back."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path

import yaml

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.compare.rules import Rule
from abreast_sidecar.compare.rules_file import RuleError, fields_of, load
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.rule_messages import fields_of as said_by
from abreast_sidecar.rule_messages import message_of


def read_rules(file: Path) -> list[api.Rule]:
    """Raise ArgumentError for what can't be imported."""
    try:
        found = load(file.read_text(), str(file))
    except RuleError as error:
        raise ArgumentError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{file} can't be read as text: {getattr(error, 'strerror', error)}") from error
    return [_message(rule, file) for rule in found.rules]


def _message(rule: Rule, file: Path) -> api.Rule:
    missing = [name for name in ("owner", "reason", "expires") if not getattr(rule, name)]
    if missing:
        raise ArgumentError(f"{file}: rule {rule.name!r} needs {' and '.join(missing)} to be imported")
    assert rule.expires is not None
    if rule.expires <= dt.datetime.now(dt.UTC).date():
        raise ArgumentError(
            f"{file}: rule {rule.name!r} expired on {rule.expires}; remove it, or say until when it holds"
        )
    fields = {name: value for name, value in fields_of(rule).items() if name != "expires"}
    made = message_of(fields)
    made.expire_time.FromDatetime(midnight(rule.expires))
    return made


def midnight(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time(), dt.UTC)


def as_yaml(rules: Iterable[api.Rule]) -> str:
    """A moment within a day becomes the next day: a file knows days only."""
    listed: list[dict[str, object]] = []
    for rule in rules:
        if any(one["name"] == rule.name for one in listed):  # of another source
            rule.name = f"{rule.name} ({rule.id})"
        expires = rule.expire_time.ToDatetime(dt.UTC)
        day = expires.date() + dt.timedelta(days=expires > midnight(expires.date()))
        listed.append({**said_by(rule), "expires": day})
    return yaml.safe_dump({"rules": listed}, sort_keys=False, allow_unicode=True)
