"""Differences between two answers' headers, by what they mean. Order between names means nothing."""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from abreast.capture import Headers, Request
from abreast_sidecar.compare.difference import Difference, Impact, Kind, Told
from abreast_sidecar.compare.meaning import APART, LISTS, cookie, location, meaning, scheme
from abreast_sidecar.compare.media import media
from abreast_sidecar.compare.value import shown

_ADDRESSES = frozenset({"location", "content-location"})
_SCHEMES = frozenset({"http", "https"})
# What a client does with an answer differs where one of these is there and was not before.
_TELLING = (
    "access-control-allow-",
    "cache-control",
    "clear-site-data",
    "content-disposition",
    "content-security-policy",
    "location",
    "refresh",
    "set-cookie[",
)
_VALIDATORS = frozenset(
    {"etag", "last-modified"}
)  # their values belong to a build, that there is one does not
_IMPACTS: dict[Kind, Impact] = {"added": "additive", "removed": "breaking", "changed": "value"}


def first(headers: Headers, name: str) -> str:
    for known, value in headers:
        if known == name:
            return value
    return ""


@lru_cache(maxsize=64)
def _split(volatile: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    prefixes = tuple(name[:-1] for name in volatile if name.endswith("*"))
    return frozenset(name for name in volatile if not name.endswith("*")), prefixes


def header_differences(
    old: Headers, new: Headers, volatile: frozenset[str], request: Request | None = None
) -> list[Difference]:
    """`request`: what both answered, so that relative and absolute addresses can be told to be the same."""
    if old == new:
        return []
    names, prefixes = _split(volatile)
    left, right = _grouped(old, names, prefixes), _grouped(new, names, prefixes)
    if left == right:
        return []
    found = []
    for name in sorted(left.keys() | right.keys()):
        values, others = left.get(name), right.get(name)
        if values != others and not _same(name, values, others, request):
            found.append(_difference(name, values, others))
    return found


def validator_differences(old: Headers, new: Headers) -> list[Difference]:
    """Whether clients can ask if what they have is still valid. Any validator will do."""
    before, after = _validator(old), _validator(new)
    if bool(before) == bool(after):
        return []
    name, value = before or after
    if before:
        return [Difference.told("header", name, name, "removed", "value", shown(value), None)]
    return [Difference.told("header", name, name, "added", "additive", None, shown(value))]


def _validator(headers: Headers) -> tuple[str, ...]:
    return next(((name, value) for name, value in headers if name in _VALIDATORS), ())


def trailer_differences(old: Headers, new: Headers, volatile: frozenset[str]) -> list[Difference]:
    found = header_differences(old, new, volatile)
    return [
        replace(one, path=f"trailer {one.path}", at=Told(f"trailer {one.place}", one.old, one.new))
        for one in found
    ]


def _grouped(headers: Headers, volatile: frozenset[str], prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, value in headers:
        if name in volatile or name.startswith(prefixes):
            continue
        if name == "set-cookie":
            known, attributes = cookie(value)
            grouped.setdefault(f"set-cookie[{known}]", []).append(attributes)
        else:
            grouped.setdefault(name, []).append(value.strip())
    return grouped


def _same(name: str, values: list[str] | None, others: list[str] | None, request: Request | None) -> bool:
    if name in _ADDRESSES and {*map(scheme, values or ()), *map(scheme, others or ())} >= _SCHEMES:
        return False
    return _meant(name, values, request) == _meant(name, others, request)


def _meant(name: str, values: list[str] | None, request: Request | None) -> list[str] | None:
    if values is None:
        return None
    if name in LISTS:
        return [meaning(name, ",".join(values))]
    if name in _ADDRESSES and request is not None and (host := first(request.headers, "host")):
        return [location(value, host, request.path) for value in values]
    if name in APART or name.startswith("set-cookie["):
        return [meaning(name, value) for value in values]
    return [meaning(name, ", ".join(values))]


def _difference(name: str, values: list[str] | None, others: list[str] | None) -> Difference:
    kind: Kind = "added" if values is None else "removed" if others is None else "changed"
    impact = _IMPACTS[kind]
    if name == "content-type" and values and others and media(values[0]).essence != media(others[0]).essence:
        impact = "breaking"
    if kind == "added" and name.startswith(_TELLING):
        impact = "value"
    return Difference.told(
        part="header",
        path=name,
        place=name,
        kind=kind,
        impact=impact,
        old=None if values is None else shown(values[0] if len(values) == 1 else values),
        new=None if others is None else shown(others[0] if len(others) == 1 else others),
    )
