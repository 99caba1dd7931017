"""Differences between two answers' headers. Order between names means nothing, order within a name does."""

from __future__ import annotations

from functools import lru_cache

from abreast.capture import Headers
from abreast_sidecar.compare.difference import Difference, Impact, Kind
from abreast_sidecar.compare.value import shown

# Attributes of a cookie that are a moment, not a meaning.
_MOMENTS = ("expires=",)


def first(headers: Headers, name: str) -> str:
    for known, value in headers:
        if known == name:
            return value
    return ""


@lru_cache(maxsize=64)
def _split(volatile: frozenset[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    prefixes = tuple(name[:-1] for name in volatile if name.endswith("*"))
    return frozenset(name for name in volatile if not name.endswith("*")), prefixes


def header_differences(old: Headers, new: Headers, volatile: frozenset[str]) -> list[Difference]:
    if old == new:
        return []
    names, prefixes = _split(volatile)
    left, right = _grouped(old, names, prefixes), _grouped(new, names, prefixes)
    found = []
    for name in sorted(left.keys() | right.keys()):
        values, others = left.get(name), right.get(name)
        if values != others:
            found.append(_difference(name, values, others))
    return found


def _grouped(headers: Headers, volatile: frozenset[str], prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, value in headers:
        if name in volatile or name.startswith(prefixes):
            continue
        if name == "set-cookie":
            cookie, _, attributes = value.partition(";")
            # The value itself is one session's; that the cookie is set, and how, is the version's.
            grouped.setdefault(f"set-cookie[{cookie.partition('=')[0].strip()}]", []).append(
                _attributes(attributes)
            )
        else:
            grouped.setdefault(name, []).append(value.strip())
    return grouped


def _attributes(text: str) -> str:
    parts = {part.strip().lower() for part in text.split(";") if part.strip()}
    return "; ".join(sorted(part for part in parts if not part.startswith(_MOMENTS)))


def _difference(name: str, values: list[str] | None, others: list[str] | None) -> Difference:
    kind: Kind = "added" if values is None else "removed" if others is None else "changed"
    impacts: dict[Kind, Impact] = {"added": "additive", "removed": "breaking", "changed": "value"}
    return Difference(
        part="header",
        path=name,
        place=name,
        kind=kind,
        impact=impacts[kind],
        old=None if values is None else shown(values[0] if len(values) == 1 else values),
        new=None if others is None else shown(others[0] if len(others) == 1 else others),
    )
