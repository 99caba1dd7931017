"""Options that say what a rule is."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import click

from abreast.v1 import rule_pb2 as api
from abreast_sidecar.cli.parameters import SPAN, UNITS
from abreast_sidecar.cli.rule_files import midnight
from abreast_sidecar.compare.difference import Kind
from abreast_sidecar.compare.rules import ACTIONS
from abreast_sidecar.compare.rules_file import RuleError
from abreast_sidecar.compare.rules_file import share as parsed_share
from abreast_sidecar.rule_messages import message_of

Command = TypeVar("Command")
RULE_ACTION = click.argument("action", type=click.Choice(ACTIONS))
PARTS = ("status", "header", "body", "error")
KINDS = tuple(kind for kind in get_args(Kind) if kind != "slower")

OPTIONS = (
    click.option("--for", "finding_id", type=click.IntRange(min=1), default=None, help="The finding that it is made for."),
    click.option("--path", default=None, help="Path and all below: $.items[*].price; .* any key, .** any steps."),
    click.option("--header", default=None, help="A response header; * stands for any characters."),
    click.option("--part", type=click.Choice(PARTS), default=None, help="Only this part of an answer."),
    click.option("--kind", type=click.Choice(KINDS), default=None, help="Only this kind of difference."),
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


def rule_options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)  # type: ignore[type-var]  # click's own
    return command


def message(given: Mapping[str, Any], expires: str = "") -> api.Rule:
    fields = {
        name: value for name, value in given.items() if value is not None and name not in {"old", "new"}
    }
    if relative := fields.get("relative"):
        fields["relative"] = share(relative)
    made = message_of(fields)
    for name in ("old", "new"):
        if given.get(name) is not None:
            setattr(made, name, given[name])
    if expires:
        made.expire_time.FromDatetime(until(expires))
    return made


def share(text: str) -> float:
    try:
        return parsed_share(text if text.strip().endswith("%") else float(text))
    except (RuleError, ValueError):
        raise click.BadParameter(
            f"must be a share such as 0.01 or 1%, got {text!r}", param_hint="--relative"
        ) from None


def until(text: str) -> dt.datetime:
    span = SPAN.fullmatch(text.strip())
    try:
        if span:
            return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=float(span[1]) * UNITS[span[2]])
        return midnight(dt.date.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"must be a span such as 90d or 12w, or a day such as 2030-01-31, got {text!r}",
            param_hint="--expires",
        ) from None
