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

VALUE_LIMIT = 500  # characters of a value that are kept in a difference

# orjson turns integers beyond 64 bits into floats, and cuts fractions, so that two different ids or amounts look equal.
# Bodies with so long a row of digits are read by the slower reader; looking at every third byte first finds out that
# there is none. 18 digits in a row are the fewest that no float has to have.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 18
_MAYBE_LONG = b"0" * (18 // 3)

FEW_DIGITS = 16  # characters of a number that a float holds for certain

_ascii = json.JSONEncoder(separators=(",", ":"))
_NAMES = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}


class NotJsonError(ValueError):
    pass


class Constant(float):
    """NaN or an infinity. orjson would write it as null, and refuses a subclass: so `canonical` tells them apart.

    NaN equals itself, since it is no change.
    """

    __slots__ = ()
    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return type(other) is Constant and repr(self) == repr(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class LongNumber(str):
    """A number that no 64-bit float holds exactly: its digits and exponent, after a word that no number begins with."""

    __slots__ = ()
    WORD = "number "

    def shown(self) -> str:
        return self.removeprefix(self.WORD)


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
    return read(body)[0]


def read(body: bytes) -> tuple[Any, bytes]:
    """The value, and a text of it that is equal where two values are (but not only there); the text may be empty.

    Raise NotJsonError for what is no JSON. NaN, infinities, big integers, lone surrogates and repeated keys are
    read as they are.
    """
    try:
        value = loads(body)
        text = dumps(value)
    except (orjson.JSONDecodeError, TypeError):
        return slowly(body), b""  # it may still be what only the lenient reader takes
    if text == body:
        return value, text
    if text.count(b":") != body.count(b":") or text.count(b"null") != body.count(b"null"):
        return slowly(body), b""
    if _may_hold_long_numbers(body):
        return slowly(body), b""
    return value, text


def whole(value: Any) -> Any:
    """The value of what was not parsed, since both sides have the same text."""
    return parse(bytes(value)) if type(value) is Raw else value


def slowly(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=Constant, parse_float=_float, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def _may_hold_long_numbers(body: bytes) -> bool:
    return _MAYBE_LONG in body[::3].translate(_DIGITS) and _LONG_NUMBER in body.translate(_DIGITS)


def _float(text: str) -> float | LongNumber:
    number = float(text)
    if len(text) < FEW_DIGITS and isfinite(number):
        return number
    exact = _exact(text)
    return (
        number if isfinite(number) and exact == _exact(repr(number)) else LongNumber(LongNumber.WORD + exact)
    )


def _exact(text: str) -> str:
    """Equal where two numbers are, however they are written."""
    try:
        sign, digits, exponent = Decimal(text).as_tuple()
    except InvalidOperation:  # an exponent of more than 18 digits
        return text.lower()
    significant = "".join(map(str, digits)).lstrip("0")
    short = significant.rstrip("0")
    if not short:
        return "0"
    return f"{'-' * sign}{short}e{int(exponent) + len(significant) - len(short)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last of equal keys wins, as everywhere; the others stay visible under a name of their own."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    last = {key: place for place, (key, _) in enumerate(pairs)}
    times: dict[str, int] = {}
    for place, (key, value) in enumerate(pairs):
        if last[key] != place:
            times[key] = times.get(key, 0) + 1
            made[
                RepeatedKey(f"{key} (repeated)" if times[key] == 1 else f"{key} (repeated {times[key]})")
            ] = value
    return made


def canonical(value: Any) -> bytes:
    """Text that is equal exactly where two values are equal as JSON: 1, 1.0, true and "1" all differ."""
    try:
        return dumps(value, None, orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate, or deeper than orjson goes
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON. To Python, so are 1 and true."""
    if one != other:
        return False
    try:
        if dumps(one) == dumps(other):
            return True
    except TypeError:
        pass
    return canonical(one) == canonical(other)


def shown(value: Any) -> str:
    """The value as ASCII JSON text, cut at VALUE_LIMIT characters; the work is bounded too."""
    kind = type(value)
    if kind is int or kind is float:
        text = repr(value)
    elif kind is str:
        text = quoted(value[:VALUE_LIMIT])
    elif kind is list or kind is dict:
        text = _beginning(value)
    elif kind is LongNumber:
        text = value.shown()
    else:
        text = _ascii.encode(value)
    return text if len(text) <= VALUE_LIMIT else text[: VALUE_LIMIT - 1] + "…"


def _beginning(value: Any) -> str:
    """The text of a small value, or at least VALUE_LIMIT + 1 characters of it."""
    pieces, length = [], 0
    for piece in _pieces(value):
        pieces.append(piece)
        length += len(piece)
        if length > VALUE_LIMIT:
            break
    return "".join(pieces)


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for place, (key, inner) in enumerate(islice(value.items(), VALUE_LIMIT)):
            yield f"{',' if place else ''}{quoted(key[:VALUE_LIMIT])}:"
            yield from _pieces(inner)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for place, inner in enumerate(islice(value, VALUE_LIMIT)):
            if place:
                yield ","
            yield from _pieces(inner)
        yield "]"
    elif type(value) is Raw:
        yield from _pieces(whole(value))
    else:
        yield quoted(value[:VALUE_LIMIT]) if isinstance(value, str) else _ascii.encode(value)


def type_name(value: Any) -> str:
    """In JSON's words; 1 and 1.0 are both numbers."""
    return _NAMES.get(type(value), "number")
