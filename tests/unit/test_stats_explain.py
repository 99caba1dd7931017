"""Changes that shapes explain, and changes that they must not explain."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from abreast_sidecar.compare.volatile import explain_change

NOW = 1_714_564_805.0  # 2024-05-01T12:00:05Z
U1, U2, U7 = (
    "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d",
    "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed",
    "017f22e2-79b0-7cc3-98c4-dc0c0c07398f",
)
NIL = str(uuid.UUID(int=0))
SIGNED = "https://cdn.example.com/a.png?w=10&X-Amz-Signature={}&Expires={}"

EXPLAINED: list[tuple[Any, Any, str]] = [
    (U1, U2, "uuid"),
    ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "01HX5ZZKBKACTAV9WEVGEMMVRZ", "ulid"),
    ("507f1f77bcf86cd799439011", "65e4a7f3b2c91d0811223344", "hex"),
    (hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest(), "hash"),
    ("8xLOxBtZp8dU3kQ1v7Wm2c", "V1StGXR8Z5jdHi6Bmy4T2q", "token"),
    ("q83vEjRWeJCrze8SNFZ4kA==", "EnFm3QljCzT4VyQqNL1+Ag==", "base64"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJhIjoxfQ.x1", "eyJhbGciOiJIUzI1NiJ9.eyJhIjoyMn0.y2", "jwt"),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:06Z", "timestamp"),
    ("2024-05-01T12:00:05.9Z", "2024-05-01T12:00:06.012Z", "timestamp"),
    ("2024-05-01 12:00:05", "2024-05-01 12:00:09", "timestamp"),
    ("Wed, 01 May 2024 12:00:05 GMT", "Wed, 01 May 2024 12:00:06 GMT", "timestamp"),
    ("2024-05-01T11:58:05Z", "2024-05-01T12:00:06Z", "timestamp"),
    (1714564805, 1714564806, "unix time"),
    (1714564805123, 1714564806123, "unix time"),
    ("1714564805", "1714564806", "unix time"),
    (SIGNED.format("abc", "1714"), SIGNED.format("xyz", "1719"), "signed url"),
    (f"order {U1} was made", f"order {U2} was made", "uuid inside"),
    ("seen 2024-05-01T12:00:05Z by Anna", "seen 2024-05-01T12:00:06Z by Anna", "timestamp inside"),
    (f"https://x.example/{U1}?a=1", f"https://x.example/{U1}?a=1&b=2", ""),
]

NEVER: list[tuple[Any, Any]] = [
    (U1, ""), (U1, None), (U1, "not found"), (U1, NIL), (NIL, U1), (U1, U7), (U1, U1.upper()), (U1, U1.replace("-", "")),
    (U1, 42), (U1, [U1]), ("8xLOxBtZp8dU3kQ1v7Wm2c", "8xLOxBtZp8dU3kQ1v7Wm"), (hashlib.sha256(b"a").hexdigest(), "a" * 64),
    ("507f1f77bcf86cd799439011", "4bf92f3577b34da6"), ("2024-05-01T12:00:05Z", "2024-05-02T12:00:05Z"),
    ("2024-05-01T12:00:05Z", "2024-05-01T13:00:05Z"), ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05+00:00"),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05"), ("2024-05-01T12:00:05Z", "2024-05-01"),
    ("2024-05-01T12:00:05+00:00", "2024-05-01T14:00:05+02:00"), ("2024-02-31T12:00:05Z", "2024-02-31T12:00:06Z"),
    ("2024-05-01T12:00:05Z", 1714564805), ("2024-05-01", "2024-05-02"), ("12:00:05", "12:00:06"),
    (1714564805, 1714564805123), (1714564805, 1814564805), (1500000000, 1500000001), ("1500000000", "1500000001"),
    (19.99, 19.98), (1999, 1998), (19, 19.0), ("19.99", "19.98"), ("1999", "1998"), (0.1, 0.2), (1, 2), (10, 11),
    ("EUR", "JPY"), ("Anna", "Otto"), ("in_stock", "out_stock"), ("red shoes", "blue shoes"), ("/a/1", "/a/2"),
    ("SKU-2024-RED-XL-0001", "SKU-2024-RED-XL-0002"), ("4111111111111111", "4111111111111112"),
    ("DE89370400440532013000", "DE89370400440532013001"), ("a@b.co", "c@b.co"), ("10.0.0.1", "10.0.0.2"),
    ("cus_9s6XKzkNRiz8i3", "cus_9s6XKzkNRiz8i4"), (True, False), (None, ""), (None, 0), ("", " "), ([], {}), ([1], [2]),
    ({"a": 1}, {"a": 2}), ("iphone-15-pro-max-256gb", "iphone-15-pro-max-512gb"),
    (SIGNED.format("abc", "1714"), SIGNED.format("", "1714")), (SIGNED.format("abc", "1"), SIGNED.format("abcd", "1")),
    (SIGNED.format("abc", "1"), SIGNED.format("xyz", "1").replace("w=10", "w=20")),
    (SIGNED.format("abc", "1"), SIGNED.format("xyz", "1").replace("a.png", "b.png")),
    (SIGNED.format("abc", "1"), SIGNED.format("abc", "1").partition("?")[0]),
    (f"order {U1} was made", f"order {U2} was lost"), (f"order {U1} was made", f"order {NIL} was made"),
    ("due 2024-05-01T12:00:05Z", "due 2024-06-01T12:00:05Z"), ("https://a.example/1", "https://a.example/2"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "reason"), EXPLAINED)
def test_explain_change_accepts_volatile_values(old: Any, new: Any, reason: str) -> None:
    assert (explain_change(old, new, NOW) or "") == reason
    assert (explain_change(new, old, NOW) or "") == reason


@pytest.mark.parametrize(("old", "new"), NEVER)
def test_explain_change_rejects_meaningful_values(old: Any, new: Any) -> None:
    assert explain_change(old, new, NOW) is None
    assert explain_change(new, old, NOW) is None


@pytest.mark.parametrize(("old", "new"), [(1714564805, 1714564806), (1714564805123, 1714564805124)])
def test_explain_change_needs_the_request_time_for_numeric_times(old: int, new: int) -> None:
    assert explain_change(old, new) is None
    assert explain_change(old, new, NOW + 3600) is None


@given(st.floats(), st.floats())
def test_explain_change_rejects_floats(old: float, new: float) -> None:
    assert explain_change(old, new, NOW) is None


@given(st.integers(), st.integers())
def test_explain_change_rejects_integers_that_are_no_time(old: int, new: int) -> None:
    near = all(abs(one / scale - NOW) <= 300 for one in (old,) for scale in (1, 1000))

    assume(not near)
    assert explain_change(old, new, NOW) is None


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ", max_size=40), st.text(alphabet="abcdefghijklmnop ", max_size=40))
def test_explain_change_rejects_words(old: str, new: str) -> None:
    assert explain_change(old, new, NOW) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.uuids().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(JSON, JSON)
def test_explain_change_is_symmetric_and_accepts_any_json(old: Any, new: Any) -> None:
    assert explain_change(old, new, NOW) == explain_change(new, old, NOW)


@given(st.datetimes(datetime(2001, 1, 1), datetime(2090, 1, 1)), st.integers(0, 9))  # noqa: DTZ001 - the zone is added below
def test_explain_change_accepts_times_of_one_moment(moment: datetime, seconds: int) -> None:
    one = moment.replace(tzinfo=UTC, microsecond=0)

    assert explain_change(one.isoformat(), (one + timedelta(seconds=seconds)).isoformat()) == "timestamp"
