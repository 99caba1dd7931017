from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.store.reader import PageRequest, decode_cursor, encode_cursor

PLACES = st.lists(st.none() | st.integers(-(2**53), 2**53) | st.text(), max_size=4)


@given(PLACES, st.dictionaries(st.text(), st.text() | st.none()))
def test_cursor_decodes_to_its_position(place: list[Any], filters: dict[str, Any]) -> None:
    assert decode_cursor("pairs", filters, encode_cursor("pairs", filters, place)) == place


@given(st.text())
def test_cursor_rejects_invalid_token(token: str) -> None:
    with pytest.raises(ArgumentError, match="page_token must be the next_page_token"):
        decode_cursor("pairs", {}, token)


def test_cursor_belongs_to_its_listing_and_filters() -> None:
    token = encode_cursor("pairs", {"service": "shop"}, [1])

    for listing, filters in (("pairs", {"service": "till"}), ("findings", {"service": "shop"})):
        with pytest.raises(ArgumentError, match="filters unchanged"):
            decode_cursor(listing, filters, token)


def test_cursor_rejects_changed_token() -> None:
    token = encode_cursor("pairs", {}, [1234])

    for place in range(len(token)):
        other = "A" if token[place] != "A" else "B"
        with pytest.raises(ArgumentError):
            decode_cursor("pairs", {}, token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize(("page_size", "size"), [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_page_request_accepts_valid_sizes(page_size: int, size: int) -> None:
    assert PageRequest.from_request(page_size, "").size == size


@pytest.mark.parametrize("page_size", [-1, -(2**31)])
def test_page_request_rejects_negative_sizes(page_size: int) -> None:
    with pytest.raises(ArgumentError, match="page_size must be at least 1"):
        PageRequest.from_request(page_size, "")
