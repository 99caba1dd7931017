"""Terminal output: numbers, times and untrusted text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.client import output

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


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
def test_format_seconds_picks_unit(value: float, text: str) -> None:
    assert output.format_seconds(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1, "100%"), (0.25, "25%"), (0.005, "0.5%"), (0.9995, "99.95%"), (0.000_000_1, "<0.0001%")],
)
def test_format_percent_distinguishes_small_shares_from_zero(share: float, text: str) -> None:
    assert output.format_percent(share) == text


def test_format_share_of_never_rounds_to_zero_or_all() -> None:
    assert output.format_share_of(1, 100_000) == "<0.1%"
    assert output.format_share_of(99_999, 100_000) == ">99.9%"
    assert output.format_share_of(5, 5) == "100%"
    assert output.format_share_of(0, 0) == ""
    assert output.format_share_of(7, 5) == ""  # a count of all time is not a part of the stored pairs


def test_format_bytes_picks_unit() -> None:
    assert [output.format_bytes(n) for n in (0, 999, 1500, 31_000_000)] == ["0 bytes", "999 bytes", "1.5 KB", "31.0 MB"]


@given(st.text())
def test_to_printable_escapes_control_characters(text: str) -> None:
    assert output.to_printable(text).isprintable()


def test_to_printable_shortens_in_the_middle() -> None:
    assert output.to_printable("a" * 50 + "z" * 50, 11) == "aaaaa…zzzzz"


def test_split_json_lines_keeps_values_as_sent() -> None:
    text = '{"a": 1E2,"a":[ ],"b":[{"c":"x,\\"{"},null],"d":{}}'

    assert output.split_json_lines(text) == [
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


def test_split_json_lines_returns_none_for_other_text() -> None:
    assert output.split_json_lines("{not json") is None


@given(json_values)
def test_split_json_lines_keeps_meaning(value: object) -> None:
    lines = output.split_json_lines(json.dumps(value))

    assert lines is not None
    assert json.loads("\n".join(lines)) == value
