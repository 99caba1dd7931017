from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.export.redaction import SECRET_HEADERS, Redactor

KEY = b"a key"
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters=";="), min_size=8)


def one(name: str, value: str, key: bytes = KEY) -> str:
    ((_, redacted),) = Redactor(key, ["x-own"]).redact_headers(((name, value),))
    return redacted


@pytest.mark.parametrize("name", [*sorted(SECRET_HEADERS), "x-own"])
def test_secret_header_is_hashed(name: str) -> None:
    assert "hunter2-hunter2" not in one(name, "hunter2-hunter2")
    assert "hmac:" in one(name, "hunter2-hunter2")


@given(TEXT, TEXT)
def test_equal_secrets_have_equal_hashes(first: str, second: str) -> None:
    assert (one("authorization", first) == one("authorization", second)) == (first == second)


@given(TEXT)
def test_hash_depends_on_the_key(value: str) -> None:
    assert one("authorization", value) != one("authorization", value, b"another key")


def test_hash_has_16_hex_digits() -> None:
    mark, colon, digits = one("authorization", "Bearer abc").partition(":")

    assert (mark, colon, len(digits)) == ("hmac", ":", 16)
    int(digits, 16)


def test_set_cookie_keeps_its_name_and_attributes() -> None:
    redacted = one("set-cookie", "session=hunter2; Path=/; Max-Age=60; HttpOnly")

    assert redacted.startswith("session=hmac:")
    assert redacted.endswith("; Path=/; Max-Age=60; HttpOnly")
    assert "hunter2" not in redacted


def test_cookie_keeps_only_its_name() -> None:
    redacted = one("cookie", "a=hunter2; b=hunter3=; naked")

    assert redacted.startswith("a=hmac:")
    assert "; b=hmac:" in redacted.replace(";  ", "; ")
    assert not any(secret in redacted for secret in ("hunter2", "hunter3", "naked"))


def test_other_headers_are_unchanged() -> None:
    headers = (("content-type", "text/html"), ("x-request-id", "7"))

    assert Redactor(KEY).redact_headers(headers) is headers


def test_key_may_have_any_length() -> None:
    assert one("authorization", "x" * 8, b"k" * 1000) != one("authorization", "x" * 8, b"k" * 999)
