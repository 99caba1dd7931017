"""What one pair's differences of one finding say, beyond that they are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from abreast_sidecar.compare.difference import Difference
from abreast_sidecar.compare.explain import explains
from abreast_sidecar.compare.path import Place
from abreast_sidecar.compare.value import LongNumber

TWICE = 2.0  # times as much, or more: far apart
LONGEST = 24  # characters of a text that is a number

_BEGINNINGS = frozenset("-0123456789")
_RANKS = {type(None): 0, bool: 1, int: 2, float: 2, str: 3, list: 4, dict: 5}
_NOTHING = (None, None)


def explained(differences: Iterable[Difference], at: float) -> bool:
    """Whether the shapes of all values explain them. `at`: when the request came, in seconds of Unix time."""
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and explains(*values(difference), at) is not None
        for difference in differences
    )


def lean(difference: Difference) -> int:
    """1 where new has the greater value, -1 where old has, 0 where that can't be said. Absent is the least."""
    if difference.kind in {"added", "removed"}:
        return 1 if difference.kind == "added" else -1
    if difference.kind == "order":
        return 0
    old, new = values(difference)
    before, after = _rank(old), _rank(new)
    if before != after:
        return 1 if after > before else -1
    if before not in {2, 3} or old == new:
        return 0
    return 1 if new > old else -1


def far(difference: Difference) -> int:
    """1 where new's number is more than twice old's, whatever their signs are, -1 where it is less than half, else 0."""
    if difference.kind != "changed":
        return 0
    old, new = map(_magnitude, values(difference))
    if old is None or new is None:
        return 0
    return (new > TWICE * old) - (old > TWICE * new)


def _magnitude(value: Any) -> float | None:
    """Of a number, or of the text of one, such as an amount of money."""
    kind = type(value)
    if kind is str and (len(value) > LONGEST or value[:1] not in _BEGINNINGS):
        return None
    if kind not in {int, float, str}:
        return None
    try:
        return abs(float(value))
    except (ValueError, OverflowError):
        return None


def values(difference: Difference) -> tuple[Any, Any]:
    """Both values; None and None where the texts of them were cut."""
    at = difference.at
    if type(at) is Place:
        return _plain(at.old), _plain(at.new)
    try:
        old, new = (orjson.loads(text or "null") for text in (difference.old, difference.new))
    except orjson.JSONDecodeError:
        return _NOTHING
    return old, new


def _plain(value: Any) -> Any:
    return float(value.shown()) if type(value) is LongNumber else value


def _rank(value: Any) -> int:
    return _RANKS.get(type(value), 2)
