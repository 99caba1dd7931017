"""Differences between two JSON values, in time linear in their size.

Arrays: equal elements pair up at any index, so that an insertion at the front is one difference. The remaining elements
pair up by a field that identifies an element, such as `id`, or else in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress, islice, repeat
from operator import eq
from typing import Any

from msgspec import DecodeError, Raw, Struct
from msgspec.json import Decoder
from orjson import OPT_SORT_KEYS, dumps

from abreast_sidecar.compare.model import Difference, Impact, JsonPath, Kind
from abreast_sidecar.compare.values import RepeatedKey, encode_canonical, is_json_equal, parse, type_name

# Fields that may identify an element, the likeliest first. Fields with the suffixes come after them.
IDENTITY_FIELDS = (
    "id", "_id", "@id", "uuid", "guid", "key", "sku", "code", "slug", "isin", "email", "url", "href", "name",
)  # fmt: skip
IDENTITY_SUFFIXES = ("_id", "Id", "ID", "_uuid", "_key", "_code", "_number", "_sku")
_NO_DEFAULT, _SORT_KEYS = repeat(None), repeat(OPT_SORT_KEYS)
IndexPairs = list[tuple[int, int]]  # indices in old and new
MAX_IDENTITY_CANDIDATES = 12
MAX_ELEMENT_FIELDS = 100  # larger elements have no identity field
MAX_JSON_DEPTH = 200  # levels; deeper values are compared as a whole
MAX_EAGER_DEPTH = 8  # levels on which values are first tested for equality as a whole
MAX_MATCHED_ARRAY_DEPTH = 8  # nested arrays; elements of deeper ones are compared by index
MAX_DIFF_STEPS = 600_000  # values; beyond it, objects and arrays are compared as a whole
MAX_DIFFERENCES_PER_PATH = 20  # for each kind; leaves room for other paths
# Paths of errors in GraphQL, JSON:API and many other APIs.
FAILURE_PATHS = frozenset({"$.error", "$.errors", "$.errors[*]"})
_ELEMENT_SUFFIXES = ("[*]", ".*")  # paths of elements of arrays and maps: an added element is no new field
_ABSENT: Any = object()
_JSON_IMPACTS: dict[Kind, Impact] = {"removed": "breaking", "changed": "value", "type": "breaking", "order": "value"}
MAX_RAW_DEPTH = 4  # levels; each level scans the text again
MIN_RAW_BYTES = 100  # smaller values are parsed as a whole
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
    if len(indices) < 2 or _keeps_identities(old, new, indices):
        return ArrayMatch([(index, index) for index in indices])
    return _match_multisets(old, new, indices, indices)


def match_by_index(old: list[Any], new: list[Any]) -> ArrayMatch:
    common = min(len(old), len(new))
    return ArrayMatch([(index, index) for index in range(common)], range(common, len(old)), range(common, len(new)))


def _find_differing_indices(old: list[Any], new: list[Any]) -> list[int]:
    """Return the indices at which two arrays of one length differ."""
    equal_flags = list(map(eq, old, new))
    if is_json_equal(list(compress(old, equal_flags)), list(compress(new, equal_flags))):
        return [index for index, is_equal in enumerate(equal_flags) if not is_equal]
    return _find_differing_texts(old, new)


def _find_differing_texts(old: list[Any], new: list[Any]) -> list[int]:
    """Compare texts: Python considers some values equal that differ in JSON, such as 1 and true."""
    try:
        texts = zip(map(dumps, old, _NO_DEFAULT, _SORT_KEYS), map(dumps, new, _NO_DEFAULT, _SORT_KEYS), strict=False)
        return [index for index, (text, other) in enumerate(texts) if text != other]
    except TypeError:
        texts = zip(map(encode_canonical, old), map(encode_canonical, new), strict=False)
        return [index for index, (text, other) in enumerate(texts) if text != other]


def _common_prefix_length(old: Iterable[Any], new: Iterable[Any]) -> int:
    """Count the equal elements before the first difference."""
    count = 0
    for old_element, new_element in zip(old, new, strict=False):
        if encode_canonical(old_element) != encode_canonical(new_element):
            break
        count += 1
    return count


def _match_between_common_ends(old: list[Any], new: list[Any]) -> ArrayMatch:
    start = _common_prefix_length(old, new)
    remaining = min(len(old), len(new)) - start
    end = _common_prefix_length(islice(reversed(old), remaining), islice(reversed(new), remaining))
    old_indices, new_indices = range(start, len(old) - end), range(start, len(new) - end)
    return (
        _match_multisets(old, new, old_indices, new_indices)
        if old_indices and new_indices
        else ArrayMatch([], old_indices, new_indices)
    )


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
    if matching.is_reordered and not matching.identity_field:
        matching.identity_field = _find_identity_field(old, new, list(old_indices), list(new_indices))
    return matching


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
            identity = old[index][field]
            if identity != new[index][field] or identity in identities:
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
    common = min(len(old_indices), len(new_indices))
    pairs = list(zip(old_indices, new_indices, strict=False))
    return ArrayMatch(pairs, old_indices[common:], new_indices[common:], is_reordered=_is_reordered(equal_pairs))


def _is_reordered(pairs: IndexPairs) -> bool:
    previous = -1
    for _, index in sorted(pairs):
        if index < previous:
            return True
        previous = index
    return False


def _find_identity_field(old: list[Any], new: list[Any], old_indices: Sequence[int], new_indices: Sequence[int]) -> str:
    """Return a field with a unique plain value in each element, and some values on both sides."""
    olds, news = [old[index] for index in old_indices], [new[index] for index in new_indices]
    if not olds or not news or {*map(type, olds), *map(type, news)} != {dict}:
        return ""
    for name in _find_identity_candidates(olds[0]):
        old_identities, new_identities = _collect_identities(olds, name), _collect_identities(news, name)
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


def _collect_identities(elements: list[dict[str, Any]], name: str) -> set[tuple[type, Any]]:
    values = {(type(value), value) for element in elements if isinstance(value := element.get(name), (str, int))}
    return values if len(values) == len(elements) else set()


def _match_by_field(
    old: list[Any],
    new: list[Any],
    old_indices: Iterable[int],
    new_indices: Iterable[int],
    identity_field: str,
    equal_pairs: IndexPairs,
) -> ArrayMatch:
    partners, unmatched_new = _index_by_identity(new, new_indices, identity_field)
    pairs, unmatched_old = [], []
    for index in old_indices:
        identity = _get_identity(old[index], identity_field)
        if identity is not None and identity in partners:
            pairs.append((index, partners.pop(identity)))
        else:
            unmatched_old.append(index)
    unmatched_new = sorted([*unmatched_new, *partners.values()])
    in_place = set(unmatched_old) & set(unmatched_new)  # another identity at the same index
    is_reordered = _is_reordered([*equal_pairs, *pairs])
    return ArrayMatch(
        pairs=sorted([*pairs, *((index, index) for index in in_place)]),
        removed=[index for index in unmatched_old if index not in in_place],
        added=[index for index in unmatched_new if index not in in_place],
        is_reordered=is_reordered,
        identity_field=identity_field if is_reordered else "",
    )


def _index_by_identity(
    elements: list[Any], indices: Iterable[int], identity_field: str
) -> tuple[dict[tuple[type, Any], int], list[int]]:
    index_by_identity: dict[tuple[type, Any], int] = {}
    unnamed = []
    for index in indices:
        identity = _get_identity(elements[index], identity_field)
        if identity is None or identity in index_by_identity:
            unnamed.append(index)
        else:
            index_by_identity[identity] = index
    return index_by_identity, unnamed


def _get_identity(element: Any, identity_field: str) -> tuple[type, Any] | None:
    value = element.get(identity_field) if isinstance(element, dict) else None
    return (type(value), value) if isinstance(value, (str, int)) else None


class JsonDiff:
    """Collects at most `limit` differences.

    `identity_lookup` returns the identity field of the array at a generalised path, or an empty text. Objects and
    arrays are compared as a whole if they would take more than `max_work` steps.
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
        self.budget_exceeded = False  # True if values were compared as a whole to save work
        self.differences: list[Difference] = []
        self.work = 0  # values visited
        self._report_counts: dict[tuple[str, Kind], int] = {}
        self._depth = self._array_depth = 0

    def compare(self, old: Any, new: Any) -> list[Difference]:
        self._diff_value(JsonPath(None, self.root, old, new))
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
                self._report("added", JsonPath(location, key, None, value))

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
        """Rate an added value: a new field is additive, a new element or a new part of a page is not."""
        if type(location.step) is RepeatedKey or (path in FAILURE_PATHS and location.new):
            return "breaking"
        return "value" if path.endswith(_ELEMENT_SUFFIXES) or self.root == "html" else "additive"


class JsonTextDiff(JsonDiff):
    """Compares JSON texts and parses only the members that differ."""

    __slots__ = ()

    def compare_texts(self, old: bytes, new: bytes) -> list[Difference]:
        """Compare two texts in UTF-8. Raise NotJsonError."""
        if (old.isascii() or _is_utf8(old)) and (new.isascii() or _is_utf8(new)):
            try:
                self._diff_texts(None, self.root, old.strip(JSON_WHITESPACE), new.strip(JSON_WHITESPACE), MAX_RAW_DEPTH)
            except (DecodeError, RecursionError):  # the lenient parser may accept it
                self.reset()
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
        left, right = _decode_members(old), _decode_members(new)
        if not (_is_compact(left, len(old)) and _is_compact(right, len(new))):
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
            for key, value in right.items():
                if key not in left:
                    self._report("added", JsonPath(location, key, None, parse(bytes(value))))
        return True

    def _diff_raw_elements(self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int) -> bool:
        left, right = _decode_elements(old), _decode_elements(new)
        if len(left) != len(right):
            return False
        location = JsonPath(parent, step, left, right)
        if self.identity_lookup is not None and self.identity_lookup(location.generalised()):
            return False
        changed_indices = [index for index, value in enumerate(left) if value != right[index]]
        if self._exceeds_raw_limit(changed_indices, left, right):
            return False
        if len(changed_indices) == 1:
            self._diff_texts(
                location,
                changed_indices[0],
                bytes(left[changed_indices[0]]),
                bytes(right[changed_indices[0]]),
                levels - 1,
            )
            return True
        _parse_at(changed_indices, left, right)
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


def _parse_at(indices: list[int], left: list[Any], right: list[Any]) -> None:
    """Parse elements in place, in one call: the overhead of a call is larger than that of an element."""
    texts = [elements[index] for elements in (left, right) for index in indices]
    values = iter(parse(b"[%b]" % b",".join(texts)))
    for elements in (left, right):
        for index in indices:
            elements[index] = next(values)


def _is_compact(members: dict[str, Raw], length: int) -> bool:
    """Tell whether the text has only these members: no spaces, no escapes in keys, no repeated keys."""
    return len("".join(members).encode()) + sum(map(len, members.values())) + 4 * len(members) + 1 == length
