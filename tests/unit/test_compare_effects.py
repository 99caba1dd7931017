"""What two versions did beside their answers is compared like the answers."""

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
from captures import capture

RULES = CompareOptions()
MAIL = "email.send"


def did(*effects: tuple[str, Any], key: str = "") -> tuple[dict[str, Any], ...]:
    return tuple({"kind": kind, "key": key, "payload": payload, "at_us": 1} for kind, payload in effects)


def with_effects(version: Version, effects: Any, *, dropped: int = 0, **how: Any) -> Capture:
    made = capture(version, {"ok": True}, role="live" if version == "old" else "shadow", **how)
    return replace(made, effects=tuple(effects), effects_dropped=dropped)


def compare(old: Any, new: Any, rules: CompareOptions = RULES) -> ComparisonResult:
    return compare_pair([with_effects("old", old), with_effects("new", new)], rules)


def seen(judgement: ComparisonResult) -> list[tuple[str, str, str]]:
    assert {found.part for found in judgement.differences} <= {"effect"}
    return [(found.path, found.kind, found.impact) for found in judgement.differences]


def test_the_same_effects_match() -> None:
    mails = did((MAIL, {"to": "a"}), (MAIL, {"to": "b"}))

    assert compare(mails, mails).outcome == "match"


def test_a_missing_an_extra_and_a_changed_one_are_told_apart() -> None:
    one, other = did((MAIL, {"to": "a", "n": 1})), did((MAIL, {"to": "b", "n": 1}))

    assert seen(compare(one, ())) == [(MAIL, "removed", "breaking")]
    assert seen(compare((), one)) == [(MAIL, "added", "value")]
    assert seen(compare(one, other)) == [(f"{MAIL}.$.to", "changed", "value")]
    assert compare(one, other).outcome == "mismatch"


def test_values_are_shown() -> None:
    (found,) = compare(did((MAIL, {"to": "a"})), did((MAIL, {"to": "b"}))).differences
    (gone,) = compare(did((MAIL, {"to": "a"}), key="k"), ()).differences

    assert (found.exact_path, found.old, found.new) == (f"{MAIL}.$.to", '"a"', '"b"')
    assert (gone.exact_path, gone.old, gone.new) == (f"{MAIL}[k]", '{"to":"a"}', None)


def test_one_that_is_missing_among_several_is_one_difference() -> None:
    three = did((MAIL, {"to": "a"}), (MAIL, {"to": "b"}), (MAIL, {"to": "c"}))

    assert seen(compare(three, three[1:])) == [(MAIL, "removed", "breaking")]
    assert seen(compare(three, (three[0], three[2]))) == [(MAIL, "removed", "breaking")]


def test_order_matters_within_a_kind_and_key_and_nowhere_else() -> None:
    a, b = did((MAIL, "a")), did((MAIL, "b"))
    sms = did(("sms.send", "a"))
    here, there = did((MAIL, "a"), key="here"), did((MAIL, "b"), key="there")

    assert seen(compare(a + b, b + a)) == [(MAIL, "order", "value")]
    assert compare(a + sms, sms + a).outcome == "match"
    assert compare(here + there, there + here).outcome == "match"


def test_a_payload_is_walked_like_a_body() -> None:
    old = did((MAIL, {"items": [{"id": 1, "price": 2}, {"id": 2, "price": 3}], "gone": 1}))
    new = did((MAIL, {"items": [{"id": 2, "price": 3}, {"id": 1, "price": "2"}]}))

    assert sorted(seen(compare(old, new))) == [
        (f"{MAIL}.$.gone", "removed", "breaking"),
        (f"{MAIL}.$.items", "order", "value"),
        (f"{MAIL}.$.items[*].price", "type", "breaking"),
    ]


def test_notes_and_errors_and_times_are_not_compared() -> None:
    (mail,) = did((MAIL, 1))
    note = {"kind": "cache.miss", "payload": 1, "at_us": 5, "note": True}

    assert compare([mail, note], [{**mail, "at_us": 900, "error": "OSError"}]).outcome == "match"


def test_of_payloads_that_were_too_long_the_digest_is_compared() -> None:
    long = {"kind": MAIL, "digest": "ab", "length": 9, "at_us": 1}

    assert compare([long], [long]).outcome == "match"
    assert seen(compare([long], [{**long, "digest": "cd"}])) == [(f"{MAIL}.$.digest", "changed", "value")]


@pytest.mark.parametrize("dropped", [(1, 0), (0, 1), (2, 2)])
def test_with_more_than_a_capture_holds_equal_ones_are_no_match(dropped: tuple[int, int]) -> None:
    judgement = compare_pair(
        [
            with_effects("old", did((MAIL, 1)), dropped=dropped[0]),
            with_effects("new", did((MAIL, 1)), dropped=dropped[1]),
        ],
        RULES,
    )

    assert (judgement.outcome, judgement.reason) == (
        "not_compared",
        "more effects than a capture holds: the first were compared",
    )


def test_what_follows_from_another_status_is_no_finding_of_its_own() -> None:
    old, new = with_effects("old", did((MAIL, 1))), with_effects("new", (), status=500)

    assert [found.part for found in compare_pair([old, new], RULES).differences] == ["status"]


def test_an_answer_to_head_has_effects_too() -> None:
    old, new = with_effects("old", did((MAIL, 1)), method="HEAD"), with_effects("new", (), method="HEAD")

    assert seen(compare_pair([old, new], RULES)) == [(MAIL, "removed", "breaking")]


def test_two_copies_of_old_tell_what_is_noise() -> None:
    old = with_effects("old", did((MAIL, {"id": 1})))
    again = replace(with_effects("old", did((MAIL, {"id": 2}))), role="baseline")
    new = with_effects("new", did((MAIL, {"id": 3})))
    judgement = compare_pair([old, again, new], RULES)

    assert judgement.baseline_compared
    assert [(found.part, found.path) for found in judgement.noise] == [("effect", f"{MAIL}.$.id")]


def test_shapes_explain_values_as_they_do_in_bodies() -> None:
    one, other = "6f1f2d7e-1c5a-4a8e-9b4e-0e8f5d2c7a11", "0b9d9c3e-58a1-4c58-8f3f-7a1f6f1a2b3c"
    fresh = compare(did((MAIL, {"id": one})), did((MAIL, {"id": other}))).differences
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
def test_rules_cover_effects(rule: Rule, outcome: str) -> None:
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
def test_it_never_raises_and_finds_nothing_in_the_same(old: Any, new: Any) -> None:
    there, back = compare(old, new), compare(new, old)

    assert compare(old, old).outcome == "match"
    assert (there.outcome == "match") == (back.outcome == "match")


@settings(max_examples=40)
@given(EFFECTS, EFFECTS)
def test_damaged_records_raise_nothing(old: Any, new: Any) -> None:
    stripped = [{name: value for name, value in effect.items() if name != "kind"} for effect in old]

    assert all(isinstance(found, Difference) for found in compare(stripped, new).differences)
