"""How much work a comparison may be, in steps: about as many values, lines or tags as are looked at.

A body of a few hundred kilobytes may decode to millions of values. Steps are counted, not time, so that the same pair has
the same outcome on every machine. What is beyond the bound is compared more coarsely, and said to be.
"""

from __future__ import annotations

from typing import NamedTuple

from abreast_sidecar.compare.media import Format


class Price(NamedTuple):
    mark: bytes  # comes once for each item, or nearly
    tenths: int  # of a step that reading one takes, measured: a step is about 1 µs


PRICES: dict[Format, Price] = {
    "json": Price(b",", 2),
    "ndjson": Price(b"\n", 60),
    "events": Price(b"\n", 60),
    "form": Price(b"&", 40),
    "multipart": Price(b"\r\n\r\n", 100),
    "html": Price(b"<", 120),
    "xml": Price(b"<", 80),
    "text": Price(b"\n", 20),
}


def reading(kind: Format, *bodies: bytes) -> int:
    """Steps that it takes to read these, counted in no time."""
    price = PRICES.get(kind)
    return sum(body.count(price.mark) for body in bodies) * price.tenths // 10 if price else 0
