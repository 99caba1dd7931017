from __future__ import annotations

import datetime as dt
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.envoy.sampling import parse_rules
from abreast_sidecar.envoy.settings import name_scope
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.settings import Settings
from abreast_sidecar.traffic.control import NO_MIRRORING_SHARES
from abreast_sidecar.traffic.envoys import read_rules
from abreast_sidecar.traffic.model import (
    MILLION,
    OTHER_RULES,
    TOTAL_WEIGHT,
    Drill,
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
    rule_shares=st.dictionaries(st.sampled_from(["post-search", "admin", "x_1", "*"]), st.integers(0, MILLION)),
)
MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
REVISION = "0b1c7e4e-3f5c-4a39-9a26-3d5f4d1f4b58"


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
        "abreast.weight.drilled_or_old": 0,
        "abreast.drill.abort": 0,
        "abreast.drill.delay": 0,
        "abreast.drill.delay_ms": 0,
        "abreast.drill.by_header": 0,
        "abreast.sample.baseline": {"numerator": 100_000, "denominator": "MILLION"},
        "abreast.sample.safe": {"numerator": 200_000, "denominator": "MILLION"},
        "abreast.sample.unsafe": {"numerator": 1, "denominator": "MILLION"},
    }


def test_runtime_layer_has_the_rules_of_its_envoy() -> None:
    """A rule has the share that was set, or that of Envoy's file."""
    rules = parse_rules("POST /search 100%; /admin/* 50%")
    shares = Shares(0, 0, 0, baseline_share=500_000, rule_shares={"post-search": 10_000, "of-another-envoy": 5})
    layer = build_runtime_layer(shares, rules)

    assert {name: value["numerator"] for name, value in layer.items() if name.startswith("abreast.rule.")} == {
        "abreast.rule.post-search.sampled": 10_000,
        "abreast.rule.post-search.baseline": 5_000,
        "abreast.rule.admin.sampled": 500_000,
        "abreast.rule.admin.baseline": 250_000,
    }
    layer = build_runtime_layer(NO_MIRRORING_SHARES, rules)
    assert not any(value["numerator"] for name, value in layer.items() if name.startswith("abreast.rule."))


def test_rules_of_services_have_different_keys() -> None:
    """Names of services and rules can contain hyphens."""
    one = build_runtime_layer(NO_MIRRORING_SHARES, parse_rules("name:admin-search /a 0%"), name_scope("shop"))
    other = build_runtime_layer(NO_MIRRORING_SHARES, parse_rules("name:search /b 100%"), name_scope("shop-admin"))

    assert "abreast.rule.shop/admin-search.sampled" in one
    assert not one.keys() & other.keys()


@pytest.mark.parametrize(
    "document", [5.0, [5.0], [{"share": 2}], [{"path": "/x", "share": 1, "newer": 1}], None, {"a": 1}]
)
def test_rules_that_are_not_valid_are_none(document: Any) -> None:
    assert read_rules(document, "edge-1") == ()


def test_change_of_a_rule_keeps_the_others() -> None:
    before = Shares(0, 1, 1, 1, rule_shares={"a": 1, "b": 2})

    assert TrafficChange("update", rule_shares={"b": 3, "c": 4}).apply(before).rule_shares == {"a": 1, "b": 3, "c": 4}
    assert TrafficChange.rollback().apply(before).rule_shares == before.rule_shares


@given(st.floats(0, 1))
def test_fixed_point_is_zero_or_full_only_for_zero_or_one(share: float) -> None:
    value = to_fixed_point("new_share", share, TOTAL_WEIGHT)

    assert (value == 0) == (share == 0)
    assert (value == TOTAL_WEIGHT) == (share == 1)
    assert abs(value - share * TOTAL_WEIGHT) <= 1


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf, -0.0001, 1.0001, 100.0])
def test_fixed_point_rejects_shares_out_of_range(share: float) -> None:
    with pytest.raises(ArgumentError, match="sample_safe must be a share from 0 to 1, got"):
        to_fixed_point("sample_safe", share, MILLION)


@given(st.integers(0, TOTAL_WEIGHT))
def test_fixed_point_round_trips_through_floats(number: int) -> None:
    assert to_fixed_point("new_share", number / TOTAL_WEIGHT, TOTAL_WEIGHT) == number


def test_default_shares_come_from_settings() -> None:
    shares = default_shares(Settings(new_share=0.25, sample_safe=0.5, sample_unsafe=0.0, baseline_share=1.0))

    assert shares == Shares(new_share=2500, sample_safe=500_000, sample_unsafe=0, baseline_share=MILLION)


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


@given(SHARES, st.integers(0, 10**18 - 1), st.uuids().map(str))
def test_stamp_contains_version_values_and_revision(shares: Shares, version: int, revision: str) -> None:
    traffic = Traffic("shop", version, MONDAY, shares, revision=revision)

    held = Traffic.from_stamp("shop", traffic.stamp)

    assert held is not None
    assert (held.service, held.version, held.shares, held.revision) == ("shop", version, shares, revision)


@pytest.mark.parametrize(
    "stamp",
    [
        "",
        "7",
        f"7/10001/0/0/0/{REVISION}",
        f"7/0/0/1000001/0/{REVISION}",
        f"7/0/0/0/0/{REVISION};a=1000001",
        "7/0/0/0/0/x",
    ],
)
def test_stamp_of_another_control_plane_is_no_traffic(stamp: str) -> None:
    assert Traffic.from_stamp("shop", stamp) is None


@given(SHARES, SHARES)
def test_merge_takes_the_lower_shares(restored: Shares, lost: Shares) -> None:
    merged = restored.merge(lost, "because")

    for name in ("new_share", "sample_safe", "sample_unsafe", "baseline_share"):
        assert getattr(merged, name) == min(getattr(restored, name), getattr(lost, name))
    for name in restored.rule_shares.keys() | lost.rule_shares.keys():
        values = [shares.rule_shares.get(name, shares.rule_shares.get(OTHER_RULES)) for shares in (restored, lost)]
        assert merged.rule_shares[name] == min(value for value in values if value is not None)
    assert merged.conflict == "because"


def test_conflict_ends_with_a_new_share_only() -> None:
    before = Shares(0, 1, 1, 1, conflict="because")

    assert TrafficChange("update", new_share=0).apply(before) == Shares(0, 1, 1, 1)
    assert TrafficChange("update", sample_safe=2).apply(before).conflict


@given(st.integers(0, 10_000), st.integers(1, MILLION))
def test_drill_gets_no_larger_part_of_requests_than_asked_for(new_share: int, part: int) -> None:
    shares = Drill(part, delay_s=0.0, duration_s=10.0).apply(Shares(new_share, 0, 0, 0))
    layer = build_runtime_layer(shares)

    assert 0 <= shares.drill_share * MILLION <= new_share * part
    weights = [layer[f"abreast.weight.{name}"] for name in ("old", "new_or_old", "drilled_or_old")]
    assert (sum(weights), weights[0]) == (10_000, 10_000 - new_share)
    assert TrafficChange("update", sample_safe=1).apply(shares).drill_share == 0
