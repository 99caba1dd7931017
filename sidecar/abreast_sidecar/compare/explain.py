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
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl

from abreast_sidecar.compare.shape import Shape, detect_shape

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
        return (
            "timestamp"
            if _are_near(to_unix_time(old, before), to_unix_time(new, after), request_time)
            else None
        )
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
        request_time is not None
        and _is_near_request(old, request_time)
        and _is_near_request(new, request_time)
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
        old_value == new_value
        or (name.lower() in SIGNATURE_PARAMETERS and _has_same_length(old_value, new_value))
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
