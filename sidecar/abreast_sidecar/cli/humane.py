"""Numbers, times and texts as people like to read them."""

from __future__ import annotations

import datetime as dt

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400  # seconds
DURATION_UNITS = ((DAY_S, "d", HOUR_S, "h"), (HOUR_S, "h", MINUTE_S, "min"), (MINUTE_S, "min", 1, "s"))


def format_count(number: int) -> str:
    return f"{number:,}"


def format_quantity(number: int, singular: str, plural: str = "") -> str:
    """1 finding, 2 findings."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_percent(share: float) -> str:
    """As many digits as it takes to tell 0.5% from 0, and 99.95% from 100%."""
    value = share * 100
    if value in {0.0, 100.0}:
        return f"{value:.0f}%"
    if value < 0.0001:
        return "<0.0001%"
    digits = 1 if 1 <= value <= 99 else 2 if 0.1 <= value <= 99.99 else 4
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + "%"


def format_share_of(part: int, total: int) -> str:
    """Rounded shares never say none or all where some are different. Empty where it is no part of the whole."""
    if not 0 <= part <= total or not total:
        return ""
    share = part / total
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}" if 0 < share < 1 else f"{share:.0%}"


def format_seconds(value: float) -> str:
    """3 µs, 4.1 ms, 120 ms, 1.25 s, 3 min 20 s, 5 h, 2 d 3 h."""
    if value < 0:
        return "-" + format_seconds(-value)
    if value < 0.0009995:
        return f"{value * 1e6:.0f} µs" if value else "0 s"
    if value < 0.9995:
        milliseconds = value * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if value < 59.95:
        return f"{value:.2f}".rstrip("0").rstrip(".") + " s" if value < 9.995 else f"{value:.0f} s"
    for size, unit, step, smaller_unit in DURATION_UNITS:
        if value >= size:
            units, remainder = divmod(round(value / step) * step, size)
            return f"{units:.0f} {unit}" + (
                f" {remainder // step:.0f} {smaller_unit}" if remainder >= step else ""
            )
    return "1 min"


def format_duration(value: Duration) -> str:
    return format_seconds(value.seconds + value.nanos / 1e9)


def format_bytes(byte_count: int) -> str:
    value = float(byte_count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"


def seconds_since(moment: Timestamp, current_time: dt.datetime) -> float:
    """Seconds from the moment until now."""
    return (current_time - moment.ToDatetime(dt.UTC)).total_seconds()


def format_age(moment: Timestamp, current_time: dt.datetime) -> str:
    elapsed_s = seconds_since(moment, current_time)
    return "now" if elapsed_s < 1 else f"{format_seconds(int(elapsed_s))} ago"


def format_local_time(moment: Timestamp) -> str:
    """Local date and time, to the second."""
    return moment.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def to_printable(text: str, max_chars: int = 0) -> str:
    """Nothing that came from a request may steer the terminal; cut in the middle where it is too long."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if max_chars and len(text) > max_chars:
        half = (max_chars - 1) // 2
        text = f"{text[: max_chars - 1 - half]}…{text[len(text) - half :]}"
    return text
