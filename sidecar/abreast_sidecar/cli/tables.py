"""How tables look: no frames, no markup in what came from outside, whole rows when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

import rich.console
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast_sidecar.cli.humane import to_printable

MAX_TABLE_VALUE_CHARS = 200  # characters
PIPED_TABLE_COLUMNS = 400  # columns: one row one line, for grep
STYLE_BY_WORD = {
    "breaking": "bold red",
    "value": "yellow",
    "additive": "cyan",
    "noise": "dim",
    "mismatch": "red",
    "match": "green",
    "old": "blue",
    "new": "magenta",
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
}


class Console(rich.console.Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def make_console(width: int | None = None) -> Console:
    if width is None and not sys.stdout.isatty():
        width = PIPED_TABLE_COLUMNS
    return Console(width=width, markup=False, highlight=False, emoji=False)


def make_table(*columns: str, numeric_columns: frozenset[str] = frozenset()) -> Table:
    """Columns named in `right` hold numbers, and are never broken."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in numeric_columns else "left",
            no_wrap=name in numeric_columns,
            overflow="fold",
        )
    return table


def style_text(text: str, style: str = "") -> Text:
    return Text(
        to_printable(text),
        STYLE_BY_WORD.get(style or text, style if " " in style or style in {"dim", "bold"} else ""),
    )


def outcome_name(value: common.Outcome.ValueType) -> str:
    return _short_enum_name(common.Outcome.Name(value))


def version_name(value: common.Version.ValueType) -> str:
    return _short_enum_name(common.Version.Name(value))


def role_name(value: common.Role.ValueType) -> str:
    return _short_enum_name(common.Role.Name(value))


def part_name(value: common.Part.ValueType) -> str:
    return _short_enum_name(common.Part.Name(value))


def kind_name(value: common.Kind.ValueType) -> str:
    return _short_enum_name(common.Kind.Name(value))


def impact_name(value: common.Impact.ValueType) -> str:
    return _short_enum_name(common.Impact.Name(value))


def _short_enum_name(constant: str) -> str:
    """OUTCOME_ONLY_OLD → only old."""
    return constant.partition("_")[2].lower().replace("_", " ")


def endpoint_name(endpoint: common.Endpoint) -> str:
    return to_printable(f"{endpoint.method} {endpoint.route}")


def format_location(part: common.Part.ValueType, path: str) -> str:
    """`$.items[*].price`, `header cache-control`, `status`."""
    name = part_name(part)
    if part == common.PART_BODY:
        return to_printable(path or "body")
    return to_printable(f"{name} {path}" if path else name)


def _format_difference_remark(difference: common.Difference) -> str:
    if difference.explained_by:
        return f"explained by rule {difference.explained_by}"
    if difference.drift:
        return "drift"
    return "noise" if difference.noise else impact_name(difference.impact)


def build_differences_table(items: Iterable[common.Difference]) -> Table:
    """One row a place, with both values."""
    table = make_table("place", "kind", "impact", "old", "new")
    for difference in items:
        table.add_row(
            format_location(difference.part, difference.place or difference.path),
            kind_name(difference.kind),
            style_text(_format_difference_remark(difference)),
            style_text(to_printable(difference.old, MAX_TABLE_VALUE_CHARS), "old")
            if difference.HasField("old")
            else style_text("-", "dim"),
            style_text(to_printable(difference.new, MAX_TABLE_VALUE_CHARS), "new")
            if difference.HasField("new")
            else style_text("-", "dim"),
        )
    return table
