"""Differences between two JSON values, in time linear in their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from abreast_sidecar.compare.array import ArrayMatch, match_by_index, match_elements
from abreast_sidecar.compare.difference import Difference, Impact, Kind
from abreast_sidecar.compare.path import JsonPath
from abreast_sidecar.compare.value import RepeatedKey, encode_canonical, is_json_equal, type_name

MAX_JSON_DEPTH = 200  # levels; below them values are only compared as a whole
MAX_EAGER_DEPTH = (
    8  # levels on which equal values are told by their texts; below them by walking through them
)
MAX_MATCHED_ARRAY_DEPTH = (
    8  # arrays in arrays whose elements are looked for elsewhere; below them only in order
)
MAX_DIFF_STEPS = 600_000  # values that are looked at; beyond it objects and arrays are compared as a whole
MAX_DIFFERENCES_PER_PATH = 20  # differences of one path and kind; further ones must not crowd out others

# Where JSON says beside what there is that something failed: GraphQL, JSON:API, and many an API's own.
FAILURE_PATHS = frozenset({"$.error", "$.errors", "$.errors[*]"})
_ELEMENT_SUFFIXES = (
    "[*]",
    ".*",
)  # how the paths of elements end, of lists and maps; what is more there is no new field

_ABSENT: Any = object()
_JSON_IMPACTS: dict[Kind, Impact] = {
    "removed": "breaking",
    "changed": "value",
    "type": "breaking",
    "order": "value",
}


class JsonDiff:
    """Collects at most `limit` differences.

    `keyed` tells the field that identifies the elements of the array at a generalised path, or nothing. Objects and
    arrays that would take more than `max_work` steps are compared as a whole.
    """

    __slots__ = (
        "_array_depth",
        "_depth",
        "_report_counts",
        "budget_exceeded",
        "differences",
        "identity_lookup",
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
        identity_lookup: Callable[[str], str] | None = None,
        max_work: int = MAX_DIFF_STEPS,
    ) -> None:
        self.limit = limit
        self.max_work = max_work
        self.root = root
        self.identity_lookup = identity_lookup
        self.reset()

    def reset(self) -> None:
        self.budget_exceeded = (
            False  # whether anything was compared as a whole for the work that it would have been
        )
        self.differences: list[Difference] = []
        self.work = 0  # values looked at
        self._report_counts: dict[tuple[str, Kind], int] = {}
        self._depth = self._array_depth = 0

    def compare(self, old: Any, new: Any) -> list[Difference]:
        self._diff_value(JsonPath(None, self.root, old, new))
        return self.differences

    def compare_by_index(self, old: list[Any], new: list[Any]) -> list[Difference]:
        """Elements by their places: where lists go on beyond these, nothing can be looked for elsewhere."""
        self._diff_elements(JsonPath(None, self.root, old, new), match_by_index(old, new))
        return self.differences

    def _diff_value(self, location: JsonPath) -> None:
        old, new = location.old, location.new
        kind = type(old)
        self.work += 1
        if kind is not type(new):
            self._report("changed" if type_name(old) == type_name(new) else "type", location)
        elif kind is not dict and kind is not list:
            if old != new:
                self._report("changed", location)
        elif self.work + len(old) + len(new) > self.max_work:
            self.budget_exceeded = self._diff_whole(location) or self.budget_exceeded
        elif self._depth >= MAX_JSON_DEPTH:
            self._diff_whole(location)
        else:
            self._depth += 1
            if kind is dict:
                self._diff_object(location, old, new)
            else:
                self._diff_array(location, old, new)
            self._depth -= 1

    def _diff_whole(self, location: JsonPath) -> bool:
        """Whether they differ."""
        is_different = encode_canonical(location.old) != encode_canonical(location.new)
        if is_different:
            self._report("changed", location)
        return is_different

    def _diff_object(self, location: JsonPath, old: dict[str, Any], new: dict[str, Any]) -> None:
        self.work += len(old) + len(new)
        removed_count = 0
        for key, value in old.items():
            other = new.get(key, _ABSENT)
            kind = type(value)
            if kind is type(other):
                if kind is not dict and kind is not list:
                    if value != other:
                        self._report("changed", JsonPath(location, key, value, other))
                elif not (self._depth <= MAX_EAGER_DEPTH and is_json_equal(value, other)):
                    self._diff_value(JsonPath(location, key, value, other))
            elif other is _ABSENT:
                removed_count += 1
                self._report("removed", JsonPath(location, key, value, None))
            else:
                self._diff_value(JsonPath(location, key, value, other))
        if len(new) > len(old) - removed_count:
            self._report_added(location, old, new)

    def _report_added(self, location: JsonPath, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if key not in old:
                self._report("added", JsonPath(location, key, None, value))

    def _diff_array(self, location: JsonPath, old: list[Any], new: list[Any]) -> None:
        self.work += len(old) + len(new)
        if self._array_depth >= MAX_MATCHED_ARRAY_DEPTH:
            matching = match_by_index(old, new)
        else:
            identity_field = (
                self.identity_lookup(location.generalised()) if self.identity_lookup is not None else ""
            )
            matching = match_elements(old, new, identity_field=identity_field)
        self._diff_elements(location, matching)

    def _diff_elements(self, location: JsonPath, matching: ArrayMatch) -> None:
        old, new = location.old, location.new
        if matching.is_reordered:
            self._report(
                "order",
                location,
                hint=f"keyed-by {matching.identity_field}" if matching.identity_field else "unordered",
            )
        self._array_depth += 1
        for index, new_index in matching.pairs:
            if len(self.differences) >= self.limit:
                break
            self._diff_value(JsonPath(location, index, old[index], new[new_index]))
        self._array_depth -= 1
        for index in matching.removed:
            self._report("removed", JsonPath(location, index, old[index], None))
        for index in matching.added:
            self._report("added", JsonPath(location, index, None, new[index]))

    def _report(self, kind: Kind, location: JsonPath, *, hint: str = "") -> None:
        path = location.generalised()
        key = path, kind
        count = self._report_counts.get(key, 0)
        if count >= MAX_DIFFERENCES_PER_PATH or len(self.differences) >= self.limit:
            return
        self._report_counts[key] = count + 1
        impact = self._added_impact(path, location) if kind == "added" else _JSON_IMPACTS[kind]
        self.differences.append(Difference("body", path, kind, impact, location, "", hint))

    def _added_impact(self, path: str, location: JsonPath) -> Impact:
        """A field more is an addition. A row more is another answer, and a page has no fields."""
        if type(location.step) is RepeatedKey or (path in FAILURE_PATHS and location.new):
            return "breaking"
        return "value" if path.endswith(_ELEMENT_SUFFIXES) or self.root == "html" else "additive"
