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
def test_sanitise_text_returns_storable_text_within_limit(value: str, limit: int) -> None:
    cleaned = sanitise_text(value, limit)

    assert len(cleaned) <= limit
    assert "\0" not in cleaned
    assert cleaned.encode().decode() == cleaned


@given(text)
def test_sanitise_text_is_idempotent(value: str) -> None:
    assert sanitise_text(sanitise_text(value, 40), 40) == sanitise_text(value, 40)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
def test_sanitise_text_keeps_ordinary_text(value: str) -> None:
    assert sanitise_text(value, 40) == value


def test_sanitise_text_keeps_long_texts_different() -> None:
    assert sanitise_text("x" * 100 + "a", 50) != sanitise_text("x" * 100 + "b", 50)


@given(values)
def test_to_json_returns_valid_jsonb(value: object) -> None:
    document = to_json([value])

    assert "\\u0000" not in document.replace("\\\\", "")
    assert isinstance(orjson.loads(document), list)
