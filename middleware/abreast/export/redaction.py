"""Redaction: keyed hashes replace the secrets in headers and effects before a capture leaves the process.

Equal secrets have equal hashes in both versions, so that they can be compared. Without the key, nobody can test a guess
against a hash of 64 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import orjson

from abreast.protocol.capture import Headers

HASH_PREFIX = "hmac:"
SECRET_DIGEST_BYTES = 8
COOKIE_HEADER = "cookie"
SET_COOKIE_HEADER = "set-cookie"
SECRET_HEADERS = frozenset(
    {
        COOKIE_HEADER,
        SET_COOKIE_HEADER,
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
NAME_SEPARATORS = str.maketrans("", "", "_- ")


@lru_cache(maxsize=4096)
def normalise_name(name: str) -> str:
    """Return the same name for access_token, Access-Token and accessToken."""
    return name.translate(NAME_SEPARATORS).lower()


class Redactor:
    def __init__(self, key: bytes, extra_headers: Iterable[str] = ()) -> None:
        self._key = hashlib.blake2b(key, digest_size=32).digest()  # blake2b limits the length of a key
        self.secret_headers = SECRET_HEADERS | frozenset(extra_headers)
        self._secret_fields = frozenset(map(normalise_name, self.secret_headers | SECRET_FIELDS))

    def hash(self, value: str) -> str:
        raw = value.encode("utf-8", "surrogatepass")
        return HASH_PREFIX + hashlib.blake2b(raw, key=self._key, digest_size=SECRET_DIGEST_BYTES).hexdigest()

    def redact_payload(self, value: Any) -> Any:
        """Return a JSON value with every secret field hashed, whatever its type is."""
        if isinstance(value, dict):
            return {name: self._redact_field(name, item) for name, item in value.items()}
        return [self.redact_payload(item) for item in value] if isinstance(value, list) else value

    def _redact_field(self, name: str, value: Any) -> Any:
        if normalise_name(name) not in self._secret_fields:
            return self.redact_payload(value)
        if value is None:
            return None
        text = value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
        return self.hash(text)

    def redact_headers(self, headers: Headers) -> Headers:
        """Return the headers with secret values hashed, or the same object if there are no secrets."""
        if self.secret_headers.isdisjoint([name for name, _ in headers]):
            return headers
        return tuple(
            (name, self._redact_header_value(name, value) if name in self.secret_headers else value)
            for name, value in headers
        )

    def _redact_header_value(self, name: str, value: str) -> str:
        if name == SET_COOKIE_HEADER:
            cookie, semicolon, attributes = value.partition(";")
            return self._redact_cookie(cookie) + semicolon + attributes
        if name == COOKIE_HEADER:
            return ";".join(self._redact_cookie(cookie) for cookie in value.split(";"))
        return self.hash(value)

    def _redact_cookie(self, cookie: str) -> str:
        """Hash the value of a cookie and keep the name. An empty value stays empty."""
        name, equals, value = cookie.partition("=")
        if not equals:
            return self.hash(cookie)
        secret = value.strip()
        return f"{name}={secret and self.hash(secret)}"
