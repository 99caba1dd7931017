"""How much work a comparison may be, in steps: about as many values, lines or tags as are looked at.

A body of a few hundred kilobytes may decode to millions of values. Steps are counted, not time, so that the same pair has
the same outcome on every machine. What is beyond the bound is compared more coarsely, and said to be.
"""

from __future__ import annotations

from typing import NamedTuple

from abreast_sidecar.compare.media import Format


class FormatCost(NamedTuple):
    separator: bytes  # comes once for each item, or nearly
    tenths_per_item: int  # of a step that reading one takes, measured: a step is about 1 µs


FORMAT_COSTS: dict[Format, FormatCost] = {
    "json": FormatCost(b",", 2),
    "ndjson": FormatCost(b"\n", 60),
    "events": FormatCost(b"\n", 60),
    "form": FormatCost(b"&", 40),
    "multipart": FormatCost(b"\r\n\r\n", 100),
    "html": FormatCost(b"<", 120),
    "xml": FormatCost(b"<", 80),
    "text": FormatCost(b"\n", 20),
}


def estimate_parse_cost(format_: Format, *bodies: bytes) -> int:
    """Steps that it takes to read these, counted in no time."""
    cost = FORMAT_COSTS.get(format_)
    return sum(body.count(cost.separator) for body in bodies) * cost.tenths_per_item // 10 if cost else 0
