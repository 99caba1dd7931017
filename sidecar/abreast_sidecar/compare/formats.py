"""Two bodies of one format as two documents, to be compared by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from abreast_sidecar.compare import items, markup
from abreast_sidecar.compare.media import Format, Media, byte_order_mark
from abreast_sidecar.compare.media import text as text_of


class Plain(NamedTuple):
    """A body without content coding."""

    data: bytes
    media: Media


@dataclass(frozen=True, slots=True)
class Pair:
    old: Any
    new: Any
    root: str  # what paths begin with
    alike: Callable[[], bool] = lambda: True  # of equal documents: whether the bodies mean the same


class UnreadableError(ValueError):
    """A side is not what it claims to be: `old` and `new` say which."""

    def __init__(self, *, old: bool, new: bool) -> None:
        super().__init__("not what it claims to be")
        self.old = old
        self.new = new


def documents(kind: Format, old: Plain, new: Plain) -> Pair:
    """Raise UnreadableError where a side is not of that format, or of one that has no structure."""
    if kind not in _READERS:
        raise UnreadableError(old=True, new=True)
    root, reader = _READERS[kind]
    left, right = _tried(reader, old), _tried(reader, new)
    if left is _FAILED or right is _FAILED:
        raise UnreadableError(old=left is _FAILED, new=right is _FAILED)
    if isinstance(left, markup.Element):
        one, other = markup.documents(left, right)
        if left.tag != right.tag and kind == "xml":
            one, other = {left.tag: one}, {right.tag: other}
        return Pair(one, other, root, lambda: markup.same_order(left, right))
    return Pair(left, right, root)


_FAILED: Any = object()


def _tried(reader: Callable[[Plain], Any], side: Plain) -> Any:
    try:
        return reader(side)
    except (ValueError, RecursionError):
        return _FAILED


def json_text(data: bytes) -> bytes:
    """Without a byte order mark, and in UTF-8 where the mark says another encoding. Raise ValueError."""
    mark, name = byte_order_mark(data)
    if not mark:
        return data
    return data[len(mark) :] if name == "utf-8" else data.decode(name).encode()


def _text(side: Plain) -> str:
    found = text_of(side.data, side.media.parameter("charset"))
    if found is None:
        raise ValueError("no text")
    return found


def _xml(side: Plain) -> markup.Element:
    charset = side.media.parameter("charset")
    return markup.read_xml(_text(side) if charset and b"encoding=" not in side.data[:100] else side.data)


_READERS: dict[Format, tuple[str, Callable[[Plain], Any]]] = {
    "ndjson": ("$", lambda side: items.ndjson(side.data)),
    "events": ("events", lambda side: items.events(_text(side))),
    "form": ("form", lambda side: items.form(_text(side))),
    "multipart": ("parts", lambda side: items.multipart(side.data, side.media)),
    "html": ("html", lambda side: markup.read_html(_text(side))),
    "xml": ("xml", _xml),
    "text": ("lines", lambda side: items.lines(_text(side))),
}
