"""Options that say what a rule is."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import click

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.parameters import SECONDS_PER_UNIT, SPAN_PATTERN
from abreast_sidecar.cli.rule_files import to_utc_midnight
from abreast_sidecar.compare.difference import Kind
from abreast_sidecar.compare.rules import ACTIONS
from abreast_sidecar.compare.rules_file import RuleError
from abreast_sidecar.compare.rules_file import parse_share as parsed_share
from abreast_sidecar.rule_messages import dict_to_message

RuleCommand = TypeVar("RuleCommand")
rule_action_argument = click.argument("action", type=click.Choice(ACTIONS))
RULE_PARTS = ("status", "header", "body", "error")
RULE_KINDS = tuple(kind for kind in get_args(Kind) if kind != "slower")

RULE_OPTIONS = (
    click.option("--for", "finding_id", type=click.IntRange(min=1), default=None, help="The finding that it is made for."),
    click.option("--path", default=None, help="Path and all below: $.items[*].price; .* any key, .** any steps."),
    click.option("--header", default=None, help="A response header; * stands for any characters."),
    click.option("--part", type=click.Choice(RULE_PARTS), default=None, help="Only this part of an answer."),
    click.option("--kind", type=click.Choice(RULE_KINDS), default=None, help="Only this kind of difference."),
    click.option("--endpoint", default=None, help='Only this endpoint, such as "GET /products/{id}"; * as in a shell.'),
    click.option("--status", default=None, help="Only answers of this status, 404 or 4xx, or this change, 404->200."),
    click.option("--release", default=None, help="Only this release of new; * as in a shell."),
    click.option("--service", default=None, help="Only this service; * as in a shell."),
    click.option("--by", default=None, help="keyed-by: the field."),
    click.option("--absolute", type=click.FloatRange(min=0), default=None, help="tolerate: at most so far apart."),
    click.option("--relative", default=None, help="tolerate: at most this share of the old number; 0.01 or 1%."),
    click.option("--old", default=None, help="expect: only this value of old, as JSON."),
    click.option("--new", default=None, help="expect: only this value of new, as JSON."),
)  # fmt: skip


def rule_options(command: RuleCommand) -> RuleCommand:
    for option in reversed(RULE_OPTIONS):
        command = option(command)  # type: ignore[type-var]  # click's own
    return command


def build_rule_message(option_values: Mapping[str, Any], expires: str = "") -> api.Rule:
    fields = {
        name: value
        for name, value in option_values.items()
        if value is not None and name not in {"old", "new"}
    }
    if relative := fields.get("relative"):
        fields["relative"] = parse_relative_share(relative)
    rule = dict_to_message(fields)
    for name in ("old", "new"):
        if option_values.get(name) is not None:
            setattr(rule, name, option_values[name])
    if expires:
        rule.expire_time.FromDatetime(parse_expiry(expires))
    return rule


def parse_relative_share(text: str) -> float:
    try:
        return parsed_share(text if text.strip().endswith("%") else float(text))
    except (RuleError, ValueError):
        raise click.BadParameter(
            f"must be a share such as 0.01 or 1%, got {text!r}", param_hint="--relative"
        ) from None


def parse_expiry(text: str) -> dt.datetime:
    match = SPAN_PATTERN.fullmatch(text.strip())
    try:
        if match:
            return dt.datetime.now(dt.UTC) + dt.timedelta(
                seconds=float(match[1]) * SECONDS_PER_UNIT[match[2]]
            )
        return to_utc_midnight(dt.date.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"must be a span such as 90d or 12w, or a day such as 2030-01-31, got {text!r}",
            param_hint="--expires",
        ) from None
