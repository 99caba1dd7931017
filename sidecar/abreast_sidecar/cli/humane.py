"""Numbers, times and texts as people like to read them."""

from __future__ import annotations

import datetime as dt

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds
STEPS = ((DAY, "d", HOUR, "h"), (HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s"))


def count(number: int) -> str:
    return f"{number:,}"


def counted(number: int, singular: str, plural: str = "") -> str:
    """1 finding, 2 findings."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def percent(share: float) -> str:
    """As many digits as it takes to tell 0.5% from 0, and 99.95% from 100%."""
    value = share * 100
    if value in {0.0, 100.0}:
        return f"{value:.0f}%"
    if value < 0.0001:
        return "<0.0001%"
    digits = 1 if 1 <= value <= 99 else 2 if 0.1 <= value <= 99.99 else 4
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + "%"


def part_of(part: int, whole: int) -> str:
    """Rounded shares never say none or all where some are different. Empty where it is no part of the whole."""
    if not 0 <= part <= whole or not whole:
        return ""
    share = part / whole
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def seconds(value: float) -> str:
    """3 µs, 4.1 ms, 120 ms, 1.25 s, 3 min 20 s, 5 h, 2 d 3 h."""
    if value < 0:
        return "-" + seconds(-value)
    if value < 0.0009995:
        return f"{value * 1e6:.0f} µs" if value else "0 s"
    if value < 0.9995:
        milliseconds = value * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if value < 59.95:
        return f"{value:.2f}".rstrip("0").rstrip(".") + " s" if value < 9.995 else f"{value:.0f} s"
    for size, unit, below, smaller in STEPS:
        if value >= size:
            first, rest = divmod(round(value / below) * below, size)
            return f"{first:.0f} {unit}" + (f" {rest // below:.0f} {smaller}" if rest >= below else "")
    return "1 min"


def duration(value: Duration) -> str:
    return seconds(value.seconds + value.nanos / 1e9)


def size(number: int) -> str:
    value = float(number)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"


def since(moment: Timestamp, now: dt.datetime) -> float:
    """Seconds from the moment until now."""
    return (now - moment.ToDatetime(dt.UTC)).total_seconds()


def ago(moment: Timestamp, now: dt.datetime) -> str:
    passed = since(moment, now)
    return "now" if passed < 1 else f"{seconds(int(passed))} ago"


def clock(moment: Timestamp) -> str:
    """Local date and time, to the second."""
    return moment.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def printable(text: str, limit: int = 0) -> str:
    """Nothing that came from a request may steer the terminal; cut in the middle where it is too long."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if limit and len(text) > limit:
        half = (limit - 1) // 2
        text = f"{text[: limit - 1 - half]}…{text[len(text) - half :]}"
    return text
