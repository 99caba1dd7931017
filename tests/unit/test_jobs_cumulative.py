from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.jobs import envoy_counts as envoy
from abreast_sidecar.jobs.cumulative import continue_counters, was_reset
from abreast_sidecar.jobs.envoy_counts import EnvoySnapshot, count_copies, sum_counts

lives = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=6)


@given(lives)
def test_continue_counters_adds_all_lives(grown: list[list[int]]) -> None:
    """Each life counts from 0; each number is what was added until the next look."""
    base: dict[str, int] = {}
    last: dict[str, int] = {}
    sums: dict[str, int] = {}
    for life in grown:
        now, fresh = 0, True
        for more in life:
            now += more
            base, sums = continue_counters(base, last, {"n": now}, is_same_life=not fresh)
            last, fresh = {"n": now}, False

    assert sums["n"] == sum(map(sum, grown))


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
)
def test_was_reset_detects_only_falling_counters(start: dict[str, int], more: dict[str, int]) -> None:
    grown = {name: start.get(name, 0) + more.get(name, 0) for name in "abc"}

    assert not was_reset(start, grown)
    assert was_reset(grown, start) == any(more.values())


def test_count_copies_includes_unsent_copies() -> None:
    def stat(cluster: str, name: str, value: int) -> dict[str, object]:
        return {"name": f"cluster.{cluster}.{name}", "value": value}

    found = count_copies(
        [
            stat("old_shadow", "upstream_rq_total", 3),
            stat("new_shadow", "upstream_rq_total", 50),
            stat("new_shadow", "upstream_rq_pending_overflow", 4),
            stat("new_shadow", "upstream_rq_pending_failure_eject", 2),
            stat("old_baseline", "upstream_rq_total", 5),
            stat("old_baseline", "upstream_cx_none_healthy", 1),
            {"histograms": {}},
        ]
    )

    assert found == {"old_shadow": 3, "new_shadow": 56, "old_baseline": 6, "sampled": 59, "not_sent": 7}


def test_sum_counts_detects_restart_by_uptime() -> None:
    before = {"last_reading": {"sampled": 5, "base": {"sampled": 100}}, "age": 60.0}
    restarted = sum_counts(before, EnvoySnapshot("edge", "shop", uptime_s=50.0, counts={"sampled": 7}))
    running = sum_counts(before, EnvoySnapshot("edge", "shop", uptime_s=900.0, counts={"sampled": 7}))

    assert restarted == ({"sampled": 105}, {"sampled": 112})
    assert running == ({"sampled": 100}, {"sampled": 107})


@pytest.mark.parametrize("jump", [-3600.0, 0.0, 3600.0])
def test_sum_counts_ignores_jump_of_postgres_clock(jump: float) -> None:
    """`age` is by that clock. This process has watched the Envoy by one that nobody sets."""
    before = {"last_reading": {"sampled": 5, "base": {"sampled": 100}}, "age": 1.0 + jump}
    seen = EnvoySnapshot("edge", "shop", uptime_s=900.0, counts={"sampled": 7})

    assert sum_counts(before, seen, is_same_life=True) == ({"sampled": 100}, {"sampled": 107})


def test_sum_counts_detects_restart_by_falling_count() -> None:
    before = {"last_reading": {"sampled": 5, "base": {}}, "age": 0.5}

    assert sum_counts(before, EnvoySnapshot("edge", "shop", 1.0, {"sampled": 1}), is_same_life=True)[1] == {
        "sampled": 6
    }


def test_has_kept_running_uses_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1000.0, 1010.0, 1020.0, 1030.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(envoy, "LAST_UPTIMES", {})
    known = [envoy._has_kept_running(EnvoySnapshot("edge", "shop", uptime, {})) for uptime in (50.0, 60.0, 69.0, 3.0)]

    assert known == [False, True, True, False]
