"""How tables look: no frames, no markup in what came from outside, whole rows when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

import rich.console
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast_sidecar.cli.humane import printable

LONGEST_VALUE = 200  # characters
PIPED_WIDTH = 400  # columns: one row one line, for grep
STYLES = {
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


def console(width: int | None = None) -> Console:
    if width is None and not sys.stdout.isatty():
        width = PIPED_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def table(*columns: str, right: frozenset[str] = frozenset()) -> Table:
    """Columns named in `right` hold numbers, and are never broken."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(
            name, justify="right" if name in right else "left", no_wrap=name in right, overflow="fold"
        )
    return made


def styled(text: str, style: str = "") -> Text:
    return Text(
        printable(text), STYLES.get(style or text, style if " " in style or style in {"dim", "bold"} else "")
    )


def outcome_name(value: common.Outcome.ValueType) -> str:
    return _name(common.Outcome.Name(value))


def version_name(value: common.Version.ValueType) -> str:
    return _name(common.Version.Name(value))


def role_name(value: common.Role.ValueType) -> str:
    return _name(common.Role.Name(value))


def part_name(value: common.Part.ValueType) -> str:
    return _name(common.Part.Name(value))


def kind_name(value: common.Kind.ValueType) -> str:
    return _name(common.Kind.Name(value))


def impact_name(value: common.Impact.ValueType) -> str:
    return _name(common.Impact.Name(value))


def _name(constant: str) -> str:
    """OUTCOME_ONLY_OLD → only old."""
    return constant.partition("_")[2].lower().replace("_", " ")


def endpoint_name(endpoint: common.Endpoint) -> str:
    return printable(f"{endpoint.method} {endpoint.route}")


def where(part: common.Part.ValueType, path: str) -> str:
    """`$.items[*].price`, `header cache-control`, `status`."""
    name = part_name(part)
    if part == common.PART_BODY:
        return printable(path or "body")
    return printable(f"{name} {path}" if path else name)


def _remark(row: common.Difference) -> str:
    if row.explained_by:
        return f"explained by rule {row.explained_by}"
    if row.drift:
        return "drift"
    return "noise" if row.noise else impact_name(row.impact)


def differences(found: Iterable[common.Difference]) -> Table:
    """One row a place, with both values."""
    made = table("place", "kind", "impact", "old", "new")
    for row in found:
        made.add_row(
            where(row.part, row.place or row.path),
            kind_name(row.kind),
            styled(_remark(row)),
            styled(printable(row.old, LONGEST_VALUE), "old") if row.HasField("old") else styled("-", "dim"),
            styled(printable(row.new, LONGEST_VALUE), "new") if row.HasField("new") else styled("-", "dim"),
        )
    return made
