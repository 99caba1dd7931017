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

from abreast_sidecar.compare.value import canonical, same

# Fields that name an element, the likelier first; then those that end like one.
IDENTITIES = (
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
ENDINGS = ("_id", "Id", "ID", "_uuid", "_key", "_code", "_number", "_sku")
_NONE, _SORTED = repeat(None), repeat(OPT_SORT_KEYS)
Pairs = list[tuple[int, int]]  # an old element's index and a new one's
MAX_CANDIDATES = 12
MAX_FIELDS = 100  # of an element; larger objects have no such field


class Matching(Struct):
    """Indices: of elements that belong together and differ, and of those on one side only."""

    pairs: list[tuple[int, int]]
    removed: Sequence[int] = ()
    added: Sequence[int] = ()
    moved: bool = False
    by: str = ""  # the field that told what belongs together, where the position did not


def match(old: list[Any], new: list[Any], *, by: str = "") -> Matching:
    """`by`: a field that identifies elements, by rule."""
    if by:
        return _by_field(old, new, range(len(old)), range(len(new)), by, [])
    if len(old) != len(new):
        return _between_common_ends(old, new)
    return match_at(old, new, _differing(old, new))


def match_at(old: list[Any], new: list[Any], places: list[int]) -> Matching:
    """Of two arrays of one length, that differ at these places."""
    if len(places) < 2 or _keep_names(old, new, places):
        return Matching([(place, place) for place in places])
    return _as_multisets(old, new, places, places)


def in_order(old: list[Any], new: list[Any]) -> Matching:
    common = min(len(old), len(new))
    return Matching(
        [(place, place) for place in range(common)], range(common, len(old)), range(common, len(new))
    )


def _differing(old: list[Any], new: list[Any]) -> list[int]:
    """The indices at which two arrays differ."""
    alike = list(map(eq, old, new))
    if same(list(compress(old, alike)), list(compress(new, alike))):
        return [place for place, equal in enumerate(alike) if not equal]
    return _differing_texts(old, new)


def _differing_texts(old: list[Any], new: list[Any]) -> list[int]:
    """For elements that are equal to Python and not in JSON, as 1 and true are.

    No text is kept: that would cost more than to write it.
    """
    try:
        texts = zip(map(dumps, old, _NONE, _SORTED), map(dumps, new, _NONE, _SORTED), strict=False)
        return [place for place, (text, other) in enumerate(texts) if text != other]
    except TypeError:
        texts = zip(map(canonical, old), map(canonical, new), strict=False)
        return [place for place, (text, other) in enumerate(texts) if text != other]


def _common(old: Iterable[Any], new: Iterable[Any]) -> int:
    """How many elements are equal before the first that is not."""
    count = 0
    for one, other in zip(old, new, strict=False):
        if canonical(one) != canonical(other):
            break
        count += 1
    return count


def _between_common_ends(old: list[Any], new: list[Any]) -> Matching:
    start = _common(old, new)
    rest = min(len(old), len(new)) - start
    end = _common(islice(reversed(old), rest), islice(reversed(new), rest))
    here, there = range(start, len(old) - end), range(start, len(new) - end)
    return _as_multisets(old, new, here, there) if here and there else Matching([], here, there)


def _as_multisets(old: list[Any], new: list[Any], here: Sequence[int], there: Sequence[int]) -> Matching:
    free: dict[bytes, deque[int]] = {}
    for place in there:
        free.setdefault(canonical(new[place]), deque()).append(place)
    same, left = [], []
    for place in here:
        partners = free.get(canonical(old[place]))
        if partners:
            same.append((place, partners.popleft()))
        else:
            left.append(place)
    if not same:
        return _leftover(old, new, left, list(there), same)
    found = _leftover(old, new, left, sorted(chain.from_iterable(free.values())), same)
    if found.moved and not found.by:
        found.by = _identity(old, new, list(here), list(there))
    return found


def _keep_names(old: list[Any], new: list[Any], places: list[int]) -> bool:
    """Whether the elements at these places are named, differently, and alike on both sides: then none moved."""
    element = old[places[0]]
    names = _candidates(element) if type(element) is dict else ()
    if not names:
        return False
    name = names[0]
    seen = set()
    try:
        for place in places:
            named = old[place][name]
            if named != new[place][name] or named in seen:
                return False
            seen.add(named)
    except (KeyError, TypeError, IndexError):  # not all are objects, or named by something plain
        return False
    return True


def _leftover(old: list[Any], new: list[Any], here: list[int], there: list[int], same: Pairs) -> Matching:
    if here and there and (by := _identity(old, new, here, there)):
        return _by_field(old, new, here, there, by, same)
    common = min(len(here), len(there))
    pairs = list(zip(here, there, strict=False))
    return Matching(pairs, here[common:], there[common:], moved=_moved(same))


def _moved(pairs: Pairs) -> bool:
    last = -1
    for _, place in sorted(pairs):
        if place < last:
            return True
        last = place
    return False


def _identity(old: list[Any], new: list[Any], here: Sequence[int], there: Sequence[int]) -> str:
    """A field that all elements have, with different plain values on each side, and some of them on both."""
    olds, news = [old[place] for place in here], [new[place] for place in there]
    if not olds or not news or {*map(type, olds), *map(type, news)} != {dict}:
        return ""
    for name in _candidates(olds[0]):
        left, right = _values(olds, name), _values(news, name)
        if left and right and not left.isdisjoint(right):
            return name
    return ""


def _candidates(element: dict[str, Any]) -> tuple[str, ...]:
    return _candidate_names(tuple(element)) if len(element) <= MAX_FIELDS else ()


@lru_cache(maxsize=1024)
def _candidate_names(fields: tuple[str, ...]) -> tuple[str, ...]:
    known = [name for name in IDENTITIES if name in fields]
    others = sorted(name for name in fields if name.endswith(ENDINGS) and name not in known)
    return tuple([*known, *others][:MAX_CANDIDATES])


def _values(elements: list[dict[str, Any]], name: str) -> set[tuple[type, Any]]:
    values = {
        (type(value), value) for element in elements if isinstance(value := element.get(name), (str, int))
    }
    return values if len(values) == len(elements) else set()


def _by_field(
    old: list[Any], new: list[Any], here: Iterable[int], there: Iterable[int], by: str, same: Pairs
) -> Matching:
    partners, rest_new = _named(new, there, by)
    pairs, rest = [], []
    for place in here:
        name = _name(old[place], by)
        if name is not None and name in partners:
            pairs.append((place, partners.pop(name)))
        else:
            rest.append(place)
    rest_new = sorted([*rest_new, *partners.values()])
    unnamed = set(rest) & set(rest_new)  # what stands at the same place and has another name
    moved = _moved([*same, *pairs])
    return Matching(
        pairs=sorted([*pairs, *((place, place) for place in unnamed)]),
        removed=[place for place in rest if place not in unnamed],
        added=[place for place in rest_new if place not in unnamed],
        moved=moved,
        by=by if moved else "",
    )


def _named(
    elements: list[Any], places: Iterable[int], by: str
) -> tuple[dict[tuple[type, Any], int], list[int]]:
    named: dict[tuple[type, Any], int] = {}
    rest = []
    for place in places:
        name = _name(elements[place], by)
        if name is None or name in named:
            rest.append(place)
        else:
            named[name] = place
    return named, rest


def _name(element: Any, by: str) -> tuple[type, Any] | None:
    value = element.get(by) if isinstance(element, dict) else None
    return (type(value), value) if isinstance(value, (str, int)) else None
