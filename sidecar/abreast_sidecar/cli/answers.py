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
from abreast_sidecar.cli.humane import format_bytes, format_duration, format_quantity, to_printable
from abreast_sidecar.cli.json_lines import split_json_lines
from abreast_sidecar.cli.tables import make_table, role_name

MIN_SIDE_BY_SIDE_COLUMNS = 100  # columns
MAX_EXCEPTION_NAME_CHARS = 80  # characters of an exception's name
CONTEXT_LINES = 3  # equal lines around a difference
MAX_ALIGNED_LINES = 3000  # lines a side that are aligned; difflib would take seconds for more
OLD_COLOUR, NEW_COLOUR = "blue", "magenta"


@dataclass(frozen=True)
class LinePair:
    """A line of old beside its line of new; None where a side has none."""

    old: str | None
    new: str | None

    @property
    def is_equal(self) -> bool:
        return self.old == self.new


def select_compared_capture(
    captures: Sequence[api.CaptureDetail], version: common.Version.ValueType
) -> api.CaptureDetail | None:
    """The first attempt that is no baseline copy."""
    candidates = [c for c in captures if c.version == version and c.role != common.ROLE_BASELINE]
    return min(candidates, key=lambda capture: capture.attempt, default=None)


def render_answers(
    captures: Sequence[api.CaptureDetail], width: int, *, full: bool = False
) -> RenderableType:
    old, new = (
        select_compared_capture(captures, version) for version in (common.VERSION_OLD, common.VERSION_NEW)
    )
    rows = [
        LinePair(format_status_line(old), format_status_line(new)),
        *align_headers(old, new),
        LinePair("", ""),
        *align_lines(split_captured_body(old), split_captured_body(new)),
    ]
    if width >= MIN_SIDE_BY_SIDE_COLUMNS:
        return _render_side_by_side(rows, old, new, full=full)
    return _render_unified(rows, full=full)


def format_status_line(capture: api.CaptureDetail | None) -> str:
    if capture is None:
        return "(no capture)"
    if capture.status:
        return f"status {capture.status}"
    return format_exception(capture) or "no answer"


def format_exception(capture: api.CaptureDetail | None) -> str:
    return (
        f"raised {to_printable(capture.raised, MAX_EXCEPTION_NAME_CHARS)}"
        if capture and capture.raised
        else ""
    )


def summarise_answer(detail: api.PairDetail, version: common.Version.ValueType) -> str:
    """How a version answered, as far as is kept: `200 in 3.1 ms`, `raised KeyError in 2.0 ms`, `no capture`."""
    pair, old = detail.pair, version == common.VERSION_OLD
    time = "old_time" if old else "new_time"
    if not pair.HasField(time):  # type: ignore[arg-type]  # a field's name
        return "no capture"
    exception_text = format_exception(select_compared_capture(detail.captures, version))
    code = pair.old_status if old else pair.new_status
    duration_text = f" in {format_duration(getattr(pair, time))}"
    if code:
        return f"{code}{duration_text}" + (f", then {exception_text}" if exception_text else "")
    return f"{exception_text or 'no answer'}{duration_text}"


def align_headers(old: api.CaptureDetail | None, new: api.CaptureDetail | None) -> list[LinePair]:
    """By name; headers that occur several times in their order."""
    rows_by_header: dict[tuple[str, int], list[str | None]] = {}
    for side, capture in enumerate((old, new)):
        occurrences: Counter[str] = Counter()
        for header in capture.headers if capture else ():
            row = rows_by_header.setdefault((header.name, occurrences[header.name]), [None, None])
            row[side] = to_printable(f"{header.name}: {header.value}")
            occurrences[header.name] += 1
    return [LinePair(*rows_by_header[key]) for key in sorted(rows_by_header)]


def split_captured_body(capture: api.CaptureDetail | None) -> list[str]:
    """JSON one value a line."""
    if capture is None:
        return []
    missing_bytes = capture.body_length - len(capture.body)
    truncation_note = [f"… {format_bytes(missing_bytes)} more were not captured"] if missing_bytes > 0 else []
    return [*split_body_bytes(capture.body), *truncation_note]


def split_body_bytes(body: bytes) -> list[str]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return [f"({format_bytes(len(body))} that are no text)"]
    lines = split_json_lines(text) or text.splitlines()
    return [to_printable(line) for line in lines]


def align_lines(old: list[str], new: list[str]) -> list[LinePair]:
    """Equal lines beside each other, in both orders."""
    if max(len(old), len(new)) > MAX_ALIGNED_LINES:
        return [LinePair(*sides) for sides in itertools.zip_longest(old, new)]
    rows = []
    for operation, i, end_i, j, end_j in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if operation == "equal":
            rows += [LinePair(line, line) for line in old[i:end_i]]
        else:
            rows += [LinePair(*sides) for sides in itertools.zip_longest(old[i:end_i], new[j:end_j])]
    return rows


def fold_equal_rows(rows: Sequence[LinePair], *, full: bool) -> Iterator[LinePair | int]:
    """The rows, long runs of equal ones replaced by how many they are."""
    position = 0
    for is_equal, run in itertools.groupby(rows, key=lambda row: row.is_equal):
        run_rows = list(run)
        before = CONTEXT_LINES if position else 0
        after = CONTEXT_LINES if position + len(run_rows) < len(rows) else 0
        position += len(run_rows)
        hidden_count = len(run_rows) - before - after
        if full or not is_equal or hidden_count < 2:
            yield from run_rows
        else:
            yield from run_rows[:before]
            yield hidden_count
            yield from run_rows[len(run_rows) - after :]


def _render_side_by_side(
    rows: Sequence[LinePair], old: api.CaptureDetail | None, new: api.CaptureDetail | None, *, full: bool
) -> Table:
    answers_table = make_table(_format_column_title("old", old), "", _format_column_title("new", new))
    answers_table.columns[0].ratio = answers_table.columns[2].ratio = 1
    answers_table.expand = True
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            answers_table.add_row(
                Text(_format_hidden_lines(row), "dim"), "", Text(_format_hidden_lines(row), "dim")
            )
        elif row.is_equal:
            answers_table.add_row(row.old, "", row.new)
        else:
            answers_table.add_row(Text(row.old or "", OLD_COLOUR), "≠", Text(row.new or "", NEW_COLOUR))
    return answers_table


def _render_unified(rows: Sequence[LinePair], *, full: bool) -> Group:
    """As diff prints it: - is old, + is new."""
    lines: list[Text] = []
    for row in fold_equal_rows(rows, full=full):
        if isinstance(row, int):
            lines.append(Text(f"  {_format_hidden_lines(row)}", "dim"))
        elif row.is_equal:
            lines.append(Text(f"  {row.old}"))
        else:
            lines += [Text(f"- {row.old}", OLD_COLOUR)] if row.old is not None else []
            lines += [Text(f"+ {row.new}", NEW_COLOUR)] if row.new is not None else []
    return Group(Text("- old", f"bold {OLD_COLOUR}"), Text("+ new", f"bold {NEW_COLOUR}"), *lines)


def _format_column_title(version: str, capture: api.CaptureDetail | None) -> str:
    return f"{version} ({role_name(capture.role)})" if capture else version


def _format_hidden_lines(line_count: int) -> str:
    return f"… {format_quantity(line_count, 'equal line')}"
