"""A changed value that does not even look like the other: what noise at a place must not hide.

Such a difference is of a kind of its own, so that counts tell it from what varies there by itself:

- `format`: one side is empty text, or one is a UUID, hash, token, timestamp, address, … and the other is not, or is one of
  another length, zone or version.
- `range`: one side is the present moment by its own service's clock and the other is not; numbers of which one is negative
  or a thousand times the other; texts of which one is ten times as long.

Whether that is a defect is not said here: random texts may be of any length, and then copies of old show it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from msgspec.structs import replace

from abreast_sidecar.compare.difference import Difference, Impact
from abreast_sidecar.compare.evidence import get_values
from abreast_sidecar.compare.explain import to_unix_time
from abreast_sidecar.compare.shape import Shape, detect_shape

START_TIME_TOLERANCE_S = 300.0  # s around the start of a request: caches, and time that passes meanwhile
RANGE_RATIO = 1000.0  # times as much
LENGTH_RATIO = 10  # times as long
MIN_TEXT_CHARS = 4  # characters: shorter texts have no length to speak of
# Not looked at: lines of plain text are empty or not as they please, cookies are compared by their attributes.
FORMATLESS_PATH_PREFIXES = ("lines[", "set-cookie[")

_FORMATTED_KINDS = frozenset(
    {
        "uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt", "timestamp", "unix", "unix text", "date",
        "time", "ip", "email", "url", "prefixed",
    }
)  # fmt: skip
_TIME_KINDS = frozenset({"timestamp", "unix", "unix text"})
_NUMBER_KINDS = frozenset({"integer", "float"})
_TEXT_KINDS = frozenset({"text", "word", "path"})

AnomalyKind = Literal["format", "range"]
StartTimes = tuple[float, float]  # when both versions began, each by its own clock, in seconds of Unix time


def classify_anomalies(differences: Iterable[Difference], start_times: StartTimes) -> list[Difference]:
    """The same differences, those of another format or range as such."""
    return [
        _classify_difference(difference, start_times) if difference.kind == "changed" else difference
        for difference in differences
    ]


def _classify_difference(difference: Difference, start_times: StartTimes) -> Difference:
    if difference.part in {"status", "error"} or difference.path.startswith(FORMATLESS_PATH_PREFIXES):
        return difference
    old, new = get_values(difference)
    anomaly = classify_anomaly(old, new, start_times)
    if anomaly is None:
        return difference
    kind, impact = anomaly
    return replace(difference, kind=kind, impact=impact)


def classify_anomaly(old: Any, new: Any, start_times: StartTimes) -> tuple[AnomalyKind, Impact] | None:
    """What sets two values of one JSON type apart beyond that they differ."""
    before, after = detect_shape(old), detect_shape(new)
    if before != after and (anomaly := _classify_format_change(before, after)) is not None:
        return anomaly
    return ("range", "value") if _is_out_of_range(old, new, before, after, start_times) else None


def _classify_format_change(before: Shape, after: Shape) -> tuple[AnomalyKind, Impact] | None:
    kinds = {before.kind, after.kind}
    if len(kinds) == 1:
        return ("format", "value") if kinds <= _FORMATTED_KINDS and kinds != {"url"} else None
    if "empty" not in kinds and not kinds & _FORMATTED_KINDS:
        return None
    return "format", "breaking" if after.kind == "empty" or before.kind in _FORMATTED_KINDS else "value"


def _is_out_of_range(old: Any, new: Any, before: Shape, after: Shape, start_times: StartTimes) -> bool:
    if before == after and before.kind in _TIME_KINDS:
        return _is_near_start(old, before, start_times[0]) != _is_near_start(new, after, start_times[1])
    kinds = {before.kind, after.kind}
    return (kinds <= _NUMBER_KINDS and _differs_in_magnitude(old, new)) or (
        kinds <= _TEXT_KINDS and _differs_in_length(old, new)
    )


def _is_near_start(value: Any, value_shape: Shape, start_time: float) -> bool:
    unix_time = to_unix_time(value, value_shape)
    return unix_time is not None and abs(unix_time - start_time) <= START_TIME_TOLERANCE_S


def _differs_in_magnitude(old: float, new: float) -> bool:
    if not old or not new:
        return False
    return (
        (old < 0) != (new < 0)
        or not abs(new) < abs(old) * RANGE_RATIO
        or not abs(old) < abs(new) * RANGE_RATIO
    )


def _differs_in_length(old: str, new: str) -> bool:
    short, long = sorted((len(old), len(new)))
    return long >= LENGTH_RATIO * max(short, MIN_TEXT_CHARS)
