"""Values that always differ and lean to one side: found in new, never in old against old."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, inf, sin
from typing import Any

import pytest
from msgspec.structs import replace

from abreast.protocol.capture import Role, Version
from abreast_sidecar.compare.model import ComparisonResult, Difference, JsonPath
from abreast_sidecar.compare.values import LongNumber
from abreast_sidecar.compare.volatile import classify_anomaly, compare_values
from abreast_sidecar.jobs.noise import COUNT_COLUMNS, classify_rows
from abreast_sidecar.stats.noise import OrderCounts, order_evidence
from abreast_sidecar.store.counters import MARKS, compute_marks
from support_captures import capture
from support_pairs import difference

Broken = Callable[[Any], Any]
Draw = Callable[[random.Random, int, bool], Any]  # the number of a request, of the live answer or of a copy
RUNS = 5
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
    **dict.fromkeys(("prices", "prices as text", "no mean", "random integers", "day and night"), 1000),
    "durations": 1500,
    "both signs": 4000,
}


@dataclass
class Place:
    """The ledger's row of the place `$.n`."""

    row: dict[str, Any] = field(
        default_factory=lambda: {
            "id": 1, "part": "body", "path": "$.n", "kind": "changed", "newest_count": None, "places": 1, **dict.fromkeys(COUNT_COLUMNS, 0),
        }
    )  # fmt: skip

    def pair(
        self,
        old: Any,
        new: Any,
        copy: Any | None,
        *,
        live: Version = "old",
        in_flight: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Add a pair. `in_flight`: other requests in the processes of old, of new, and of the second copy."""
        self.row["compared"] += 1
        noisy = (old, copy) if live == "old" else (copy, new)
        change, noise = between(old, new), None if copy is None else between(*noisy)
        self.row["count"] += change is not None
        self.row["baseline_count"] += noise is not None
        roles: tuple[Role, Role] = ("live", "shadow") if live == "old" else ("shadow", "live")
        sides = (
            replace(capture("old", role=roles[0]), in_flight=in_flight[0]),
            replace(capture("new", role=roles[1]), in_flight=in_flight[1]),
            None if copy is None else replace(capture(live, role="baseline"), in_flight=in_flight[2]),
        )
        result = ComparisonResult("mismatch", "GET", "/", *sides, baseline_compared=copy is not None)
        self.row["baseline_compared"] += copy is not None
        changes, noises = ([difference] if difference else [] for difference in (change, noise))
        marks = compute_marks(result, changes, noises, 0.0, copies_writes=False) if change or noise else 0
        for name, mark in MARKS.items():
            self.row[name] += bool(marks & mark)

    def decided(self) -> str:
        (decision,) = classify_rows([self.row])
        return decision.reason if decision.state == "real" else ""


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
def test_no_value_leans_for_old_against_old(name: str) -> None:
    draw = {**ALIKE, **LATER}[name]

    for seed in range(RUNS):
        assert not any(run(draw, seed))


@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize("has_copies", [True, False])
def test_durations_under_unequal_loads_lean_only_for_slower_code(factor: int, *, has_copies: bool) -> None:
    """Requests wait longer in old, which answers most users and gets most copies."""
    rng, place = random.Random(1), Place()
    for number in range(2000):
        live: Version = "new" if number % 10 < 3 else "old"
        is_new = False, True, live == "new"
        old, new, copy = in_flight = tuple(
            rng.randrange(12) if is_of_new else rng.randrange(5, 30) for is_of_new in is_new
        )
        durations = [
            rng.expovariate(1) * (1 + load) * (factor if is_of_new else 1)
            for load, is_of_new in zip(in_flight, is_new, strict=True)
        ]
        copy_duration = durations[2] if has_copies else None
        place.pair(durations[0], durations[1], copy_duration, live=live, in_flight=(old, new, copy))

    assert bool(place.decided()) is (factor > 1)


def test_value_that_grows_is_noise_if_one_copy_waits_longer() -> None:
    rng, place = random.Random(1), Place()
    for n in range(300):
        place.pair(100 + n, 100 + n + rng.randrange(1, 9), 100 + n + rng.randrange(1, 3))

    assert not place.decided()


@pytest.mark.parametrize("lead", [-40, 0, 40])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("live", ["old", "new"])
def test_counter_of_each_process_is_noise(lead: int, step: int, live: Version) -> None:
    """A counter of visits, or of requests that a limit still allows, is in the memory of each process."""
    place = Place()
    for n in range(200):
        value, other, later = 1000 + 2 * step * n, 1000 + step * n + lead, 1000 + 2 * step * n + step
        place.pair(*((value, other, later) if live == "old" else (other, value, later)), live=live)

    assert not place.decided()


@pytest.mark.parametrize("name", ["a flag", "a variant", "a score"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_value_that_leans_is_real(name: str, is_broken: bool) -> None:
    rng, place = random.Random(name), Place()
    draw: Callable[[bool], Any] = {
        "a flag": lambda broken: rng.random() < 0.5 and not broken,
        "a variant": lambda broken: "A" if broken else rng.choice("AB"),
        "a score": lambda broken: rng.gauss(80, 1) * (1.02 if broken else 1),
    }[name]
    for _ in range(200):
        place.pair(draw(False), draw(is_broken), draw(False))

    assert bool(place.decided()) is is_broken


@pytest.mark.parametrize("name", ALIKE)
def test_value_without_copies_is_noise(name: str) -> None:
    for seed in range(RUNS):
        assert not any(run(ALIKE[name], seed, copies=False))


def times(factor: float) -> Broken:
    def broken(value: Any) -> Any:
        return text(float(value) * factor) if isinstance(value, str) else value * factor

    return broken


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize(("factor", "share"), [(10, 1), (0.1, 1), (0, 0.5)])
def test_factor_of_ten_is_found(name: str, factor: float, share: float) -> None:
    pairs = int(FOUND[name] * share)
    decisions = [run(ALIKE[name], seed, pairs, broken=times(factor))[-1] for seed in range(RUNS)]

    assert all(decisions)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1, 3, 1), (3, 1, -1), (1, 1.01, 1), (1, -3, 1), (0, 1, 1), (1, 0, -1), (0, 0.0, 0), ("1.50", "9.99", 1),
        ("7", "7.1", 1), (1, "3", 1), ("a", "b", 1), ("b", "a", -1), ("12 of 13", "1 of 13", None), (True, 3, None), (None, 3, None),
        (10**400, 1, None), (LongNumber("number 1e30"), 1, -1), (False, True, 1), ("9.50 EUR", "10 EUR", 1),
        ("9.50 EUR", "10 USD", None), ("took 12 ms", "took 13 ms", 0), ("took 12 ms", "took 60 ms", 1), ("a-7-f3", "b-1-aa", None),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:09Z", 1), ("2026-01-01T00:00:00Z", "2026-01-01T00:00:02Z", 0),
        ("ends at 2026-01-01T02:00:00Z", "ends at 2026-01-01T01:00:00Z", -1), (1_767_225_600, 1_767_229_200, 1),
        (1_767_225_600.5, 1_767_225_601.5, 0), ("Sat, 31 Jan 2026 00:00:00 GMT", "Sat, 31 Jan 2026 01:00:00 GMT", 1),
    ],
)  # fmt: skip
def test_compare_values_orders_values_of_one_kind(old: Any, new: Any, expected: int | None) -> None:
    assert (
        compare_values([Difference("body", "$.n", "changed", "value", JsonPath(None, "$.n", old, new))], (0.0, 0.0))
        == expected
    )
    assert compare_values([difference("$.n", kind="range", old="1", new="9000")], (0.0, 0.0)) is None


def test_compare_values_counts_times_from_start_of_each_request() -> None:
    later = difference("$.until", old="1767225600", new="1767229200")

    assert compare_values([later], (1_767_222_000.0, 1_767_225_600.0)) == 0
    assert compare_values([later], (1_767_222_000.0, 1_767_222_000.0)) == 1


def test_compare_values_expects_clocks_to_differ() -> None:
    start_times = 1_767_225_600.0, 1_767_225_600.0

    assert compare_values([difference("$.now", old="1767225600", new="1767225620")], start_times) == 0
    assert compare_values([difference("$.now", old="1767225600", new="1767225660")], start_times) == 1


@pytest.mark.parametrize("path", ["$.took", "$.timings[*].elapsedMs", "$.process.uptime_seconds", "$.pid"])
def test_compare_values_needs_twice_the_value_of_process(path: str) -> None:
    assert compare_values([difference(path, old="10", new="15")], (0.0, 0.0)) == 0
    assert compare_values([difference(path, old="10", new="25")], (0.0, 0.0)) == 1


def test_compare_values_counts_elements_of_list() -> None:
    rows = [difference("$.rows[*].n", old=old, new=new) for old, new in (("1", "2"), ("5", "4"), ("1", "3"))]

    assert compare_values(rows, (0.0, 0.0)) == 1
    assert compare_values(rows[:2], (0.0, 0.0)) == 0


def test_order_evidence_needs_discordant_triples() -> None:
    assert order_evidence(OrderCounts(20, 0, 0, 0)) > 10
    assert order_evidence(OrderCounts(20, 15, 0, 0)) < 5
    assert order_evidence(OrderCounts(20, 20, 3, 3)) == -inf
    assert order_evidence(OrderCounts(10, 0, 0, 10)) > 10
    assert order_evidence(OrderCounts(0, 0, 0, 40)) == -inf  # only the second copies lean
    assert order_evidence(OrderCounts(0, 0, 0, 0)) == -inf
    assert order_evidence(OrderCounts(20, 0, 0, 0, same_rises=20)) == -inf
    assert order_evidence(OrderCounts(20, 0, 0, 0, same_rises=30, same_falls=10)) > 10
