"""docs/transparency.md and the cases of the transparency suite."""

from __future__ import annotations

from support_transparency_known import (
    DOCUMENTATION,
    KNOWN,
    KNOWN_COPIES,
    KNOWN_NEW,
    documented_patterns,
    find_rows,
    matching_cases,
)


def test_each_row_names_cases_that_exist() -> None:
    unheld = {row[0] for row, patterns in find_rows() if not patterns or not all(map(matching_cases, patterns))}

    assert not unheld


def test_each_known_difference_is_documented() -> None:
    known = {**KNOWN_NEW, **KNOWN, **KNOWN_COPIES}

    assert known.keys() - set(documented_patterns()) == set()


def test_page_is_short() -> None:
    assert len(DOCUMENTATION.read_text().splitlines()) <= 100
