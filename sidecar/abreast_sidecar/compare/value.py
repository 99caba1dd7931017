"""JSON values: reading them without losing anything, and telling them apart as JSON does, not as Python does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted
from math import isfinite
from typing import Any

import orjson
from msgspec import Raw
from orjson import dumps, loads

MAX_VALUE_CHARS = 500  # characters of a value that are kept in a difference

# orjson turns integers beyond 64 bits into floats, and cuts fractions, so that two different ids or amounts look equal.
# Bodies with so long a row of digits are read by the slower reader; looking at every third byte first finds out that
# there is none. 18 digits in a row are the fewest that no float has to have.
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER_DIGITS = b"0" * 18
_LONG_NUMBER_SAMPLE = b"0" * (18 // 3)

MAX_FLOAT_CHARS = 16  # characters of a number that a float holds for certain

_ASCII_ENCODER = json.JSONEncoder(separators=(",", ":"))
_TYPE_NAMES = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}


class NotJsonError(ValueError):
    pass


class NonFiniteNumber(float):
    """NaN or an infinity. orjson would write it as null, and refuses a subclass: so `canonical` tells them apart.

    NaN equals itself, since it is no change.
    """

    __slots__ = ()
    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return type(other) is NonFiniteNumber and repr(self) == repr(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class LongNumber(str):
    """A number that no 64-bit float holds exactly: its digits and exponent, after a word that no number begins with."""

    __slots__ = ()
    PREFIX = "number "

    def digits(self) -> str:
        return self.removeprefix(self.PREFIX)


class RepeatedKey(str):
    """Stands for a key whose value is lost to most readers, since the key comes again in the same object."""

    __slots__ = ()


def parse(body: bytes) -> Any:
    """As `read`."""
    try:
        value = loads(body)
        if dumps(value) == body:
            return value
    except (orjson.JSONDecodeError, TypeError):
        pass
    return parse_with_text(body)[0]


def parse_with_text(body: bytes) -> tuple[Any, bytes]:
    """The value, and a text of it that is equal where two values are (but not only there); the text may be empty.

    Raise NotJsonError for what is no JSON. NaN, infinities, big integers, lone surrogates and repeated keys are
    read as they are.
    """
    try:
        value = loads(body)
        text = dumps(value)
    except (orjson.JSONDecodeError, TypeError):
        return parse_exact(body), b""  # it may still be what only the lenient reader takes
    if text == body:
        return value, text
    if text.count(b":") != body.count(b":") or text.count(b"null") != body.count(b"null"):
        return parse_exact(body), b""
    if _may_hold_long_numbers(body):
        return parse_exact(body), b""
    return value, text


def parse_raw(value: Any) -> Any:
    """The value of what was not parsed, since both sides have the same text."""
    return parse(bytes(value)) if type(value) is Raw else value


def parse_exact(body: bytes) -> Any:
    try:
        return json.loads(
            body, parse_constant=NonFiniteNumber, parse_float=_parse_float, object_pairs_hook=_make_object
        )
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def _may_hold_long_numbers(body: bytes) -> bool:
    return _LONG_NUMBER_SAMPLE in body[::3].translate(
        _DIGITS_TO_ZERO
    ) and _LONG_NUMBER_DIGITS in body.translate(_DIGITS_TO_ZERO)


def _parse_float(text: str) -> float | LongNumber:
    number = float(text)
    if len(text) < MAX_FLOAT_CHARS and isfinite(number):
        return number
    digits = _canonical_number(text)
    return (
        number
        if isfinite(number) and digits == _canonical_number(repr(number))
        else LongNumber(LongNumber.PREFIX + digits)
    )


def _canonical_number(text: str) -> str:
    """Equal where two numbers are, however they are written."""
    try:
        sign, digits, exponent = Decimal(text).as_tuple()
    except InvalidOperation:  # an exponent of more than 18 digits
        return text.lower()
    significant = "".join(map(str, digits)).lstrip("0")
    trimmed = significant.rstrip("0")
    if not trimmed:
        return "0"
    return f"{'-' * sign}{trimmed}e{int(exponent) + len(significant) - len(trimmed)}"


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last of equal keys wins, as everywhere; the others stay visible under a name of their own."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    last = {key: index for index, (key, _) in enumerate(pairs)}
    counts: dict[str, int] = {}
    for index, (key, value) in enumerate(pairs):
        if last[key] != index:
            counts[key] = counts.get(key, 0) + 1
            result[
                RepeatedKey(f"{key} (repeated)" if counts[key] == 1 else f"{key} (repeated {counts[key]})")
            ] = value
    return result


def encode_canonical(value: Any) -> bytes:
    """Text that is equal exactly where two values are equal as JSON: 1, 1.0, true and "1" all differ."""
    try:
        return dumps(value, None, orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate, or deeper than orjson goes
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def is_json_equal(value: Any, other: Any) -> bool:
    """Whether two values are equal as JSON. To Python, so are 1 and true."""
    if value != other:
        return False
    try:
        if dumps(value) == dumps(other):
            return True
    except TypeError:
        pass
    return encode_canonical(value) == encode_canonical(other)


def render_value(value: Any) -> str:
    """The value as ASCII JSON text, cut at VALUE_LIMIT characters; the work is bounded too."""
    kind = type(value)
    if kind is int or kind is float:
        text = repr(value)
    elif kind is str:
        text = quoted(value[:MAX_VALUE_CHARS])
    elif kind is list or kind is dict:
        text = _render_start(value)
    elif kind is LongNumber:
        text = value.digits()
    else:
        text = _ASCII_ENCODER.encode(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def _render_start(value: Any) -> str:
    """The text of a small value, or at least VALUE_LIMIT + 1 characters of it."""
    pieces, length = [], 0
    for piece in _render_pieces(value):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_VALUE_CHARS:
            break
    return "".join(pieces)


def _render_pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for index, (key, inner) in enumerate(islice(value.items(), MAX_VALUE_CHARS)):
            yield f"{',' if index else ''}{quoted(key[:MAX_VALUE_CHARS])}:"
            yield from _render_pieces(inner)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, inner in enumerate(islice(value, MAX_VALUE_CHARS)):
            if index:
                yield ","
            yield from _render_pieces(inner)
        yield "]"
    elif type(value) is Raw:
        yield from _render_pieces(parse_raw(value))
    else:
        yield quoted(value[:MAX_VALUE_CHARS]) if isinstance(value, str) else _ASCII_ENCODER.encode(value)


def type_name(value: Any) -> str:
    """In JSON's words; 1 and 1.0 are both numbers."""
    return _TYPE_NAMES.get(type(value), "number")
