"""Differences between two JSON values, in time linear in their size.

Lists are compared as multisets of canonical texts first: equal elements pair up wherever they stand, so that one
element inserted at the front is one difference and not as many as the list is long. What is left pairs up in order.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from abreast_sidecar.compare.difference import Difference, Impact, Kind
from abreast_sidecar.compare.path import Trail, exact, general
from abreast_sidecar.compare.value import canonical, shown, type_name

MAX_DEPTH = 200  # levels; below them values are only compared as a whole

_SCALARS = (str, int, float, bool, type(None))
_IMPACTS: dict[Kind, Impact] = {
    "added": "additive",
    "removed": "breaking",
    "changed": "value",
    "type": "breaking",
    "order": "value",
}


class DocumentDiff:
    """Collects at most `limit` differences."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.found: list[Difference] = []
        self.trail: Trail = []

    def compare(self, old: Any, new: Any) -> list[Difference]:
        self._value(old, new)
        return self.found

    def _value(self, old: Any, new: Any) -> None:
        if len(self.found) >= self.limit:
            return
        if type(old) is dict and type(new) is dict and len(self.trail) < MAX_DEPTH:
            self._object(old, new)
        elif type(old) is list and type(new) is list and len(self.trail) < MAX_DEPTH:
            self._array(old, new)
        elif type_name(old) != type_name(new):
            self._report("type", old, new)
        elif type(old) is not type(new) or (old != new and canonical(old) != canonical(new)):
            self._report("changed", old, new)

    def _object(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        trail = self.trail
        for key, value in old.items():
            if key in new:
                other = new[key]
                if type(value) is type(other) and isinstance(value, _SCALARS) and value == other:
                    continue
                trail.append(key)
                self._value(value, other)
            else:
                trail.append(key)
                self._report("removed", value, None)
            trail.pop()
        for key in new.keys() - old.keys() if new.keys() != old.keys() else ():
            self._at(key, "added", None, new[key])

    def _array(self, old: list[Any], new: list[Any]) -> None:
        texts, others = [canonical(item) for item in old], [canonical(item) for item in new]
        if texts == others:
            return
        if len(texts) == len(others) and (places := _in_place(texts, others)):
            self._pairs(old, new, places, places)
            return
        common = Counter(texts) & Counter(others)
        kept, left = _split(texts, common)
        kept_new, left_new = _split(others, common)
        if kept != kept_new:
            self._report("order", old, new)
        self._pairs(old, new, left, left_new)
        for index in left[len(left_new) :]:
            self._at(index, "removed", old[index], None)
        for index in left_new[len(left) :]:
            self._at(index, "added", None, new[index])

    def _pairs(self, old: list[Any], new: list[Any], left: list[int], right: list[int]) -> None:
        for index, other in zip(left, right, strict=False):
            self.trail.append(index)
            self._value(old[index], new[other])
            self.trail.pop()

    def _at(self, step: str | int, kind: Kind, old: Any, new: Any) -> None:
        self.trail.append(step)
        self._report(kind, old, new)
        self.trail.pop()

    def _report(self, kind: Kind, old: Any, new: Any) -> None:
        if len(self.found) >= self.limit:
            return
        self.found.append(
            Difference(
                part="body",
                path=general(self.trail),
                place=exact(self.trail),
                kind=kind,
                impact=_IMPACTS[kind],
                old=None if kind == "added" else shown(old),
                new=None if kind == "removed" else shown(new),
            )
        )


def _in_place(texts: list[bytes], others: list[bytes]) -> list[int]:
    """The indices that differ, if no element merely moved; else none."""
    places = [index for index, (text, other) in enumerate(zip(texts, others, strict=True)) if text != other]
    moved = {texts[index] for index in places} & {others[index] for index in places}
    return [] if moved else places


def _split(texts: list[bytes], common: Counter[bytes]) -> tuple[list[bytes], list[int]]:
    """The texts that have a partner on the other side, and the indices of those that have none."""
    free = common.copy()
    kept, left = [], []
    for index, text in enumerate(texts):
        if free[text] > 0:
            free[text] -= 1
            kept.append(text)
        else:
            left.append(index)
    return kept, left
