"""Differences between two JSON texts, of which only what differs is parsed.

Most of two answers is equal, byte for byte. Where both have an object or an array at one place, their members are told
apart without being parsed, and equal texts mean the same whatever they hold: long numbers, repeated keys, 1 beside 1.0.
"""

from __future__ import annotations

from typing import Any

from msgspec import DecodeError, Raw
from msgspec.json import Decoder

from abreast_sidecar.compare.array import match_elements_at
from abreast_sidecar.compare.difference import Difference
from abreast_sidecar.compare.document import JsonDiff
from abreast_sidecar.compare.path import JsonPath
from abreast_sidecar.compare.value import is_json_equal, parse

MAX_RAW_DEPTH = 4  # on which members are told apart; each looks at the text again
MIN_RAW_BYTES = 100  # bytes, that are parsed at once
MAX_RAW_DIFFERENCES = 4  # members that may differ though they are most
JSON_WHITESPACE = b" \t\r\n"
_decode_members = Decoder(dict[str, Raw]).decode
_decode_elements = Decoder(list[Raw]).decode


class JsonTextDiff(JsonDiff):
    __slots__ = ()

    def compare_texts(self, old: bytes, new: bytes) -> list[Difference]:
        """Raise NotJsonError where a text is no JSON."""
        if (old.isascii() or _is_utf8(old)) and (new.isascii() or _is_utf8(new)):
            try:
                self._diff_texts(
                    None, self.root, old.strip(JSON_WHITESPACE), new.strip(JSON_WHITESPACE), MAX_RAW_DEPTH
                )
            except (DecodeError, RecursionError):  # the lenient reader may take it
                self.reset()
            else:
                return self.differences
        return self.compare(parse(old), parse(new))

    def _diff_texts(
        self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int
    ) -> None:
        first_byte = old[:1]
        if levels and first_byte == new[:1] and len(old) > MIN_RAW_BYTES < len(new):
            if first_byte == b"{" and self._diff_members(parent, step, old, new, levels):
                return
            if first_byte == b"[" and self._diff_raw_elements(parent, step, old, new, levels):
                return
        self._diff_value(JsonPath(parent, step, parse(old), parse(new)))

    def _diff_members(
        self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int
    ) -> bool:
        """Nothing is done and False returned where it is better to parse them."""
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

    def _diff_raw_elements(
        self, parent: JsonPath | None, step: str | int, old: bytes, new: bytes, levels: int
    ) -> bool:
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
    """Whether it is UTF-8: what is not parsed was not looked into."""
    try:
        return bool(body.decode())
    except UnicodeDecodeError:
        return False


def _parse_at(indices: list[int], left: list[Any], right: list[Any]) -> None:
    """All at once: to begin takes longer than to go on."""
    texts = [elements[index] for elements in (left, right) for index in indices]
    values = iter(parse(b"[%b]" % b",".join(texts)))
    for elements in (left, right):
        for index in indices:
            elements[index] = next(values)


def _is_compact(members: dict[str, Raw], length: int) -> bool:
    """Whether nothing is in the text but these members: no spaces, no escapes in keys, and no key that comes again."""
    return len("".join(members).encode()) + sum(map(len, members.values())) + 4 * len(members) + 1 == length
