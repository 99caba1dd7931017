"""Differences between two JSON values, in time linear in their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from abreast_sidecar.compare.array import Matching, in_order, match
from abreast_sidecar.compare.difference import Difference, Impact, Kind
from abreast_sidecar.compare.path import Place
from abreast_sidecar.compare.value import RepeatedKey, canonical, same, type_name

MAX_DEPTH = 200  # levels; below them values are only compared as a whole
MAX_EAGER = 8  # levels on which equal values are told by their texts; below them by walking through them
MAX_ARRAYS = 8  # arrays in arrays whose elements are looked for elsewhere; below them only in order
MAX_WORK = 600_000  # values that are looked at; beyond it objects and arrays are compared as a whole
PER_PATH = 20  # differences of one path and kind; further ones must not crowd out others

# Where JSON says beside what there is that something failed: GraphQL, JSON:API, and many an API's own.
FAILURES = frozenset({"$.error", "$.errors", "$.errors[*]"})
_ELEMENTS = (
    "[*]",
    ".*",
)  # how the paths of elements end, of lists and maps; what is more there is no new field

_ABSENT: Any = object()
_IMPACTS: dict[Kind, Impact] = {
    "removed": "breaking",
    "changed": "value",
    "type": "breaking",
    "order": "value",
}


class DocumentDiff:
    """Collects at most `limit` differences.

    `keyed` tells the field that identifies the elements of the array at a generalised path, or nothing. Objects and
    arrays that would take more than `max_work` steps are compared as a whole.
    """

    __slots__ = (
        "_arrays",
        "_depth",
        "_times",
        "coarse",
        "found",
        "keyed",
        "limit",
        "max_work",
        "root",
        "work",
    )

    def __init__(
        self,
        limit: int,
        *,
        root: str = "$",
        keyed: Callable[[str], str] | None = None,
        max_work: int = MAX_WORK,
    ) -> None:
        self.limit = limit
        self.max_work = max_work
        self.root = root
        self.keyed = keyed
        self.begin()

    def begin(self) -> None:
        self.coarse = False  # whether anything was compared as a whole for the work that it would have been
        self.found: list[Difference] = []
        self.work = 0  # values looked at
        self._times: dict[tuple[str, Kind], int] = {}
        self._depth = self._arrays = 0

    def compare(self, old: Any, new: Any) -> list[Difference]:
        self._value(Place(None, self.root, old, new))
        return self.found

    def compare_in_order(self, old: list[Any], new: list[Any]) -> list[Difference]:
        """Elements by their places: where lists go on beyond these, nothing can be looked for elsewhere."""
        self._elements(Place(None, self.root, old, new), in_order(old, new))
        return self.found

    def _value(self, place: Place) -> None:
        old, new = place.old, place.new
        kind = type(old)
        self.work += 1
        if kind is not type(new):
            self._report("changed" if type_name(old) == type_name(new) else "type", place)
        elif kind is not dict and kind is not list:
            if old != new:
                self._report("changed", place)
        elif self.work + len(old) + len(new) > self.max_work:
            self.coarse = self._as_a_whole(place) or self.coarse
        elif self._depth >= MAX_DEPTH:
            self._as_a_whole(place)
        else:
            self._depth += 1
            if kind is dict:
                self._object(place, old, new)
            else:
                self._array(place, old, new)
            self._depth -= 1

    def _as_a_whole(self, place: Place) -> bool:
        """Whether they differ."""
        differ = canonical(place.old) != canonical(place.new)
        if differ:
            self._report("changed", place)
        return differ

    def _object(self, place: Place, old: dict[str, Any], new: dict[str, Any]) -> None:
        self.work += len(old) + len(new)
        gone = 0
        for key, value in old.items():
            other = new.get(key, _ABSENT)
            kind = type(value)
            if kind is type(other):
                if kind is not dict and kind is not list:
                    if value != other:
                        self._report("changed", Place(place, key, value, other))
                elif not (self._depth <= MAX_EAGER and same(value, other)):
                    self._value(Place(place, key, value, other))
            elif other is _ABSENT:
                gone += 1
                self._report("removed", Place(place, key, value, None))
            else:
                self._value(Place(place, key, value, other))
        if len(new) > len(old) - gone:
            self._added(place, old, new)

    def _added(self, place: Place, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if key not in old:
                self._report("added", Place(place, key, None, value))

    def _array(self, place: Place, old: list[Any], new: list[Any]) -> None:
        self.work += len(old) + len(new)
        if self._arrays >= MAX_ARRAYS:
            found = in_order(old, new)
        else:
            by = self.keyed(place.general()) if self.keyed is not None else ""
            found = match(old, new, by=by)
        self._elements(place, found)

    def _elements(self, place: Place, found: Matching) -> None:
        old, new = place.old, place.new
        if found.moved:
            self._report("order", place, hint=f"keyed-by {found.by}" if found.by else "unordered")
        self._arrays += 1
        for index, other in found.pairs:
            if len(self.found) >= self.limit:
                break
            self._value(Place(place, index, old[index], new[other]))
        self._arrays -= 1
        for index in found.removed:
            self._report("removed", Place(place, index, old[index], None))
        for index in found.added:
            self._report("added", Place(place, index, None, new[index]))

    def _report(self, kind: Kind, place: Place, *, hint: str = "") -> None:
        path = place.general()
        key = path, kind
        times = self._times.get(key, 0)
        if times >= PER_PATH or len(self.found) >= self.limit:
            return
        self._times[key] = times + 1
        impact = self._impact_added(path, place) if kind == "added" else _IMPACTS[kind]
        self.found.append(Difference("body", path, kind, impact, place, "", hint))

    def _impact_added(self, path: str, place: Place) -> Impact:
        """A field more is an addition. A row more is another answer, and a page has no fields."""
        if type(place.step) is RepeatedKey or (path in FAILURES and place.new):
            return "breaking"
        return "value" if path.endswith(_ELEMENTS) or self.root == "html" else "additive"
