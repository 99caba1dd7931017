"""What a body is: by its content type, or by its beginning where that is missing or plainly wrong."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Format = Literal["json", "ndjson", "events", "form", "multipart", "html", "xml", "text", "bytes", "unknown"]

_FORMATS_BY_MEDIA_TYPE: dict[str, Format] = {
    "application/json": "json",
    "text/json": "json",
    "application/x-json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/x-jsonlines": "ndjson",
    "application/jsonlines": "ndjson",
    "application/json-seq": "ndjson",
    "application/stream+json": "ndjson",
    "text/event-stream": "events",
    "application/x-www-form-urlencoded": "form",
    "text/html": "html",
    "application/xml": "xml",
    "text/xml": "xml",
    "application/javascript": "text",
    "application/yaml": "text",
    "application/toml": "text",
    "application/graphql": "text",
    "application/octet-stream": "unknown",
}
_BINARY_PREFIXES = (
    "image/",
    "audio/",
    "video/",
    "font/",
    "application/pdf",
    "application/zip",
    "application/grpc",
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python knows codecs that are no charsets, and some of them are slow on purpose-made input.
_CHARSET_PREFIXES = (
    "utf",
    "iso8859",
    "cp",
    "ascii",
    "gb",
    "big5",
    "shift_jis",
    "euc_",
    "koi8",
    "iso2022",
    "mac-",
)
_PARAMETER = re.compile(r';([^;="]*)=\s*(?:"((?:[^"\\]|\\.)*)"\s*(?=;|$)|([^;]*))')
_CONTROL_BYTES = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")


@dataclass(frozen=True, slots=True)
class MediaType:
    essence: str  # "text/html", lower case; empty where none was said
    parameters: tuple[tuple[str, str], ...]  # names in lower case, sorted
    format: Format

    def get_parameter(self, name: str) -> str:
        return next((value for key, value in self.parameters if key == name), "")


@lru_cache(maxsize=512)
def parse_media_type(content_type: str) -> MediaType:
    essence, _, parameter_text = content_type.partition(";")
    essence = essence.strip().lower()
    return MediaType(essence, _parse_parameters(parameter_text), _detect_format(essence))


def _parse_parameters(text: str) -> tuple[tuple[str, str], ...]:
    parameters = {
        name.strip().lower(): quoted or value.strip()
        for name, quoted, value in _PARAMETER.findall(f";{text}")
    }
    return tuple(sorted((name, value) for name, value in parameters.items() if name))


def _detect_format(essence: str) -> Format:
    exact_match = _FORMATS_BY_MEDIA_TYPE.get(essence)
    if exact_match:
        return exact_match
    if essence.endswith("+json"):
        return "json"
    if essence == "application/xhtml+xml" or essence.endswith("+xml"):
        return "xml"
    if essence.startswith("multipart/"):
        return "multipart"
    if essence.startswith("text/"):
        return "text"
    return "bytes" if essence.startswith(_BINARY_PREFIXES) else "unknown"


def sniff_format(body: bytes) -> Format:
    """What the body begins like."""
    head = body[:512].lstrip(codecs.BOM_UTF8).lstrip()[:64].lower()
    if head[:1] in {b"{", b"["}:
        return "json"
    if head.startswith((b"<!doctype html", b"<html")):
        return "html"
    if head.startswith(b"<?xml"):
        return "xml"
    return "bytes" if _CONTROL_BYTES.intersection(body[:512]) else "text"


def find_byte_order_mark(body: bytes) -> tuple[bytes, str]:
    """The mark and the encoding that it says, or nothing."""
    return next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if body.startswith(mark)), (b"", ""))


def decode_text(body: bytes, charset: str) -> str | None:
    """The body's characters without a byte order mark; nothing where it is no text of that charset."""
    mark, mark_encoding = find_byte_order_mark(body)
    for encoding in (mark_encoding, charset, "utf-8"):
        if not encoding:
            continue
        try:
            if not codecs.lookup(encoding).name.startswith(_CHARSET_PREFIXES):
                continue
            return body[len(mark) if encoding == mark_encoding == "utf-8" else 0 :].decode(encoding)
        except (UnicodeDecodeError, LookupError, ValueError):
            continue
    return None
