"""Page tokens: where a listing goes on, bound to the listing's filters. Pure.

A token is text that says nothing to a client. Its checksum catches what was damaged, and what belongs to other
filters; it is no signature, since a forged place in a listing shows nothing that the listing would not.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from abreast_sidecar.errors import ArgumentError

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
CURSOR_CHECKSUM_BYTES = 8  # bytes


@dataclass(frozen=True, slots=True)
class PageRequest:
    size: int
    token: str = ""

    @classmethod
    def from_request(cls, size: int, token: str) -> PageRequest:
        """Check what a request says; 0 means the default size."""
        if not 0 <= size <= MAX_PAGE_SIZE:
            raise ArgumentError(
                f"page_size must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, got {size}"
            )
        return cls(size or DEFAULT_PAGE_SIZE, token)


def encode_cursor(listing: str, filters: Mapping[str, Any], position: list[Any]) -> str:
    content = orjson.dumps(position)
    return (
        base64.urlsafe_b64encode(_compute_cursor_checksum(listing, filters, content) + content)
        .decode()
        .rstrip("=")
    )


def decode_cursor(listing: str, filters: Mapping[str, Any], token: str) -> list[Any]:
    """Raise ArgumentError for what `encode` did not make of the same listing and filters."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    checksum, content = raw[:CURSOR_CHECKSUM_BYTES], raw[CURSOR_CHECKSUM_BYTES:]
    if not content or checksum != _compute_cursor_checksum(listing, filters, content):
        raise ArgumentError(
            "page_token must be the next_page_token of the last answer, with the filters unchanged; "
            "leave it empty to begin anew"
        )
    position: list[Any] = orjson.loads(content)
    return position


def _compute_cursor_checksum(listing: str, filters: Mapping[str, Any], content: bytes) -> bytes:
    scope = orjson.dumps([listing, filters], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(scope + content, digest_size=CURSOR_CHECKSUM_BYTES).digest()
