"""When each version got the request, what it asked of others, when it began its answer and ended it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import format_seconds, to_printable
from abreast_sidecar.cli.tables import STYLE_BY_WORD, make_table, role_name, version_name

MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 16, 60  # columns of the bars
TIMELINE_TEXT_COLUMNS = 52  # columns beside the bars and the notes
BAR_COLUMN_INDEX = 4  # the column they are in
WAITING_MARK, SENDING_MARK = "─", "█"
USUAL_NAME_CHARS = 14  # characters, as `old baseline 2`
MAX_SPAN_NAME_CHARS = 40  # characters of what was asked


@dataclass(frozen=True)
class TimelineSpan:
    """Seconds since the first arrival. `first_byte` is None where no answer began."""

    name: str
    style: str
    arrival: float
    first_byte: float | None
    end: float
    note: str = ""
    children: tuple[TimelineSpan, ...] = ()  # what it asked of others, by the time it asked


def build_timeline_spans(captures: Sequence[api.CaptureDetail]) -> list[TimelineSpan]:
    """Ordered by arrival. The clocks of two machines may differ by more than the bars show."""
    arrivals = [capture.started.ToNanoseconds() / 1e9 for capture in captures]
    first_arrival = min(arrivals, default=0.0)
    timeline_spans = [
        _build_capture_span(capture, arrival - first_arrival)
        for capture, arrival in zip(captures, arrivals, strict=True)
    ]
    return sorted(timeline_spans, key=lambda span: span.arrival)


def _build_capture_span(capture: api.CaptureDetail, arrival: float) -> TimelineSpan:
    first_byte = (
        arrival + capture.first_byte.ToNanoseconds() / 1e9 if capture.HasField("first_byte") else None
    )
    version = version_name(capture.version)
    attempt = f" {capture.attempt}" if capture.attempt > 1 else ""
    notes = [f"raised {capture.raised}"] if capture.raised else []
    if capture.client_left:
        notes.append("the client left")
    if capture.hops and capture.role != common.ROLE_LIVE:
        notes.append("dropped by Envoy")
    return TimelineSpan(
        name=f"{version} {role_name(capture.role)}{attempt}",
        style=STYLE_BY_WORD.get(version, ""),
        arrival=arrival,
        first_byte=first_byte,
        end=max(arrival + capture.total.ToNanoseconds() / 1e9, first_byte or arrival),
        note=", ".join(notes),
        children=tuple(
            sorted((_build_child_span(hop, arrival) for hop in capture.hops), key=lambda span: span.arrival)
        ),
    )


def _build_child_span(child: api.Hop, arrival: float) -> TimelineSpan:
    start = arrival + child.start.ToNanoseconds() / 1e9
    end = start + child.duration.ToNanoseconds() / 1e9
    return TimelineSpan(
        f"→ {child.kind} {child.name}"[:MAX_SPAN_NAME_CHARS], "dim", start, None, end, child.note
    )


def build_timeline_table(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """One row a capture, and one for each thing it asked of others: arrival, first byte and end, and a bar of both."""
    rows = [row for span in build_timeline_spans(captures) for row in (span, *span.children)]
    total_s = max((span.end for span in rows), default=0.0)
    note_columns = max((len(span.note) for span in rows), default=0)
    extra_name_columns = max((len(span.name) - USUAL_NAME_CHARS for span in rows), default=0)
    bar_columns = max(
        MIN_BAR_COLUMNS,
        min(MAX_BAR_COLUMNS, width - TIMELINE_TEXT_COLUMNS - note_columns - max(0, extra_name_columns)),
    )
    table = make_table(
        "",
        "arrived",
        "first byte",
        "end",
        "",
        "",
        numeric_columns=frozenset({"arrived", "first byte", "end"}),
    )
    table.columns[BAR_COLUMN_INDEX].no_wrap = True  # notes wrap, where all is too narrow
    for span in rows:
        first_byte_text = "-" if span.first_byte is None else format_seconds(span.first_byte)
        table.add_row(
            Text(to_printable(span.name), span.style),
            "+" + format_seconds(span.arrival),
            first_byte_text,
            format_seconds(span.end),
            draw_bar(span, total_s, bar_columns),
            to_printable(span.note),
        )
    return table


def draw_bar(span: TimelineSpan, total_s: float, columns: int) -> Text:
    """Waiting for the first byte, then sending; each as wide as its share of the whole, and never invisible."""

    def to_column(moment: float) -> int:
        return min(columns - 1, int(moment / total_s * columns)) if total_s else 0

    start, end = to_column(span.arrival), to_column(span.end) + 1
    first_byte_column = end if span.first_byte is None else min(to_column(span.first_byte), end - 1)
    return Text(
        " " * start + WAITING_MARK * (first_byte_column - start) + SENDING_MARK * (end - first_byte_column),
        span.style,
    )
