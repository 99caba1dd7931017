"""Differences between the effects of two versions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from abreast.protocol.capture import Capture, Version
from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions, Rule, RuleSet
from abreast_sidecar.compare.volatile import is_explained_by_shape
from support_captures import capture

RULES = CompareOptions()
MAIL = "email.send"


def did(*effects: tuple[str, Any], key: str = "") -> tuple[dict[str, Any], ...]:
    return tuple({"kind": kind, "key": key, "payload": payload, "at_us": 1} for kind, payload in effects)


def with_effects(version: Version, effects: Any, *, dropped: int = 0, **how: Any) -> Capture:
    copy = capture(version, {"ok": True}, role="live" if version == "old" else "shadow", **how)
    return replace(copy, effects=tuple(effects), effects_dropped=dropped)


def compare(old: Any, new: Any, rules: CompareOptions = RULES) -> ComparisonResult:
    return compare_pair([with_effects("old", old), with_effects("new", new)], rules)


def list_differences(result: ComparisonResult) -> list[tuple[str, str, str]]:
    assert {difference.part for difference in result.differences} <= {"effect"}
    return [(difference.path, difference.kind, difference.impact) for difference in result.differences]


def test_equal_effects_match() -> None:
    mails = did((MAIL, {"to": "a"}), (MAIL, {"to": "b"}))

    assert compare(mails, mails).outcome == "match"


def test_missing_extra_and_changed_effects_are_reported() -> None:
    old, new = did((MAIL, {"to": "a", "n": 1})), did((MAIL, {"to": "b", "n": 1}))

    assert list_differences(compare(old, ())) == [(MAIL, "removed", "breaking")]
    assert list_differences(compare((), old)) == [(MAIL, "added", "value")]
    assert list_differences(compare(old, new)) == [(f"{MAIL}.$.to", "changed", "value")]
    assert compare(old, new).outcome == "mismatch"


def test_effect_difference_has_path_and_values() -> None:
    (result,) = compare(did((MAIL, {"to": "a"})), did((MAIL, {"to": "b"}))).differences
    (difference,) = compare(did((MAIL, {"to": "a"}), key="k"), ()).differences

    assert (result.exact_path, result.old, result.new) == (f"{MAIL}.$.to", '"a"', '"b"')
    assert (difference.exact_path, difference.old, difference.new) == (f"{MAIL}[k]", '{"to":"a"}', None)


def test_missing_effect_among_several_is_one_difference() -> None:
    three = did((MAIL, {"to": "a"}), (MAIL, {"to": "b"}), (MAIL, {"to": "c"}))

    assert list_differences(compare(three, three[1:])) == [(MAIL, "removed", "breaking")]
    assert list_differences(compare(three, (three[0], three[2]))) == [(MAIL, "removed", "breaking")]


def test_effect_order_counts_only_within_kind_and_key() -> None:
    a, b = did((MAIL, "a")), did((MAIL, "b"))
    sms = did(("sms.send", "a"))
    first, second = did((MAIL, "a"), key="here"), did((MAIL, "b"), key="there")

    assert list_differences(compare(a + b, b + a)) == [(MAIL, "order", "value")]
    assert compare(a + sms, sms + a).outcome == "match"
    assert compare(first + second, second + first).outcome == "match"


def test_effect_payload_is_compared_by_paths() -> None:
    old = did((MAIL, {"items": [{"id": 1, "price": 2}, {"id": 2, "price": 3}], "gone": 1}))
    new = did((MAIL, {"items": [{"id": 2, "price": 3}, {"id": 1, "price": "2"}]}))

    assert sorted(list_differences(compare(old, new))) == [
        (f"{MAIL}.$.gone", "removed", "breaking"),
        (f"{MAIL}.$.items", "order", "value"),
        (f"{MAIL}.$.items[*].price", "type", "breaking"),
    ]


def test_effect_notes_errors_and_times_are_ignored() -> None:
    (mail,) = did((MAIL, 1))
    note = {"kind": "cache.miss", "payload": 1, "at_us": 5, "note": True}

    assert compare([mail, note], [{**mail, "at_us": 900, "error": "OSError"}]).outcome == "match"


def test_long_effect_payload_is_compared_by_digest() -> None:
    long = {"kind": MAIL, "digest": "ab", "length": 9, "at_us": 1}

    assert compare([long], [long]).outcome == "match"
    assert list_differences(compare([long], [{**long, "digest": "cd"}])) == [(f"{MAIL}.$.digest", "changed", "value")]


@pytest.mark.parametrize("dropped", [(1, 0), (0, 1), (2, 2)])
def test_dropped_effects_prevent_a_match(dropped: tuple[int, int]) -> None:
    result = compare_pair(
        [
            with_effects("old", did((MAIL, 1)), dropped=dropped[0]),
            with_effects("new", did((MAIL, 1)), dropped=dropped[1]),
        ],
        RULES,
    )

    assert (result.outcome, result.reason) == (
        "not_compared",
        "a capture has more effects than its limit: only the first ones were compared",
    )


def test_other_status_hides_missing_effects() -> None:
    old, new = with_effects("old", did((MAIL, 1))), with_effects("new", (), status=500)

    assert [difference.part for difference in compare_pair([old, new], RULES).differences] == ["status"]


def test_effects_of_head_requests_are_compared() -> None:
    old, new = with_effects("old", did((MAIL, 1)), method="HEAD"), with_effects("new", (), method="HEAD")

    assert list_differences(compare_pair([old, new], RULES)) == [(MAIL, "removed", "breaking")]


def test_baseline_yields_noise_of_effects() -> None:
    old = with_effects("old", did((MAIL, {"id": 1})))
    baseline = replace(with_effects("old", did((MAIL, {"id": 2}))), role="baseline")
    new = with_effects("new", did((MAIL, {"id": 3})))
    result = compare_pair([old, baseline, new], RULES)

    assert result.baseline_compared
    assert [(difference.part, difference.path) for difference in result.noise] == [("effect", f"{MAIL}.$.id")]


def test_shapes_explain_effect_payloads() -> None:
    first, second = "6f1f2d7e-1c5a-4a8e-9b4e-0e8f5d2c7a11", "0b9d9c3e-58a1-4c58-8f3f-7a1f6f1a2b3c"
    fresh = compare(did((MAIL, {"id": first})), did((MAIL, {"id": second}))).differences
    plain = compare(did((MAIL, {"to": "ann"})), did((MAIL, {"to": "bob"}))).differences

    assert is_explained_by_shape(fresh, 0)
    assert not is_explained_by_shape(plain, 0)


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [
        (Rule("r", "ignore", part="effect", path=f"{MAIL}.$.to"), "match"),
        (Rule("r", "ignore", path=MAIL), "match"),
        (Rule("r", "ignore", part="body", path=f"{MAIL}.$.to"), "mismatch"),
        (Rule("r", "ignore", path="sms.send"), "mismatch"),
    ],
)
def test_rules_explain_effects(rule: Rule, outcome: str) -> None:
    rules = CompareOptions(rule_set=RuleSet((rule,)))

    assert compare(did((MAIL, {"to": "a"})), did((MAIL, {"to": "b"})), rules).outcome == outcome


EFFECTS = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from("ab"), "payload": st.recursive(st.none() | st.integers() | st.text(), st.lists)},
        optional={"key": st.sampled_from("xy"), "note": st.just(True), "error": st.text()},
    ),
    max_size=5,
)


@settings(max_examples=40)
@given(EFFECTS, EFFECTS)
def test_effects_with_swapped_sides_have_the_same_outcome(old: Any, new: Any) -> None:
    forward, backward = compare(old, new), compare(new, old)

    assert compare(old, old).outcome == "match"
    assert (forward.outcome == "match") == (backward.outcome == "match")


@settings(max_examples=40)
@given(EFFECTS, EFFECTS)
def test_damaged_effect_records_can_be_compared(old: Any, new: Any) -> None:
    stripped = [{name: value for name, value in effect.items() if name != "kind"} for effect in old]

    assert all(isinstance(difference, Difference) for difference in compare(stripped, new).differences)
