"""JSON values: reading them without losing anything, and telling them apart as JSON does, not as Python does."""

from __future__ import annotations

import json
from typing import Any

import orjson

VALUE_LIMIT = 500  # characters of a value that are kept in a difference

# orjson turns integers above 2⁶⁴ into floats, so that two different ids look equal. Bodies with so long a row of digits
# are read by the slower reader; finding one this way takes a tenth of a regular expression's time.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19


_ascii = json.JSONEncoder(separators=(",", ":"))


class NotJsonError(ValueError):
    pass


class Constant(float):
    """NaN or an infinity. orjson would write it as null, and refuses a subclass: so `canonical` tells them apart."""


def parse(body: bytes) -> Any:
    """Raise NotJsonError for what is no JSON. NaN, infinities, big integers and lone surrogates are read as they are."""
    if _LONG_NUMBER not in body.translate(_DIGITS):
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            pass  # it may still be what only the lenient reader takes
    try:
        return json.loads(body, parse_constant=Constant)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def canonical(value: Any) -> bytes:
    """Text that is equal exactly where two values are equal as JSON: 1, 1.0, true and "1" all differ."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate, or deeper than orjson goes
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def shown(value: Any) -> str:
    """The value as ASCII JSON text, cut at VALUE_LIMIT characters."""
    text = _ascii.encode(value)
    return text if len(text) <= VALUE_LIMIT else text[: VALUE_LIMIT - 1] + "…"


def type_name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
