"""When each version got the request, what it asked of others, when it began its answer and ended it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.humane import printable, seconds
from abreast_sidecar.cli.tables import STYLES, role_name, table, version_name

NARROWEST, WIDEST = 16, 60  # columns of the bars
TEXTS = 52  # columns beside the bars and the notes
BARS = 4  # the column they are in
WAITING, SENDING = "─", "█"
USUAL_NAME = 14  # characters, as `old baseline 2`
MOST_NAME = 40  # characters of what was asked


@dataclass(frozen=True)
class Span:
    """Seconds since the first arrival. `first_byte` is None where no answer began."""

    who: str
    style: str
    arrival: float
    first_byte: float | None
    end: float
    note: str = ""
    hops: tuple[Span, ...] = ()  # what it asked of others, by the time it asked


def spans(captures: Sequence[api.CaptureDetail]) -> list[Span]:
    """Ordered by arrival. The clocks of two machines may differ by more than the bars show."""
    arrivals = [capture.started.ToNanoseconds() / 1e9 for capture in captures]
    zero = min(arrivals, default=0.0)
    found = [_span(capture, arrived - zero) for capture, arrived in zip(captures, arrivals, strict=True)]
    return sorted(found, key=lambda span: span.arrival)


def _span(capture: api.CaptureDetail, arrival: float) -> Span:
    began = arrival + capture.first_byte.ToNanoseconds() / 1e9 if capture.HasField("first_byte") else None
    version = version_name(capture.version)
    attempt = f" {capture.attempt}" if capture.attempt > 1 else ""
    notes = [f"raised {capture.raised}"] if capture.raised else []
    if capture.client_left:
        notes.append("the client left")
    if capture.hops and capture.role != common.ROLE_LIVE:
        notes.append("dropped by Envoy")
    return Span(
        who=f"{version} {role_name(capture.role)}{attempt}",
        style=STYLES.get(version, ""),
        arrival=arrival,
        first_byte=began,
        end=max(arrival + capture.total.ToNanoseconds() / 1e9, began or arrival),
        note=", ".join(notes),
        hops=tuple(sorted((_hop(hop, arrival) for hop in capture.hops), key=lambda span: span.arrival)),
    )


def _hop(hop: api.Hop, arrival: float) -> Span:
    asked = arrival + hop.start.ToNanoseconds() / 1e9
    answered = asked + hop.duration.ToNanoseconds() / 1e9
    return Span(f"→ {hop.kind} {hop.name}"[:MOST_NAME], "dim", asked, None, answered, hop.note)


def timeline(captures: Sequence[api.CaptureDetail], width: int) -> Table:
    """One row a capture, and one for each thing it asked of others: arrival, first byte and end, and a bar of both."""
    found = [row for span in spans(captures) for row in (span, *span.hops)]
    whole = max((span.end for span in found), default=0.0)
    noted = max((len(span.note) for span in found), default=0)
    named = max((len(span.who) - USUAL_NAME for span in found), default=0)
    columns = max(NARROWEST, min(WIDEST, width - TEXTS - noted - max(0, named)))
    made = table(
        "", "arrived", "first byte", "end", "", "", right=frozenset({"arrived", "first byte", "end"})
    )
    made.columns[BARS].no_wrap = True  # notes wrap, where all is too narrow
    for span in found:
        began = "-" if span.first_byte is None else seconds(span.first_byte)
        made.add_row(
            Text(printable(span.who), span.style),
            "+" + seconds(span.arrival),
            began,
            seconds(span.end),
            bar(span, whole, columns),
            printable(span.note),
        )
    return made


def bar(span: Span, whole: float, columns: int) -> Text:
    """Waiting for the first byte, then sending; each as wide as its share of the whole, and never invisible."""

    def column(moment: float) -> int:
        return min(columns - 1, int(moment / whole * columns)) if whole else 0

    start, end = column(span.arrival), column(span.end) + 1
    began = end if span.first_byte is None else min(column(span.first_byte), end - 1)
    return Text(" " * start + WAITING * (began - start) + SENDING * (end - began), span.style)
