"""Bodies without their content coding, never larger than a bound: a small body may decode to gigabytes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

GZIP_OR_ZLIB = 47  # zlib's wbits: 15, plus 32 to find out which
RAW_DEFLATE = -15  # what some servers send as deflate
MAX_CODINGS = 3  # one over another
MAX_MEMBERS = 1000  # gzip allows several, one after another

Problem = Literal["", "corrupt", "too large", "unknown"]


class Decoded(NamedTuple):
    """`data` is the body as it came where there is a problem."""

    data: bytes
    problem: Problem = ""
    coding: str = ""  # the one that is the problem


class _TooLargeError(Exception):
    pass


def decoded(body: bytes, encoding: str, limit: int) -> Decoded:
    """`encoding` is the header's value, `limit` in bytes."""
    codings = [name.strip().lower() for name in encoding.split(",") if name.strip()]
    data = body
    for coding in reversed(codings):
        if coding == "identity":
            continue
        reader = _READERS.get(coding)
        if reader is None or len(codings) > MAX_CODINGS:
            return Decoded(body, "unknown", coding)
        try:
            data = reader(data, limit)
        except _TooLargeError:
            return Decoded(body, "too large", coding)
        except ImportError:
            return Decoded(body, "unknown", coding)
        except Exception:  # noqa: BLE001  # each library has errors of its own
            return Decoded(body, "corrupt", coding)
    return Decoded(data)


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise _TooLargeError
    return data


def _gzip(body: bytes, limit: int) -> bytes:
    pieces: list[bytes] = []
    length = 0
    for _ in range(MAX_MEMBERS):
        reader = zlib.decompressobj(GZIP_OR_ZLIB)
        pieces.append(_bounded(reader.decompress(body, limit + 1 - length), limit - length))
        length += len(pieces[-1])
        if not reader.eof:
            raise ValueError("the stream ends early")
        body = reader.unused_data
        if not body.strip(b"\0"):
            return b"".join(pieces)
    raise _TooLargeError


def _deflate(body: bytes, limit: int) -> bytes:
    try:
        return _gzip(body, limit)
    except zlib.error:
        reader = zlib.decompressobj(RAW_DEFLATE)
        plain = _bounded(reader.decompress(body, limit + 1), limit)
        if not reader.eof:
            raise ValueError("the stream ends early") from None
        return plain


def _zstd(body: bytes, limit: int) -> bytes:
    import zstandard

    # Not decompress(max_output_size=…): it trusts the size that the frame states.
    reader = zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True)
    plain = _bounded(reader.read(limit + 1), limit)
    whole = zstandard.ZstdDecompressor().decompressobj()  # the reader can't tell where a frame was cut
    whole.decompress(body)
    if not whole.eof:
        raise ValueError("the stream ends early")
    return plain


def _brotli(body: bytes, limit: int) -> bytes:
    """Raise ImportError where the package is not installed."""
    reader: Any = importlib.import_module("brotli").Decompressor()
    plain = _bounded(reader.process(body, output_buffer_limit=limit + 1), limit)
    if not reader.is_finished():
        raise ValueError("the stream ends early")
    return bytes(plain)


_READERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
