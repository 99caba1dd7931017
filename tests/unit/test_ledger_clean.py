from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.store.database import sanitise_text, to_json

text = st.text(st.characters(exclude_categories=()))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


@given(text, st.integers(10, 60))
def test_cleaned_text_can_be_stored_and_is_no_longer_than_allowed(value: str, limit: int) -> None:
    cleaned = sanitise_text(value, limit)

    assert len(cleaned) <= limit
    assert "\0" not in cleaned
    assert cleaned.encode().decode() == cleaned


@given(text)
def test_cleaning_twice_changes_nothing_more(value: str) -> None:
    assert sanitise_text(sanitise_text(value, 40), 40) == sanitise_text(value, 40)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_ordinary_text_stays_as_it_is(value: str) -> None:
    assert sanitise_text(value, 40) == value


def test_long_texts_that_begin_alike_stay_different() -> None:
    assert sanitise_text("x" * 100 + "a", 50) != sanitise_text("x" * 100 + "b", 50)


@given(values)
def test_json_for_the_ledger_holds_nothing_that_jsonb_refuses(value: object) -> None:
    made = to_json([value])

    assert b"\\u0000" not in made.replace(b"\\\\", b"")
    assert isinstance(orjson.loads(made), list)
