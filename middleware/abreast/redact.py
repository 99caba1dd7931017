"""Secrets in headers and in what effects say, replaced by keyed hashes before a capture leaves the process.

Equal secrets give equal hashes in both versions, so that they can still be compared. Without the key a hash can't be
tried against guesses, and 64 bits of it don't give the secret away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import orjson

from abreast.capture import Headers

MARK = "hmac:"
DIGEST_SIZE = 8  # bytes
COOKIES = "cookie"
SET_COOKIE = "set-cookie"
SECRET_HEADERS = frozenset(
    {
        COOKIES,
        SET_COOKIE,
        "api-key",
        "apikey",
        "authentication-info",
        "authorization",
        "cf-access-jwt-assertion",
        "private-token",
        "proxy-authentication-info",
        "proxy-authorization",
        "x-access-token",
        "x-amz-security-token",
        "x-amzn-oidc-accesstoken",
        "x-amzn-oidc-data",
        "x-api-key",
        "x-api-token",
        "x-auth-key",
        "x-auth-token",
        "x-authorization",
        "x-client-secret",
        "x-csrf-token",
        "x-csrftoken",
        "x-forwarded-access-token",
        "x-forwarded-authorization",
        "x-goog-api-key",
        "x-id-token",
        "x-refresh-token",
        "x-secret",
        "x-session-id",
        "x-session-token",
        "x-token",
        "x-vault-token",
        "x-xsrf-token",
    }
)
SECRET_FIELDS = frozenset(
    {
        "access_token",
        "api_key",
        "api_token",
        "auth_token",
        "authorization",
        "card_number",
        "client_secret",
        "cookie",
        "credit_card",
        "csrf_token",
        "cvc",
        "cvv",
        "id_token",
        "new_password",
        "old_password",
        "passphrase",
        "passwd",
        "password",
        "pin",
        "private_key",
        "pwd",
        "refresh_token",
        "secret",
        "secret_key",
        "session_id",
        "session_token",
        "ssn",
        "token",
    }
)
SEPARATORS = str.maketrans("", "", "_- ")


@lru_cache(maxsize=4096)
def squeezed(name: str) -> str:
    """access_token, Access-Token and accessToken are one name."""
    return name.translate(SEPARATORS).lower()


class Redactor:
    def __init__(self, key: bytes, extra: Iterable[str] = ()) -> None:
        self._key = hashlib.blake2b(key, digest_size=32).digest()  # a key of any length
        self.names = SECRET_HEADERS | frozenset(extra)
        self._fields = frozenset(map(squeezed, self.names | SECRET_FIELDS))

    def hash(self, value: str) -> str:
        raw = value.encode("utf-8", "surrogatepass")
        return MARK + hashlib.blake2b(raw, key=self._key, digest_size=DIGEST_SIZE).hexdigest()

    def payload(self, value: Any) -> Any:
        """A JSON value without the secrets in it: what stands under the name of one is hashed, whatever it is."""
        if isinstance(value, dict):
            return {name: self._field(name, held) for name, held in value.items()}
        return [self.payload(held) for held in value] if isinstance(value, list) else value

    def _field(self, name: str, value: Any) -> Any:
        if squeezed(name) not in self._fields:
            return self.payload(value)
        if value is None:
            return None
        text = value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        return self.hash(text)

    def headers(self, headers: Headers) -> Headers:
        """The same headers with secret values hashed; the same object when there is none."""
        if self.names.isdisjoint([name for name, _ in headers]):
            return headers
        return tuple(
            (name, self._value(name, value) if name in self.names else value) for name, value in headers
        )

    def _value(self, name: str, value: str) -> str:
        if name == SET_COOKIE:
            cookie, semicolon, attributes = value.partition(";")
            return self._cookie(cookie) + semicolon + attributes
        if name == COOKIES:
            return ";".join(self._cookie(cookie) for cookie in value.split(";"))
        return self.hash(value)

    def _cookie(self, cookie: str) -> str:
        """Hash the value and keep the name, and that there is no value. What follows a semicolon in quotes is hashed too."""
        name, equals, value = cookie.partition("=")
        if not equals:
            return self.hash(cookie)
        held = value.strip()
        return f"{name}={held and self.hash(held)}"
