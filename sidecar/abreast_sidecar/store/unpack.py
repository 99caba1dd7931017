"""Reads the captures of an example: each after its length (4 bytes, big endian), compressed together by Examples."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import suppress

import zstandard

from abreast.capture import Capture, decode
from abreast.errors import CaptureError
from abreast_sidecar.errors import LedgerError

MAX_EXAMPLE_BYTES = 64 * 1024 * 1024  # bytes, uncompressed
BLOB_PREFIX_BYTES = 4  # bytes


def read_captures(content: bytes) -> tuple[Capture, ...]:
    """Those captures that this code can read. Raise LedgerError for a damaged example."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
            blobs = reader.read(MAX_EXAMPLE_BYTES + 1)
    except zstandard.ZstdError as error:
        raise LedgerError(f"an example in the ledger is damaged: {error}") from error
    if len(blobs) > MAX_EXAMPLE_BYTES:
        raise LedgerError(f"an example in the ledger is larger than {MAX_EXAMPLE_BYTES} bytes")
    return tuple(_split_captures(blobs))


def _split_captures(blobs: bytes) -> Iterable[Capture]:
    offset = 0
    while offset < len(blobs):
        length = int.from_bytes(blobs[offset : offset + BLOB_PREFIX_BYTES], "big")
        offset += BLOB_PREFIX_BYTES
        with suppress(CaptureError):  # of a format that this code does not know
            yield decode(blobs[offset : offset + length])
        offset += length
