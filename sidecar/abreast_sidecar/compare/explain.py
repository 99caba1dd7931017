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

from abreast_sidecar.compare.shape import Shape, shape

NEAR = 10.0  # s between two answers to one request
MOMENT = 300.0  # s around the request, for numbers that may be a time: clocks, caches

OPAQUE = frozenset({"uuid", "ulid", "trace", "hash", "hex", "token", "base64", "jwt"})
SIGNING = frozenset(
    {
        "awsaccesskeyid", "expires", "expiry", "exp", "hmac", "key-pair-id", "policy", "se", "sig", "sign",
        "signature", "st", "token", "ts", "hdnea", "hdnts", "__token__", "x-amz-credential", "x-amz-date",
        "x-amz-security-token", "x-amz-signature", "x-goog-credential", "x-goog-date", "x-goog-signature",
    }
)  # fmt: skip
_INSIDE = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?",
    re.ASCII,
)


def explains(old: Any, new: Any, at: float | None = None) -> str | None:
    """What explains that two JSON values differ, in a word or two, or None.

    `at`: when the request came, in seconds of Unix time. Numbers are taken for a time only if they are near it.
    """
    before, after = shape(old), shape(new)
    if before != after:
        return _signed(old, new) if before.kind == after.kind == "url" else None
    if before.kind in OPAQUE:
        return before.kind if _fresh(old, new) else None
    if before.kind == "timestamp":
        return "timestamp" if _near(moment(old, before), moment(new, after), at) else None
    if before.kind in {"unix", "unix text"}:
        return (
            "unix time"
            if at is not None and _now(moment(old, before), at) and _now(moment(new, after), at)
            else None
        )
    if before.kind == "url":
        return _signed(old, new) or _inside(old, new, at)
    return _inside(old, new, at) if before.kind == "text" else None


def _fresh(old: str, new: str) -> bool:
    """Not one value written in two ways."""
    return old.casefold() != new.casefold()


def _now(seconds: float | None, at: float) -> bool:
    return seconds is not None and abs(seconds - at) <= MOMENT


def _near(old: float | None, new: float | None, at: float | None) -> bool:
    if old is None or new is None:
        return False
    return abs(old - new) <= NEAR or (at is not None and _now(old, at) and _now(new, at))


def moment(value: Any, found: Shape) -> float | None:
    """Unix time of a timestamp or a number that may be one; a time without a zone is read as UTC, on both sides alike."""
    if found.kind != "timestamp":
        return int(value) / (1 if found.format == "s" else 1000)
    try:
        if found.format == "http":
            return parsedate_to_datetime(value).timestamp()
        found_at = datetime.fromisoformat(value.replace(",", "."))
    except ValueError:  # the 31st of February
        return None
    return (found_at if found_at.tzinfo else found_at.replace(tzinfo=UTC)).timestamp()


def _signed(old: str, new: str) -> str | None:
    """The same address but for what signs it; nothing that signs it may be missing, empty or of another length."""
    before, after = old.partition("?"), new.partition("?")
    if before[0] != after[0] or not before[2] or not after[2]:
        return None
    ours, theirs = parse_qsl(before[2], keep_blank_values=True), parse_qsl(after[2], keep_blank_values=True)
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return None
    alike = all(
        one == other or (name.lower() in SIGNING and _varies(one, other))
        for (name, one), (_, other) in zip(ours, theirs, strict=True)
    )
    return "signed url" if alike and ours != theirs else None


def _varies(old: str, new: str) -> bool:
    return bool(old) and len(old) == len(new)


def _inside(old: str, new: str, at: float | None) -> str | None:
    if _INSIDE.sub("\0", old) != _INSIDE.sub("\0", new):
        return None
    pairs = [
        pair for pair in zip(_INSIDE.findall(old), _INSIDE.findall(new), strict=True) if pair[0] != pair[1]
    ]
    reasons = [explains(one, other, at) for one, other in pairs]
    found = [reason for reason in reasons if reason is not None]
    return f"{found[0]} inside" if found and len(found) == len(reasons) else None
