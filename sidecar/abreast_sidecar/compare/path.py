"""Paths into JSON documents, and endpoints for requests without a route template."""

from __future__ import annotations

import json
import re
from functools import lru_cache

Trail = list[str | int]  # keys and indices from the root

# The end of a longer word is no id; a key or segment that is one as a whole is.
_ID = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?=[^\d]*\d)[0-9a-fA-F]{16,}"
    r"|(?=[^\d]*\d)[0-9A-Za-z_-]{24,}"
)
_KEYS = 4096  # of documents, that are remembered as they are written

_PLAIN = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_CONVERTOR = re.compile(r"\{(\w+):\w+\}")


def exact(trail: Trail) -> str:
    """`$.items[3].price`"""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else _key(step) for step in trail)


def general(trail: Trail) -> str:
    """`$.items[*].price`: one cause, one path, whatever the index or id."""
    return "$" + "".join("[*]" if isinstance(step, int) else _general_key(step) for step in trail)


@lru_cache(maxsize=_KEYS)
def _general_key(key: str) -> str:
    return ".*" if _ID.fullmatch(key) else _key(key)


def _key(key: str) -> str:
    return f".{key}" if _PLAIN.fullmatch(key) else f"[{json.dumps(key)}]"


@lru_cache(maxsize=_KEYS)
def route_of(template: str, path: str) -> str:
    """The endpoint's route: the template without convertors, or else the path with its ids generalised."""
    if template:
        return _CONVERTOR.sub(r"{\1}", template)
    return "/".join("{id}" if _ID.fullmatch(segment) else segment for segment in path.split("/")) or "/"
