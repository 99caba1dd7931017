from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.jobs import reports
from abreast_sidecar.jobs.reports import (
    EnvoySnapshot,
    continue_counters,
    count_copies,
    read_stats,
    select_service,
    sum_counts,
    was_reset,
)

lives = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=6)


@given(lives)
def test_continue_counters_adds_all_lives(grown: list[list[int]]) -> None:
    """Each life counts from 0; each number is what was added until the next look."""
    base: dict[str, int] = {}
    last: dict[str, int] = {}
    sums: dict[str, int] = {}
    for life in grown:
        total, fresh = 0, True
        for step in life:
            total += step
            base, sums = continue_counters(base, last, {"n": total}, is_same_life=not fresh)
            last, fresh = {"n": total}, False

    assert sums["n"] == sum(map(sum, grown))


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)),
)
def test_was_reset_detects_only_falling_counters(start: dict[str, int], increase: dict[str, int]) -> None:
    grown = {name: start.get(name, 0) + increase.get(name, 0) for name in "abc"}

    assert not was_reset(start, grown)
    assert was_reset(grown, start) == any(increase.values())


def test_count_copies_includes_unsent_copies() -> None:
    def stat(cluster: str, name: str, value: int) -> dict[str, object]:
        return {"name": f"cluster.{cluster}.{name}", "value": value}

    counts = count_copies(
        [
            stat("old_shadow", "lua.copy.sent", 3),
            stat("new_shadow", "lua.copy.sent", 52),
            stat("new_shadow", "lua.copy.shed", 7),
            stat("new_shadow", "lua.copy.answered", 48),
            stat("new_shadow", "upstream_rq_pending_overflow", 4),
            stat("new_shadow", "upstream_rq_pending_failure_eject", 2),
            stat("old_baseline", "lua.copy.sent", 5),
            stat("old_baseline", "lua.copy.shed", 2),
            stat("old_baseline", "upstream_cx_none_healthy", 1),
            {"name": "http.ingress.lua.copies.sampled.0d7c1e3a-0001", "value": 30},
            {"name": "http.ingress.lua.copies.sampled.0d7c1e3a-0002", "value": 40},
            {"name": "http.ingress.lua.copies.too_large", "value": 2},
            {"name": "http.ingress.lua.copies.shed_failing", "value": 11},
            {"name": "http.ingress.lua.copies.logged_in", "value": 9},
            {"name": "http.ingress.lua.copies.baseline_shed_queueing", "value": 13},
            stat("old", "lua.capture.sent", 40),
            stat("new_shadow", "lua.capture.sent", 30),
            stat("old", "lua.capture.over_memory", 3),
            stat("collector", "upstream_rq_5xx", 6),
            stat("collector", "upstream_rq_4xx", 1),
            {"histograms": {}},
        ]
    )

    assert counts == {
        "old_shadow": 3,
        "new_shadow": 63,
        "old_baseline": 8,
        "new_baseline": 0,
        "sampled": 70,
        "not_sent": 18,
        "shadows_sent": 55,
        "shadows_ejected": 2,
        "new_sent": 52,
        "new_ejected": 2,
        "shed_queue": 7,
        "shed_baseline": 15,
        "shed_failing": 11,
        "shed_queueing": 0,
        "over_memory": 0,
        "logged_in": 9,
        "too_large": 2,
        "new_answered": 48,
        "captures_sent": 70,
        "captures_over_memory": 3,
        "captures_undelivered": 7,
    }


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
    snapshot = EnvoySnapshot("edge", "shop", uptime_s=900.0, counts={"sampled": 7})

    assert sum_counts(before, snapshot, is_same_life=True) == ({"sampled": 100}, {"sampled": 107})


def test_sum_counts_detects_restart_by_falling_count() -> None:
    before = {"last_reading": {"sampled": 5, "base": {}}, "age": 0.5}

    assert sum_counts(before, EnvoySnapshot("edge", "shop", 1.0, {"sampled": 1}), is_same_life=True)[1] == {
        "sampled": 6
    }


def test_has_kept_running_uses_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1000.0, 1010.0, 1020.0, 1030.0))
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(reports, "LAST_UPTIMES", {})
    results = [
        reports._has_kept_running(EnvoySnapshot("edge", "shop", uptime, {})) for uptime in (50.0, 60.0, 69.0, 3.0)
    ]

    assert results == [False, True, True, False]


def test_statistics_of_a_service_exclude_those_of_a_service_with_a_longer_name() -> None:
    values = {
        "cluster.shop-old_shadow.lua.copy.sent": 1,
        "cluster.shop-api-old_shadow.lua.copy.sent": 2,
        "http.ingress.lua.shop-copies.sampled.s1": 3,
        "http.ingress.lua.shop-api-copies.sampled.s2": 4,
        "vhost.service_1.route.shop-safe_plain.upstream_rq_completed": 5,
        "vhost.service_2.route.shop-safe_plain.upstream_rq_completed": 6,
        "vhost.service_1.route.shop-api-safe_plain.upstream_rq_completed": 7,
        "vhost.service_1.route.shop-shadow_calls.upstream_rq_completed": 8,
        "http.ingress.downstream_rq_completed": 26,
    }
    stats = [{"name": name, "value": value} for name, value in values.items()]
    shop, api = (read_stats(select_service(stats, scope)) for scope in ("shop-", "shop-api-"))

    assert shop == {
        "cluster.old_shadow.lua.copy.sent": 1,
        "http.ingress.lua.copies.sampled.s1": 3,
        "vhost.service.route.safe_plain.upstream_rq_completed": 11,
        "vhost.service.route.shadow_calls.upstream_rq_completed": 8,
        "http.ingress.downstream_rq_completed": 11,
    }
    assert api["http.ingress.downstream_rq_completed"] == 7
    assert read_stats(select_service(stats, "")) == values
