"""Differences between two JSON values, in time linear in their size.

Arrays: equal elements pair up at any index, so that an insertion at the front is one difference. The remaining elements
pair up by a field that identifies an element, such as `id`, or else in order. The identities 1 and "1" are the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress, islice, pairwise
from operator import eq
from typing import Any

from msgspec import DecodeError, Raw, Struct, field
from msgspec.json import Decoder

from abreast_sidecar.compare.model import ELEMENT_SUFFIXES, Difference, Impact, JsonPath, Kind, Part
from abreast_sidecar.compare.values import (
    RepeatedKey,
    encode_canonical,
    is_json_equal,
    may_be_card_numbers,
    parse,
    parse_canonical,
    parse_raw,
    type_name,
)

# Fields that may identify an element, the likeliest first. Fields with the suffixes come after them.
IDENTITY_FIELDS = (
    "id", "_id", "@id", "uuid", "guid", "key", "sku", "code", "slug", "isin", "email", "url", "href", "name",
)  # fmt: skip
IDENTITY_SUFFIXES = ("_id", "Id", "ID", "_uuid", "_key", "_code", "_number", "_sku")
IndexPairs = list[tuple[int, int]]  # indices in old and new
Place = tuple[str, Kind]
# Returns the class of a difference. Differences of one path and class have the same effect on a verdict.
DifferenceClassifier = Callable[[Difference], Hashable]
MAX_IDENTITY_CANDIDATES = 12
MAX_ELEMENT_FIELDS = 100  # larger elements have no identity field
MAX_JSON_DEPTH = 200  # levels; deeper values are compared as a whole
MAX_EAGER_DEPTH = 8  # levels on which values are first tested for equality as a whole
MAX_MATCHED_ARRAY_DEPTH = 8  # nested arrays; elements of deeper ones are compared by index
MAX_DIFF_STEPS = 600_000  # values; beyond it, objects and arrays are compared as a whole
MAX_DIFFERENCES_PER_PATH = 20  # for each kind; of more, one of each class is kept
MAX_PLACES = 1000  # paths with a kind; more are counted
CLASSIFICATION_STEPS = 4
# Paths of errors in GraphQL, JSON:API and many other APIs.
FAILURE_PATHS = frozenset({"$.error", "$.errors", "$.errors[*]"})
_ABSENT: Any = object()
_JSON_IMPACTS: dict[Kind, Impact] = {
    "added": "additive", "removed": "breaking", "changed": "value", "type": "breaking", "order": "value",
}  # fmt: skip
MAX_RAW_DEPTH = 4  # levels; each level scans the text again
MIN_RAW_BYTES = 100  # smaller values are parsed as a whole
MIN_FLAT_BYTES = 1000  # smaller objects of plain values are parsed as a whole
MAX_FLAT_DIFFERENCES = 16
MEMBER_END = b',"'  # also within a text that ends with a comma
MAX_RAW_DIFFERENCES = 4  # changed members; with more, and more than half of all, the value is parsed as a whole
JSON_WHITESPACE = b" \t\r\n"
_decode_members = Decoder(dict[str, Raw]).decode
_decode_elements = Decoder(list[Raw]).decode


class ArrayMatch(Struct):
    """Indices of elements that belong together and differ, and of elements on one side only."""

    pairs: list[tuple[int, int]]
    removed: Sequence[int] = ()
    added: Sequence[int] = ()
    is_reordered: bool = False
    identity_field: str = ""  # the field that matched the elements, if they are reordered


def match_elements(old: list[Any], new: list[Any], *, identity_field: str = "") -> ArrayMatch:
    """Match two arrays. `identity_field` is set by a rule; without it, a field is looked for."""
    if identity_field:
        return _match_by_field(old, new, range(len(old)), range(len(new)), identity_field, [])
    if len(old) != len(new):
        return _match_between_common_ends(old, new)
    return match_elements_at(old, new, _find_differing_indices(old, new))


def match_elements_at(old: list[Any], new: list[Any], indices: list[int]) -> ArrayMatch:
    """Match two arrays of one length that differ at these indices."""
    if indices and _keeps_identities(old, new, indices):
        return ArrayMatch([(index, index) for index in indices])
    if len(indices) < 2:
        return _match_in_order(old, new, indices, indices, [])
    return _match_multisets(old, new, indices, indices)


def match_by_index(old: list[Any], new: list[Any]) -> ArrayMatch:
    common = min(len(old), len(new))
    return ArrayMatch([(index, index) for index in range(common)], range(common, len(old)), range(common, len(new)))


def _find_differing_indices(old: list[Any], new: list[Any]) -> list[int]:
    """Return the indices at which two arrays of one length differ."""
    equal_flags = list(map(eq, old, new))
    if is_json_equal(list(compress(old, equal_flags)), list(compress(new, equal_flags))):
        return [index for index, is_equal in enumerate(equal_flags) if not is_equal]
    # Python considers some values equal that differ in JSON, such as 1 and true.
    texts = zip(map(encode_canonical, old), map(encode_canonical, new), strict=True)
    return [index for index, (text, other) in enumerate(texts) if text != other]


def _common_prefix_length(old: Iterable[Any], new: Iterable[Any]) -> int:
    """Count the equal elements before the first difference."""
    count = 0
    for count, (element, other) in enumerate(zip(old, new, strict=False), 1):
        if encode_canonical(element) != encode_canonical(other):
            return count - 1
    return count


def _match_between_common_ends(old: list[Any], new: list[Any]) -> ArrayMatch:
    start = _common_prefix_length(old, new)
    remaining = min(len(old), len(new)) - start
    end = _common_prefix_length(islice(reversed(old), remaining), islice(reversed(new), remaining))
    old_indices, new_indices = range(start, len(old) - end), range(start, len(new) - end)
    if old_indices and new_indices:
        return _match_multisets(old, new, old_indices, new_indices)
    return ArrayMatch([], old_indices, new_indices)


def _match_multisets(
    old: list[Any], new: list[Any], old_indices: Sequence[int], new_indices: Sequence[int]
) -> ArrayMatch:
    new_by_text: dict[bytes, deque[int]] = {}
    for index in new_indices:
        new_by_text.setdefault(encode_canonical(new[index]), deque()).append(index)
    equal_pairs, unmatched_old = [], []
    for index in old_indices:
        partners = new_by_text.get(encode_canonical(old[index]))
        if partners:
            equal_pairs.append((index, partners.popleft()))
        else:
            unmatched_old.append(index)
    if not equal_pairs:
        return _match_leftover(old, new, unmatched_old, list(new_indices), equal_pairs)
    matching = _match_leftover(old, new, unmatched_old, sorted(chain.from_iterable(new_by_text.values())), equal_pairs)
    if old_indices is new_indices and not matching.is_reordered:
        matching.is_reordered = any(_passes_others(pair, old_indices) for pair in equal_pairs)
    if matching.is_reordered and not matching.identity_field:
        matching.identity_field = _find_identity_field(old, new, list(old_indices), list(new_indices))
    return matching


def _passes_others(pair: tuple[int, int], indices: Sequence[int]) -> bool:
    """Tell whether an element moved past an index that is not among the sorted indices, whose element stays in place."""
    start, end = sorted(pair)
    return end - start > bisect_left(indices, end) - bisect_left(indices, start)


def _keeps_identities(old: list[Any], new: list[Any], indices: list[int]) -> bool:
    """Tell whether each element has a unique identity that is the same on both sides: then none moved."""
    element = old[indices[0]]
    fields = _find_identity_candidates(element) if type(element) is dict else ()
    if not fields:
        return False
    field = fields[0]
    identities = set()
    try:
        for index in indices:
            identity = str(old[index][field])
            if identity != str(new[index][field]) or identity in identities:
                return False
            identities.add(identity)
    except (KeyError, TypeError, IndexError):  # an element is no object, or its identity is no plain value
        return False
    return True


def _match_leftover(
    old: list[Any], new: list[Any], old_indices: list[int], new_indices: list[int], equal_pairs: IndexPairs
) -> ArrayMatch:
    if old_indices and new_indices and (identity_field := _find_identity_field(old, new, old_indices, new_indices)):
        return _match_by_field(old, new, old_indices, new_indices, identity_field, equal_pairs)
    return _match_in_order(old, new, old_indices, new_indices, equal_pairs)


def _match_in_order(
    old: list[Any], new: list[Any], old_indices: list[int], new_indices: list[int], equal_pairs: IndexPairs
) -> ArrayMatch:
    """Match elements in order, except those that replace each other."""
    common = min(len(old_indices), len(new_indices))
    pairs = list(zip(old_indices, new_indices, strict=False))
    replaced = _find_replaced(old, new, pairs)
    return ArrayMatch(
        [pair for pair in pairs if pair not in replaced],
        removed=sorted([*old_indices[common:], *(index for index, _ in replaced)]),
        added=sorted([*new_indices[common:], *(index for _, index in replaced)]),
        is_reordered=_is_reordered(equal_pairs),
    )


def _find_replaced(old: list[Any], new: list[Any], pairs: IndexPairs) -> set[tuple[int, int]]:
    """Return the pairs of two elements instead of one: with another identity and other members.

    The field must identify all elements of both arrays, and some on both sides. Else, each response may have new ids.
    """
    suspects = [pair for pair in pairs if _has_other_identity(old[pair[0]], new[pair[1]])]
    if len(suspects) in {0, len(old), len(new)}:
        return set()
    field = _find_identity_field(old, new, range(len(old)), range(len(new)))
    if not field:
        return set()
    return {
        (index, new_index)
        for index, new_index in suspects
        if _get_identity(old[index], field) != _get_identity(new[new_index], field)
        and not _is_similar(old[index], new[new_index], ignored=field)
    }


def _has_other_identity(element: Any, other: Any) -> bool:
    if type(element) is not dict or type(other) is not dict:
        return False
    return any(element[name] != other.get(name) for name in _find_identity_candidates(element))


def _is_reordered(pairs: IndexPairs) -> bool:
    return any(following < index for (_, index), (_, following) in pairwise(sorted(pairs)))


def _find_identity_field(old: list[Any], new: list[Any], old_indices: Sequence[int], new_indices: Sequence[int]) -> str:
    """Return a field with a unique plain value in each element, and some values on both sides."""
    old_elements, new_elements = (
        [parse_raw(side[i]) for i in indices] for side, indices in ((old, old_indices), (new, new_indices))
    )
    if not old_elements or not new_elements or {*map(type, old_elements), *map(type, new_elements)} != {dict}:
        return ""
    for name in _find_identity_candidates(old_elements[0]):
        old_identities = _collect_identities(old_elements, name)
        new_identities = _collect_identities(new_elements, name)
        if old_identities and new_identities and not old_identities.isdisjoint(new_identities):
            return name
    return ""


def _find_identity_candidates(element: dict[str, Any]) -> tuple[str, ...]:
    return _rank_identity_candidates(tuple(element)) if len(element) <= MAX_ELEMENT_FIELDS else ()


@lru_cache(maxsize=1024)
def _rank_identity_candidates(fields: tuple[str, ...]) -> tuple[str, ...]:
    exact_fields = [name for name in IDENTITY_FIELDS if name in fields]
    suffix_fields = sorted(name for name in fields if name.endswith(IDENTITY_SUFFIXES) and name not in exact_fields)
    return tuple([*exact_fields, *suffix_fields][:MAX_IDENTITY_CANDIDATES])


def _collect_identities(elements: list[dict[str, Any]], name: str) -> set[str]:
    values = {str(value) for element in elements if isinstance(value := element.get(name), (str, int))}
    return values if len(values) == len(elements) else set()


def _match_by_field(
    old: list[Any],
    new: list[Any],
    old_indices: Iterable[int],
    new_indices: Iterable[int],
    identity_field: str,
    equal_pairs: IndexPairs,
) -> ArrayMatch:
    partners: dict[str | None, int] = {}
    unmatched_new, unmatched_old, pairs = [], [], []
    for index in new_indices:
        identity = _get_identity(new[index], identity_field)
        if identity is None or identity in partners:
            unmatched_new.append(index)
        else:
            partners[identity] = index
    for index in old_indices:
        identity = _get_identity(old[index], identity_field)
        if identity in partners:
            pairs.append((index, partners.pop(identity)))
        else:
            unmatched_old.append(index)
    unmatched_new = sorted([*unmatched_new, *partners.values()])
    in_place = {  # another identity of the same element
        index
        for index in set(unmatched_old) & set(unmatched_new)
        if _is_similar(old[index], new[index], ignored=identity_field)
    }
    is_reordered = _is_reordered([*equal_pairs, *pairs])
    return ArrayMatch(
        pairs=sorted([*pairs, *((index, index) for index in in_place)]),
        removed=[index for index in unmatched_old if index not in in_place],
        added=[index for index in unmatched_new if index not in in_place],
        is_reordered=is_reordered,
        identity_field=identity_field if is_reordered else "",
    )


def _is_similar(old: Any, new: Any, *, ignored: str) -> bool:
    """Tell whether half of the members are equal, except one: else, one element takes the place of another one."""
    if type(old) is not dict or type(new) is not dict:
        return True
    names = (old.keys() | new.keys()) - {ignored}
    equal_count = sum(bool(old.get(name, _ABSENT) == new.get(name, _ABSENT)) for name in names)
    return 2 * equal_count >= len(names)


def _get_identity(element: Any, identity_field: str) -> str | None:
    value = element.get(identity_field) if isinstance(element, dict) else None
    return str(value) if isinstance(value, (str, int)) else None


class JsonDiff(Struct):
    """Collects differences, at least one for each path, kind and class.

    A path has MAX_DIFFERENCES_PER_PATH differences of a kind, or fewer if there are `limit` in total. The others are in
    `repeat_count`. `omitted_count` counts the differences beyond MAX_PLACES, and those whose class is unknown because
    the work is used up.

    `identity_lookup` returns the identity field of the array at a generalised path, or an empty text. Objects and
    arrays are compared as a whole if they would take more than `max_work` steps.
    """

    limit: int
    root: str = "$"
    part: Part = "body"
    identity_lookup: Callable[[str], str] | None = None
    classify: DifferenceClassifier | None = None
    max_work: int = MAX_DIFF_STEPS
    differences: list[Difference] = field(default_factory=list)
    work: int = 0  # values visited
    repeat_count: int = 0
    omitted_count: int = 0
    budget_exceeded: bool = False  # True if values were compared as a whole to save work
    _kept: dict[Place, list[Difference]] = field(default_factory=dict)
    _classes: dict[Place, set[Hashable]] = field(default_factory=dict)  # of places with more than are kept
    _depth: int = 0
    _array_depth: int = 0

    def compare(self, old: Any, new: Any) -> list[Difference]:
        return self.compare_at(JsonPath(None, self.root, old, new))

    def compare_at(self, location: JsonPath) -> list[Difference]:
        """Compare the values of a location in larger documents."""
        self._diff_value(location)
        return self.differences

    def compare_by_index(self, old: list[Any], new: list[Any]) -> list[Difference]:
        """Compare arrays by index: the other arrays match elements, which needs the arrays to be complete."""
        self._diff_elements(JsonPath(None, self.root, old, new), match_by_index(old, new))
        return self.differences

    def _diff_value(self, location: JsonPath) -> None:
        old, new = location.old, location.new
        kind = type(old)
        self.work += 1
        if kind is not type(new):
            has_one_type = type_name(old) == type_name(new) or may_be_card_numbers(old, new)
            self._report("changed" if has_one_type else "type", location)
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
        """Report and return whether the values differ."""
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
                self._report("added", JsonPath(location, key, None, parse_raw(value)))

    def _diff_array(self, location: JsonPath, old: list[Any], new: list[Any]) -> None:
        self.work += len(old) + len(new)
        if self._array_depth >= MAX_MATCHED_ARRAY_DEPTH:
            matching = match_by_index(old, new)
        else:
            identity_field = self.identity_lookup(location.generalised()) if self.identity_lookup is not None else ""
            matching = match_elements(old, new, identity_field=identity_field)
        self._diff_elements(location, matching)

    def _diff_elements(self, location: JsonPath, matching: ArrayMatch) -> None:
        old, new = location.old, location.new
        if matching.is_reordered:
            hint = f"keyed-by {matching.identity_field}" if matching.identity_field else "unordered"
            self._report("order", location, hint=hint)
        self._array_depth += 1
        for index, new_index in matching.pairs:
            self._diff_value(JsonPath(location, index, old[index], new[new_index], new_index))
        self._array_depth -= 1
        for index in matching.removed:
            self._report("removed", JsonPath(location, index, old[index], None))
        for index in matching.added:
            self._report("added", JsonPath(location, index, None, new[index]))

    def _report(self, kind: Kind, location: JsonPath, *, hint: str = "") -> None:
        path = location.generalised()
        impact = _JSON_IMPACTS[kind]
        if kind == "added":
            if type(location.step) is RepeatedKey or (path in FAILURE_PATHS and location.new):
                impact = "breaking"
            elif path.endswith(ELEMENT_SUFFIXES) or self.root == "html":
                impact = "value"  # a new element or a new part of a page, unlike a new field
        difference = Difference(self.part, path, kind, impact, location, "", hint)
        place = path, kind
        kept = self._kept.get(place)
        if kept is None:
            if len(self._kept) >= MAX_PLACES:
                self.omitted_count += 1
                return
            self._kept[place] = kept = []
        elif (len(kept) >= MAX_DIFFERENCES_PER_PATH or len(self.differences) >= self.limit) and not self._is_new_class(
            place, kept, difference
        ):
            return
        kept.append(difference)
        self.differences.append(difference)

    def _is_new_class(self, place: Place, kept: list[Difference], difference: Difference) -> bool:
        """Tell whether a difference is unlike those kept at its place. Count it if not."""
        if self.classify is None:
            self.repeat_count += 1
            return False
        self.work += CLASSIFICATION_STEPS
        if self.work > self.max_work:
            self.omitted_count += 1
            return False
        classes = self._classes.get(place)
        if classes is None:
            classes = self._classes[place] = set(map(self.classify, kept))
        class_count = len(classes)
        classes.add(self.classify(difference))
        is_new = len(classes) > class_count
        self.repeat_count += not is_new
        return is_new


class JsonTextDiff(JsonDiff):
    """Compares JSON texts and parses only the members that differ."""

    def compare_texts(self, old: bytes, new: bytes) -> list[Difference]:
        """Compare two texts in UTF-8. Raise NotJsonError."""
        if (old.isascii() or _is_utf8(old)) and (new.isascii() or _is_utf8(new)):
            try:
                self._diff_texts(None, self.root, old.strip(JSON_WHITESPACE), new.strip(JSON_WHITESPACE), MAX_RAW_DEPTH)
            except (DecodeError, RecursionError):  # the lenient parser may accept it
                self.differences, self._kept, self._classes = [], {}, {}
                self.work = self.repeat_count = self.omitted_count = self._depth = self._array_depth = 0
                self.budget_exceeded = False
            else:
                return self.differences
        return self.compare(parse(old), parse(new))

    def _diff_texts(self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int) -> None:
        first_byte = old[:1]
        if levels and first_byte == new[:1] and len(old) > MIN_RAW_BYTES < len(new):
            if first_byte == b"{" and self._diff_members(parent, step, old, new, levels):
                return
            if first_byte == b"[" and self._diff_raw_elements(parent, step, old, new, levels):
                return
        self._diff_value(JsonPath(parent, step, parse(old), parse(new)))

    def _diff_members(self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int) -> bool:
        """Compare objects by the texts of their members. Return False if parsing both is faster."""
        if old.find(b"{", 1) < 0 and old.find(b"[", 1) < 0:
            return len(old) > MIN_FLAT_BYTES and self._diff_flat_members(parent, step, old, new)
        left, right = _decode_members(old), _decode_members(new)
        if not (_is_complete(left, old) and _is_complete(right, new)):
            return False
        changed_keys = [key for key, value in left.items() if value != right.get(key)]
        if self._exceeds_raw_limit(changed_keys, left, right):
            return False
        location, removed_count = JsonPath(parent, step, left, right), 0
        for key in changed_keys:
            if key in right:
                self._diff_texts(location, key, bytes(left[key]), bytes(right[key]), levels - 1)
            else:
                removed_count += 1
                self._report("removed", JsonPath(location, key, parse(bytes(left[key])), None))
        if len(right) > len(left) - removed_count:
            self._report_added(location, left, right)
        return True

    def _diff_flat_members(self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes) -> bool:
        """Compare objects of plain values by the texts between commas. Return False if both must be parsed.

        These texts are the members if old has as many as keys: else, a text ends within a string or a key repeats.
        """
        count = old.count(MEMBER_END) + 1
        if count == 1 or not new.endswith(b"}") or self.work + 2 * count >= self.max_work:
            return False
        texts = _find_changed_texts(old[1:-1], new[1:-1])
        members = parse_canonical(old) if texts else None
        if not texts or members is None or len(members) != count:
            return False
        old_changes, new_changes = (parse_canonical(b"{%b}" % b",".join(side)) for side in texts)
        if old_changes is None or new_changes is None or [*old_changes] != [*new_changes]:
            return False
        self.work += 1 + 2 * (count - len(old_changes))
        self._diff_object(JsonPath(parent, step, members, members | new_changes), old_changes, new_changes)
        return True

    def _diff_raw_elements(self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int) -> bool:
        left: list[Any] = _decode_elements(old)
        right: list[Any] = _decode_elements(new)
        if len(left) != len(right):
            return False
        location = JsonPath(parent, step, left, right)
        if self.identity_lookup is not None and self.identity_lookup(location.generalised()):
            return False
        changed_indices = [index for index, value in enumerate(left) if value != right[index]]
        if self._exceeds_raw_limit(changed_indices, left, right):
            return False
        if len(left) == 1:
            self._diff_texts(location, 0, bytes(left[0]), bytes(right[0]), levels - 1)
            return True
        # One call parses them all: the overhead of a call is larger than that of an element.
        texts = [elements[index] for elements in (left, right) for index in changed_indices]
        values = parse(b"[%b]" % b",".join(texts))
        for index, value, other in zip(changed_indices, values, values[len(changed_indices) :], strict=False):
            left[index], right[index] = value, other
        changed_indices = [index for index in changed_indices if not is_json_equal(left[index], right[index])]
        self._diff_elements(location, match_elements_at(left, right, changed_indices))
        return True

    def _exceeds_raw_limit(self, changed: list[Any], left: Any, right: Any) -> bool:
        work = self.work + len(left) + len(right)
        if (len(changed) > MAX_RAW_DIFFERENCES and 2 * len(changed) > len(left)) or work > self.max_work:
            return True
        self.work = work
        return False


def _is_utf8(body: bytes) -> bool:
    """Check the encoding, since equal members are not parsed."""
    try:
        return bool(body.decode())
    except UnicodeDecodeError:
        return False


def _find_changed_texts(old: bytes, new: bytes) -> tuple[list[bytes], list[bytes]] | None:
    """Return the texts between commas before quotes that differ. Return None if their numbers differ, or there are many."""
    old_texts: list[bytes] = []
    new_texts: list[bytes] = []
    old_start = new_start = 0
    while len(old_texts) <= MAX_FLAT_DIFFERENCES:
        equal_length = _find_equal_length(old, new, old_start, new_start)
        start = max(old.rfind(MEMBER_END, old_start, old_start + equal_length) + 1, old_start)
        new_start += start - old_start
        end, new_end = old.find(MEMBER_END, start), new.find(MEMBER_END, new_start)
        old_texts.append(old[start : end if end > 0 else None])
        new_texts.append(new[new_start : new_end if new_end > 0 else None])
        if end < 0 or new_end < 0:
            return (old_texts, new_texts) if end == new_end else None
        old_start, new_start = end + 1, new_end + 1
    return None


def _find_equal_length(old: bytes, new: bytes, old_start: int, new_start: int) -> int:
    """Count the equal bytes from the starts on. Each comparison halves the rest."""
    length, end = 0, min(len(old) - old_start, len(new) - new_start)
    while length < end:
        middle = (length + end + 1) // 2
        if old[old_start + length : old_start + middle] == new[new_start + length : new_start + middle]:
            length = middle
        else:
            end = middle - 1
    return length


def _is_complete(members: dict[str, Raw], text: bytes) -> bool:
    """Tell whether a text without or with the usual spaces has only these members: no key repeats or has escapes."""
    separator_bytes = len(text) - len("".join(members).encode()) - sum(map(len, members.values()))
    if separator_bytes == 4 * len(members) + 1:
        return True
    return separator_bytes == 6 * len(members) and text.startswith(b'": ', len(next(iter(members), "").encode()) + 2)
