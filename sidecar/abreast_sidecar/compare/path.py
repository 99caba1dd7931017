"""Paths into documents, and endpoints for requests without a route template."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import Any

from msgspec import Raw, Struct

from abreast_sidecar.compare.value import parse_raw

# The end of a longer word is no id; a key or segment that is one as a whole is.
_ID_PATTERN = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
)
# These are ids, or moments, only where all keys of an object look so.
_ID_LIKE_PATTERN = re.compile(
    r"\d{4}-\d\d(-\d\d)?([T ]\d\d:\d\d(:\d\d)?\S{0,16})?"
    r"|[A-Za-z]{1,16}[-_:/#.]?\d+"
    r"|[A-Za-z]{1,16}[-_:/#][0-9A-Za-z]*\d[0-9A-Za-z]*"
    r"|[^@\s]{1,64}@[^@\s]{1,255}"
    r"|\d{1,3}(\.\d{1,3}){3}(:\d+)?"
)
_KEY_CACHE_SIZE = 4096  # of documents, that are remembered as they are written
_TYPES_BY_FIRST_BYTE = {
    b"{": dict,
    b"[": list,
    b'"': str,
    b"t": bool,
    b"f": bool,
    b"n": type(None),
}  # by how a text begins
MIN_ID_LIKE_KEYS, MIN_SAME_SHAPE_KEYS, MIN_SAME_TYPE_KEYS = 3, 8, 50  # entries that make a map

_PLAIN_KEY = re.compile(r"[A-Za-z_@#][\w-]*", re.ASCII)
_ROUTE_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


class JsonPath(Struct):
    """Where a walk through two documents is: a step below another place. Paths are only written when asked for."""

    parent: JsonPath | None
    step: str | int
    old: Any
    new: Any
    _generalised: str | None = None
    _is_map: bool | None = None

    def generalised(self) -> str:
        """`$.items[*].price`: one cause, one path, whatever the index or id."""
        path = self._generalised
        if path is None:
            parent, step = self.parent, self.step
            if parent is None:
                path = str(step)
            elif type(step) is int:
                path = parent.generalised() + "[*]"
            else:
                path = parent.generalised() + (".*" if parent.is_map() else _generalise_key(step))
            self._generalised = path
        return path

    def exact(self) -> str:
        """`$.items[3].price`"""
        steps = []
        node: JsonPath = self
        while node.parent is not None:
            steps.append(f"[{node.step}]" if isinstance(node.step, int) else _format_key(node.step))
            node = node.parent
        return str(node.step) + "".join(reversed(steps))

    def is_map(self) -> bool:
        """Whether the keys here are ids, so that what differs below them is one cause."""
        if self._is_map is None:
            self._is_map = is_map(self.old, self.new)
        return self._is_map


def is_map(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Ids as keys; many values of one shape; or very many plain values of one type."""
    for key in chain(old, new):
        if not _is_id_like(key):
            break
    else:
        return len(old.keys() | new.keys()) >= MIN_ID_LIKE_KEYS
    key_count = len(old) if old.keys() == new.keys() else len(old.keys() | new.keys())
    if key_count < MIN_SAME_SHAPE_KEYS:
        return False
    values = list(chain(old.values(), new.values()))
    kinds = {*map(_get_value_type, values)} - {type(None)}
    if kinds == {dict}:
        shapes = Counter(frozenset(value) for value in map(parse_raw, values) if value is not None)
        shape, count = shapes.most_common(1)[0]
        return len(shape) > 1 and count * 5 >= len(values) * 4
    return key_count >= MIN_SAME_TYPE_KEYS and (len(kinds) == 1 or kinds == {int, float})


def _get_value_type(value: Any) -> type:
    """Also of what was not parsed."""
    if type(value) is not Raw:
        return type(value)
    return _TYPES_BY_FIRST_BYTE.get(bytes(value)[:1]) or type(parse_raw(value))


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _is_id_like(key: str) -> bool:
    return bool(_ID_PATTERN.fullmatch(key) or _ID_LIKE_PATTERN.fullmatch(key))


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _generalise_key(key: str) -> str:
    return ".*" if _ID_PATTERN.fullmatch(key) else _format_key(key)


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def _format_key(key: str) -> str:
    return f".{key}" if _PLAIN_KEY.fullmatch(key) else f"[{json.dumps(key)}]"


@lru_cache(maxsize=_KEY_CACHE_SIZE)
def normalise_route(template: str, path: str) -> str:
    """The endpoint's route: the template without convertors, or else the path with its ids generalised."""
    if template:
        return _ROUTE_CONVERTOR.sub(r"{\1}", template)
    return (
        "/".join("{id}" if _ID_PATTERN.fullmatch(segment) else segment for segment in path.split("/")) or "/"
    )
