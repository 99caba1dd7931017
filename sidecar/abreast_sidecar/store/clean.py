"""Text that Postgres takes. It refuses NUL and lone surrogates, and an index refuses long keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

NUL_PLACEHOLDER = "␀"  # stands for a zero byte, which no text in Postgres may hold
TRUNCATION_MARK = "…"  # stands for what was cut
TRUNCATION_DIGEST_BYTES = 4  # bytes that tell apart what begins alike


def sanitise_text(text: str, max_chars: int) -> str:
    """At most `limit` characters. What is cut ends in a digest of the whole, so that different texts stay different."""
    if len(text) > max_chars:
        digest = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=TRUNCATION_DIGEST_BYTES
        ).hexdigest()
        text = text[: max_chars - len(digest) - 1] + TRUNCATION_MARK + digest
    if "\0" in text:
        text = text.replace("\0", NUL_PLACEHOLDER)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def to_json(records: Any) -> bytes:
    """JSON of plain dicts, lists, strings and numbers that `jsonb` takes."""
    try:
        text = orjson.dumps(records)
    except TypeError:  # a lone surrogate
        return orjson.dumps(_sanitise_value(records))
    return orjson.dumps(_sanitise_value(records)) if b"\\u0000" in text else text


def _sanitise_value(value: Any) -> Any:
    if isinstance(value, str):
        return sanitise_text(value, len(value))
    if isinstance(value, Mapping):
        return {_sanitise_value(name): _sanitise_value(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_sanitise_value(part) for part in value]
    return value
