"""Secrets in headers, replaced by keyed hashes before a capture leaves the process.

Equal secrets give equal hashes in both versions, so that they can still be compared. Without the key a hash can't be
tried against guesses, and 64 bits of it don't give the secret away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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


class Redactor:
    def __init__(self, key: bytes, extra: Iterable[str] = ()) -> None:
        self._key = hashlib.blake2b(key, digest_size=32).digest()  # a key of any length
        self.names = SECRET_HEADERS | frozenset(extra)

    def hash(self, value: str) -> str:
        raw = value.encode("utf-8", "surrogatepass")
        return MARK + hashlib.blake2b(raw, key=self._key, digest_size=DIGEST_SIZE).hexdigest()

    def headers(self, headers: Headers) -> Headers:
        """The same headers with secret values hashed; the same object when there is none."""
        if self.names.isdisjoint(name for name, _ in headers):
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
        """Hash the value and keep the name. A quoted value may hold a semicolon; what follows it is hashed too."""
        name, equals, value = cookie.partition("=")
        if not equals:
            return self.hash(cookie)
        return f"{name}={self.hash(value.strip())}"
