"""Values of another format or range, which are anomalies even at noisy places."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.export.redaction import Redactor
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.volatile import classify_anomaly
from support_captures import capture

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
    (f"http://h.example/jobs/{U1}", f"http://h.example/job/{U2}", ("format", "value")),
    (f"http://h.example/jobs/{U1}", f"https://h.example/jobs/{U2}", ("format", "value")),
    (f"http://h.example/jobs/{U1}", f"http://g.example/jobs/{U2}", ("format", "value")),
    (f"/jobs/{U1}", f"/job/{U2}", ("format", "value")),
    (f"job_{U1}.pdf", f"bob_{U2}.pdf", ("format", "value")),
    (f"job {U1} took 5 ms", f"task {U2} took 6 ms", ("format", "value")),
]
ALIKE: list[tuple[Any, Any]] = [
    (f"job {U1} took 5 ms", f"job {U2} took 1.5 ms"), (f"http://h/jobs/{U1}?n=1", f"http://h/jobs/{U2}?n=2"),
    (f"http://h/jobs/{U1}", f"http://h/job/{U1}"), ("3 items left", "no items left"), (f"/jobs/{U1}", f"/jobs/{U2}"),
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


DIGEST = "hmac:07b60d15:255e74d7328ca7f4f282380ee05d424f"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("4111111111111112", DIGEST, "changed"),
        (f"{DIGEST}-8314-c5f048b1a2d3", U1, "changed"),
        (4111111111111112, DIGEST, "changed"),
        (DIGEST, 4111111111111112, "changed"),
        (12345, DIGEST, "type"),
        (True, DIGEST, "type"),
        ("", DIGEST, "format"),
    ],
)
def test_value_that_looks_like_a_secret_by_chance_has_no_other_format(old: Any, new: Any, kind: str) -> None:
    pair = [capture("old", body=orjson.dumps({"id": old})), capture("new", body=orjson.dumps({"id": new}))]

    [found] = compare_pair(pair, CompareOptions()).differences
    assert found.kind == kind


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(VALUES, VALUES)
def test_classify_anomaly_is_symmetric_in_kind(old: Any, new: Any) -> None:
    forward, backward = classify_anomaly(old, new, STARTS), classify_anomaly(new, old, STARTS)

    assert (forward and forward[0]) == (backward and backward[0])


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


TRACE = 'Traceback (most recent call last):\n  File "/srv/app.py", line 7, in show\n    raise KeyError'
BCRYPT = "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW"
TOKEN = "k3Jd8Qw2Zx9Pv5Lm1Ty7Rb4N"
LEAKS: list[dict[str, Any]] = [
    {"card_number": "4242 4242 4242 4242"}, {"password_hash": BCRYPT}, {"pw": BCRYPT}, {"reset_token": TOKEN}, {"user": {"profile": [{"apiKey": TOKEN}]}},
    {"pem": "-----BEGIN PRIVATE KEY-----\nMIIE"}, {"cause": TRACE}, {"_debug": {"sql": ["select 1"]}},
    {"detail": "Error: no\n    at show (/srv/app.js:7:12)"}, {"detail": "goroutine 1 [running]:\nmain.main()"},
    {"info": "java.lang.IllegalStateException\n\tat org.shop.Basket.add(Basket.java:17)"}, {"pin": "0815"},
]  # fmt: skip
HARMLESS: list[dict[str, Any]] = [
    {"colour": "red"}, {"next_page_token": TOKEN}, {"upload_id": TOKEN}, {"etag": TOKEN}, {"has_password": True},
    {"reset_token": None}, {"password": ""}, {"password_changed_at": "2024-05-01T12:00:05Z"}, {"total_tokens": 1234},
    {"debug": False}, {"debug": {}}, {"owner_id": 4242424242424242}, {"sha": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"},
    {"paid_with": 4242424242424242}, {"reference": TOKEN}, {"avatar": f"https://cdn.example/{TOKEN}/a.png"},
    {"note": "at the corner (see 7:12)"}, {"image_url": f"https://cdn.example/a?sig={TOKEN}"},
]  # fmt: skip


def compare_addition(addition: Any, *, is_redacted: bool) -> set[tuple[str, str]]:
    bodies = [orjson.dumps({"id": 1}), orjson.dumps({"id": 1, **addition})]
    if is_redacted:
        redactor = Redactor("key")
        bodies = [redactor.redact_value(body.decode()).encode() for body in bodies]
    pair = [capture("old", body=bodies[0]), capture("new", body=bodies[1])]
    return {(difference.kind, difference.impact) for difference in compare_pair(pair, CompareOptions()).differences}


@pytest.mark.parametrize("is_redacted", [False, True])
@pytest.mark.parametrize("addition", LEAKS)
def test_compare_pair_reports_an_added_secret_as_breaking(addition: Any, is_redacted: bool) -> None:
    assert compare_addition(addition, is_redacted=is_redacted) == {("added", "breaking")}


@pytest.mark.parametrize("is_redacted", [False, True])
@pytest.mark.parametrize("addition", HARMLESS)
def test_compare_pair_reports_an_added_harmless_field_as_additive(addition: Any, is_redacted: bool) -> None:
    assert compare_addition(addition, is_redacted=is_redacted) == {("added", "additive")}


def test_compare_pair_accepts_a_new_element_with_secrets_that_old_has_too() -> None:
    bodies = [orjson.dumps([{"id": index, "token": TOKEN} for index in range(count)]) for count in (1, 2)]
    pair = [capture("old", body=bodies[0]), capture("new", body=bodies[1])]

    assert [difference.impact for difference in compare_pair(pair, CompareOptions()).differences] == ["value"]


@pytest.mark.parametrize("text", ["\n" * 60_000, ("\n" + " " * 1000) * 60, "\n at x (" * 8_000])
def test_search_for_leaks_takes_linear_time(text: str) -> None:
    pair = [capture("old", body=orjson.dumps({"id": 1})), capture("new", body=orjson.dumps({"id": 1, "note": text}))]
    start = time.process_time()

    assert [difference.impact for difference in compare_pair(pair, CompareOptions()).differences] == ["additive"]
    assert time.process_time() - start < 2
