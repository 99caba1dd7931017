"""Detection of a new version that misses a cache more often than old."""

from __future__ import annotations

from abreast_sidecar.stats.latency import CacheLookups, MissIncrease, detect_extra_misses

COLD_START = [CacheLookups(0, 1, 0, 1, "1")] * 20


def lookups(old_misses: int, new_misses: int, requests: int = 400) -> list[CacheLookups]:
    """Return requests with one lookup each, of which so many in ten miss, after a cold start."""
    warm = [
        CacheLookups(
            int(n % 10 >= old_misses),
            int(n % 10 < old_misses),
            int(n % 10 >= new_misses),
            int(n % 10 < new_misses),
            "1",
        )
        for n in range(requests)
    ]
    return COLD_START + warm


def test_increase_has_the_misses_per_request_of_warm_pairs() -> None:
    increase = detect_extra_misses(lookups(1, 5))

    assert isinstance(increase, MissIncrease)
    assert 0.08 <= increase.old <= 0.12
    assert 0.48 <= increase.new <= 0.52
    assert increase.pairs >= 300


def test_equal_or_fewer_misses_are_no_increase() -> None:
    assert detect_extra_misses(lookups(5, 5)) is None
    assert detect_extra_misses(lookups(5, 1)) is None


def test_increase_needs_warm_pairs_and_a_noticeable_ratio() -> None:
    assert detect_extra_misses(lookups(1, 5, requests=20)) is None
    assert detect_extra_misses(lookups(5, 6)) is None
