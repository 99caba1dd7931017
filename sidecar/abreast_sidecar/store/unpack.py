"""Reads the captures of an example: each after its length (4 bytes, big endian), compressed together by Examples."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import suppress

import zstandard

from abreast.capture import Capture, decode
from abreast.errors import CaptureError
from abreast_sidecar.errors import LedgerError

LARGEST = 64 * 1024 * 1024  # bytes, uncompressed
PREFIX = 4  # bytes


def unpack(content: bytes) -> tuple[Capture, ...]:
    """Those captures that this code can read. Raise LedgerError for a damaged example."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as reader:
            joined = reader.read(LARGEST + 1)
    except zstandard.ZstdError as error:
        raise LedgerError(f"an example in the ledger is damaged: {error}") from error
    if len(joined) > LARGEST:
        raise LedgerError(f"an example in the ledger is larger than {LARGEST} bytes")
    return tuple(_captures(joined))


def _captures(joined: bytes) -> Iterable[Capture]:
    place = 0
    while place < len(joined):
        length = int.from_bytes(joined[place : place + PREFIX], "big")
        place += PREFIX
        with suppress(CaptureError):  # of a format that this code does not know
            yield decode(joined[place : place + length])
        place += length
