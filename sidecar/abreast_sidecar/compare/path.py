"""Paths into documents, and endpoints for requests without a route template."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import Any

from msgspec import Raw, Struct

from abreast_sidecar.compare.value import whole

# The end of a longer word is no id; a key or segment that is one as a whole is.
_ID = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
)
# These are ids, or moments, only where all keys of an object look so.
_LIKE_ID = re.compile(
    r"\d{4}-\d\d(-\d\d)?([T ]\d\d:\d\d(:\d\d)?\S{0,16})?"
    r"|[A-Za-z]{1,16}[-_:/#.]?\d+"
    r"|[A-Za-z]{1,16}[-_:/#][0-9A-Za-z]*\d[0-9A-Za-z]*"
    r"|[^@\s]{1,64}@[^@\s]{1,255}"
    r"|\d{1,3}(\.\d{1,3}){3}(:\d+)?"
)
_KEYS = 4096  # of documents, that are remembered as they are written
_TYPES = {b"{": dict, b"[": list, b'"': str, b"t": bool, b"f": bool, b"n": type(None)}  # by how a text begins
LIKE_IDS, SAME_SHAPES, SAME_TYPES = 3, 8, 50  # entries that make a map

_PLAIN = re.compile(r"[A-Za-z_@#][\w-]*", re.ASCII)
_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


class Place(Struct):
    """Where a walk through two documents is: a step below another place. Paths are only written when asked for."""

    above: Place | None
    step: str | int
    old: Any
    new: Any
    _general: str | None = None
    _map: bool | None = None

    def general(self) -> str:
        """`$.items[*].price`: one cause, one path, whatever the index or id."""
        path = self._general
        if path is None:
            above, step = self.above, self.step
            if above is None:
                path = str(step)
            elif type(step) is int:
                path = above.general() + "[*]"
            else:
                path = above.general() + (".*" if above.is_map() else _general_key(step))
            self._general = path
        return path

    def exact(self) -> str:
        """`$.items[3].price`"""
        steps = []
        place: Place = self
        while place.above is not None:
            steps.append(f"[{place.step}]" if isinstance(place.step, int) else _key(place.step))
            place = place.above
        return str(place.step) + "".join(reversed(steps))

    def is_map(self) -> bool:
        """Whether the keys here are ids, so that what differs below them is one cause."""
        if self._map is None:
            self._map = is_map(self.old, self.new)
        return self._map


def is_map(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Ids as keys; many values of one shape; or very many plain values of one type."""
    for key in chain(old, new):
        if not _like_id(key):
            break
    else:
        return len(old.keys() | new.keys()) >= LIKE_IDS
    many = len(old) if old.keys() == new.keys() else len(old.keys() | new.keys())
    if many < SAME_SHAPES:
        return False
    values = list(chain(old.values(), new.values()))
    kinds = {*map(_type, values)} - {type(None)}
    if kinds == {dict}:
        shapes = Counter(frozenset(value) for value in map(whole, values) if value is not None)
        shape, times = shapes.most_common(1)[0]
        return len(shape) > 1 and times * 5 >= len(values) * 4
    return many >= SAME_TYPES and (len(kinds) == 1 or kinds == {int, float})


def _type(value: Any) -> type:
    """Also of what was not parsed."""
    if type(value) is not Raw:
        return type(value)
    return _TYPES.get(bytes(value)[:1]) or type(whole(value))


@lru_cache(maxsize=_KEYS)
def _like_id(key: str) -> bool:
    return bool(_ID.fullmatch(key) or _LIKE_ID.fullmatch(key))


@lru_cache(maxsize=_KEYS)
def _general_key(key: str) -> str:
    return ".*" if _ID.fullmatch(key) else _key(key)


@lru_cache(maxsize=_KEYS)
def _key(key: str) -> str:
    return f".{key}" if _PLAIN.fullmatch(key) else f"[{json.dumps(key)}]"


@lru_cache(maxsize=_KEYS)
def route_of(template: str, path: str) -> str:
    """The endpoint's route: the template without convertors, or else the path with its ids generalised."""
    if template:
        return _CONVERTOR.sub(r"{\1}", template)
    return "/".join("{id}" if _ID.fullmatch(segment) else segment for segment in path.split("/")) or "/"
