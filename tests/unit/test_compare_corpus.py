"""Every labelled pair: all that differs is found, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from support_corpus import Pair, found, pairs

PAIRS = pairs()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_exactly_what_is_labelled_is_found(pair: Pair) -> None:
    judgement = pair.judged()

    told = pair.expected if pair.got is None else pair.got
    assert found(judgement) == {_deep(text) for text in told}
    assert judgement.outcome == pair.outcome


def _deep(text: str) -> str:
    return text.replace("$*", "$" + "[*]" * 150)


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    labels = Counter(pair.label for pair in PAIRS)

    assert len(PAIRS) >= 400
    assert len({pair.name for pair in PAIRS}) > 0.95 * len(PAIRS)
    assert labels["harmless"] >= 40
    assert labels["regression"] >= 100


def test_labels_and_expectations_say_the_same() -> None:
    for pair in PAIRS:
        impacts = {text.rpartition(" ")[2] for text in pair.expected}

        assert bool(impacts) == (pair.label not in {"harmless", "unknown"}), pair.name
        assert (impacts == {"additive"}) == (pair.label == "additive"), pair.name
        assert (pair.label == "unknown") == (pair.outcome not in {"match", "mismatch"} and not impacts), pair.name


def test_what_is_known_to_be_told_wrongly_is_little_and_named() -> None:
    assert [pair.name for pair in PAIRS if pair.got is not None] == [
        "a scope in another order",
        "fields of protobuf in another order",
        "quotes that a table does not need",
    ]


def test_swapped_sides_differ_where_the_pair_does() -> None:
    for pair in PAIRS:
        there = pair.judged()
        back = type(pair)(
            pair.name, pair.label, replace(pair.new, version="old"), replace(pair.old, version="new"), pair.expected, ""
        ).judged()

        assert {one.path for one in there.differences if one.part != "status"} == {
            one.path for one in back.differences if one.part != "status"
        }, pair.name
