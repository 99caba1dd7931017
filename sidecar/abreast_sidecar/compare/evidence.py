"""What one pair's differences of one finding say, beyond that they are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from abreast_sidecar.compare.difference import Difference
from abreast_sidecar.compare.explain import explain_change
from abreast_sidecar.compare.path import JsonPath
from abreast_sidecar.compare.value import LongNumber

MAGNITUDE_SHIFT_RATIO = 2.0  # times as much, or more: far apart
MAX_NUMBER_CHARS = 24  # characters of a text that is a number

_NUMBER_FIRST_CHARS = frozenset("-0123456789")
_TYPE_RANKS = {type(None): 0, bool: 1, int: 2, float: 2, str: 3, list: 4, dict: 5}
_NO_VALUES = (None, None)


def is_explained_by_shape(differences: Iterable[Difference], request_time: float) -> bool:
    """Whether the shapes of all values explain them. `at`: when the request came, in seconds of Unix time."""
    return all(
        difference.kind == "changed"
        and difference.part != "status"
        and explain_change(*get_values(difference), request_time) is not None
        for difference in differences
    )


def get_direction(difference: Difference) -> int:
    """1 where new has the greater value, -1 where old has, 0 where that can't be said. Absent is the least."""
    if difference.kind in {"added", "removed"}:
        return 1 if difference.kind == "added" else -1
    if difference.kind == "order":
        return 0
    old, new = get_values(difference)
    before, after = _get_type_rank(old), _get_type_rank(new)
    if before != after:
        return 1 if after > before else -1
    if before not in {2, 3} or old == new:
        return 0
    return 1 if new > old else -1


def get_magnitude_shift(difference: Difference) -> int:
    """1 where new's number is more than twice old's, whatever their signs are, -1 where it is less than half, else 0."""
    if difference.kind != "changed":
        return 0
    old, new = map(_parse_magnitude, get_values(difference))
    if old is None or new is None:
        return 0
    return (new > MAGNITUDE_SHIFT_RATIO * old) - (old > MAGNITUDE_SHIFT_RATIO * new)


def _parse_magnitude(value: Any) -> float | None:
    """Of a number, or of the text of one, such as an amount of money."""
    kind = type(value)
    if kind is str and (len(value) > MAX_NUMBER_CHARS or value[:1] not in _NUMBER_FIRST_CHARS):
        return None
    if kind not in {int, float, str}:
        return None
    try:
        return abs(float(value))
    except (ValueError, OverflowError):
        return None


def get_values(difference: Difference) -> tuple[Any, Any]:
    """Both values; None and None where the texts of them were cut."""
    location = difference.location
    if type(location) is JsonPath:
        return _to_plain_number(location.old), _to_plain_number(location.new)
    try:
        old, new = (orjson.loads(text or "null") for text in (difference.old, difference.new))
    except orjson.JSONDecodeError:
        return _NO_VALUES
    return old, new


def _to_plain_number(value: Any) -> Any:
    return float(value.digits()) if type(value) is LongNumber else value


def _get_type_rank(value: Any) -> int:
    return _TYPE_RANKS.get(type(value), 2)
