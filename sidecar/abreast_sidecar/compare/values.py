"""Parsing and rendering of JSON values, and the shape of a value: its kind and format.

Values of one shape differ only in content. A shape does not tell what a value means: two product ids may both be UUIDs.
`volatile.py` decides which differences a shape may explain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import Any, NamedTuple

import orjson
from msgspec import Raw
from orjson import dumps, loads

MAX_VALUE_CHARS = 500  # longer rendered values are truncated

MAX_FLOAT_CHARS = 16  # shorter numbers are exact as a float

# orjson turns integers beyond 64 bits into floats and rounds fractions, so that two different ids look equal. The slower
# parser reads bodies whose long numbers orjson writes in another way. A search in every third byte rules most bodies out.
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789.", b"0000000000")
_LONG_NUMBER_DIGITS = b"0" * MAX_FLOAT_CHARS
_LONG_NUMBER_SAMPLE = b"0" * (MAX_FLOAT_CHARS // 3)
_LONG_NUMBERS = re.compile(rb"[0-9.]{16,}")
_JSON_WHITESPACE = b" \t\r\n"

_ASCII_ENCODER = json.JSONEncoder(separators=(",", ":"))
TYPE_NAMES = {str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object"}
MAX_SHAPE_CHARS = 4096  # longer texts have no detailed shape
MIN_TOKEN_CHARS, MAX_TOKEN_CHARS = 16, 512
UUID_CHARS = 36
NUMERIC_FIRST_CHARS = frozenset("0123456789-")
UNIX_TIME_RANGE_S = range(946_684_800, 4_102_444_800)  # the years 2000 to 2099
MIN_ACCOUNT_DIGITS = 16  # card and account numbers have a fixed length; smaller numbers are counts or ids
DIGEST_HEX_CHARS = {32, 40, 56, 64, 96, 128}  # MD5, SHA-1 and SHA-2


class NotJsonError(ValueError):
    """A text is not JSON."""


class NonFiniteNumber(float):
    """NaN or an infinity. NaN equals itself, since it is no change.

    orjson renders a float NaN as null and refuses a subclass, so that `encode_canonical` uses the exact encoder.
    """

    __slots__ = ()
    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return type(other) is NonFiniteNumber and repr(self) == repr(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class LongNumber(str):
    """A number that is not exact as a 64-bit float: a prefix, then its digits and exponent. No string equals it."""

    __slots__ = ()
    PREFIX = "number "
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return type(other) is LongNumber and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def digits(self) -> str:
        return self.removeprefix(self.PREFIX)


class RepeatedKey(str):
    """The key of a value that most parsers lose, since the object repeats the key."""

    __slots__ = ()


def parse(body: bytes) -> Any:
    """Parse JSON exactly, see `parse_with_text`. Raise NotJsonError."""
    return parse_with_text(body)[0]


def parse_canonical(body: bytes) -> Any:
    """Parse JSON as orjson writes it: without spaces and repeated keys. Return None for other texts."""
    try:
        value = loads(body)
        return value if dumps(value) == body else None
    except (orjson.JSONDecodeError, TypeError):
        return None


def parse_with_text(body: bytes) -> tuple[Any, bytes]:
    """Return the value and its canonical text, which may be empty. Values with equal texts are equal.

    NaN, infinities, big integers, lone surrogates and repeated keys stay distinct. Raise NotJsonError.
    """
    try:
        value = loads(body)
        text = dumps(value)
    except (orjson.JSONDecodeError, TypeError):
        return parse_exact(body), b""  # the exact parser accepts more
    if text == body:
        return value, text
    if text.count(b":") != body.count(b":") or text.count(b"null") != body.count(b"null") or _is_rounded(body, text):
        return parse_exact(body), b""
    return value, text


def _is_rounded(body: bytes, text: bytes) -> bool:
    """Tell whether a long number of the body has another form in the canonical text."""
    if _LONG_NUMBER_SAMPLE not in body[::3].translate(_DIGITS_TO_ZERO):
        return False
    if _LONG_NUMBER_DIGITS not in body.translate(_DIGITS_TO_ZERO):
        return False
    if body.translate(None, _JSON_WHITESPACE) == text.translate(None, _JSON_WHITESPACE):
        return False
    return _LONG_NUMBERS.findall(body) != _LONG_NUMBERS.findall(text)


def parse_raw(value: Any) -> Any:
    """Parse a member that was not parsed yet, since both sides have the same text."""
    return parse(bytes(value)) if type(value) is Raw else value


class ExactDecoder(json.JSONDecoder):
    """Keeps long numbers, NaN, infinity and repeated keys."""

    def __init__(self) -> None:
        super().__init__(parse_constant=NonFiniteNumber, parse_float=_parse_float, object_pairs_hook=_make_object)


def parse_exact(body: bytes) -> Any:
    try:
        return json.loads(body, cls=ExactDecoder)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def _parse_float(text: str) -> float | LongNumber:
    number = float(text)
    if (len(text) < MAX_FLOAT_CHARS and isfinite(number)) or repr(number) == text:
        return number
    digits = _canonical_number(text)
    is_exact = isfinite(number) and digits == _canonical_number(repr(number))
    return number if is_exact else LongNumber(LongNumber.PREFIX + digits)


def _canonical_number(text: str) -> str:
    """Return a text that is equal for equal numbers, however they are written."""
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
    """Keep the last of equal keys, as other parsers do, and the others under separate names."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    last = {key: index for index, (key, _) in enumerate(pairs)}
    counts: dict[str, int] = {}
    for index, (key, value) in enumerate(pairs):
        if last[key] != index:
            count = counts[key] = counts.get(key, 0) + 1
            result[RepeatedKey(f"{key} (repeated)" if count == 1 else f"{key} (repeated {count})")] = value
    return result


def encode_canonical(value: Any) -> bytes:
    """Return a text that is equal only for equal JSON values: 1, 1.0, true and "1" all differ."""
    try:
        return dumps(value, None, orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate, or deeper than orjson goes
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def is_json_equal(value: Any, other: Any) -> bool:
    """Compare as JSON. Python considers 1 and true equal."""
    if value != other:
        return False
    try:
        if dumps(value) == dumps(other):
            return True
    except TypeError:
        pass
    return encode_canonical(value) == encode_canonical(other)


def render_value(value: Any) -> str:
    """Return ASCII JSON text of at most MAX_VALUE_CHARS characters, in bounded work."""
    kind = type(value)
    if kind is int or kind is float:
        text = repr(value)
    elif kind is str:
        text = encode_basestring_ascii(value[:MAX_VALUE_CHARS])
    elif kind is list or kind is dict:
        text = ""
        for piece in _render_pieces(value):
            text += piece
            if len(text) > MAX_VALUE_CHARS:
                break
    elif kind is LongNumber:
        text = value.digits()
    else:
        text = _ASCII_ENCODER.encode(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def _render_pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for index, (key, inner) in enumerate(islice(value.items(), MAX_VALUE_CHARS)):
            yield f"{',' if index else ''}{encode_basestring_ascii(key[:MAX_VALUE_CHARS])}:"
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
    elif isinstance(value, str):
        yield encode_basestring_ascii(value[:MAX_VALUE_CHARS])
    else:
        yield _ASCII_ENCODER.encode(value)


def type_name(value: Any) -> str:
    """Return the type in the terms of JSON: 1 and 1.0 are both numbers."""
    return TYPE_NAMES.get(type(value), "number")


class Shape(NamedTuple):
    kind: str
    format: str = ""


PLAIN_SHAPES = {
    kind: Shape(kind)
    for kind in ("null", "boolean", "integer", "float", "date", "decimal", "time", "ip", "trace", "ulid", "url")
}
EMPTY_TEXT = Shape("empty")
BLANK_TEXT = Shape("empty", "blank")
TEXT = Shape("text")
LONG_TEXT = Shape("text", "long")
WORD = Shape("word")
PATH = Shape("path")

# For values that start with a digit or minus sign. _OPAQUE_PATTERN is for other values of one word.
_NUMERIC_PATTERN = re.compile(
    r"""
      (?P<digits>\d+)
    | (?P<timestamp>\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)
    | (?P<date>\d{4}-\d\d-\d\d)
    | (?P<decimal>-?\d+\.\d+|-\d+)
    | (?P<time>\d\d:\d\d:\d\d(?:\.\d+)?)
    | (?P<ip>\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})
    | (?P<trace>[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})
    | (?P<ulid>[0-7][0-9A-HJKMNP-TV-Z]{25})
    """,
    re.VERBOSE | re.ASCII,
)
_OPAQUE_PATTERN = re.compile(
    r"""
      (?P<hex>[0-9a-f]{16,}|[0-9A-F]{16,})
    | (?P<prefixed>[a-z]{2,8}_(?:(?:test|live)_)?[A-Za-z0-9]{8,})
    | (?P<base64>(?=.*[+/=])[A-Za-z0-9+/]{16,}={0,2})
    | (?P<token>[A-Za-z0-9_~+/.-]{16,})
    """,
    re.VERBOSE | re.ASCII,
)
DIGEST = re.compile(r"hmac:[0-9a-f]{8}:[0-9a-f]{32}")
_CARD_NUMBERS = range(10**13, 10**19)
_UUID_PATTERN = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_PARTS_PATTERN = re.compile("[./]")
_JWT = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*", re.ASCII)
_EMAIL = re.compile(r"[^\s@/:]+@[^\s@/:]+\.[A-Za-z]{2,}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://\S+|/[\w./%~-]*\?\S+")
_PATH_START = re.compile(r"/[a-z][a-z0-9_-]{0,15}/")  # very rare in random base64
_IP6 = re.compile(r"(?=[^:]*:[^:]*:)[0-9a-fA-F:]{2,39}")
_HTTP_DATE = re.compile(r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")
_CHARACTER_CLASSES = b"".join(
    b"0" if char.isdigit() else b"A" if char.isupper() else b"a" if char.islower() else b"-"
    for char in map(int.to_bytes, range(256))
)
TOKEN_SEPARATORS = "-_.~"


def has_digest(value: Any) -> bool:
    """Return whether a value contains the digest of a secret. The format of such a value is unknown."""
    return isinstance(value, str) and "hmac:" in value and DIGEST.search(value) is not None


def may_be_card_numbers(one: Any, other: Any) -> bool:
    """Return whether one value is a digest, and the other a number as long as that of a card. Their types can be equal."""
    number, text = (one, other) if type(one) is int else (other, one)
    return type(number) is int and number in _CARD_NUMBERS and has_digest(text)


def detect_shape(value: Any) -> Shape:
    """Return the shape of a parsed JSON value. Never raises."""
    if isinstance(value, str):
        return _text_shape(value)
    if value is None or isinstance(value, bool):
        return PLAIN_SHAPES["null" if value is None else "boolean"]
    if isinstance(value, int):
        if value in UNIX_TIME_RANGE_S:
            return Shape("unix", "s")
        return Shape("unix", "ms") if value // 1000 in UNIX_TIME_RANGE_S else PLAIN_SHAPES["integer"]
    if isinstance(value, float):
        return PLAIN_SHAPES["float"] if isfinite(value) else Shape("float", "not finite")
    return Shape("array" if isinstance(value, list) else "object", "" if value else "empty")


def _text_shape(value: str) -> Shape:
    if not value:
        return EMPTY_TEXT
    length = len(value)
    if value.isalpha() and length < 200:
        return WORD
    if " " in value and not (length < 40 and (value[0].isdigit() or _HTTP_DATE.fullmatch(value))):
        return TEXT if value.strip() else BLANK_TEXT
    if length > MAX_SHAPE_CHARS:
        return LONG_TEXT
    if length == UUID_CHARS and _UUID_PATTERN.fullmatch(value):
        is_nil = value.count("0") == 32
        return Shape("uuid", "nil" if is_nil else f"v{value[14]}{_describe_case(value)}")
    if value[0] in NUMERIC_FIRST_CHARS:
        match = _NUMERIC_PATTERN.fullmatch(value)
        if match is not None:
            return _make_shape(str(match.lastgroup), value)
    return _shape_by_marker(value) or _opaque_shape(value)


def _shape_by_marker(value: str) -> Shape | None:
    """Detect shapes that have a typical character."""
    if value.startswith("eyJ") and _JWT.fullmatch(value):
        return Shape("jwt", value.partition(".")[0][:200])
    if "@" in value and _EMAIL.fullmatch(value):
        return Shape("email")
    if ("?" in value or "://" in value) and _URL.fullmatch(value):
        return PLAIN_SHAPES["url"]
    if ":" in value:
        if _IP6.fullmatch(value):
            return Shape("ip", "6")
        return Shape("timestamp", "http") if _HTTP_DATE.fullmatch(value) else TEXT
    return None


def _opaque_shape(value: str) -> Shape:
    if len(value) <= MAX_TOKEN_CHARS and not (value[0] == "/" and _PATH_START.match(value)):
        match = _OPAQUE_PATTERN.fullmatch(value)
        if match is not None:
            return _make_shape(str(match.lastgroup), value)
    if not value.strip():
        return BLANK_TEXT
    return TEXT if " " in value else _plain_shape(value)


def _make_shape(kind: str, value: str) -> Shape:
    return PLAIN_SHAPES.get(kind) or _SHAPE_DETECTORS[kind](value)


def _describe_case(value: str) -> str:
    return "" if value == value.lower() else " upper"


def _timestamp_shape(value: str) -> Shape:
    """Keep the separator, the zone and the fraction digits in steps of three, since Go omits trailing zeros."""
    clock = re.split("[Z+-]", value[11:])[0]
    zone = value[11 + len(clock) :]
    fraction_digits = max(len(clock) - 9, 0)
    return Shape("timestamp", f"{value[10]}{min(len(clock), 8)}.{-(-fraction_digits // 3) * 3}{zone}")


def _digits_shape(value: str) -> Shape:
    length = len(value)
    if length in {10, 13} and int(value[:10]) in UNIX_TIME_RANGE_S:
        return Shape("unix text", "s" if length == 10 else "ms")
    return Shape("digits", str(length) if value[0] == "0" or length >= MIN_ACCOUNT_DIGITS else "")


def _hex_shape(value: str) -> Shape:
    length = len(value)
    if not _is_random(value, 0.2, 0.2):
        return WORD
    return Shape("hash" if length in DIGEST_HEX_CHARS else "hex", f"{length}{_describe_case(value)}")


def _prefixed_shape(value: str) -> Shape:
    prefix, _, suffix = value.rpartition("_")
    return Shape("prefixed", f"{prefix}_{len(suffix)}") if _is_random(suffix) else _token_shape(value)


def _base64_shape(value: str) -> Shape:
    if len(value) % 4 == 0 and _is_token(value):
        return Shape("base64", str(len(value)))
    return _token_shape(value)


def _token_shape(value: str) -> Shape:
    if _is_token(value) and not _contains_token(value):
        return Shape("token", str(len(value)))
    return _plain_shape(value)


def _is_token(value: str) -> bool:
    separators = sum(map(value.count, TOKEN_SEPARATORS))
    return separators <= len(value) // 8 + 1 and _is_random(value)


def _contains_token(value: str) -> bool:
    """Tell whether a part of the text is an id, such as the name of a file, so that the rest has its own meaning."""
    if _UUID_PATTERN.search(value):
        return True
    parts = _PARTS_PATTERN.split(value)
    return len(parts) > 1 and any(len(part) >= MIN_TOKEN_CHARS and _opaque_shape(part) != WORD for part in parts)


def _plain_shape(value: str) -> Shape:
    return PATH if "/" in value else WORD


def _is_random(value: str, min_change_rate: float = 0.25, min_change_rate_few_digits: float = 0.35) -> bool:
    """Detect random text by the rate at which digits, capitals and small letters alternate.

    The rates are changes per character. The second one applies if one or two changes involve digits, as in names.
    """
    count = value.encode("ascii", "replace").translate(_CHARACTER_CLASSES).count
    digits = count(b"0a") + count(b"0A")
    if not digits:
        return False
    changes = digits + count(b"a0") + count(b"A0") + count(b"aA") + count(b"Aa")
    return changes >= (min_change_rate if digits > 2 else min_change_rate_few_digits) * len(value)


_SHAPE_DETECTORS: dict[str, Callable[[str], Shape]] = {
    "timestamp": _timestamp_shape,
    "digits": _digits_shape,
    "hex": _hex_shape,
    "prefixed": _prefixed_shape,
    "base64": _base64_shape,
    "token": _token_shape,
}
