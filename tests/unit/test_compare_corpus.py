"""Labelled pairs of the corpus yield exactly the expected differences."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from support_corpus import Pair, describe_differences, pairs

PAIRS = pairs()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_corpus_pair_yields_the_labelled_differences(pair: Pair) -> None:
    result = pair.compare()

    expected = pair.expected if pair.actual is None else pair.actual
    assert describe_differences(result) == {_deep(text) for text in expected}
    assert result.outcome == pair.outcome


def _deep(text: str) -> str:
    return text.replace("$*", "$" + "[*]" * 150)


def test_corpus_is_large_and_has_unique_names() -> None:
    labels = Counter(pair.label for pair in PAIRS)

    assert len(PAIRS) >= 400
    assert len({pair.name for pair in PAIRS}) > 0.95 * len(PAIRS)
    assert labels["harmless"] >= 40
    assert labels["regression"] >= 100


def test_corpus_labels_agree_with_expected_differences() -> None:
    for pair in PAIRS:
        impacts = {text.rpartition(" ")[2] for text in pair.expected}

        assert bool(impacts) == (pair.label not in {"harmless", "unknown"}), pair.name
        assert (impacts == {"additive"}) == (pair.label == "additive"), pair.name
        assert (pair.label == "unknown") == (pair.outcome not in {"match", "mismatch"} and not impacts), pair.name


def test_corpus_lists_its_known_errors() -> None:
    assert [pair.name for pair in PAIRS if pair.actual is not None] == [
        "a scope in another order",
        "fields of protobuf in another order",
    ]


def test_corpus_pair_with_swapped_sides_differs_at_the_same_paths() -> None:
    for pair in PAIRS:
        forward = pair.compare()
        backward = type(pair)(
            pair.name, pair.label, replace(pair.new, version="old"), replace(pair.old, version="new"), pair.expected, ""
        ).compare()

        assert {difference.path for difference in forward.differences if difference.part != "status"} == {
            difference.path for difference in backward.differences if difference.part != "status"
        }, pair.name
