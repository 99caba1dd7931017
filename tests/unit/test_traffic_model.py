from __future__ import annotations

import datetime as dt
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.settings import Settings
from abreast_sidecar.traffic.model import (
    MILLION,
    TOTAL_WEIGHT,
    Shares,
    Traffic,
    TrafficChange,
    build_runtime_layer,
    default_shares,
    to_fixed_point,
)

SHARES = st.builds(
    Shares,
    new_share=st.integers(0, TOTAL_WEIGHT),
    sample_safe=st.integers(0, MILLION),
    sample_unsafe=st.integers(0, MILLION),
    baseline_share=st.integers(0, MILLION),
)
MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)


@given(SHARES)
def test_runtime_layer_weights_sum_to_10_000(shares: Shares) -> None:
    layer = build_runtime_layer(shares)

    assert layer["abreast.weight.old"] + layer["abreast.weight.new_or_old"] == 10_000
    assert layer["abreast.weight.new_or_old"] == shares.new_share


@given(SHARES)
def test_runtime_layer_baseline_never_exceeds_the_sample(shares: Shares) -> None:
    """The baseline route matches first, with the same random number."""
    layer = build_runtime_layer(shares)

    assert 0 <= layer["abreast.sample.baseline"]["numerator"] <= layer["abreast.sample.safe"]["numerator"]


def test_runtime_layer_has_the_keys_of_envoy() -> None:
    shares = Shares(new_share=2500, sample_safe=200_000, sample_unsafe=1, baseline_share=500_000)

    assert build_runtime_layer(shares) == {
        "abreast.weight.old": 7500,
        "abreast.weight.new_or_old": 2500,
        "abreast.sample.baseline": {"numerator": 100_000, "denominator": "MILLION"},
        "abreast.sample.safe": {"numerator": 200_000, "denominator": "MILLION"},
        "abreast.sample.unsafe": {"numerator": 1, "denominator": "MILLION"},
    }


@given(st.floats(0, 1))
def test_fixed_point_is_zero_or_full_only_for_zero_or_one(share: float) -> None:
    found = to_fixed_point("new_share", share, TOTAL_WEIGHT)

    assert (found == 0) == (share == 0)
    assert (found == TOTAL_WEIGHT) == (share == 1)
    assert abs(found - share * TOTAL_WEIGHT) <= 1


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf, -0.0001, 1.0001, 100.0])
def test_fixed_point_rejects_shares_out_of_range(share: float) -> None:
    with pytest.raises(ArgumentError, match="sample_safe must be a share from 0 to 1, got"):
        to_fixed_point("sample_safe", share, MILLION)


@given(st.integers(0, TOTAL_WEIGHT))
def test_fixed_point_round_trips_through_floats(number: int) -> None:
    assert to_fixed_point("new_share", number / TOTAL_WEIGHT, TOTAL_WEIGHT) == number


def test_default_shares_come_from_settings() -> None:
    found = default_shares(Settings(new_share=0.25, sample_safe=0.5, sample_unsafe=0.0, baseline_share=1.0))

    assert found == Shares(new_share=2500, sample_safe=500_000, sample_unsafe=0, baseline_share=MILLION)


def test_rollback_keeps_the_sampling() -> None:
    before = Shares(new_share=9000, sample_safe=500_000, sample_unsafe=7, baseline_share=100_000)

    assert TrafficChange.rollback().apply(before) == Shares(0, 500_000, 7, 100_000, rolled_back=True)


@pytest.mark.parametrize("change", [TrafficChange.promote(), TrafficChange("update", new_share=0)])
def test_change_of_the_share_ends_a_rollback(change: TrafficChange) -> None:
    before = Shares(0, 1, 1, 1, rolled_back=True)

    assert not change.apply(before).rolled_back


def test_change_of_sampling_keeps_a_rollback() -> None:
    before = Shares(0, 1, 1, 1, rolled_back=True)

    assert TrafficChange("update", sample_safe=5).apply(before) == Shares(0, 5, 1, 1, rolled_back=True)


def test_traffic_is_ordered_by_time_then_version() -> None:
    shares = Shares(0, 0, 0, 0)
    first = Traffic("shop", 7, MONDAY, shares)
    restored = Traffic("shop", 3, MONDAY + dt.timedelta(seconds=1), shares)

    assert first.is_newer_than(None)
    assert not first.is_newer_than(first)
    assert restored.is_newer_than(first)
    assert not first.is_newer_than(restored)
