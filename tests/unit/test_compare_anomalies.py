"""Values of another format or range, which are anomalies even at noisy places."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.volatile import classify_anomaly
from captures import capture

NOW = 1_714_564_805.0  # 2024-05-01T12:00:05Z
STARTS = (NOW, NOW)
U1, U2 = "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d", "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"

OTHER: list[tuple[Any, Any, tuple[str, str]]] = [
    (U1, "", ("format", "breaking")),
    (U1, "not found", ("format", "breaking")),
    (U1, "00000000-0000-0000-0000-000000000000", ("format", "value")),
    (U1, "017f22e2-79b0-7cc3-98c4-dc0c0c07398f", ("format", "value")),
    (U1, U2.replace("-", ""), ("format", "breaking")),
    ("8xLOxBtZp8dU3kQ1v7Wm2c", "8xLOxBtZp8dU3kQ1v7W", ("format", "value")),
    ("any tip of the day", "", ("format", "breaking")),
    ("", "any tip of the day", ("format", "value")),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05+00:00", ("format", "value")),
    ("2024-05-01T12:00:05Z", "2024-05-01T14:00:05+02:00", ("format", "value")),
    ("2024-05-01T12:00:05Z", "2024-05-01T12:00:05.000Z", ("format", "value")),
    ("2024-05-01T12:00:05Z", "Wed, 01 May 2024 12:00:05 GMT", ("format", "value")),
    (1714564805, 1714564805123, ("format", "value")),
    ("2024-05-01T12:00:05Z", "2021-05-01T12:00:05Z", ("range", "value")),
    ("2024-05-01T12:00:05Z", "2024-05-01T14:00:05Z", ("range", "value")),
    ("2024-05-01T14:00:05Z", "2024-05-01T12:00:05Z", ("range", "value")),
    (1714564805, 1614564805, ("range", "value")),
    (37, -4, ("range", "value")),
    (37, 1e9, ("range", "value")),
    (0.5, 1200, ("range", "value")),
    (37, float("inf"), ("range", "value")),
    ("any tip of the day, and more of it, and more of it", "any", ("range", "value")),
]
ALIKE: list[tuple[Any, Any]] = [
    (U1, U2), ("2024-05-01T12:00:05Z", "2024-05-01T12:00:06Z"), (1714564805, 1714564806), (37, 36), (37, 3700), (0, 900),
    (12.5, 12), ("Anna", "Otto of Ottoburg"), ("EUR", "JPY"), ("2019-05-01T12:00:05Z", "2021-05-01T12:00:05Z"), ("a", "bcdefgh"),
    ("https://a.example/x?y=1", "https://a.example/y?y=1"), (True, False), ("1999", "12"), ([1], [2]), ({"a": 1}, {"a": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), OTHER)
def test_classify_anomaly_detects_format_and_range(old: Any, new: Any, expected: tuple[str, str]) -> None:
    assert classify_anomaly(old, new, STARTS) == expected


@pytest.mark.parametrize(("old", "new"), ALIKE)
def test_classify_anomaly_accepts_values_of_one_shape(old: Any, new: Any) -> None:
    assert classify_anomaly(old, new, STARTS) is None


def test_classify_anomaly_uses_the_start_time_of_each_side() -> None:
    ahead = (NOW, NOW + 3600)

    assert classify_anomaly("2024-05-01T12:00:05Z", "2024-05-01T13:00:05Z", ahead) is None
    assert classify_anomaly("2024-05-01T12:00:05Z", "2024-05-01T12:00:06Z", ahead) == ("range", "value")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(VALUES, VALUES)
def test_classify_anomaly_is_symmetric_in_kind(old: Any, new: Any) -> None:
    there, back = classify_anomaly(old, new, STARTS), classify_anomaly(new, old, STARTS)

    assert (there and there[0]) == (back and back[0])


@pytest.mark.parametrize(("new", "kind"), [(U2, "changed"), ("", "format"), (None, "type"), ("not found", "format")])
def test_compare_pair_reports_anomalies_in_bodies_and_headers(new: Any, kind: str) -> None:
    pair = [
        capture("old", headers=(("x-search-id", U1),), body=orjson.dumps({"id": U1})),
        capture("new", headers=(("x-search-id", str(new or "")),), body=orjson.dumps({"id": new})),
    ]
    result = compare_pair(pair, CompareOptions()).differences

    assert {difference.path: difference.kind for difference in result} == {
        "x-search-id": "format" if kind == "type" else kind,
        "$.id": kind,
    }
