"""Which differences need no further explanation than that such values always differ.

May explain, if both sides have one shape, format and length included:

- `uuid` of one version (never the nil one, never one given back as the other's text), `ulid`, `trace`;
- `hash`, `hex`, `token`, `base64`, `jwt`: of one length, long enough and mixed enough to be no word, name or number;
- `timestamp` with zone and fraction alike, and `unix`, `unix text`, if both are near the moment of the request, or, for
  timestamps, near each other: a delivery date that is a day off is a defect;
- `url`: the same but for parameters that sign it or limit its time;
- `text` and `url` with UUIDs and timestamps inside, where the rest is equal and each of these may explain itself.

Never: numbers of any kind (a wrong price is a number beside a number), digits, decimals, words, names, plain text, paths,
dates, times of the day, e-mail and IP addresses, ids with a prefix (`cus_…` names somebody), booleans, null, empty values,
and anything beside another shape. Counters are numbers: only the baseline says of a place that it counts.

The explanation is a presumption. A wrong product's UUID looks like a fresh one, so a place that never differs between
old's own answers is judged by `noise.decide`, which is told the number of explained differences and overrules them.
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

MAX_ANSWER_GAP_S = 10.0  # s between two answers to one request
REQUEST_TIME_TOLERANCE_S = 300.0  # s around the request, for numbers that may be a time: clocks, caches

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
    """What explains that two JSON values differ, in a word or two, or None.

    `at`: when the request came, in seconds of Unix time. Numbers are taken for a time only if they are near it.
    """
    before, after = detect_shape(old), detect_shape(new)
    if before != after:
        return _explain_signed_url(old, new) if before.kind == after.kind == "url" else None
    if before.kind in OPAQUE_KINDS:
        return before.kind if _is_fresh(old, new) else None
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


def _is_fresh(old: str, new: str) -> bool:
    """Not one value written in two ways."""
    return old.casefold() != new.casefold()


def _is_near_request(seconds: float | None, request_time: float) -> bool:
    return seconds is not None and abs(seconds - request_time) <= REQUEST_TIME_TOLERANCE_S


def _are_near(old: float | None, new: float | None, request_time: float | None) -> bool:
    if old is None or new is None:
        return False
    return abs(old - new) <= MAX_ANSWER_GAP_S or (
        request_time is not None and _is_near_request(old, request_time) and _is_near_request(new, request_time)
    )


def to_unix_time(value: Any, value_shape: Shape) -> float | None:
    """Unix time of a timestamp or a number that may be one; a time without a zone is read as UTC, on both sides alike."""
    if value_shape.kind != "timestamp":
        return int(value) / (1 if value_shape.format == "s" else 1000)
    try:
        if value_shape.format == "http":
            return parsedate_to_datetime(value).timestamp()
        timestamp = datetime.fromisoformat(value.replace(",", "."))
    except ValueError:  # the 31st of February
        return None
    return (timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)).timestamp()


def _explain_signed_url(old: str, new: str) -> str | None:
    """The same address but for what signs it; nothing that signs it may be missing, empty or of another length."""
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
        old_value == new_value or (name.lower() in SIGNATURE_PARAMETERS and _has_same_length(old_value, new_value))
        for (name, old_value), (_, new_value) in zip(old_parameters, new_parameters, strict=True)
    )
    return "signed url" if only_signature_differs and old_parameters != new_parameters else None


def _has_same_length(old: str, new: str) -> bool:
    return bool(old) and len(old) == len(new)


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


MAGNITUDE_SHIFT_RATIO = 2.0  # times as much, or more: far apart
MAX_NUMBER_CHARS = 24  # characters of a text that is a number

_NUMBER_FIRST_CHARS = frozenset("-0123456789")
_TYPE_RANKS = {type(None): 0, bool: 1, int: 2, float: 2, str: 3, list: 4, dict: 5}
_NO_VALUES = (None, None)


def is_explained_by_shape(differences: Iterable[Difference], request_time: float) -> bool:
    """Whether the shapes of all values explain them. `at`: when the request came, in seconds of Unix time."""
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and explain_change(*get_values(difference), request_time) is not None
        for difference in differences
    )


def get_direction(difference: Difference) -> int:
    """1 where new has the greater value, -1 where old has, 0 where that can't be said. Absent is the least."""
    if difference.kind in {"added", "removed"}:
        return 1 if difference.kind == "added" else -1
    if difference.kind == "order":
        return 0
    old, new = get_values(difference)
    before, after = _get_type_rank(old), _get_type_rank(new)
    if before != after:
        return 1 if after > before else -1
    if before not in {2, 3} or old == new:
        return 0
    return 1 if new > old else -1


def get_magnitude_shift(difference: Difference) -> int:
    """1 where new's number is more than twice old's, whatever their signs are, -1 where it is less than half, else 0."""
    if difference.kind != "changed":
        return 0
    old, new = map(_parse_magnitude, get_values(difference))
    if old is None or new is None:
        return 0
    return (new > MAGNITUDE_SHIFT_RATIO * old) - (old > MAGNITUDE_SHIFT_RATIO * new)


def _parse_magnitude(value: Any) -> float | None:
    """Of a number, or of the text of one, such as an amount of money."""
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
    """Both values; None and None where the texts of them were cut."""
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


def _get_type_rank(value: Any) -> int:
    return _TYPE_RANKS.get(type(value), 2)


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
    return (old < 0) != (new < 0) or not abs(new) < abs(old) * RANGE_RATIO or not abs(old) < abs(new) * RANGE_RATIO


def _differs_in_length(old: str, new: str) -> bool:
    short, long = sorted((len(old), len(new)))
    return long >= LENGTH_RATIO * max(short, MIN_TEXT_CHARS)
