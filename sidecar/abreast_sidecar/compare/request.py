"""The features of one captured request, small enough to be kept: names, and short values where those are no secrets.

A name without a value says that something was there: a cookie, a header that is kept as a hash only, a field whose name
says that it is secret, or a long text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

import orjson

from abreast.capture import Headers, Request
from abreast.redact import MARK
from abreast_sidecar.compare.feature import LONGEST, features, of_target

MOST_NAMES = 100
MOST_VALUES = 5  # of one name
MOST_BODY = 16 * 1024  # bytes; a longer body names nothing
FORM = "application/x-www-form-urlencoded"
# They name one request or connection, and so nothing that requests have in common.
PASSING = frozenset(
    {"content-length", "cookie", "date", "forwarded", "idempotency-key", "traceparent", "tracestate", "via",
     "x-abreast-pair", "x-forwarded-for", "x-real-ip", "x-request-id"}
)  # fmt: skip
_SECRET = re.compile(
    r"pass(w|phrase|code|$)|pwd|secret|token|api.?key|auth(?!or)|session|credential|signature"
    r"|(?<![a-z])(pin|otp|cvv|cvc|iban|ssn)(?![a-z])|(?<![a-z])card",
    re.IGNORECASE,
)


def of_request(request: Request, route: str) -> dict[str, list[str]]:
    """By name (`query.currency`, `header.accept-language`, `body.items[*].sku`) all values that may be kept."""
    target = f"{request.path}?{request.query}" if request.query else request.path
    found = of_target(target, route)
    found |= features(headers=_kept(request.headers), body=_body(request))
    for name in _cookies(request.headers):
        found.setdefault(f"cookie.{name}", [])
    names = sorted(found, key=lambda name: (name.startswith("body."), name))[:MOST_NAMES]
    return {name: _values(name, found[name]) for name in names if len(name) <= LONGEST}


def _kept(headers: Headers) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name not in PASSING]


def _values(name: str, values: list[str]) -> list[str]:
    if _SECRET.search(name):
        return []
    return [value for value in values if len(value) <= LONGEST and MARK not in value][:MOST_VALUES]


def _cookies(headers: Headers) -> Iterator[str]:
    for name, value in headers:
        if name == "cookie":
            yield from (part.partition("=")[0].strip() for part in value.split(";") if "=" in part)


def _body(request: Request) -> object:
    """JSON, or a form as an object; None for all else."""
    body = request.body
    if not body.held or not body.whole or body.length > MOST_BODY:
        return None
    if FORM in _content_type(request.headers):
        return _form(body.held)
    try:
        found: object = orjson.loads(body.held)
    except orjson.JSONDecodeError:
        return None
    return found


def _form(held: bytes) -> dict[str, str | list[str]] | None:
    try:
        pairs = parse_qsl(held.decode(), keep_blank_values=True, max_num_fields=2 * MOST_NAMES)
    except ValueError:
        return None
    found: dict[str, str | list[str]] = {}
    for name, value in pairs:
        found[name] = value if name not in found else [*_listed(found[name]), value]
    return found


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _content_type(headers: Headers) -> str:
    return next((value.lower() for name, value in headers if name == "content-type"), "")
