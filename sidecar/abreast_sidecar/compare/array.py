"""Which elements of two arrays belong together. Everything here takes time linear in the arrays' size.

Equal elements pair up wherever they stand, so that one inserted at the front is one difference and not as many as the
array is long. What is left pairs up by a field that identifies an element, if there is one, or else in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress, islice, repeat
from operator import eq
from typing import Any

from msgspec import Struct
from orjson import OPT_SORT_KEYS, dumps

from abreast_sidecar.compare.value import encode_canonical, is_json_equal

# Fields that name an element, the likelier first; then those that end like one.
IDENTITY_FIELDS = (
    "id",
    "_id",
    "@id",
    "uuid",
    "guid",
    "key",
    "sku",
    "code",
    "slug",
    "isin",
    "email",
    "url",
    "href",
    "name",
)
IDENTITY_SUFFIXES = ("_id", "Id", "ID", "_uuid", "_key", "_code", "_number", "_sku")
_NO_DEFAULT, _SORT_KEYS = repeat(None), repeat(OPT_SORT_KEYS)
IndexPairs = list[tuple[int, int]]  # an old element's index and a new one's
MAX_IDENTITY_CANDIDATES = 12
MAX_ELEMENT_FIELDS = 100  # of an element; larger objects have no such field


class ArrayMatch(Struct):
    """Indices: of elements that belong together and differ, and of those on one side only."""

    pairs: list[tuple[int, int]]
    removed: Sequence[int] = ()
    added: Sequence[int] = ()
    is_reordered: bool = False
    identity_field: str = ""  # the field that told what belongs together, where the position did not


def match_elements(old: list[Any], new: list[Any], *, identity_field: str = "") -> ArrayMatch:
    """`by`: a field that identifies elements, by rule."""
    if identity_field:
        return _match_by_field(old, new, range(len(old)), range(len(new)), identity_field, [])
    if len(old) != len(new):
        return _match_between_common_ends(old, new)
    return match_elements_at(old, new, _find_differing_indices(old, new))


def match_elements_at(old: list[Any], new: list[Any], indices: list[int]) -> ArrayMatch:
    """Of two arrays of one length, that differ at these places."""
    if len(indices) < 2 or _keeps_identities(old, new, indices):
        return ArrayMatch([(index, index) for index in indices])
    return _match_multisets(old, new, indices, indices)


def match_by_index(old: list[Any], new: list[Any]) -> ArrayMatch:
    common = min(len(old), len(new))
    return ArrayMatch(
        [(index, index) for index in range(common)], range(common, len(old)), range(common, len(new))
    )


def _find_differing_indices(old: list[Any], new: list[Any]) -> list[int]:
    """The indices at which two arrays differ."""
    equal_flags = list(map(eq, old, new))
    if is_json_equal(list(compress(old, equal_flags)), list(compress(new, equal_flags))):
        return [index for index, is_equal in enumerate(equal_flags) if not is_equal]
    return _find_differing_texts(old, new)


def _find_differing_texts(old: list[Any], new: list[Any]) -> list[int]:
    """For elements that are equal to Python and not in JSON, as 1 and true are.

    No text is kept: that would cost more than to write it.
    """
    try:
        texts = zip(
            map(dumps, old, _NO_DEFAULT, _SORT_KEYS), map(dumps, new, _NO_DEFAULT, _SORT_KEYS), strict=False
        )
        return [index for index, (text, other) in enumerate(texts) if text != other]
    except TypeError:
        texts = zip(map(encode_canonical, old), map(encode_canonical, new), strict=False)
        return [index for index, (text, other) in enumerate(texts) if text != other]


def _common_prefix_length(old: Iterable[Any], new: Iterable[Any]) -> int:
    """How many elements are equal before the first that is not."""
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
    matching = _match_leftover(
        old, new, unmatched_old, sorted(chain.from_iterable(new_by_text.values())), equal_pairs
    )
    if matching.is_reordered and not matching.identity_field:
        matching.identity_field = _find_identity_field(old, new, list(old_indices), list(new_indices))
    return matching


def _keeps_identities(old: list[Any], new: list[Any], indices: list[int]) -> bool:
    """Whether the elements at these places are named, differently, and alike on both sides: then none moved."""
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
    except (KeyError, TypeError, IndexError):  # not all are objects, or named by something plain
        return False
    return True


def _match_leftover(
    old: list[Any], new: list[Any], old_indices: list[int], new_indices: list[int], equal_pairs: IndexPairs
) -> ArrayMatch:
    if (
        old_indices
        and new_indices
        and (identity_field := _find_identity_field(old, new, old_indices, new_indices))
    ):
        return _match_by_field(old, new, old_indices, new_indices, identity_field, equal_pairs)
    common = min(len(old_indices), len(new_indices))
    pairs = list(zip(old_indices, new_indices, strict=False))
    return ArrayMatch(
        pairs, old_indices[common:], new_indices[common:], is_reordered=_is_reordered(equal_pairs)
    )


def _is_reordered(pairs: IndexPairs) -> bool:
    previous = -1
    for _, index in sorted(pairs):
        if index < previous:
            return True
        previous = index
    return False


def _find_identity_field(
    old: list[Any], new: list[Any], old_indices: Sequence[int], new_indices: Sequence[int]
) -> str:
    """A field that all elements have, with different plain values on each side, and some of them on both."""
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
    suffix_fields = sorted(
        name for name in fields if name.endswith(IDENTITY_SUFFIXES) and name not in exact_fields
    )
    return tuple([*exact_fields, *suffix_fields][:MAX_IDENTITY_CANDIDATES])


def _collect_identities(elements: list[dict[str, Any]], name: str) -> set[tuple[type, Any]]:
    values = {
        (type(value), value) for element in elements if isinstance(value := element.get(name), (str, int))
    }
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
    in_place = set(unmatched_old) & set(unmatched_new)  # what stands at the same place and has another name
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
