"""Two bodies of one format as two documents, to be compared by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from abreast_sidecar.compare import items, markup
from abreast_sidecar.compare.media import Format, MediaType, find_byte_order_mark
from abreast_sidecar.compare.media import decode_text as text_of


class DecodedBody(NamedTuple):
    """A body without content coding."""

    data: bytes
    media_type: MediaType


@dataclass(frozen=True, slots=True)
class DocumentPair:
    old: Any
    new: Any
    root: str  # what paths begin with
    is_equivalent: Callable[[], bool] = lambda: True  # of equal documents: whether the bodies mean the same


class UnreadableError(ValueError):
    """A side is not what it claims to be: `old` and `new` say which."""

    def __init__(self, *, old: bool, new: bool) -> None:
        super().__init__("not what it claims to be")
        self.old = old
        self.new = new


def parse_both(format_: Format, old: DecodedBody, new: DecodedBody) -> DocumentPair:
    """Raise UnreadableError where a side is not of that format, or of one that has no structure."""
    if format_ not in _DOCUMENT_PARSERS:
        raise UnreadableError(old=True, new=True)
    root, parser = _DOCUMENT_PARSERS[format_]
    left, right = _try_parse(parser, old), _try_parse(parser, new)
    if left is _PARSE_FAILED or right is _PARSE_FAILED:
        raise UnreadableError(old=left is _PARSE_FAILED, new=right is _PARSE_FAILED)
    if isinstance(left, markup.Element):
        old_document, new_document = markup.to_documents(left, right)
        if left.tag != right.tag and format_ == "xml":
            old_document, new_document = {left.tag: old_document}, {right.tag: new_document}
        return DocumentPair(old_document, new_document, root, lambda: markup.has_same_order(left, right))
    return DocumentPair(left, right, root)


_PARSE_FAILED: Any = object()


def _try_parse(parser: Callable[[DecodedBody], Any], side: DecodedBody) -> Any:
    try:
        return parser(side)
    except (ValueError, RecursionError):
        return _PARSE_FAILED


def normalise_json_encoding(data: bytes) -> bytes:
    """Without a byte order mark, and in UTF-8 where the mark says another encoding. Raise ValueError."""
    mark, name = find_byte_order_mark(data)
    if not mark:
        return data
    return data[len(mark) :] if name == "utf-8" else data.decode(name).encode()


def _read_text(side: DecodedBody) -> str:
    text = text_of(side.data, side.media_type.get_parameter("charset"))
    if text is None:
        raise ValueError("no text")
    return text


def _read_xml_body(side: DecodedBody) -> markup.Element:
    charset = side.media_type.get_parameter("charset")
    return markup.read_xml(_read_text(side) if charset and b"encoding=" not in side.data[:100] else side.data)


_DOCUMENT_PARSERS: dict[Format, tuple[str, Callable[[DecodedBody], Any]]] = {
    "ndjson": ("$", lambda side: items.parse_ndjson(side.data)),
    "events": ("events", lambda side: items.parse_sse(_read_text(side))),
    "form": ("form", lambda side: items.parse_form(_read_text(side))),
    "multipart": ("parts", lambda side: items.parse_multipart(side.data, side.media_type)),
    "html": ("html", lambda side: markup.read_html(_read_text(side))),
    "xml": ("xml", _read_xml_body),
    "text": ("lines", lambda side: items.split_lines(_read_text(side))),
}
