"""Text that Postgres takes. It refuses NUL and lone surrogates, and an index refuses long keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

NUL = "␀"  # stands for a zero byte, which no text in Postgres may hold
MARK = "…"  # stands for what was cut
DIGEST = 4  # bytes that tell apart what begins alike


def clean(text: str, limit: int) -> str:
    """At most `limit` characters. What is cut ends in a digest of the whole, so that different texts stay different."""
    if len(text) > limit:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).hexdigest()
        text = text[: limit - len(digest) - 1] + MARK + digest
    if "\0" in text:
        text = text.replace("\0", NUL)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def json_text(records: Any) -> bytes:
    """JSON of plain dicts, lists, strings and numbers that `jsonb` takes."""
    try:
        text = orjson.dumps(records)
    except TypeError:  # a lone surrogate
        return orjson.dumps(_cleaned(records))
    return orjson.dumps(_cleaned(records)) if b"\\u0000" in text else text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value, len(value))
    if isinstance(value, Mapping):
        return {_cleaned(name): _cleaned(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_cleaned(part) for part in value]
    return value
