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
from abreast.redact import HASH_PREFIX
from abreast_sidecar.compare.feature import MAX_VALUE_CHARS, collect_features, collect_target_features

MAX_NAMES = 100
MAX_VALUES_PER_NAME = 5  # of one name
MAX_FEATURE_BODY_BYTES = 16 * 1024  # bytes; a longer body names nothing
FORM_MEDIA_TYPE = "application/x-www-form-urlencoded"
# They name one request or connection, and so nothing that requests have in common.
REQUEST_SPECIFIC_HEADERS = frozenset(
    {"content-length", "cookie", "date", "forwarded", "idempotency-key", "traceparent", "tracestate", "via",
     "x-abreast-pair", "x-forwarded-for", "x-real-ip", "x-request-id"}
)  # fmt: skip
_SECRET_NAME = re.compile(
    r"pass(w|phrase|code|$)|pwd|secret|token|api.?key|auth(?!or)|session|credential|signature"
    r"|(?<![a-z])(pin|otp|cvv|cvc|iban|ssn)(?![a-z])|(?<![a-z])card",
    re.IGNORECASE,
)


def collect_request_features(request: Request, route: str) -> dict[str, list[str]]:
    """By name (`query.currency`, `header.accept-language`, `body.items[*].sku`) all values that may be kept."""
    target = f"{request.path}?{request.query}" if request.query else request.path
    values_by_name = collect_target_features(target, route)
    values_by_name |= collect_features(headers=_select_headers(request.headers), body=_parse_body(request))
    for name in _iterate_cookie_names(request.headers):
        values_by_name.setdefault(f"cookie.{name}", [])
    names = sorted(values_by_name, key=lambda name: (name.startswith("body."), name))[:MAX_NAMES]
    return {
        name: _select_values(name, values_by_name[name]) for name in names if len(name) <= MAX_VALUE_CHARS
    }


def _select_headers(headers: Headers) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name not in REQUEST_SPECIFIC_HEADERS]


def _select_values(name: str, values: list[str]) -> list[str]:
    if _SECRET_NAME.search(name):
        return []
    return [value for value in values if len(value) <= MAX_VALUE_CHARS and HASH_PREFIX not in value][
        :MAX_VALUES_PER_NAME
    ]


def _iterate_cookie_names(headers: Headers) -> Iterator[str]:
    for name, value in headers:
        if name == "cookie":
            yield from (part.partition("=")[0].strip() for part in value.split(";") if "=" in part)


def _parse_body(request: Request) -> object:
    """JSON, or a form as an object; None for all else."""
    body = request.body
    if not body.content or not body.is_complete or body.length > MAX_FEATURE_BODY_BYTES:
        return None
    if FORM_MEDIA_TYPE in _get_content_type(request.headers):
        return _parse_form(body.content)
    try:
        document: object = orjson.loads(body.content)
    except orjson.JSONDecodeError:
        return None
    return document


def _parse_form(content: bytes) -> dict[str, str | list[str]] | None:
    try:
        pairs = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=2 * MAX_NAMES)
    except ValueError:
        return None
    fields: dict[str, str | list[str]] = {}
    for name, value in pairs:
        fields[name] = value if name not in fields else [*_as_list(fields[name]), value]
    return fields


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _get_content_type(headers: Headers) -> str:
    return next((value.lower() for name, value in headers if name == "content-type"), "")
