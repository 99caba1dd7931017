"""Differences between two JSON texts, of which only what differs is parsed.

Most of two answers is equal, byte for byte. Where both have an object or an array at one place, their members are told
apart without being parsed, and equal texts mean the same whatever they hold: long numbers, repeated keys, 1 beside 1.0.
"""

from __future__ import annotations

from typing import Any

from msgspec import DecodeError, Raw
from msgspec.json import Decoder

from abreast_sidecar.compare.array import match_at
from abreast_sidecar.compare.difference import Difference
from abreast_sidecar.compare.document import DocumentDiff
from abreast_sidecar.compare.path import Place
from abreast_sidecar.compare.value import parse, same

LEVELS = 4  # on which members are told apart; each looks at the text again
SMALL = 100  # bytes, that are parsed at once
FEW = 4  # members that may differ though they are most
WHITESPACE = b" \t\r\n"
_object = Decoder(dict[str, Raw]).decode
_array = Decoder(list[Raw]).decode


class TextDiff(DocumentDiff):
    __slots__ = ()

    def compare_texts(self, old: bytes, new: bytes) -> list[Difference]:
        """Raise NotJsonError where a text is no JSON."""
        if (old.isascii() or _is_text(old)) and (new.isascii() or _is_text(new)):
            try:
                self._texts(None, self.root, old.strip(WHITESPACE), new.strip(WHITESPACE), LEVELS)
            except (DecodeError, RecursionError):  # the lenient reader may take it
                self.begin()
            else:
                return self.found
        return self.compare(parse(old), parse(new))

    def _texts(self, above: Place | None, step: str | int, old: bytes, new: bytes, levels: int) -> None:
        begin = old[:1]
        if levels and begin == new[:1] and len(old) > SMALL < len(new):
            if begin == b"{" and self._members(above, step, old, new, levels):
                return
            if begin == b"[" and self._items(above, step, old, new, levels):
                return
        self._value(Place(above, step, parse(old), parse(new)))

    def _members(self, above: Place | None, step: str | int, old: bytes, new: bytes, levels: int) -> bool:
        """Nothing is done and False returned where it is better to parse them."""
        left, right = _object(old), _object(new)
        if not (_is_plain(left, len(old)) and _is_plain(right, len(new))):
            return False
        differ = [key for key, value in left.items() if value != right.get(key)]
        if self._too_many(differ, left, right):
            return False
        place, gone = Place(above, step, left, right), 0
        for key in differ:
            if key in right:
                self._texts(place, key, bytes(left[key]), bytes(right[key]), levels - 1)
            else:
                gone += 1
                self._report("removed", Place(place, key, parse(bytes(left[key])), None))
        if len(right) > len(left) - gone:
            for key, value in right.items():
                if key not in left:
                    self._report("added", Place(place, key, None, parse(bytes(value))))
        return True

    def _items(self, above: Place | None, step: str | int, old: bytes, new: bytes, levels: int) -> bool:
        left, right = _array(old), _array(new)
        if len(left) != len(right):
            return False
        place = Place(above, step, left, right)
        if self.keyed is not None and self.keyed(place.general()):
            return False
        differ = [index for index, value in enumerate(left) if value != right[index]]
        if self._too_many(differ, left, right):
            return False
        if len(differ) == 1:
            self._texts(place, differ[0], bytes(left[differ[0]]), bytes(right[differ[0]]), levels - 1)
            return True
        _parse_at(differ, left, right)
        differ = [index for index in differ if not same(left[index], right[index])]
        self._elements(place, match_at(left, right, differ))
        return True

    def _too_many(self, differ: list[Any], left: Any, right: Any) -> bool:
        work = self.work + len(left) + len(right)
        if (len(differ) > FEW and 2 * len(differ) > len(left)) or work > self.max_work:
            return True
        self.work = work
        return False


def _is_text(body: bytes) -> bool:
    """Whether it is UTF-8: what is not parsed was not looked into."""
    try:
        return bool(body.decode())
    except UnicodeDecodeError:
        return False


def _parse_at(places: list[int], left: list[Any], right: list[Any]) -> None:
    """All at once: to begin takes longer than to go on."""
    texts = [elements[place] for elements in (left, right) for place in places]
    values = iter(parse(b"[%b]" % b",".join(texts)))
    for elements in (left, right):
        for place in places:
            elements[place] = next(values)


def _is_plain(members: dict[str, Raw], length: int) -> bool:
    """Whether nothing is in the text but these members: no spaces, no escapes in keys, and no key that comes again."""
    return len("".join(members).encode()) + sum(map(len, members.values())) + 4 * len(members) + 1 == length
