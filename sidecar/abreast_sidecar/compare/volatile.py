"""Classification of differences by the shapes of their values: volatile, of another format, or out of range.

Values that both have one shape, with the same format and length, explain a difference if they are:

- A `uuid` of one version, except the nil UUID and two spellings of one UUID. A `ulid` or `trace`.
- A `hash`, `hex`, `token`, `base64` or `jwt`: long and mixed enough to be no word, name or number.
- A `timestamp` of one zone and precision, near the request or near each other.
- A number of type `unix` or `unix text`, near the request.
- A `url` that differs only in parameters that sign it or limit its lifetime.
- A `text` or `url` that differs only in UUIDs and timestamps inside it, which explain themselves.

Values of two shapes never explain a difference. Neither do numbers, words, names, plain text, paths, dates, times of day,
email and IP addresses, ids with a prefix (`cus_...`), booleans, null and empty values. A counter is a number too: only
the baseline shows that it counts.

The explanation is a presumption, since the UUID of a wrong product looks like a new one. `stats.noise` overrules it at
places that never differ between old and baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import parse_qsl

import orjson
from msgspec.structs import replace

from abreast_sidecar.compare.model import Difference, Impact, JsonPath
from abreast_sidecar.compare.values import LongNumber, Shape, detect_shape

MAX_ANSWER_GAP_S = 10.0  # between two answers to one request
REQUEST_TIME_TOLERANCE_S = 300.0  # for clock skew and cached values

MAGNITUDE_SHIFT_RATIO = 2.0
MAX_NUMBER_CHARS = 24
_NUMBER_FIRST_CHARS = frozenset("-0123456789")
_TYPE_RANKS = {type(None): 0, bool: 1, int: 2, float: 2, str: 3, list: 4, dict: 5}
_NO_VALUES = (None, None)
START_TIME_TOLERANCE_S = 300.0  # for cached values, and time that passes during the request
RANGE_RATIO = 1000.0
LENGTH_RATIO = 10
MIN_TEXT_CHARS = 4  # shorter texts count as this long
# Values without a format: lines of plain text, and the attributes of cookies.
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
StartTimes = tuple[float, float]  # old and new: Unix time in seconds, each by its own clock
OPAQUE_KINDS = frozenset({"uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt"})
SIGNATURE_PARAMETERS = frozenset(
    {
        "awsaccesskeyid", "expires", "expiry", "exp", "hmac", "key-pair-id", "policy", "se", "sig", "sign",
        "signature", "st", "token", "ts", "hdnea", "hdnts", "__token__", "x-amz-credential", "x-amz-date",
        "x-amz-security-token", "x-amz-signature", "x-goog-credential", "x-goog-date", "x-goog-signature",
    }
)  # fmt: skip
_EMBEDDED_VALUE = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?",
    re.ASCII,
)


def explain_change(old: Any, new: Any, request_time: float | None = None) -> str | None:
    """Return the explanation of a difference between two JSON values, such as `uuid`, or None.

    `request_time` is Unix time in seconds. A number counts as a time only if it is near.
    """
    before, after = detect_shape(old), detect_shape(new)
    if before != after:
        return _explain_signed_url(old, new) if before.kind == after.kind == "url" else None
    if before.kind in OPAQUE_KINDS:
        return before.kind if old.casefold() != new.casefold() else None  # two spellings of one value
    if before.kind == "timestamp":
        return "timestamp" if _are_near(to_unix_time(old, before), to_unix_time(new, after), request_time) else None
    if before.kind in {"unix", "unix text"}:
        return (
            "unix time"
            if request_time is not None
            and _is_near_request(to_unix_time(old, before), request_time)
            and _is_near_request(to_unix_time(new, after), request_time)
            else None
        )
    if before.kind == "url":
        return _explain_signed_url(old, new) or _explain_embedded(old, new, request_time)
    return _explain_embedded(old, new, request_time) if before.kind == "text" else None


def _is_near_request(seconds: float | None, request_time: float) -> bool:
    return seconds is not None and abs(seconds - request_time) <= REQUEST_TIME_TOLERANCE_S


def _are_near(old: float | None, new: float | None, request_time: float | None) -> bool:
    if old is None or new is None:
        return False
    return abs(old - new) <= MAX_ANSWER_GAP_S or (
        request_time is not None and _is_near_request(old, request_time) and _is_near_request(new, request_time)
    )


def to_unix_time(value: Any, value_shape: Shape) -> float | None:
    """Convert a timestamp or number to Unix time in seconds. A time without a zone is in UTC."""
    if value_shape.kind != "timestamp":
        return int(value) / (1 if value_shape.format == "s" else 1000)
    try:
        if value_shape.format == "http":
            return parsedate_to_datetime(value).timestamp()
        timestamp = datetime.fromisoformat(value.replace(",", "."))
    except ValueError:  # 31 February
        return None
    return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)).timestamp()


def _explain_signed_url(old: str, new: str) -> str | None:
    """Compare addresses except for signatures, which must exist, have one length and not be empty."""
    before, after = old.partition("?"), new.partition("?")
    if before[0] != after[0] or not before[2] or not after[2]:
        return None
    old_parameters, new_parameters = (
        parse_qsl(before[2], keep_blank_values=True),
        parse_qsl(after[2], keep_blank_values=True),
    )
    if [name for name, _ in old_parameters] != [name for name, _ in new_parameters]:
        return None
    only_signature_differs = all(
        old_value == new_value or (name.lower() in SIGNATURE_PARAMETERS and 0 < len(old_value) == len(new_value))
        for (name, old_value), (_, new_value) in zip(old_parameters, new_parameters, strict=True)
    )
    return "signed url" if only_signature_differs and old_parameters != new_parameters else None


def _explain_embedded(old: str, new: str, request_time: float | None) -> str | None:
    if _EMBEDDED_VALUE.sub("\0", old) != _EMBEDDED_VALUE.sub("\0", new):
        return None
    pairs = [
        pair
        for pair in zip(_EMBEDDED_VALUE.findall(old), _EMBEDDED_VALUE.findall(new), strict=True)
        if pair[0] != pair[1]
    ]
    reasons = [explain_change(old_value, new_value, request_time) for old_value, new_value in pairs]
    explanations = [reason for reason in reasons if reason is not None]
    return f"{explanations[0]} inside" if explanations and len(explanations) == len(reasons) else None


def is_explained_by_shape(differences: Iterable[Difference], request_time: float) -> bool:
    """Tell whether shapes explain all differences. `request_time` is Unix time in seconds."""
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and explain_change(*get_values(difference), request_time) is not None
        for difference in differences
    )


def get_direction(difference: Difference) -> int:
    """Return 1 if new is greater, -1 if old is greater, 0 if they have no order. An absent value is the least."""
    if difference.kind in {"added", "removed"}:
        return 1 if difference.kind == "added" else -1
    if difference.kind == "order":
        return 0
    old, new = get_values(difference)
    before, after = (_TYPE_RANKS.get(type(value), 2) for value in (old, new))
    if before != after:
        return 1 if after > before else -1
    if before not in {2, 3} or old == new:
        return 0
    return 1 if new > old else -1


def get_magnitude_shift(difference: Difference) -> int:
    """Return 1 if new is more than twice old, -1 if it is less than half, else 0. Signs don't count."""
    if difference.kind != "changed":
        return 0
    old, new = map(_parse_magnitude, get_values(difference))
    if old is None or new is None:
        return 0
    return (new > MAGNITUDE_SHIFT_RATIO * old) - (old > MAGNITUDE_SHIFT_RATIO * new)


def _parse_magnitude(value: Any) -> float | None:
    """Return the absolute value of a number, or of a number in a text, such as an amount of money."""
    kind = type(value)
    if kind is str and (len(value) > MAX_NUMBER_CHARS or value[:1] not in _NUMBER_FIRST_CHARS):
        return None
    if kind not in {int, float, str}:
        return None
    try:
        return abs(float(value))
    except (ValueError, OverflowError):
        return None


def get_values(difference: Difference) -> tuple[Any, Any]:
    """Return both values, or None and None if a rendered text was truncated."""
    location = difference.location
    if type(location) is JsonPath:
        return _to_plain_number(location.old), _to_plain_number(location.new)
    try:
        old, new = (orjson.loads(text or "null") for text in (difference.old, difference.new))
    except orjson.JSONDecodeError:
        return _NO_VALUES
    return old, new


def _to_plain_number(value: Any) -> Any:
    return float(value.digits()) if type(value) is LongNumber else value


def classify_anomalies(differences: Iterable[Difference], start_times: StartTimes) -> list[Difference]:
    """Replace the kind of differences that are anomalies: values of another format, or out of range."""
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
    """Return kind and impact of an anomaly between two values of one JSON type, or None."""
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
    return (old < 0) != (new < 0) or not abs(new) < abs(old) * RANGE_RATIO or not abs(old) < abs(new) * RANGE_RATIO


def _differs_in_length(old: str, new: str) -> bool:
    short, long = sorted((len(old), len(new)))
    return long >= LENGTH_RATIO * max(short, MIN_TEXT_CHARS)
