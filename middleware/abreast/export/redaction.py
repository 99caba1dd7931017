"""The redaction of secrets: keyed hashes replace them before a capture leaves the process.

A secret has a secret name, such as `password`, or the shape of one: a card number, a JWT, a private key or a random
token. One key makes equal hashes of equal values, so that the sidecar can compare secrets without their values.
The rest of a text stays byte for byte. Most texts contain no secret, and a few searches in C prove it.
"""

from __future__ import annotations

import binascii
import gzip
import hashlib
import itertools
import json
import re
import secrets
import threading
import time
import zlib
from base64 import b64decode
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import quote, unquote, unquote_plus

import orjson

from abreast.protocol.capture import CHECKSUM_PREFIX, HASH_PREFIX, PART_CHECKSUM_PREFIX, Body, Headers
from abreast.recorder import BackgroundThread

HASH_BYTES = 16
KEY_ID_BYTES = 4
COOKIE_HEADER = "cookie"
SET_COOKIE_HEADER = "set-cookie"
COOKIE_PLACEHOLDERS = frozenset({"[object object]", "nan", "none", "null", "undefined"})
SIGNED_COOKIE = re.compile(r".+\.(?:[A-Za-z0-9+/_=%-]{20,}|hmac:[0-9a-f:]{41})")  # value and signature, maybe redacted
HOST_HEADERS = frozenset({"host", ":authority", "x-forwarded-host"})
# fmt: off
SECRET_HEADERS = frozenset({
    COOKIE_HEADER, SET_COOKIE_HEADER, "api-key", "apikey", "authentication-info", "authorization",
    "cf-access-jwt-assertion", "private-token", "proxy-authentication-info", "proxy-authorization", "x-access-token", "x-amz-security-token",
    "x-amzn-oidc-accesstoken", "x-amzn-oidc-data", "x-api-key", "x-api-token", "x-auth-key", "x-auth-token",
    "x-authorization", "x-client-secret", "x-csrf-token", "x-csrftoken", "x-forwarded-access-token",
    "x-forwarded-authorization", "x-goog-api-key", "x-id-token", "x-refresh-token", "x-secret", "x-session-id",
    "x-session-token", "x-token", "x-vault-token", "x-xsrf-token",
})
SECRET_FIELDS = frozenset({
    "access_key", "access_key_id", "api_key", "api_token", "authorization", "card_number", "credit_card", "cvc", "cvv",
    "encryption_key", "pan", "private_key", "secret_key", "session", "session_id", "session_key", "sessid", "sid",
    "signing_key", "ssn",
})
# A name is secret if one of these words is its last one: `csrf_token` is, and `token_type` is not.
SECRET_WORDS = frozenset({
    "accesstoken", "apikey", "authtoken", "clientsecret", "cookie", "credential", "credentials", "csrf", "csrftoken",
    "cvc", "cvv", "idtoken", "jsessionid", "jwt", "otp", "passcode", "passphrase", "passwd", "password", "passwords",
    "phpsessid", "pin", "pwd", "refreshtoken", "secret", "secrets", "sessionid", "ssn", "token", "tokens", "totp", "xsrf",
})
# One of these words anywhere makes a name secret: `password_confirmation`.
SECRET_WORDS_ANYWHERE = frozenset({"passphrase", "passwd", "password", "pwd"})
PUBLIC_NAMES = frozenset({  # positions in a list, counts of the tokens of a language model, and a flag of CORS
    "access_control_allow_credentials", "completion_tokens", "continuation_token", "input_tokens",
    "max_completion_tokens", "max_output_tokens", "max_tokens", "next_page_token", "next_token", "output_tokens",
    "page_token", "prev_page_token", "previous_page_token", "prompt_tokens", "sync_token", "total_tokens",
})
# fmt: on
NAME_SEPARATORS = str.maketrans("", "", "_- ")
CARD_GAPS = str.maketrans("", "", " .-")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
CONTROL_CODES = frozenset({*range(9), *range(14, 27), *range(28, 32)})  # not in texts
# Tables for bytes.translate: characters of tokens as `a` and control characters as 0, digits as `0`, and names, of which `=` and `<` mark the ends.
_RUNS = bytes(
    97 if chr(code).isascii() and (chr(code).isalnum() or chr(code) in "_+/-") else 0 if code in CONTROL_CODES else 32
    for code in range(256)
)
_FORMS = bytes(95 if 48 <= code <= 57 else code for code in range(256))  # digits as `_`, like _NAMES
_CARD_GAP_CHARS = b" .-"
_HEX_FORM = b'_abcdef-"'
# For bytes.translate too: digits as `0`, spaces and dashes as spaces, and other characters except dots as `x`.
_CARD_SHAPES = bytes({32: 32, 45: 32, 46: 46}.get(code, 48 if 48 <= code <= 57 else 120) for code in range(256))
_NAME_CHARS = {**{code: chr(code) for code in b"_.[]-<="}, **dict.fromkeys(b"0123456789", "_"), 58: "="}
_NAMES = bytes(
    ord(_NAME_CHARS.get(code, chr(code) if chr(code).isascii() and chr(code).isalpha() else " ")) for code in range(256)
)
MIN_TOKEN_CHARS = 20
MIN_CARD_DIGITS, MIN_CARD_GROUP_DIGITS = 14, 4
MAX_CARD_CHARS = 25  # with gaps, and two characters after it, such as `.1`
CARD_FORM, MAX_FORM_BYTES = b"_" * MIN_CARD_DIGITS, 64
RUN, DIGIT_RUN = b"a" * MIN_TOKEN_CHARS, b"0" * MIN_CARD_DIGITS
CARD_SHAPES = (  # the shortest of each grouping; a text without one has no card number
    DIGIT_RUN, b"0000 0000 0000 0000", b"0000.0000.0000.0000", b"0000 000000 0000", b"0000.000000.0000",
    b"000000 0000000000000",
)  # fmt: skip
MAX_HARMLESS_NAMES = 10_000
PIECE_BYTES = 16 * 1024  # per turn; most texts take 0.1 to 0.6 ms, digits in the groups of cards at most 7 ms
PIECE_OVERLAP_BYTES = 2100  # longer than each match of an alternative that contains separators
MAX_LOOKAHEAD_CHARS = 16  # after a match
MAX_CURL_OPTIONS_CHARS = 300  # between `curl` and a login
MIN_SHAPED_CHARS = 8  # a shorter string has no secret that only its shape reveals
JSON_COLON_STARTS = (":", " ", "\t", "\n", "\r")
TURN_S = 0.0003  # seconds of work, after which the loop gets its turn
RELEASE_S = 50e-6  # seconds
MAX_RATED_CHARS = 512  # of a token; an image in base64 may have megabytes
MIN_HEX_TOKEN_CHARS = 32
MIN_CHANGE_RATIO = 0.33  # neighbours of another class in a random token: 0.6 on average; in words: below 0.3
MIN_KEY_GROUPS, MIN_KEY_GROUP_CHARS = 3, 5
MIN_TOKEN_GAPS, MIN_RANDOM_CHARS = 2, 10  # a text with gaps, such as Air-Max-90-Size-42, needs parts that are no words
MAX_JSON_CARD = 2**53  # a number above it is no card number, because many clients would round it
MAX_DECODED_BYTES = 4 * 1024 * 1024  # in a compressed body
GZIP_WBITS, DEFLATE_WBITS = 31, 15
MAX_DEPTH = 8  # JSON in strings of JSON
MAX_PERCENT_DEPTH = 3  # percent escapes of percent escapes
_CARD_PATTERN = re.compile(
    r"4(\d{15}|\d{18})|5[1-5]\d{14}|2(22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(0[0-5]|[68]\d)\d{11}|35(2[89]|[3-8]\d)\d{12}|6[02-57]\d{14,17}",
    re.ASCII,
)
_DOUBLED_DIGITS = bytes.maketrans(b"0123456789", b"0246813579")  # the sum of the digits of the double
# Digits without gaps, or in the groups that are printed on cards. Between them are dots, or spaces and dashes.
# The last group may be an expiry or a security code. For speed, a class of characters comes first, and a year after 2000
# is no first group.
_CARD_DIGITS = (
    r"[2-6](?<!\w\d)(?<!\d\.\d)(?!(?<=2)[01])(?:\d{13,18}"
    r"|\d{3}(?:(?:[ -]\d{4}){3}(?:[ -]\d{1,3}(?!\w))?|(?:\.\d{4}){3}(?:\.\d{1,3}(?!\w))?)"
    r"|\d{3}(?:[ -]\d{6}[ -]|\.\d{6}\.)\d{4,5}|\d{5}[ -]\d{13})(?!\w|\.\d)"
)
_CARD = re.compile(rf"(?P<card>{_CARD_DIGITS})", re.ASCII)
_LAST_GROUP = re.compile(r"[ .-]\d+$")
_JWT = re.compile(rb"(?<![\w-])eyJ[\w-]{6,}+\.[\w-]{4,}+\.")
_USER_AND_PASSWORD = r"[^\s/@\"'<>:]{0,200}+:[^\s/@\"'<>]{1,200}+"
_VERSION = r"v?\d+(?:(?:\.\d+){1,2}(?!\.?\w)|(?![\w.-]))"
_LOGIN = re.compile(rf"//{_USER_AND_PASSWORD}@".encode())
# The option -u, alone or after options without a value, such as -s.
_CURL_LOGIN = r"-(?<=\s-)(?:[0-46aBfgGiIjJklLMnNOpqRsSvVZ#]{0,9}+[uU]\s*+|-(?:proxy-)?user[=\s]\s*+)[\"']?(?P<curl>[^\s\"':]{1,200}+:[^\s\"']+)"
_CURL_OPTION = re.compile(_CURL_LOGIN.encode())
_CURL = re.compile(r"\bcurl\b")
_SCHEME = re.compile(rb"[Bb](?:earer|asic)\s")
_ISSUER_STARTS = frozenset(b"sk pk rk gh gi gl xo wh np hf sh do da".split())
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
_ESCAPED_SPACE = re.compile(rb"\\(?:[bfnrt]|u[0-9a-fA-F]{4})")
_SPACE_AND_COLON = re.compile(rb'"\s+:')
_SEPARATOR = re.compile(r"[\s\"'<>&,;]")
_RUN_END = re.compile(rb"[^\w+/-]")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_UUID_OR_HEX = re.compile(rf"(?:[0-9a-f]+|[0-9A-F]+|{_UUID.pattern})={{0,2}}")
_TOKEN_TEXT = re.compile(r"[A-Za-z0-9_+/=-]+")
_TOKEN_GAP = re.compile("[_+/-]")
_WORD = re.compile(
    r"[A-Z]?[a-z]*(?:[A-Z][a-z]{2,}+|\d++)*+|[A-Z]+\d*|\d+[A-Z]?[a-z]*|\d+[A-Z]+"
)  # or a number, such as 256GB
_ISSUED_TOKEN = re.compile(
    r"(?:sk|pk|rk)_(?:live|test)_\w{10,}|gh[opsur]_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|AIza[\w-]{30,}|whsec_[\w+/=]{16,}|npm_\w{30,}|github_pat_\w{30,}|sk-[\w-]{32,}"
    r"|hf_[A-Za-z]{30,}|shp(?:at|ca|pa|ss)_[0-9a-f]{32}|do[opr]_v1_[0-9a-f]{64}|dapi[0-9a-f]{32}"
)
# In a text, the first alternative that matches wins. Each one takes linear time: it reads a character a bounded number of
# times, because a repetition has a limit, or is possessive and begins only once in a run of its characters.
_ALTERNATIVES = {
    "pem": r"(?P<pem>-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z))",
    "jwt": r"(?P<jwt>(?<![\w-])eyJ[\w-]{6,}+\.[\w-]{4,}+\.[\w-]*+)",
    # Without a scheme, `//` begins a value, and a host follows. Otherwise it is a package such as //a.example:b@1.2.3.
    "login": rf"(?P<login>(?:(?<=://)|(?<![^\s\"'=(>,]//)(?<=//)(?={_USER_AND_PASSWORD}@(?!{_VERSION})[^\s/@\"'<>])){_USER_AND_PASSWORD}(?=@))",
    "curl": _CURL_LOGIN,
    "scheme": r"(?P<scheme>\b(?:[Bb]earer|[Bb]asic)\s++)(?P<credentials>(?!\w++=[\w\"'])[\w.~+/=-]{6,})",
    "field": r"(?P<field><(?P<form_tag>(?i:input|meta|button|textarea))\b(?:[^<>]|<(?!(?i:input|meta|button|textarea))){0,2000}+>)",
    "token": r"(?P<token>(?<![\w+/-])[\w+/-]{20,}+(?:={1,2}(?![\w=]))?)",
    "name": r"(?P<name>(?<![\w\[.])(?<!\w-)[A-Za-z_][\w.\[\]-]{1,80}+)[\"']?\s{0,9}(?:=>|[=:])\s{0,9}",
    "tag": r"<(?P<tag>[A-Za-z_][\w.:-]{0,80}+)[^<>]{0,2000}+>",
    "card": rf"(?P<card>{_CARD_DIGITS})",
}
_NAME_START = re.compile(_ALTERNATIVES["name"], re.ASCII)
_VALUE = re.compile(r"\"([^\"]+)|'([^']+)|((?:(?:[Bb]earer|[Bb]asic)\s+)?[^\s\"'&,;<>(){}\[\]]+)")
_ELEMENT_TEXT = re.compile(r"\s*(?:<!\[CDATA\[([^\]]+)|([^<\s][^<]*))")
_FORM_NAME = re.compile(r"\b(?:name|property|id|type)\s*=\s*[\"']?([\w.\[\]-]+)", re.IGNORECASE)
_FORM_NAME_BYTES = re.compile(_FORM_NAME.pattern.replace(r"\w.", r"\w\x80-\xff.").encode(), re.IGNORECASE)
_FORM_TAG = re.compile(rb"<(?i:input|meta|button|textarea)\b")
_FORM_VALUE = re.compile(r"(\b(?:value|content)\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s\"'>]+)", re.IGNORECASE)
_JSON_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # up to the closing quote, or the end
_JSON_COLON = re.compile(r"\s*+:\s*+")
_JSON_NUMBER = re.compile(r"(?<![\d.])-?(\d{14,16})(?![\d.eE])")
_JSON_SCALAR = re.compile(r"[^,\]}\s]*")
_JSON_DECODER = json.JSONDecoder(strict=False)
_BOUNDARY = re.compile(r'boundary="?([^";,]+)', re.IGNORECASE)
_HEADER_PARAMETER = re.compile(r"""\b(name|filename\*?)=("?)((?:(?<=")(?:[^"\\]|\\.)*|[^\s;"]+))""")
_BINARY_PREFIXES = ("image/", "audio/", "video/", "font/", "application/pdf", "application/zip", "application/grpc")
_Item = TypeVar("_Item")
FORM_TYPE, EVENT_TYPE = "application/x-www-form-urlencoded", "text/event-stream"
BINARY_TYPE = "binary"  # stands for all types without text
_KEY_OF_PROCESS = secrets.token_hex(32)
NO_NAMES: frozenset[str] = frozenset()
EVERYTHING, BODY = "*", "body"  # in the allow list


PEM, JWT, LOGIN, CURL, SCHEME, FIELD, TOKEN, NAME, TAG, CARD = (1 << index for index in range(len(_ALTERNATIVES)))
TEXT_KINDS = (1 << len(_ALTERNATIVES)) - 1
JSON_NAME = TEXT_KINDS + 1
ALL_KINDS = TEXT_KINDS | JSON_NAME
BINARY = 2 * JSON_NAME  # no text


@cache
def _compile_alternatives(kinds: int) -> re.Pattern[str] | None:
    alternatives = [pattern for index, pattern in enumerate(_ALTERNATIVES.values()) if kinds >> index & 1]
    return re.compile("|".join(alternatives), re.DOTALL | re.ASCII) if alternatives else None


def _let_loop_run() -> None:
    """In the thread, release Python's lock: the loop would wait 5 ms for it otherwise."""
    if threading.current_thread().name == BackgroundThread.NAME:
        time.sleep(RELEASE_S)


def _in_turns(items: Iterable[_Item]) -> Iterator[_Item]:
    """Return the items. In the thread, let the loop run between them."""
    turn_end = time.perf_counter() + TURN_S
    for item in items:
        if time.perf_counter() > turn_end:
            _let_loop_run()
            turn_end = time.perf_counter() + TURN_S
        yield item


@lru_cache(maxsize=256)
def _read_media_type(content_type: str) -> str:
    media_type = content_type.partition(";")[0].strip().lower()
    is_binary = media_type.startswith(_BINARY_PREFIXES) and not media_type.endswith(("+xml", "json"))
    return BINARY_TYPE if is_binary else media_type


def _search(pattern: re.Pattern[str], text: str, position: int, piece_end: int) -> tuple[re.Match[str] | None, int]:
    """Return the next match and the end of its piece, which the next call gets, so that the time is linear.

    A long text is searched in pieces that end after a token.
    """
    size = PIECE_BYTES
    if piece_end <= position:
        piece_end = _find_piece_end(text, position + size)
    while (
        match := pattern.search(text, position, piece_end)
    ) is None or match.end() >= piece_end - MAX_LOOKAHEAD_CHARS:
        if piece_end == len(text):
            break
        if match is None:
            position = max(position, piece_end - PIECE_OVERLAP_BYTES)
            _let_loop_run()
        else:  # the match may be longer
            size *= 2
        piece_end = _find_piece_end(text, position + size)
    return match, piece_end


def _find_piece_end(text: str, start: int) -> int:
    separator = _SEPARATOR.search(text, start)
    return separator.start() if separator else len(text)


@lru_cache(maxsize=4096)
def normalise_name(name: str) -> str:
    """Return the same name for access_token, Access-Token and accessToken."""
    return name.translate(NAME_SEPARATORS).lower()


_PUBLIC_NAMES = frozenset(map(normalise_name, PUBLIC_NAMES))


class Redactor:
    """Replaces secrets. `key` is the same for both versions. `allow` lists names for endpoints: (endpoint, name).

    Without a key, the hashes of two processes have different key ids, and the sidecar does not compare them.
    """

    def __init__(self, key: str = "", extra_headers: Iterable[str] = (), allow: Iterable[tuple[str, str]] = ()) -> None:
        raw_key = (key or _KEY_OF_PROCESS).encode()
        self._key = hashlib.blake2b(raw_key, digest_size=32, person=b"abreast-secrets").digest()
        self.key_id = hashlib.blake2b(self._key, digest_size=KEY_ID_BYTES, person=b"abreast-key-id").hexdigest()
        self._prefix = f"{HASH_PREFIX}{self.key_id}:"
        self.secret_headers = SECRET_HEADERS | frozenset(extra_headers)
        self._secret_names = frozenset(map(normalise_name, self.secret_headers | SECRET_FIELDS))
        self._secret_names |= {re.sub(r"\d", "", name) for name in self._secret_names}  # as `_inspect` reads names
        self._harmless_names: set[bytes] = set()
        self._harmless_bodies: set[tuple[str, int]] = set()  # hashes, because responses often repeat
        self._harmless_forms: set[bytes] = set()  # short texts, with `_` for each digit
        self._allowed_names: dict[str, frozenset[str]] = {}
        for endpoint, name in allow:
            self._allowed_names[endpoint] = self._allowed_names.get(endpoint, NO_NAMES) | {normalise_name(name)}
        self.is_secret_name = lru_cache(maxsize=4096)(self._is_secret_name)
        self._redact_header = lru_cache(maxsize=1024)(self._scan_header)  # most values repeat
        self._is_secret_word = lru_cache(maxsize=1024)(self._contains_secret)
        self._redact_short_text = lru_cache(maxsize=1024)(self._scan_text)

    def at(self, _time_s: float) -> Redactor:
        """Return this redactor, which has one key at all times. RotatingRedactor has two."""
        return self

    def allowed_names(self, method: str, route: str) -> frozenset[str]:
        """Return the normalised names that stay readable at an endpoint."""
        return self._allowed_names.get(f"{method} {route}", NO_NAMES) if self._allowed_names else NO_NAMES

    def hash(self, value: str) -> str:
        raw = value.encode("utf-8", "surrogatepass")
        return self._prefix + hashlib.blake2b(raw, key=self._key, digest_size=HASH_BYTES).hexdigest()

    def _is_secret_name(self, name: str) -> bool:
        normalised = normalise_name(name)
        if normalised in self._secret_names:
            return True
        words = [word.lower() for word in _WORDS.findall(name)]
        if not words or normalised in _PUBLIC_NAMES:
            return False
        is_composed = len(words) > 1 and normalise_name("".join(words[-2:])) in self._secret_names
        return words[-1] in SECRET_WORDS or is_composed or not SECRET_WORDS_ANYWHERE.isdisjoint(words)

    # Search.

    def _inspect(self, content: bytes, *, is_json: bool) -> int:
        """Return the kinds of secrets that a text may contain, as a sum of constants such as NAME.

        Most texts contain none, and a few searches in C prove it. A long text is read in pieces.
        """
        if len(content) <= PIECE_BYTES:
            return self._inspect_piece(content, is_json=is_json)
        kinds = end = 0
        while end < len(content):
            start = max(0, end - PIECE_OVERLAP_BYTES)
            run_end = _RUN_END.search(content, end + PIECE_BYTES)  # a token is in one piece
            end = run_end.end() if run_end else len(content)
            kinds |= self._inspect_piece(content[start:end], is_json=is_json)
            _let_loop_run()
        return kinds

    def _inspect_piece(self, content: bytes, *, is_json: bool) -> int:
        runs = content.translate(_RUNS)
        kinds = BINARY if b"\0" in runs else 0
        if is_json and b"\\" in content:
            if b"\\\\" in content or (b"\\u00" in content and _ASCII_ESCAPE.search(content)):
                return kinds | ALL_KINDS
            content = _ESCAPED_SPACE.sub(b" ", content).translate(None, b"\\")
            runs = content.translate(_RUNS)
        if kinds:
            runs = runs.replace(b"\0", b" ")
        if b"-----BEGIN" in content:
            kinds |= PEM
        if b"@" in content and _LOGIN.search(content):
            kinds |= LOGIN
        if b"curl" in content and _CURL_OPTION.search(content):
            kinds |= CURL
        if (b"earer" in content or b"asic" in content) and _SCHEME.search(content):
            kinds |= SCHEME
        if _has_card_number(content):
            kinds |= CARD
        if RUN in runs:
            kinds |= self._inspect_words(content, runs)
        return kinds | self._inspect_names(content, is_json=is_json)

    def _inspect_words(self, content: bytes, runs: bytes) -> int:
        """Inspect the words that are long enough for a token or a part of a JWT."""
        kinds = 0
        start = runs.find(RUN)
        while start >= 0:
            end = runs.find(b" ", start)
            end = len(runs) if end < 0 else end
            word = content[start:end]
            if not (word.islower() and word[:2] not in _ISSUER_STARTS):  # not a word, a UUID or a path
                if b"eyJ" in word and _JWT.search(content):
                    kinds |= JWT
                if not kinds & TOKEN and self._is_secret_word(word):
                    kinds |= TOKEN
            start = runs.find(RUN, end)
        return kinds

    def _contains_secret(self, word: bytes) -> bool:
        token = word.decode("ascii")
        return is_random_token(token) or self._is_encoded_secret(token)

    def _inspect_names(self, content: bytes, *, is_json: bool) -> int:
        kinds = 0
        if is_json:
            pieces = content.split(b'":')
            if self._has_secret_name({piece.rpartition(b'"')[2] for piece in pieces[:-1]}):
                kinds |= JSON_NAME
            content = b'" '.join(pieces)
        has_tag = b"<" in content
        if not (has_tag or b"=" in content or b":" in content):
            return kinds
        text = content.translate(_NAMES)
        pieces = text.split(b"=")[:-1]
        has_space = any([piece[-1:] == b" " for piece in pieces])  # noqa: C419  # a list is faster
        if is_json and has_space and _SPACE_AND_COLON.search(content):  # an unusual spelling
            return ALL_KINDS
        if self._has_secret_name({piece.rstrip().rpartition(b" ")[2] for piece in pieces}):
            kinds |= NAME
        if has_tag:
            if self._has_secret_name({piece.partition(b" ")[0] for piece in text.split(b"<")[1:]}):
                kinds |= TAG
            if _FORM_TAG.search(content) and self._has_secret_name(set(_FORM_NAME_BYTES.findall(content))):
                kinds |= FIELD
        return kinds

    def _has_secret_name(self, names: set[bytes]) -> bool:
        if names <= self._harmless_names:
            return False
        new_names = names - self._harmless_names
        if any(self.is_secret_name(name.decode("latin-1")) for name in new_names):
            return True
        if len(self._harmless_names) > MAX_HARMLESS_NAMES:
            self._harmless_names.clear()
        self._harmless_names |= new_names
        return False

    # Parts of a request.

    def redact_headers(self, headers: Headers, allowed: frozenset[str] = NO_NAMES) -> Headers:
        """Return the headers with secret values hashed."""
        if EVERYTHING in allowed:
            return headers
        redact = self._redact_header
        return tuple([row if allowed and normalise_name(row[0]) in allowed else redact(row) for row in headers])

    def _scan_header(self, row: tuple[str, str]) -> tuple[str, str]:
        name, value = row
        if name in self.secret_headers or self.is_secret_name(name):
            return name, self._redact_header_value(name, value)
        if name in HOST_HEADERS and "@" in value:
            user, at, host = value.rpartition("@")
            return name, self.hash(user) + at + host
        return row if _is_plain(value) else (name, self._redact_encoded(value, self._scan_text(value)))

    def _redact_header_value(self, name: str, value: str) -> str:
        if name == SET_COOKIE_HEADER:
            cookie, semicolon, attributes = value.partition(";")
            return self._redact_cookie(cookie) + semicolon + self.redact_text(attributes)
        if name == COOKIE_HEADER:
            return ";".join(self._redact_cookie(cookie) for cookie in value.split(";"))
        return self.hash(value)

    def _redact_cookie(self, cookie: str) -> str:
        """Hash the value of a cookie, and its signature separately. Keep the name, an empty value and a placeholder."""
        name, equals, value = cookie.partition("=")
        if not equals:
            return self.hash(cookie)
        secret = value.strip()
        if not (content := secret.strip('"')) or content.lower() in COOKIE_PLACEHOLDERS:
            return f"{name}={secret}"
        if SIGNED_COOKIE.fullmatch(content):
            text, _, signature = content.rpartition(".")
            return f"{name}={self.hash(text)}.{self.hash(signature)}"
        return f"{name}={self.hash(secret)}"

    def redact_path(self, path: str) -> str:
        """Return a path with secret segments hashed. A long hexadecimal segment is one, if it is no UUID."""
        segments = path.split("/")
        for index, segment in enumerate(segments):
            if len(segment) >= 12 and not _is_plain(segment):  # the shortest token that is recognized is longer
                text = unquote(segment)
                redacted = self.hash(text) if is_random_token(text, is_target=True) else self.redact_text(text)
                if redacted != text:
                    segments[index] = quote(redacted, safe="!$&'()*+,;=:@~")
        return "/".join(segments)

    def redact_query(self, query: str, allowed: frozenset[str] = NO_NAMES) -> str:
        """Return a query or a form with secret values hashed."""
        if not query or EVERYTHING in allowed:
            return query
        return "&".join([self._redact_parameter(parameter, allowed) for parameter in _in_turns(query.split("&"))])

    def _redact_parameter(self, parameter: str, allowed: frozenset[str]) -> str:
        raw_name, equals, raw_value = parameter.partition("=")
        if _is_plain(raw_value) and raw_name.isidentifier() and not self.is_secret_name(raw_name):
            return parameter
        name, value = unquote_plus(raw_name), unquote_plus(raw_value)
        if allowed and normalise_name(name) in allowed:
            return parameter
        if not value:
            redacted = name if equals else self._redact_target_text(name)
            return parameter if redacted == name else redacted
        redacted = self.hash(value) if self.is_secret_name(name) else self._redact_target_text(value)
        return parameter if redacted == value else f"{raw_name}={quote(redacted, safe=':')}"

    def _redact_target_text(self, text: str, depth: int = 0) -> str:
        if is_random_token(text, is_target=True):
            return self.hash(text)
        return self._redact_encoded(text, self.redact_value(text), depth)

    def _redact_encoded(self, text: str, redacted: str, depth: int = 0) -> str:
        """Return the redacted text, or the hash of the whole text if its percent escapes hide a secret."""
        if "%" not in redacted or depth >= MAX_PERCENT_DEPTH:
            return redacted
        decoded = unquote_plus(redacted)
        return redacted if self._redact_target_text(decoded, depth + 1) == decoded else self.hash(text)

    def redact_body(
        self, body: Body, content_type: str, content_encoding: str = "", allowed: frozenset[str] = NO_NAMES
    ) -> Body:
        """Return a body without secrets. A body that can't be read keeps only its length and digest, unless allowed."""
        content = body.content
        if not allowed.isdisjoint((EVERYTHING, BODY)) or not body.length:
            return body
        digest = self._hash_digest(body.digest) if body.digest else ""
        coding = content_encoding.strip().lower() if content_encoding else ""
        if coding and coding != "identity":
            decoded = _decompress(content, coding) if body.is_complete else None
            redacted = None if decoded is None else self._redact_content(decoded, content_type, allowed)
            if redacted is None:
                return Body(b"", body.length, self._hash_digest(body.fingerprint()))
            if redacted == decoded:
                return body
            redacted = _compress(redacted, coding)
        else:
            redacted = self._redact_content(content, content_type, allowed)
            if redacted is None:
                return Body(b"", body.length, self._hash_digest(body.fingerprint()))
            if redacted is content:
                return Body(content, body.length, digest) if digest else body
        return Body(redacted, len(redacted) if body.is_complete else body.length, digest)

    def _hash_digest(self, digest: str) -> str:
        """Hash a digest, since a plain one could confirm a guess. The mark of a checksum stays."""
        mark = next((prefix for prefix in (PART_CHECKSUM_PREFIX, CHECKSUM_PREFIX) if digest.startswith(prefix)), "")
        return mark + self.hash(digest)

    def _redact_content(self, content: bytes, content_type: str, allowed: frozenset[str]) -> bytes | None:
        """Return the text without secrets, the same object if it has none, or None if it can't be read."""
        media_type = _read_media_type(content_type)
        if media_type.startswith("multipart/"):
            return self._redact_multipart(content, content_type, allowed)
        if media_type == BINARY_TYPE:
            return None
        is_json = "json" in media_type or content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
        key = (media_type, hash(content))
        if key in self._harmless_bodies:
            return content
        kinds = self._inspect(content, is_json=is_json)
        if kinds & BINARY:
            return None
        if not kinds and media_type not in (FORM_TYPE, EVENT_TYPE):  # of which each part is inspected after decoding
            if len(self._harmless_bodies) > MAX_HARMLESS_NAMES:
                self._harmless_bodies.clear()
            self._harmless_bodies.add(key)
            return content
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            is_text = media_type.startswith("text/") or "json" in media_type or "xml" in media_type
            if not is_text and error.end < len(content):
                return None
            text, encoding = content.decode("latin-1"), "latin-1"
        else:
            encoding = "utf-8"
        redacted = self._redact_typed_text(text, media_type, kinds, allowed, is_json=is_json)
        return content if redacted == text else redacted.encode(encoding)

    def _redact_typed_text(
        self, text: str, media_type: str, kinds: int, allowed: frozenset[str], *, is_json: bool
    ) -> str:
        if is_json:
            return self._redact_json(text, kinds, allowed)
        if media_type == FORM_TYPE:
            return self.redact_query(text, allowed)
        if media_type == EVENT_TYPE:
            return "".join(
                [self._redact_event_line(line, allowed) for line in _in_turns(text.splitlines(keepends=True))]
            )
        return self._replace(text, kinds, allowed)

    def _redact_event_line(self, line: str, allowed: frozenset[str]) -> str:
        field, colon, value = line.partition(":")
        return field + colon + self.redact_value(value, allowed) if colon else self._scan_text(line, allowed)

    def _redact_multipart(self, content: bytes, content_type: str, allowed: frozenset[str]) -> bytes | None:
        boundary = _BOUNDARY.search(content_type)
        if boundary is None:
            return None
        delimiter = b"--" + boundary[1].strip().encode("latin-1", "replace")
        return delimiter.join([self._redact_part(part, allowed) for part in _in_turns(content.split(delimiter))])

    def _redact_part(self, part: bytes, allowed: frozenset[str]) -> bytes:
        """Redact a part: head, empty line, content. Keep only length and digest of a content that can't be read."""
        head, separator, content = part.partition(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n")
        if not separator:
            return part if len(part) < MIN_TOKEN_CHARS else self._scan_text(part.decode("latin-1")).encode("latin-1")
        head_text = head.decode("utf-8", "surrogateescape")
        parameters = {key: value for key, _, value in _HEADER_PARAMETER.findall(head_text)}
        head_text = _HEADER_PARAMETER.sub(lambda match: f"{match[1]}={match[2]}{self.redact_text(match[3])}", head_text)
        name = parameters.get("name", "")
        if name and normalise_name(name) in allowed:
            return part
        line_end = next((end for end in (b"\r\n", b"\n") if content.endswith(end)), b"")
        body = content.removesuffix(line_end)
        redacted: bytes | None
        if name and self.is_secret_name(name) and body:
            redacted = self.hash(body.decode("latin-1")).encode()
        else:
            content_type = re.search(r"(?i)content-type:\s*([^\r\n]+)", head_text)
            redacted = self._redact_content(body, content_type[1] if content_type else "text/plain", allowed)
        if redacted is None:
            redacted = f"{len(body)} bytes, {self.hash(body.decode('latin-1'))}".encode()
        return head_text.encode("utf-8", "surrogateescape") + separator + redacted + line_end

    def redact_payload(self, value: Any, allowed: frozenset[str] = NO_NAMES) -> Any:
        """Return a JSON value with every secret hashed."""
        if isinstance(value, dict):
            return {self.redact_text(name): self._redact_field(name, item, allowed) for name, item in value.items()}
        if isinstance(value, list):
            return [self.redact_payload(item, allowed) for item in value]
        if isinstance(value, str):
            return self.redact_value(value, allowed)
        return self._hash_json(value) if type(value) is int and _is_json_card(value) else value

    def _redact_field(self, name: str, value: Any, allowed: frozenset[str]) -> Any:
        if allowed and normalise_name(name) in allowed:
            return value
        if not self.is_secret_name(name):
            return self.redact_payload(value, allowed)
        return self._hash_json(value)

    def _hash_json(self, value: Any) -> Any:
        """Return the hash of a JSON value. Equal values have equal hashes, whatever their spelling is.

        A number and the text of its digits have different hashes, because clients tell them apart.
        """
        if value is None or isinstance(value, bool) or value == "":
            return value
        if isinstance(value, str):
            return self.hash(value)
        return self.hash(f"{type(value).__name__} {json.dumps(value, sort_keys=True, separators=(',', ':'))}")

    # Texts.

    def _redact_json(  # noqa: C901, PLR0912  # one loop is faster
        self, text: str, kinds: int, allowed: frozenset[str] = NO_NAMES, depth: int = 0
    ) -> str:
        """Return JSON text with the secrets hashed. Works for several values, and for JSON that is cut off.

        `kinds` is the result of `_inspect`.
        """
        pattern = _compile_alternatives(kinds & TEXT_KINDS)
        has_only_names = kinds & ALL_KINDS == JSON_NAME and "\\" not in text
        pieces: list[str] = []
        harmless: set[str] = set()
        copied_end = position = 0
        for _ in _in_turns(itertools.repeat(None)):
            if has_only_names:
                end = text.find('":', position)
                start = text.rfind('"', position, end) if end >= 0 else -1
                if start < 0 <= end:  # a value that begins with a colon
                    position = end + 2
                    continue
            else:
                start = text.find('"', position)
            if kinds & CARD:
                end = start if start >= 0 else len(text)
                for number in _in_turns(_JSON_NUMBER.finditer(text, position, end)):
                    if _is_json_card(int(number[1])):
                        pieces += text[copied_end : number.start()], f'"{self._hash_json(int(number[1]))}"'
                        copied_end = number.end()
            if start < 0:
                break
            start += 1
            if not has_only_names:
                end = text.find('"', start)
                if end < 0 or text[end - 1] == "\\":
                    end = _JSON_STRING.match(text, start).end()  # type: ignore[union-attr]  # it matches empty text
            content, position = text[start:end], end + 1
            if has_only_names and content in harmless:
                continue
            colon = _JSON_COLON.match(text, position) if text[position : position + 1] in JSON_COLON_STARTS else None
            if colon and content in harmless:
                continue
            replacement = content
            if colon and self.is_secret_name(name := _unescape(content)):
                start = colon.end()
                end = position = _find_value_end(text, start)
                replacement = text[start:end]
                if not allowed or normalise_name(name) not in allowed:
                    replacement = self._hash_json_text(replacement)
            elif colon and allowed and normalise_name(_unescape(content)) in allowed:
                position = _find_value_end(text, colon.end())
            elif len(content) >= MIN_SHAPED_CHARS and (pattern or "\\" in content):
                value = _unescape(content)
                redacted = self._redact_string(value, pattern, allowed, depth + 1)
                replacement = content if redacted == value else _escape(redacted)
            if replacement != text[start:end]:
                pieces += text[copied_end:start], replacement
                copied_end = end
            elif colon and end < position:
                harmless.add(content)
        return "".join((*pieces, text[copied_end:])) if pieces else text

    def _redact_string(self, value: str, pattern: re.Pattern[str] | None, allowed: frozenset[str], depth: int) -> str:
        if value.lstrip()[:1] in ("{", "[") and depth < MAX_DEPTH:
            return self.redact_value(value, allowed, depth)
        return self._replace_matches(value, pattern, allowed) if pattern else value

    def _hash_json_text(self, text: str) -> str:
        try:
            value = self._hash_json(json.loads(text, strict=False))
        except (ValueError, RecursionError):
            value = self.hash(text)
        return text if not isinstance(value, str) or not value else f'"{value}"'

    def redact_value(self, text: str, allowed: frozenset[str] = NO_NAMES, depth: int = 0) -> str:
        """Return a string, which may contain JSON, without secrets."""
        if text.lstrip()[:1] in ("{", "[") and depth < MAX_DEPTH:
            kinds = self._inspect(text.encode("utf-8", "surrogatepass"), is_json=True)
            return self._redact_json(text, kinds, allowed, depth) if kinds else text
        return self.redact_text(text, allowed)

    def redact_text(self, text: str, allowed: frozenset[str] = NO_NAMES) -> str:
        return self._redact_short_text(text) if len(text) < 200 and not allowed else self._scan_text(text, allowed)

    def _scan_text(self, text: str, allowed: frozenset[str] = NO_NAMES) -> str:
        """Return a text with the secrets in it hashed.

        Texts such as dates occur again with other digits. If no digits can make them secret, they are searched once.
        """
        content = text.encode("utf-8", "surrogatepass")
        form = content.translate(_FORMS)
        if form in self._harmless_forms:
            return text
        has_card_digits = CARD_FORM in form.translate(None, _CARD_GAP_CHARS)
        if not has_card_digits and not form.translate(None, _HEX_FORM):  # such as a digest or a UUID
            return text
        kinds = self._inspect(content, is_json=False)
        if kinds:
            return self._replace(text, kinds, allowed)
        if len(form) <= MAX_FORM_BYTES and not has_card_digits and RUN not in form.translate(_RUNS):
            if len(self._harmless_forms) > MAX_HARMLESS_NAMES:
                self._harmless_forms.clear()
            self._harmless_forms.add(form)
        return text

    def _replace(self, text: str, kinds: int, allowed: frozenset[str]) -> str:
        pattern = _compile_alternatives(kinds & TEXT_KINDS)
        return self._replace_matches(text, pattern, allowed) if pattern else text

    def _replace_matches(self, text: str, pattern: re.Pattern[str], allowed: frozenset[str]) -> str:
        pieces: list[str] = []
        copied_end = position = piece_end = 0
        for _ in _in_turns(itertools.repeat(None)):
            match, piece_end = _search(pattern, text, position, piece_end)
            if match is None:
                break
            start, end, replacement = self._redact_match(match, allowed)
            if replacement is not None:
                pieces += text[copied_end:start], replacement
                copied_end = end
            position = max(end, match.start() + 1)
        return "".join((*pieces, text[copied_end:])) if pieces else text

    def _redact_match(self, match: re.Match[str], allowed: frozenset[str]) -> tuple[int, int, str | None]:
        """Return start and end of a part of the match and its replacement, or None to keep it."""
        text, kind = match[0], match.lastgroup or ""
        if kind in ("name", "tag"):
            name = match[kind]
            is_secret = self.is_secret_name(name) and not (allowed and normalise_name(name) in allowed)
            value = (
                (_VALUE if kind == "name" else _ELEMENT_TEXT).match(match.string, match.end()) if is_secret else None
            )
            if value is None or value[0].lstrip("\"'").startswith(HASH_PREFIX):
                return match.end(), value.end() if value else match.end(kind), None  # attributes follow a tag
            return *value.span(value.lastindex or 0), self.hash(value[value.lastindex or 0].strip())
        if kind == "field":
            return self._redact_form_field(match, allowed)
        if kind == "curl":
            start = max(0, match.start() - MAX_CURL_OPTIONS_CHARS)
            if not _CURL.search(match.string, start, match.start()):
                return match.start(), match.start(kind), None
        if kind in ("credentials", "curl"):
            return *match.span(kind), self.hash(match[kind])
        if kind == "card":
            if (card := _read_card(match)) is None:
                return match.start(), match.start() + MIN_CARD_GROUP_DIGITS, None  # a card may begin at the next group
            return match.start(), match.start() + len(card), self.hash(card)
        if kind == "token":
            return self._redact_token(match, allowed)
        return match.start(), match.end(), self.hash(text)

    def _redact_form_field(self, match: re.Match[str], allowed: frozenset[str]) -> tuple[int, int, str | None]:
        """Do the same for an element of a form."""
        names = _FORM_NAME.findall(match[0])
        if any(self.is_secret_name(name) and normalise_name(name) not in allowed for name in names):
            if match["form_tag"].lower() == "textarea":
                value = _ELEMENT_TEXT.match(match.string, match.end())
                return (
                    (*value.span(2), self.hash(value[2].strip()))
                    if value and value[2]
                    else (match.start(), match.end(), None)
                )
            text = _FORM_VALUE.sub(lambda value: f'{value[1]}"{self.hash(value[2].strip(chr(34)))}"', match[0])
            return match.start(), match.end(), text
        return match.start(), match.start() + 1, None

    def _redact_token(self, match: re.Match[str], allowed: frozenset[str]) -> tuple[int, int, str | None]:
        """Do the same for a long word, which may be a token, a name or contain a card number."""
        text, kinds = match[0], match.re.groupindex
        name = _NAME_START.match(match.string, match.start()) if "name" in kinds else None
        if name is not None and self.is_secret_name(name["name"]):
            return self._redact_match(name, allowed)
        if is_random_token(text) or self._is_encoded_secret(text, allowed):
            return match.start(), match.end(), self.hash(text)
        if "card" in kinds and (place := _find_card(match.string, match.start(), match.end())):
            start, card = place
            return start, start + len(card), self.hash(card)
        return match.start(), match.end(), None

    def _is_encoded_secret(self, token: str, allowed: frozenset[str] = NO_NAMES) -> bool:
        text = decode_base64_text(token)
        return text is not None and self.redact_value(text, allowed, MAX_DEPTH - 1) != text


def is_card_number(digits: str) -> bool:
    """Tell whether digits are a card number: a known issuer, and the check digit of Luhn's algorithm."""
    if _CARD_PATTERN.fullmatch(digits) is None:
        return False
    raw = digits.encode()
    return (sum(raw[::-2]) + sum(raw[-2::-2].translate(_DOUBLED_DIGITS)) - ord("0") * len(raw)) % 10 == 0


def _read_card(match: re.Match[str]) -> str | None:
    """Return the card number in a match of _CARD_DIGITS, with its gaps, or None."""
    text = match["card"]
    if is_card_number(text.translate(CARD_GAPS)):
        return text
    card = _LAST_GROUP.sub("", text)
    return card if is_card_number(card.translate(CARD_GAPS)) else None


def _find_card(text: str, start: int, end: int) -> tuple[int, str] | None:
    """Return start and text of the first card number that starts in a part of a text."""
    while (match := _CARD.search(text, start, end + MAX_CARD_CHARS)) and match.start() < end:
        if card := _read_card(match):
            return match.start(), card
        start = match.start() + MIN_CARD_GROUP_DIGITS  # a card may begin at the next group
    return None


def _is_json_card(number: int) -> bool:
    return abs(number) <= MAX_JSON_CARD and is_card_number(str(abs(number)))


def _has_card_number(content: bytes) -> bool:
    shapes = content.translate(_CARD_SHAPES)
    if DIGIT_RUN in shapes:
        shapes = shapes.replace(b"0." + DIGIT_RUN, b"x")  # the digits after a decimal point are no card number
    elif b"0000 0000" not in shapes and b"0000.0000" not in shapes:  # one of which each grouping contains
        return False
    if not any(shape in shapes for shape in CARD_SHAPES):
        return False
    return _find_card(content.decode("latin-1"), 0, len(content)) is not None


def is_random_token(text: str, *, is_target: bool = False) -> bool:
    """Tell whether a text is a random token. UUIDs and hexadecimal digests are not, as they identify things.

    `is_target`: the text is a part of a path or query, where a long hexadecimal text is a token too.
    """
    if _ISSUED_TOKEN.fullmatch(text):
        return True
    if len(text) < MIN_TOKEN_CHARS or not text.isascii() or not _TOKEN_TEXT.fullmatch(text):
        return False
    if _UUID_OR_HEX.fullmatch(text):
        return is_target and len(text) >= MIN_HEX_TOKEN_CHARS and "-" not in text
    if text.count("/") > 1 + len(text) // 12 or decode_base64_text(text) is not None:
        return False
    classes = text[:MAX_RATED_CHARS].rstrip("=").translate(_CHARACTER_CLASSES)
    if "A" in classes and "0" in classes and "a" not in classes:
        return _is_grouped_key(text)
    if not ("a" in classes and "A" in classes and "0" in classes):
        return False
    changes = sum(map(str.__ne__, classes, classes[1:]))
    return changes >= MIN_CHANGE_RATIO * (len(classes) - 1) and not _is_made_of_words(text[:MAX_RATED_CHARS])


def _is_grouped_key(text: str) -> bool:
    """Tell whether capitals and digits alternate in groups of one length, as in XK9L2-QW8Z5-TB1V7-YC4N3."""
    groups = text.split("-")
    is_hex = not text.strip("0123456789ABCDEF-")
    if (
        is_hex
        or len(groups) < MIN_KEY_GROUPS
        or {len(group) for group in groups} != {max(MIN_KEY_GROUP_CHARS, len(groups[0]))}
    ):
        return False
    classes = [group.translate(_CHARACTER_CLASSES) for group in groups]
    changes = sum(sum(map(str.__ne__, group, group[1:])) for group in classes)
    return changes > len(groups)  # a number after letters has one


def _is_made_of_words(text: str) -> bool:
    """Tell whether gaps divide a text into words and numbers, such as the name of a product or file."""
    parts = _TOKEN_GAP.split(text.rstrip("="))
    random_chars = sum(len(part) for part in parts if not _WORD.fullmatch(part))
    return len(parts) > MIN_TOKEN_GAPS and random_chars < MIN_RANDOM_CHARS


_CHARACTER_CLASSES = {
    **dict.fromkeys(range(97, 123), "a"),
    **dict.fromkeys(range(65, 91), "A"),
    **dict.fromkeys(range(48, 58), "0"),
}


def decode_base64_text(token: str) -> str | None:
    """Return the text that a token encodes in base64, or None if it encodes no text."""
    raw = token.rstrip("=").replace("-", "+").replace("_", "/")
    if len(raw) < 8 or len(raw) % 4 == 1:
        return None
    try:
        text = b64decode(raw + "=" * (-len(raw) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return text if text.replace("\n", " ").replace("\t", " ").isprintable() else None


def _is_plain(text: str) -> bool:
    """Tell whether a text is a short word or number, or a UUID. Other texts need a search."""
    return (text.isalnum() and len(text) < MIN_CARD_DIGITS) or _UUID.fullmatch(text) is not None


def _unescape(content: str) -> str:
    """Return the text of a JSON string, or its content if it is cut off."""
    if "\\" not in content:
        return content
    try:
        return str(json.loads(f'"{content}"', strict=False))
    except ValueError:
        return content


def _escape(text: str) -> str:
    """Return the content of a JSON string."""
    try:
        return orjson.dumps(text).decode()[1:-1]
    except TypeError:  # a lone surrogate
        return json.dumps(text)[1:-1]


def _find_value_end(text: str, start: int) -> int:
    """Return the end of the JSON value, or of the text if the value is cut off."""
    if text[start : start + 1] == '"':
        match = _JSON_STRING.match(text, start + 1)
        return min(match.end() + 1, len(text)) if match else len(text)
    if text[start : start + 1] in ("{", "["):
        try:
            return int(_JSON_DECODER.raw_decode(text, start)[1])
        except (ValueError, RecursionError):
            return len(text)
    match = _JSON_SCALAR.match(text, start)
    return match.end() if match else start


def _decompress(content: bytes, coding: str) -> bytes | None:
    """Return the text of a compressed body, or None if it can't be read or is too long.

    A service that sends br or zstd has a library for it.
    """
    try:
        if coding in ("gzip", "x-gzip", "deflate"):
            decompressor = zlib.decompressobj(DEFLATE_WBITS if coding == "deflate" else GZIP_WBITS)
            text = decompressor.decompress(content, MAX_DECODED_BYTES)
            return text if decompressor.eof and not decompressor.unused_data else None
        if coding == "br":
            brotli = import_module("brotli").Decompressor()
            text = brotli.process(content, output_buffer_limit=MAX_DECODED_BYTES)
            return bytes(text) if brotli.is_finished() else None
        if coding == "zstd":
            zstandard = import_module("zstandard").ZstdDecompressor().stream_reader(content)
            text = zstandard.read(MAX_DECODED_BYTES + 1)
            return bytes(text) if len(text) <= MAX_DECODED_BYTES else None
    except Exception:  # noqa: BLE001  # each library has its own errors, and may be missing
        return None
    return None


def _compress(text: bytes, coding: str) -> bytes:
    if coding == "br":
        return bytes(import_module("brotli").compress(text, quality=1))
    if coding == "zstd":
        return bytes(import_module("zstandard").ZstdCompressor(level=1).compress(text))
    return zlib.compress(text, 1) if coding == "deflate" else gzip.compress(text, 1, mtime=0)
