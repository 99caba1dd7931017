"""Numbers, times and texts for people; values of options."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.cli import options as parameters
from abreast_sidecar.cli.up import parse_upstream
from abreast_sidecar.client import output as humane
from abreast_sidecar.client import output as json_lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.000_003, "3 µs"),
        (0.0041, "4.1 ms"),
        (0.12, "120 ms"),
        (0.9996, "1 s"),
        (1.25, "1.25 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7199.9, "2 h"),
        (90_000, "1 d 1 h"),
        (-2, "-2 s"),
    ],
)
def test_durations_have_the_unit_that_fits(value: float, text: str) -> None:
    assert humane.format_seconds(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1, "100%"), (0.25, "25%"), (0.005, "0.5%"), (0.9995, "99.95%"), (0.000_000_1, "<0.0001%")],
)
def test_shares_tell_a_little_from_nothing(share: float, text: str) -> None:
    assert humane.format_percent(share) == text


def test_a_part_is_never_rounded_to_none_or_all() -> None:
    assert humane.format_share_of(1, 100_000) == "<0.1%"
    assert humane.format_share_of(99_999, 100_000) == ">99.9%"
    assert humane.format_share_of(5, 5) == "100%"
    assert humane.format_share_of(0, 0) == ""
    assert humane.format_share_of(7, 5) == ""  # all time, of what is kept


def test_sizes_have_the_unit_that_fits() -> None:
    assert [humane.format_bytes(n) for n in (0, 999, 1500, 31_000_000)] == ["0 bytes", "999 bytes", "1.5 KB", "31.0 MB"]


@given(st.text())
def test_nothing_from_outside_can_steer_the_terminal(text: str) -> None:
    assert humane.to_printable(text).isprintable()


def test_long_texts_keep_both_ends() -> None:
    assert humane.to_printable("a" * 50 + "z" * 50, 11) == "aaaaa…zzzzz"


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2d", 172_800), ("now", 0)])
def test_moments_can_be_spans(text: str, ago: float) -> None:
    passed = dt.datetime.now(dt.UTC) - parameters.parse_moment(text)

    assert passed.total_seconds() == pytest.approx(ago, abs=5)


def test_moments_can_be_times() -> None:
    assert parameters.parse_moment("2026-01-31T09:30Z") == dt.datetime(2026, 1, 31, 9, 30, tzinfo=dt.UTC)


@pytest.mark.parametrize("text", ["6h", "2d"])
def test_long_spans_begin_with_a_full_hour(text: str) -> None:
    asked, found = parameters.parse_moment(text), parameters.parse_window_start(text)

    assert found == asked.replace(minute=0, second=0, microsecond=0)


@pytest.mark.parametrize(("text", "ago"), [("90s", 90), ("5h", 18_000)])
def test_short_spans_begin_when_they_say(text: str, ago: float) -> None:
    passed = dt.datetime.now(dt.UTC) - parameters.parse_window_start(text)

    assert passed.total_seconds() == pytest.approx(ago, abs=5)


def test_times_begin_when_they_say() -> None:
    assert parameters.parse_window_start("2026-01-31T09:30Z") == dt.datetime(2026, 1, 31, 9, 30, tzinfo=dt.UTC)


@pytest.mark.parametrize("text", ["", "soon", "3q", "1h2m", "99999999999d"])
def test_other_moments_are_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s, 15m"):
        parameters.parse_moment(text)


@pytest.mark.parametrize("text", ["127.0.0.1:50051", "sidecar.internal:443", "[::1]:50051"])
def test_sidecars_are_named_by_host_and_port(text: str) -> None:
    assert parameters.parse_target(text) == text


@pytest.mark.parametrize("text", ["", "50051", ":50051", "http://127.0.0.1:50051", "host:0", "host:99999", "::1:50051"])
def test_other_addresses_of_sidecars_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parameters.parse_target(text)


@pytest.mark.parametrize(
    ("text", "host", "port", "tls"),
    [
        ("http://127.0.0.1:8001", "127.0.0.1", 8001, ""),
        ("http://shop.internal/", "shop.internal", 80, ""),
        ("https://shop.internal", "shop.internal", 443, "shop.internal"),
        ("127.0.0.1:8001", "127.0.0.1", 8001, ""),
        ("http://[::1]:8001", "::1", 8001, ""),
    ],
)
def test_versions_are_named_by_url(text: str, host: str, port: int, tls: str) -> None:
    assert parse_upstream(text) == ((host, port), tls)


@pytest.mark.parametrize("text", ["", "ftp://a:1", "http://a:1/path", "http://a:x", "http://user@a:1"])
def test_other_urls_of_versions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse_upstream(text)


def test_json_is_shown_as_it_was_sent() -> None:
    text = '{"a": 1E2,"a":[ ],"b":[{"c":"x,\\"{"},null],"d":{}}'

    assert json_lines.split_json_lines(text) == [
        "{",
        '  "a": 1E2,',
        '  "a": [],',
        '  "b": [',
        "    {",
        '      "c": "x,\\"{"',
        "    },",
        "    null",
        "  ],",
        '  "d": {}',
        "}",
    ]


def test_what_is_no_json_is_not_taken_apart() -> None:
    assert json_lines.split_json_lines("{not json") is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_json_keeps_its_meaning(value: object) -> None:
    import json

    lines = json_lines.split_json_lines(json.dumps(value))

    assert lines is not None
    assert json.loads("\n".join(lines)) == value
