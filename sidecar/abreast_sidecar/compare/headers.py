"""Differences between two answers' headers, by what they mean. Order between names means nothing."""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from abreast.capture import Headers, Request
from abreast_sidecar.compare.difference import Difference, Impact, Kind, RenderedValues
from abreast_sidecar.compare.meaning import (
    LIST_HEADERS,
    PER_LINE_HEADERS,
    canonical_value,
    get_scheme,
    parse_cookie,
    resolve_location,
)
from abreast_sidecar.compare.media import parse_media_type
from abreast_sidecar.compare.value import render_value

_URL_HEADERS = frozenset({"location", "content-location"})
_HTTP_SCHEMES = frozenset({"http", "https"})
# What a client does with an answer differs where one of these is there and was not before.
_BEHAVIOUR_HEADER_PREFIXES = (
    "access-control-allow-",
    "cache-control",
    "clear-site-data",
    "content-disposition",
    "content-security-policy",
    "location",
    "refresh",
    "set-cookie[",
)
_VALIDATOR_HEADERS = frozenset(
    {"etag", "last-modified"}
)  # their values belong to a build, that there is one does not
_HEADER_IMPACTS: dict[Kind, Impact] = {"added": "additive", "removed": "breaking", "changed": "value"}


def get_header(headers: Headers, name: str) -> str:
    for header, value in headers:
        if header == name:
            return value
    return ""


@lru_cache(maxsize=64)
def _split_volatile(volatile: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    prefixes = tuple(name[:-1] for name in volatile if name.endswith("*"))
    return frozenset(name for name in volatile if not name.endswith("*")), prefixes


def diff_headers(
    old: Headers, new: Headers, volatile: frozenset[str], request: Request | None = None
) -> list[Difference]:
    """`request`: what both answered, so that relative and absolute addresses can be told to be the same."""
    if old == new:
        return []
    exact_names, prefixes = _split_volatile(volatile)
    left, right = _group_by_name(old, exact_names, prefixes), _group_by_name(new, exact_names, prefixes)
    if left == right:
        return []
    differences = []
    for name in sorted(left.keys() | right.keys()):
        old_values, new_values = left.get(name), right.get(name)
        if old_values != new_values and not _is_equivalent(name, old_values, new_values, request):
            differences.append(_header_difference(name, old_values, new_values))
    return differences


def diff_validators(old: Headers, new: Headers) -> list[Difference]:
    """Whether clients can ask if what they have is still valid. Any validator will do."""
    before, after = _find_validator(old), _find_validator(new)
    if bool(before) == bool(after):
        return []
    name, value = before or after
    if before:
        return [Difference.from_text("header", name, name, "removed", "value", render_value(value), None)]
    return [Difference.from_text("header", name, name, "added", "additive", None, render_value(value))]


def _find_validator(headers: Headers) -> tuple[str, ...]:
    return next(((name, value) for name, value in headers if name in _VALIDATOR_HEADERS), ())


def diff_trailers(old: Headers, new: Headers, volatile: frozenset[str]) -> list[Difference]:
    differences = diff_headers(old, new, volatile)
    return [
        replace(
            difference,
            path=f"trailer {difference.path}",
            location=RenderedValues(f"trailer {difference.place}", difference.old, difference.new),
        )
        for difference in differences
    ]


def _group_by_name(
    headers: Headers, volatile: frozenset[str], prefixes: tuple[str, ...]
) -> dict[str, list[str]]:
    values_by_name: dict[str, list[str]] = {}
    for name, value in headers:
        if name in volatile or name.startswith(prefixes):
            continue
        if name == "set-cookie":
            cookie_name, attributes = parse_cookie(value)
            values_by_name.setdefault(f"set-cookie[{cookie_name}]", []).append(attributes)
        else:
            values_by_name.setdefault(name, []).append(value.strip())
    return values_by_name


def _is_equivalent(
    name: str, old_values: list[str] | None, new_values: list[str] | None, request: Request | None
) -> bool:
    if (
        name in _URL_HEADERS
        and {*map(get_scheme, old_values or ()), *map(get_scheme, new_values or ())} >= _HTTP_SCHEMES
    ):
        return False
    return _canonical_values(name, old_values, request) == _canonical_values(name, new_values, request)


def _canonical_values(name: str, values: list[str] | None, request: Request | None) -> list[str] | None:
    if values is None:
        return None
    if name in LIST_HEADERS:
        return [canonical_value(name, ",".join(values))]
    if name in _URL_HEADERS and request is not None and (host := get_header(request.headers, "host")):
        return [resolve_location(value, host, request.path) for value in values]
    if name in PER_LINE_HEADERS or name.startswith("set-cookie["):
        return [canonical_value(name, value) for value in values]
    return [canonical_value(name, ", ".join(values))]


def _header_difference(name: str, old_values: list[str] | None, new_values: list[str] | None) -> Difference:
    kind: Kind = "added" if old_values is None else "removed" if new_values is None else "changed"
    impact = _HEADER_IMPACTS[kind]
    if (
        name == "content-type"
        and old_values
        and new_values
        and parse_media_type(old_values[0]).essence != parse_media_type(new_values[0]).essence
    ):
        impact = "breaking"
    if kind == "added" and name.startswith(_BEHAVIOUR_HEADER_PREFIXES):
        impact = "value"
    return Difference.from_text(
        part="header",
        path=name,
        place=name,
        kind=kind,
        impact=impact,
        old=None
        if old_values is None
        else render_value(old_values[0] if len(old_values) == 1 else old_values),
        new=None
        if new_values is None
        else render_value(new_values[0] if len(new_values) == 1 else new_values),
    )
