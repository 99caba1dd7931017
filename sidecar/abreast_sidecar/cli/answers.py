"""Both answers of a pair, side by side or one below the other, with what differs marked."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import counted, duration, printable, size
from abreast_sidecar.cli.json_lines import json_lines
from abreast_sidecar.cli.tables import role_name, table

SIDE_BY_SIDE_FROM = 100  # columns
LONGEST_NAME = 80  # characters of an exception's name
CONTEXT = 3  # equal lines around a difference
LONGEST = 3000  # lines a side that are aligned; difflib would take seconds for more
OLD, NEW = "blue", "magenta"


@dataclass(frozen=True)
class Row:
    """A line of old beside its line of new; None where a side has none."""

    old: str | None
    new: str | None

    @property
    def same(self) -> bool:
        return self.old == self.new


def compared(
    captures: Sequence[api.CaptureDetail], version: common.Version.ValueType
) -> api.CaptureDetail | None:
    """The first attempt that is no baseline copy."""
    found = [c for c in captures if c.version == version and c.role != common.ROLE_BASELINE]
    return min(found, key=lambda capture: capture.attempt, default=None)


def answers(captures: Sequence[api.CaptureDetail], width: int, *, full: bool = False) -> RenderableType:
    old, new = (compared(captures, version) for version in (common.VERSION_OLD, common.VERSION_NEW))
    rows = [
        Row(status(old), status(new)),
        *header_rows(old, new),
        Row("", ""),
        *aligned(body(old), body(new)),
    ]
    if width >= SIDE_BY_SIDE_FROM:
        return _beside(rows, old, new, full=full)
    return _below(rows, full=full)


def status(capture: api.CaptureDetail | None) -> str:
    if capture is None:
        return "(no capture)"
    if capture.status:
        return f"status {capture.status}"
    return raised(capture) or "no answer"


def raised(capture: api.CaptureDetail | None) -> str:
    return f"raised {printable(capture.raised, LONGEST_NAME)}" if capture and capture.raised else ""


def ended(detail: api.PairDetail, version: common.Version.ValueType) -> str:
    """How a version answered, as far as is kept: `200 in 3.1 ms`, `raised KeyError in 2.0 ms`, `no capture`."""
    pair, old = detail.pair, version == common.VERSION_OLD
    time = "old_time" if old else "new_time"
    if not pair.HasField(time):  # type: ignore[arg-type]  # a field's name
        return "no capture"
    failed = raised(compared(detail.captures, version))
    code = pair.old_status if old else pair.new_status
    took = f" in {duration(getattr(pair, time))}"
    if code:
        return f"{code}{took}" + (f", then {failed}" if failed else "")
    return f"{failed or 'no answer'}{took}"


def header_rows(old: api.CaptureDetail | None, new: api.CaptureDetail | None) -> list[Row]:
    """By name; headers that occur several times in their order."""
    found: dict[tuple[str, int], list[str | None]] = {}
    for side, capture in enumerate((old, new)):
        seen: Counter[str] = Counter()
        for header in capture.headers if capture else ():
            row = found.setdefault((header.name, seen[header.name]), [None, None])
            row[side] = printable(f"{header.name}: {header.value}")
            seen[header.name] += 1
    return [Row(*found[key]) for key in sorted(found)]


def body(capture: api.CaptureDetail | None) -> list[str]:
    """JSON one value a line."""
    if capture is None:
        return []
    cut = capture.body_length - len(capture.body)
    rest = [f"… {size(cut)} more were not captured"] if cut > 0 else []
    return [*body_lines(capture.body), *rest]


def body_lines(body: bytes) -> list[str]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return [f"({size(len(body))} that are no text)"]
    found = json_lines(text) or text.splitlines()
    return [printable(line) for line in found]


def aligned(old: list[str], new: list[str]) -> list[Row]:
    """Equal lines beside each other, in both orders."""
    if max(len(old), len(new)) > LONGEST:
        return [Row(*sides) for sides in itertools.zip_longest(old, new)]
    rows = []
    for what, i, end_i, j, end_j in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            rows += [Row(line, line) for line in old[i:end_i]]
        else:
            rows += [Row(*sides) for sides in itertools.zip_longest(old[i:end_i], new[j:end_j])]
    return rows


def folded(rows: Sequence[Row], *, full: bool) -> Iterator[Row | int]:
    """The rows, long runs of equal ones replaced by how many they are."""
    at = 0
    for same, run in itertools.groupby(rows, key=lambda row: row.same):
        part = list(run)
        before = CONTEXT if at else 0
        after = CONTEXT if at + len(part) < len(rows) else 0
        at += len(part)
        hidden = len(part) - before - after
        if full or not same or hidden < 2:
            yield from part
        else:
            yield from part[:before]
            yield hidden
            yield from part[len(part) - after :]


def _beside(
    rows: Sequence[Row], old: api.CaptureDetail | None, new: api.CaptureDetail | None, *, full: bool
) -> Table:
    made = table(_title("old", old), "", _title("new", new))
    made.columns[0].ratio = made.columns[2].ratio = 1
    made.expand = True
    for row in folded(rows, full=full):
        if isinstance(row, int):
            made.add_row(Text(_left_out(row), "dim"), "", Text(_left_out(row), "dim"))
        elif row.same:
            made.add_row(row.old, "", row.new)
        else:
            made.add_row(Text(row.old or "", OLD), "≠", Text(row.new or "", NEW))
    return made


def _below(rows: Sequence[Row], *, full: bool) -> Group:
    """As diff prints it: - is old, + is new."""
    found: list[Text] = []
    for row in folded(rows, full=full):
        if isinstance(row, int):
            found.append(Text(f"  {_left_out(row)}", "dim"))
        elif row.same:
            found.append(Text(f"  {row.old}"))
        else:
            found += [Text(f"- {row.old}", OLD)] if row.old is not None else []
            found += [Text(f"+ {row.new}", NEW)] if row.new is not None else []
    return Group(Text("- old", f"bold {OLD}"), Text("+ new", f"bold {NEW}"), *found)


def _title(version: str, capture: api.CaptureDetail | None) -> str:
    return f"{version} ({role_name(capture.role)})" if capture else version


def _left_out(number: int) -> str:
    return f"… {counted(number, 'equal line')}"
