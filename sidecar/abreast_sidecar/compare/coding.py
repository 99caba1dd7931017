"""Bodies without their content coding, never larger than a bound: a small body may decode to gigabytes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

GZIP_OR_ZLIB_WBITS = 47  # zlib's wbits: 15, plus 32 to find out which
RAW_DEFLATE_WBITS = -15  # what some servers send as deflate
MAX_CODINGS = 3  # one over another
MAX_GZIP_MEMBERS = 1000  # gzip allows several, one after another

DecodeProblem = Literal["", "corrupt", "too large", "unknown"]


class DecodeResult(NamedTuple):
    """`data` is the body as it came where there is a problem."""

    data: bytes
    problem: DecodeProblem = ""
    coding: str = ""  # the one that is the problem


class _TooLargeError(Exception):
    pass


def decode_content(body: bytes, content_encoding: str, limit: int) -> DecodeResult:
    """`encoding` is the header's value, `limit` in bytes."""
    codings = [name.strip().lower() for name in content_encoding.split(",") if name.strip()]
    data = body
    for coding in reversed(codings):
        if coding == "identity":
            continue
        decode = _CONTENT_DECODERS.get(coding)
        if decode is None or len(codings) > MAX_CODINGS:
            return DecodeResult(body, "unknown", coding)
        try:
            data = decode(data, limit)
        except _TooLargeError:
            return DecodeResult(body, "too large", coding)
        except ImportError:
            return DecodeResult(body, "unknown", coding)
        except Exception:  # noqa: BLE001  # each library has errors of its own
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

    # Not decompress(max_output_size=…): it trusts the size that the frame states.
    reader = zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True)
    data = _check_size(reader.read(limit + 1), limit)
    decompressor = zstandard.ZstdDecompressor().decompressobj()  # the reader can't tell where a frame was cut
    decompressor.decompress(body)
    if not decompressor.eof:
        raise ValueError("the stream ends early")
    return data


def _decode_brotli(body: bytes, limit: int) -> bytes:
    """Raise ImportError where the package is not installed."""
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
