"""The format of a body, its content coding, and the cost of parsing it."""

from __future__ import annotations

import codecs
import importlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

DecodeProblem = Literal["", "corrupt", "too large", "unknown"]
Format = Literal["json", "ndjson", "events", "form", "multipart", "html", "xml", "text", "bytes", "unknown"]

GRPC_TYPE, GRPC_PROTO_TYPE = "application/grpc", "application/grpc+proto"
GRPC_OBJECT_TYPE, GRPC_LINES_TYPE = "application/grpc+json", "application/grpc+ndjson"  # the collector converted them
_MEDIA_TYPES: dict[Format, tuple[str, ...]] = {
    "json": ("application/json", "application/x-json", "text/json"),
    "ndjson": (
        GRPC_LINES_TYPE, "application/json-seq", "application/jsonl", "application/jsonlines", "application/ndjson",
        "application/stream+json", "application/x-jsonlines", "application/x-ndjson",
    ),
    "events": ("text/event-stream",),
    "form": ("application/x-www-form-urlencoded",),
    "html": ("text/html",),
    "xml": ("application/xml", "text/xml"),
    "text": ("application/graphql", "application/javascript", "application/toml", "application/yaml"),
    "unknown": ("application/octet-stream",),
}  # fmt: skip
_FORMATS_BY_MEDIA_TYPE = {name: format_ for format_, names in _MEDIA_TYPES.items() for name in names}
_BINARY_PREFIXES = ("image/", "audio/", "video/", "font/", "application/pdf", "application/zip", GRPC_TYPE)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python has codecs that are no charsets, and some are slow on crafted input.
_CHARSET_PREFIXES = ("utf", "iso8859", "cp", "ascii", "gb", "big5", "shift_jis", "euc_", "koi8", "iso2022", "mac-")
_PARAMETER = re.compile(r';([^;="]*)=\s*(?:"((?:[^"\\]|\\.)*)"\s*(?=;|$)|([^;]*))')
_CONTROL_BYTES = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")
GZIP_OR_ZLIB_WBITS = 47  # 15, plus 32 to detect the header
RAW_DEFLATE_WBITS = -15  # some servers send raw streams as deflate
MAX_CODINGS = 3  # nested codings of one body
MAX_GZIP_MEMBERS = 1000  # concatenated streams of one body


@dataclass(frozen=True, slots=True)
class MediaType:
    essence: str  # "text/html", in lower case; may be empty
    parameters: tuple[tuple[str, str], ...]  # sorted, names in lower case
    format: Format

    def get_parameter(self, name: str) -> str:
        return next((value for key, value in self.parameters if key == name), "")


@lru_cache(maxsize=512)
def parse_media_type(content_type: str) -> MediaType:
    essence, _, text = content_type.partition(";")
    essence = essence.strip().lower()
    matches = _PARAMETER.findall(f";{text}")
    parameters = {name.strip().lower(): quoted_value or value.strip() for name, quoted_value, value in matches}
    parameters.pop("", None)
    return MediaType(essence, tuple(sorted(parameters.items())), _detect_format(essence))


def _detect_format(essence: str) -> Format:
    if essence in _FORMATS_BY_MEDIA_TYPE:
        return _FORMATS_BY_MEDIA_TYPE[essence]
    if essence.endswith("+json"):
        return "json"
    if essence.endswith("+xml"):
        return "xml"
    if essence.startswith("multipart/"):
        return "multipart"
    if essence.startswith("text/"):
        return "text"
    return "bytes" if essence.startswith(_BINARY_PREFIXES) else "unknown"


def sniff_format(body: bytes) -> Format:
    """Guess the format from the first bytes."""
    head = body[:512].lstrip(codecs.BOM_UTF8).lstrip()[:64].lower()
    if head[:1] in {b"{", b"["}:
        return "json"
    if head.startswith((b"<!doctype html", b"<html")):
        return "html"
    if head.startswith(b"<?xml"):
        return "xml"
    return "bytes" if _CONTROL_BYTES.intersection(body[:512]) else "text"


def find_byte_order_mark(body: bytes) -> tuple[bytes, str]:
    """Return the mark and its encoding, both empty if the body has none."""
    return next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if body.startswith(mark)), (b"", ""))


def decode_text(body: bytes, charset: str) -> str | None:
    """Decode by byte order mark, charset or UTF-8. Return None if the body is not text in any of them."""
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


class DecodeResult(NamedTuple):
    data: bytes  # the body as it was sent if there is a problem
    problem: DecodeProblem = ""
    coding: str = ""  # the coding that has the problem


class _TooLargeError(Exception):
    pass


def decode_content(body: bytes, content_encoding: str, limit: int) -> DecodeResult:
    """Undo the codings of a `content-encoding` header. The result has at most `limit` bytes."""
    codings = [name.strip().lower() for name in content_encoding.split(",") if name.strip()]
    data = body
    for coding in reversed(codings):
        if coding == "identity":
            continue
        if coding not in _CONTENT_DECODERS or len(codings) > MAX_CODINGS:
            return DecodeResult(body, "unknown", coding)
        try:
            data = _CONTENT_DECODERS[coding](data, limit)
        except _TooLargeError:
            return DecodeResult(body, "too large", coding)
        except ImportError:
            return DecodeResult(body, "unknown", coding)
        except Exception:  # noqa: BLE001  # each library has its own errors
            return DecodeResult(body, "corrupt", coding)
    return DecodeResult(data)


def _check_size(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise _TooLargeError
    return data


def _decode_gzip(body: bytes, limit: int) -> bytes:
    pieces: list[bytes] = []
    length = 0
    for _ in range(MAX_GZIP_MEMBERS):
        decompressor = zlib.decompressobj(GZIP_OR_ZLIB_WBITS)
        pieces.append(_check_size(decompressor.decompress(body, limit + 1 - length), limit - length))
        length += len(pieces[-1])
        if not decompressor.eof:
            raise ValueError("the stream ends early")
        body = decompressor.unused_data
        if not body.strip(b"\0"):
            return b"".join(pieces)
    raise _TooLargeError


def _decode_deflate(body: bytes, limit: int) -> bytes:
    try:
        return _decode_gzip(body, limit)
    except zlib.error:
        decompressor = zlib.decompressobj(RAW_DEFLATE_WBITS)
        data = _check_size(decompressor.decompress(body, limit + 1), limit)
        if not decompressor.eof:
            raise ValueError("the stream ends early") from None
        return data


def _decode_zstd(body: bytes, limit: int) -> bytes:
    import zstandard

    # decompress(max_output_size=...) trusts the size in the frame header.
    reader = zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True)
    data = _check_size(reader.read(limit + 1), limit)
    decompressor = zstandard.ZstdDecompressor().decompressobj()  # the reader doesn't detect a truncated frame
    decompressor.decompress(body)
    if not decompressor.eof:
        raise ValueError("the stream ends early")
    return data


def _decode_brotli(body: bytes, limit: int) -> bytes:
    """Decode with the optional package brotli. Raise ImportError if it is not installed."""
    decompressor: Any = importlib.import_module("brotli").Decompressor()
    data = _check_size(decompressor.process(body, output_buffer_limit=limit + 1), limit)
    if not decompressor.is_finished():
        raise ValueError("the stream ends early")
    return bytes(data)


_CONTENT_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _decode_gzip,
    "x-gzip": _decode_gzip,
    "deflate": _decode_deflate,
    "br": _decode_brotli,
    "zstd": _decode_zstd,
}


class FormatCost(NamedTuple):
    separator: bytes  # occurs about once per item
    tenths_per_item: int  # tenths of a step to parse an item, measured; a step is about 1 µs


FORMAT_COSTS: dict[Format, FormatCost] = {
    "json": FormatCost(b",", 2),
    "ndjson": FormatCost(b"\n", 60),
    "events": FormatCost(b"\n", 60),
    "form": FormatCost(b"&", 40),
    "multipart": FormatCost(b"\r\n\r\n", 100),
    "html": FormatCost(b"<", 120),
    "xml": FormatCost(b"<", 80),
    "text": FormatCost(b"\n", 20),
}


def estimate_parse_cost(format_: Format, *bodies: bytes) -> int:
    """Estimate the steps to parse bodies, from the number of their items."""
    cost = FORMAT_COSTS.get(format_)
    return sum(body.count(cost.separator) for body in bodies) * cost.tenths_per_item // 10 if cost else 0
