"""Shapes of values: a labelled table, and properties."""

from __future__ import annotations

import base64
import hashlib
import random
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.values import Shape, detect_shape

LABELLED: dict[str, tuple[Any, ...]] = {
    "null": (None,),
    "boolean": (True, False),
    "empty": ("", " ", "\n\t", "   "),
    "uuid": (
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d",
        "017f22e2-79b0-7cc3-98c4-dc0c0c07398f",
        "1EC9414C-232A-6B00-B3C8-9E6BDECED846",
        "74738ff5-5367-5958-9aee-98fffdcd1876",
        "00000000-0000-0000-0000-000000000000",
    ),
    "timestamp": (
        "2024-05-01T12:00:05Z",
        "2024-05-01T12:00:05.1Z",
        "2024-05-01T12:00:05.123Z",
        "2024-05-01T12:00:05.123456",
        "2024-05-01T12:00:05.123456789Z",
        "2024-05-01T12:00:05+02:00",
        "2024-05-01T12:00:05-0500",
        "2024-05-01T12:00",
        "2024-05-01 12:00:05",
        "2024-05-01 12:00:05.123456+00:00",
        "2024-05-01T12:00:05,123Z",
        "Wed, 21 Oct 2015 07:28:00 GMT",
    ),
    "unix": (1700000000, 1700000000123, 946684800, 4102444799),
    "unix text": ("1700000000", "1700000000123"),
    "date": ("2024-05-01", "1999-12-31"),
    "time": ("12:00:05", "23:59:59.999"),
    "hash": (
        hashlib.md5(b"a", usedforsecurity=False).hexdigest(),
        hashlib.sha1(b"b", usedforsecurity=False).hexdigest(),
        hashlib.sha224(b"c").hexdigest(),
        hashlib.sha256(b"d").hexdigest(),
        hashlib.sha384(b"e").hexdigest(),
        hashlib.sha512(b"f").hexdigest(),
        hashlib.sha256(b"g").hexdigest().upper(),
    ),
    "hex": ("507f1f77bcf86cd799439011", "65e4a7f3b2c91d08", "4bf92f3577b34da6", "A1B2C3D4E5F60718"),
    "trace": ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",),
    "ulid": ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "01HX5ZZKBKACTAV9WEVGEMMVRZ"),
    "jwt": (
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjMifQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r",
        "eyJhbGciOiJub25lIn0.eyJhIjoxfQ.",
    ),
    "token": (
        "8xLOxBtZp8dU3kQ1v7Wm2c",
        "V1StGXR8Z5jdHi6Bmy4T2",
        "k3j9d8f7h2l1q0w9e8r7t6",
        "dQw4w9WgXcQa7Zp2L5n8",
        "Zk9-3fQ2_xT7bL0mV4cR8w",
        "ya29A0ARrdaM8Kf3bT9qX1zL7",
        "1srOrx2ZWZBpBUvZwXKQmoEYga2",
    ),
    "base64": (
        "EnFm3QljCzT4VyQqNL1+AvbtBeA=",
        "q83vEjRWeJCrze8SNFZ4kA==",
        "3q2+7wARIjNEVWZ3iJmqu8zd7v8=",
    ),
    "prefixed": (
        "cus_9s6XKzkNRiz8i3",
        "pi_3MtwBwLkdIwHu7ix28a3tqPa",
        "sk_test_4eC39HqLyjWDarjtT1zdp7dc",
        "ch_3Ln0h2K5a8Jx7Q9r",
        "req_7aX3k9Lm2P",
    ),
    "email": ("a@b.co", "anna.schmidt+shop@example.com", "x_y@mail.example.org"),
    "ip": ("10.0.0.1", "255.255.255.255", "::1", "2001:db8::8a2e:370:7334", "fe80::1"),
    "url": (
        "https://example.com/a/b",
        "https://cdn.example.com/i.png?X-Amz-Signature=abc&X-Amz-Date=20240501T000000Z",
        "http://localhost:8080/?q=1",
        "/products?page=2",
        "/products/42?currency=JPY",
        "s3://bucket/key",
    ),
    "path": ("/products/42", "images/2024/shoe.png", "text/html", "Europe/Berlin", "n/a", "application/json"),
    "digits": ("0", "42", "007", "4111111111111111", "90210", "20240501", "12345678901234567890", "0049170123456"),
    "decimal": ("12.50", "-3", "0.1", "-1.75", "1000000.00"),
    "integer": (0, 1, -5, 42, 1999, 10**30, -(10**20), 946684799),
    "float": (0.0, 1.5, -2.75, 19.99, 1e300),
    "array": ([], [1], ["a", "b"]),
    "object": ({}, {"a": 1}),
    "word": (
        "EUR", "JPY", "a", "Anna", "Zürich", "Müller", "DELIVERED", "in_stock", "out-of-stock", "de-DE", "x",
        "iphone-15-pro-max-256gb", "SKU-2024-RED-XL-0001", "CamelCaseIdentifierName2", "snake_case_identifier_long",
        "SHOE42", "A4", "v1.2.3", "1.2.3-beta", "DE89370400440532013000", "1Z999AA10123456784", "B07XJ8C8F5", "#ff00aa",
        "red-running-shoes", "user_settings12345678", "Donaudampfschifffahrtsgesellschaft", "+491701234567", "$19.99",
        "19,99", "1e5", "50%", "XL", "978-3-16-148410-0", "GB82WEST12345698765432", "ORDER_2024_0000001",
        "PaymentMethodNotSupported", "deadbeefdeadbeef", "aaaaaaaaaaaaaaaaaaaaaaaa", "customer_0000000001", "utf-8",
        "2024-W18", "en_US.UTF-8", "max-age=60", "W12-34567-89012-3456",
    ),
    "text": (
        "Red running shoes",
        "Anna Schmidt",
        "no such product",
        "1 item left",
        "max-age=60, public",
        "+49 170 1234567",
        "Wed, 21 Oct",
        "19.99 EUR",
        "text/html; charset=utf-8",
        "€ 5",
        "12:00",
        "arn:aws:s3",
        "The quick brown fox jumps over the lazy dog. " * 20,
        "x" * 5000,
    ),
}  # fmt: skip

ROWS = [(kind, value) for kind, values in LABELLED.items() for value in values]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
TELLING = frozenset({"token", "hash", "hex", "base64", "uuid", "ulid", "jwt", "trace", "timestamp", "prefixed"})


def test_shape_table_has_enough_values() -> None:
    assert len(ROWS) >= 150


@pytest.mark.parametrize(("kind", "value"), ROWS, ids=lambda value: str(value)[:40])
def test_detect_shape_of_labelled_values(kind: str, value: Any) -> None:
    assert detect_shape(value).kind == kind


@given(JSON)
def test_detect_shape_accepts_any_json(value: Any) -> None:
    shape = detect_shape(value)

    assert isinstance(shape, Shape)
    assert detect_shape(value) == shape


@given(st.uuids(version=4), st.uuids(version=4))
def test_detect_shape_of_uuids_depends_on_the_version_only(first: uuid.UUID, second: uuid.UUID) -> None:
    assert detect_shape(str(first)) == detect_shape(str(second))


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2090, 1, 1)))  # noqa: DTZ001 - the zone is added below
def test_detect_shape_recognises_times_of_python(moment: datetime) -> None:
    for text in (moment.isoformat(), moment.replace(tzinfo=UTC).isoformat(), moment.isoformat(" ")):
        assert detect_shape(text).kind == "timestamp"


@given(st.binary(min_size=16, max_size=64))
def test_detect_shape_recognises_digests(content: bytes) -> None:
    assert detect_shape(hashlib.sha256(content).hexdigest()) == Shape("hash", "64")


@pytest.mark.parametrize(
    ("make", "kinds", "part"),
    [
        (lambda dice: dice.randbytes(16).hex(), {"hash"}, 0.99),
        (lambda dice: dice.randbytes(8).hex(), {"hex"}, 0.9),
        (lambda dice: base64.urlsafe_b64encode(dice.randbytes(32)).decode().rstrip("="), {"token"}, 0.9),
        (lambda dice: base64.b64encode(dice.randbytes(20)).decode(), {"base64"}, 0.9),
        (lambda dice: "".join(dice.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=24)), {"token"}, 0.8),
    ],
)
def test_detect_shape_recognises_most_random_values(make: Any, kinds: set[str], part: float) -> None:
    """The others are words, and left to the baseline: that is the harmless side."""
    dice = random.Random(4)
    hits = sum(detect_shape(make(dice)).kind in kinds for _ in range(1000))

    assert hits >= 1000 * part


WORDS = st.sampled_from(
    ["red", "shoe", "Anna", "order", "XL", "2024", "42", "pro", "Shop", "v2", "DE", "item", "256gb"]
)


@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["-", "_", " ", ".", "/"]))
def test_detect_shape_never_takes_words_for_random(parts: list[str], separator: str) -> None:
    assert detect_shape(separator.join(parts)).kind not in TELLING


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_detect_shape_recognises_numbers_in_text(value: float) -> None:
    assert detect_shape(value).kind in {"integer", "float", "unix"}
    assert detect_shape(f"{value:f}").kind in {"decimal", "digits", "unix text"}


def test_detect_shape_distinguishes_formats() -> None:
    assert detect_shape("2024-05-01T12:00:05Z") != detect_shape("2024-05-01T12:00:05+00:00")
    assert detect_shape("2024-05-01T12:00:05Z") != detect_shape("2024-05-01T12:00:05.123Z")
    assert detect_shape("2024-05-01T12:00:05.12Z") == detect_shape("2024-05-01T12:00:05.123Z")
    assert detect_shape("2024-05-01T12:00:05Z") != detect_shape("2024-05-01 12:00:05Z")
    assert detect_shape(str(uuid.UUID(int=0))) != detect_shape("9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d")
    assert detect_shape("507f1f77bcf86cd799439011") != detect_shape("65e4a7f3b2c91d08")


def test_detect_shape_takes_linear_time() -> None:
    """The bounds leave room for a busy machine."""
    values = [value for _, value in ROWS if isinstance(value, str) and len(value) < 200]
    hostile = ["a" * 100_000, "a@" * 50_000, "1" * 100_000, "a:" * 50_000, "/?" * 50_000, "ey" * 2000, "-" * 4000]

    assert fastest(values) / len(values) < 20e-6
    assert fastest(hostile) / len(hostile) < 2e-3


def fastest(values: list[str]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for value in values:
            detect_shape(value)
        times.append(time.perf_counter() - start)
    return min(times)
