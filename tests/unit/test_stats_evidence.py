from __future__ import annotations

import time
import uuid

import pytest

from abreast_sidecar.compare.json_diff import JsonDiff
from abreast_sidecar.compare.values import parse
from abreast_sidecar.compare.volatile import get_direction, get_values, is_explained_by_shape
from support_pairs import difference

AT = time.time()


def test_shape_explains_fresh_ids_but_not_prices() -> None:
    one, other = uuid.uuid4(), uuid.uuid4()

    assert is_explained_by_shape([difference(old=f'"{one}"', new=f'"{other}"')], AT)
    assert not is_explained_by_shape([difference(old="1.5", new="1.6")], AT)
    assert not is_explained_by_shape([difference(kind="removed", old=f'"{one}"', new=None)], AT)


def test_shape_must_explain_every_value() -> None:
    fresh = difference(old=f'"{uuid.uuid4()}"', new=f'"{uuid.uuid4()}"')

    assert is_explained_by_shape([fresh, fresh], AT)
    assert not is_explained_by_shape([fresh, difference(old='"a"', new='"b"')], AT)


def test_shape_never_explains_a_status_as_a_time() -> None:
    now = str(int(AT))

    assert not is_explained_by_shape([difference("200->500", part="status", old=now, new=now)], AT)


@pytest.mark.parametrize(
    ("kind", "old", "new", "side"),
    [
        ("added", None, "1", 1),
        ("removed", "1", None, -1),
        ("changed", "1.5", "1.6", 1),
        ("changed", '"b"', '"a"', -1),
        ("changed", "true", "false", 0),
        ("type", "null", "1", 1),
        ("type", '"1"', "1", -1),
        ("order", "[1,2]", "[2,1]", 0),
        ("changed", '"cut…', '"cut…', 0),
    ],
)
def test_direction_points_to_the_greater_value(kind: str, old: str | None, new: str | None, side: int) -> None:
    assert get_direction(difference(kind=kind, old=old, new=new)) == side


def test_values_of_a_document_are_not_truncated() -> None:
    old, new = "a" * 2000, "a" * 1999 + "b"
    (found,) = JsonDiff(200).compare({"text": old}, {"text": new})

    assert get_values(found) == (old, new)
    assert get_direction(found) == 1


def test_direction_of_numbers_beyond_floats() -> None:
    old, new = (
        b'{"a": 0.123456789012345678, "b": 1, "c": 1e999}',
        b'{"a": 0.5, "b": 1e400, "c": 1e99999999999999999999999}',
    )
    found = JsonDiff(10).compare(parse(old), parse(new))

    assert [get_direction(one) for one in found] == [1, 1, 0]
    assert not is_explained_by_shape(found, time.time())
