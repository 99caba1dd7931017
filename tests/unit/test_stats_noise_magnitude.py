"""Shifts in the magnitude of numbers that always differ: found in new, never in old against old."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import exp, inf, sin
from typing import Any

import pytest

from abreast_sidecar.compare.model import Difference, JsonPath
from abreast_sidecar.compare.values import LongNumber
from abreast_sidecar.compare.volatile import classify_anomaly, get_direction, get_magnitude_shift
from abreast_sidecar.jobs.noise import COUNT_COLUMNS, classify_rows
from abreast_sidecar.stats.noise import MagnitudeShift, magnitude_evidence
from support_pairs import difference

Broken = Callable[[Any], Any]
Draw = Callable[[random.Random, int, bool], Any]  # the number of a request, of the live answer or of a copy
RUNS = 8
PAIRS = 1500
LOOKS = 150  # pairs from one to the next
COPIES = 10  # pairs per baseline copy


def text(value: float) -> str:
    return f"{value:.2f}"


# Values that do not depend on being a copy.
ALIKE: dict[str, Draw] = {
    "prices": lambda rng, _n, _copy: round(rng.lognormvariate(3, 1), 2),
    "prices as text": lambda rng, _n, _copy: text(rng.lognormvariate(3, 1)),
    "heavy tails": lambda rng, _n, _copy: rng.lognormvariate(0, 3),
    "no mean": lambda rng, _n, _copy: rng.paretovariate(0.8),
    "both signs": lambda rng, _n, _copy: rng.gauss(0, 5),
    "no mean, both signs": lambda rng, _n, _copy: rng.gauss(0, 1) / (rng.gauss(0, 1) or 1),
    "random integers": lambda rng, _n, _copy: rng.getrandbits(63),
    "few": lambda rng, _n, _copy: rng.choice((0, 0, 0, 1, 2, 5)),
    "durations": lambda rng, _n, _copy: rng.expovariate(0.05) * rng.choice((1,) * 50 + (100,)),
    "hits and misses": lambda rng, _n, _copy: rng.choice((1, 1, 500)) + rng.random(),
    "day and night": lambda rng, n, _copy: rng.expovariate(1) * exp(3 * sin(n / 100)),
}
# Values that are later or further in every copy.
LATER: dict[str, Draw] = {
    "times": lambda rng, n, copy: 1_767_225_600 + n + copy * rng.randrange(3),
    "times in ms, as text": lambda rng, n, copy: str(1_767_225_600_000 + 1000 * n + copy * rng.randrange(40)),
    "a counter": lambda rng, n, copy: 3 * n + copy * rng.randrange(1, 4),
    "a counter that begins again": lambda rng, n, copy: (7 * n) % 100 + copy * rng.randrange(1, 4),
    "a counter of each item": lambda rng, _n, copy: rng.randrange(3) + copy * rng.randrange(1, 4),
    "what doubles": lambda _rng, n, copy: int(1.02**n) + copy,
    "stock": lambda rng, _n, copy: max(0, rng.randrange(6) - copy),
    "slow copies": lambda rng, _n, copy: rng.expovariate(0.05) * (4 if copy else 1),
    "warm copies": lambda rng, _n, copy: rng.choice((1, 1, 1, 500) if copy else (1, 500)) + rng.random(),
}
# Pairs until a shift is found, a tenth of them with a copy.
FOUND = {
    **dict.fromkeys(("prices", "prices as text", "no mean", "random integers", "day and night"), 450),
    "durations": 900,
    "both signs": 1500,
}


@dataclass
class Place:
    """The ledger's row of the place `$.n`."""

    row: dict[str, Any] = field(
        default_factory=lambda: {
            "id": 1, "part": "body", "path": "$.n", "kind": "changed", "newest_count": None, **dict.fromkeys(COUNT_COLUMNS, 0),
        }
    )  # fmt: skip

    def pair(self, old: Any, new: Any, copy: Any | None) -> None:
        self.row["compared"] += 1
        if (found := between(old, new)) is not None:
            self.row["count"] += 1
            self.row["new_greater"] += get_direction(found) > 0
            self.row["new_smaller"] += get_direction(found) < 0
            self.row["magnitude_up"] += get_magnitude_shift(found) > 0
            self.row["magnitude_down"] += get_magnitude_shift(found) < 0
        if copy is not None:
            self.row["baseline_compared"] += 1
            if (found := between(old, copy)) is not None:
                self.row["baseline_count"] += 1
                self.row["baseline_magnitude_up"] += get_magnitude_shift(found) > 0
                self.row["baseline_magnitude_down"] += get_magnitude_shift(found) < 0

    def decided(self) -> str:
        (found,) = classify_rows([self.row])
        return found.reason if found.state == "real" else ""


def between(old: Any, new: Any) -> Difference | None:
    """Return the difference of kind `changed`; other ranges are separate findings."""
    if old == new or classify_anomaly(old, new, (0.0, 0.0)) is not None:
        return None
    return Difference("body", "$.n", "changed", "value", JsonPath(None, "$.n", old, new))


def run(
    draw: Draw, seed: int, pairs: int = PAIRS, *, copies: bool = True, broken: Broken = lambda value: value
) -> list[str]:
    """Return the reason at each evaluation, empty unless real."""
    rng, place, reasons = random.Random(seed), Place(), []
    for n in range(pairs):
        copy = draw(rng, n, True) if copies and n % COPIES == 0 else None  # a Draw
        place.pair(draw(rng, n, False), broken(draw(rng, n, True)), copy)  # a Draw
        if n % LOOKS == LOOKS - 1:
            reasons.append(place.decided())
    return reasons


@pytest.mark.parametrize("name", [*ALIKE, *LATER])
def test_magnitude_shift_is_noise_for_old_against_old(name: str) -> None:
    draw = {**ALIKE, **LATER}[name]

    for seed in range(RUNS):
        assert not any(run(draw, seed))


@pytest.mark.parametrize("name", ALIKE)
def test_magnitude_shift_without_copies_or_direction_is_noise(name: str) -> None:
    for seed in range(RUNS):
        assert not any(run(ALIKE[name], seed, copies=False))


def times(factor: float) -> Broken:
    def broken(value: Any) -> Any:
        return text(float(value) * factor) if isinstance(value, str) else value * factor

    return broken


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize(("factor", "share"), [(10, 1), (0.1, 1), (0, 0.5)])
def test_magnitude_shift_finds_factors_of_ten(name: str, factor: float, share: float) -> None:
    pairs = int(FOUND[name] * share)
    found = [run(ALIKE[name], seed, pairs, broken=times(factor))[-1] for seed in range(RUNS)]

    assert all(found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1, 3, 1), (3, 1, -1), (1, 2, 0), (1, -3, 1), (0, 1, 1), (1, 0, -1), (0, 0.0, 0), ("1.50", "9.99", 1),
        ("7", "7.1", 0), (1, "3", 1), ("a", "b", 0), ("12 of 13", "1 of 13", 0), (True, 3, 0), (None, 3, 0), ("-", 3, 0),
        (10**400, 1, 0), (LongNumber("number 1e30"), 1, -1),
    ],
)  # fmt: skip
def test_get_magnitude_shift_compares_two_numbers(old: Any, new: Any, expected: int) -> None:
    assert (
        get_magnitude_shift(Difference("body", "$.n", "changed", "value", JsonPath(None, "$.n", old, new))) == expected
    )
    assert get_magnitude_shift(difference("$.n", kind="range", old="1", new="9000")) == 0


def test_magnitude_shift_waits_for_expected_copies() -> None:
    far_one_way = MagnitudeShift(
        compared=100, far_greater=60, far_smaller=2, baseline_compared=0, baseline_far_greater=0, baseline_far_smaller=0
    )

    assert magnitude_evidence(far_one_way) > 10
    assert magnitude_evidence(replace(far_one_way, baseline_compared=10, baseline_far_greater=1)) < 5
    assert magnitude_evidence(replace(far_one_way, baseline_compared=100, baseline_far_greater=2)) > 10
    assert magnitude_evidence(replace(far_one_way, baseline_compared=100, baseline_far_greater=70)) == -inf
    assert magnitude_evidence(replace(far_one_way, far_smaller=60)) == -inf
