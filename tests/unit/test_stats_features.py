"""The request feature that separates requests with a finding from the others."""

from __future__ import annotations

import random
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.stats.features import (
    MAX_BODY_LEAVES,
    MIN_REQUESTS,
    Feature,
    collect_features,
    collect_target_features,
    find_common_feature,
    fisher_exact,
)

CURRENCIES = ["EUR", "USD", "JPY", "GBP"]
AGENTS = ["curl/8", "Mozilla/5.0", "okhttp/4", "python-httpx/0.28"]


def request(dice: random.Random, **query: str) -> dict[str, list[str]]:
    """Return the features of a shop's request with a unique id and irrelevant values."""
    chosen = {"currency": dice.choice(CURRENCIES), "page": str(dice.randrange(1, 9)), **query}
    return collect_features(
        query=chosen.items(),
        path={"id": str(dice.randrange(10**6))},
        headers=[("User-Agent", dice.choice(AGENTS)), ("accept", "application/json")],
        body={"items": [{"sku": f"S{dice.randrange(500)}", "count": dice.randrange(1, 4)}]},
    )


def make_requests(n: int, seed: int = 1, **query: str) -> list[dict[str, list[str]]]:
    dice = random.Random(seed)
    return [request(dice, **query) for _ in range(n)]


def without(name: str, requests: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    return [{key: values for key, values in request.items() if key != name} for request in requests]


def of(requests: list[dict[str, list[str]]], currency: str, *, equal: bool) -> list[dict[str, list[str]]]:
    return [request for request in requests if (request["query.currency"] == [currency]) == equal]


def test_feature_has_coverage_and_precision() -> None:
    requests = make_requests(400)
    feature = find_common_feature(of(requests, "JPY", equal=True), of(requests, "JPY", equal=False))

    assert feature is not None
    assert str(feature) == "query.currency=JPY"
    assert (feature.coverage, feature.precision) == (1.0, 1.0)
    assert feature.p_value < 1e-6


def test_feature_needs_ten_requests() -> None:
    requests = make_requests(200)
    feature = find_common_feature(make_requests(10, 2, currency="JPY"), of(requests, "JPY", equal=False))

    assert str(feature) == "query.currency=JPY"


def test_feature_of_an_intermittent_cause_has_less_precision() -> None:
    feature = find_common_feature(make_requests(50, 2, currency="JPY"), make_requests(400))

    assert feature is not None
    assert str(feature) == "query.currency=JPY"
    assert feature.precision < 0.5


def test_feature_precision_uses_totals_not_samples() -> None:
    affected, others = make_requests(50, 2, currency="JPY"), make_requests(400)
    small = find_common_feature(affected, others)
    large = find_common_feature(affected, others, total_with_finding=50, total_without_finding=400_000)

    assert small is not None
    assert large is not None
    assert large.precision < small.precision / 100


def test_feature_tolerates_stray_requests() -> None:
    requests = of(make_requests(400), "JPY", equal=False)
    feature = find_common_feature(make_requests(40, 2, currency="JPY") + requests[:8], requests[8:])

    assert feature is not None
    assert str(feature) == "query.currency=JPY"
    assert feature.coverage == pytest.approx(40 / 48)


def test_feature_can_be_a_present_or_absent_name() -> None:
    requests = make_requests(200)

    assert str(find_common_feature(requests[:50], without("query.page", requests[50:]))) == "query.page"
    assert str(find_common_feature(without("query.page", requests[:50]), requests[50:])) == "no query.page"


def test_feature_can_be_a_body_item_or_header() -> None:
    requests = make_requests(300)
    marked = [{**request, "body.items[*].sku": [*request["body.items[*].sku"], "GIFT"]} for request in requests[:40]]
    german = [{**request, "header.accept-language": ["de"]} for request in requests[:40]]
    english = [{**request, "header.accept-language": ["en"]} for request in requests[40:]]

    assert str(find_common_feature(marked, requests[40:])) == "body.items[*].sku=GIFT"
    assert str(find_common_feature(german, english)) == "header.accept-language=de"


def test_feature_is_the_simplest_of_equivalent_ones() -> None:
    requests = of(make_requests(300), "JPY", equal=False)
    marked = [
        {**request, "header.x-currency": ["JPY"], "body.order.currency": ["JPY"]}
        for request in make_requests(40, 2, currency="JPY")
    ]

    assert str(find_common_feature(marked, requests)) == "query.currency=JPY"


def test_feature_excludes_names_of_all_requests() -> None:
    assert find_common_feature(make_requests(100, 1), make_requests(100, 2)) is None


@pytest.mark.parametrize(("affected_count", "other_count"), [(0, 0), (MIN_REQUESTS - 1, 100), (100, MIN_REQUESTS - 1)])
def test_feature_is_none_for_few_requests(affected_count: int, other_count: int) -> None:
    assert (
        find_common_feature(
            make_requests(affected_count, 1, currency="JPY"), make_requests(other_count, 2, currency="EUR")
        )
        is None
    )


def test_feature_is_none_for_chance_among_hundreds() -> None:
    """40 small samples without any cause, each with hundreds of values that few of them have."""
    features = [
        find_common_feature(make_requests(8, 2 * seed), make_requests(30, 2 * seed + 1)) for seed in range(1, 41)
    ]

    assert sum(feature is not None for feature in features) <= 3


def test_feature_needs_more_evidence_with_more_candidates() -> None:
    affected, others = [{"query.a": ["x"]}] * 5, [{"query.a": ["x"]}] * 5 + [{"query.a": ["y"]}] * 25
    alone = find_common_feature(affected, others)
    among = find_common_feature(numbered(affected), numbered(others))

    assert alone is not None
    assert among is not None
    assert (str(alone), str(among)) == ("query.a=x", "query.a=x")
    assert among.p_value > 2 * alone.p_value


def numbered(requests: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    return [{**request, "path.id": [str(number)]} for number, request in enumerate(requests)]


def test_feature_prefers_the_query_to_a_slightly_better_body_value() -> None:
    affected = [{"query.currency": ["JPY"], "body.total.currency": ["JPY"]}] * 100
    others = [{"query.currency": ["JPY"]}, *[{"query.currency": ["EUR"]}] * 99]

    assert str(find_common_feature(affected, others)) == "query.currency=JPY"


def test_collect_features_flattens_bodies_up_to_a_limit() -> None:
    features = collect_features(
        [("a", "1"), ("a", "2")], {"id": "7"}, [("X-A", "b")], {"n": None, "t": True, "l": [{"x": 1.5}]}
    )
    large = collect_features(body={"list": [{f"k{number}": number} for number in range(100_000)]})
    deep: Any = 1
    for _ in range(500):
        deep = [deep]

    assert features == {
        "query.a": ["1", "2"],
        "path.id": ["7"],
        "header.x-a": ["b"],
        "body.n": ["null"],
        "body.t": ["true"],
        "body.l[*].x": ["1.5"],
    }
    assert len(large) == MAX_BODY_LEAVES
    assert collect_features(body=deep) == {}


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_fisher_exact_is_the_sum_of_the_tail(hits: int, misses: int, false: int, quiet: int) -> None:
    affected_count, other_count, marked_count = hits + misses, false + quiet, hits + false
    tail = sum(
        comb(affected_count, k) * comb(other_count, marked_count - k)
        for k in range(hits, min(affected_count, marked_count) + 1)
    )

    assert fisher_exact(hits, affected_count, false, other_count) == pytest.approx(
        tail / comb(affected_count + other_count, marked_count)
    )


SAMPLE = st.lists(
    st.dictionaries(
        st.sampled_from(["query.a", "path.b", "body.c"]), st.lists(st.sampled_from("xyz"), min_size=1, unique=True)
    ),
    max_size=30,
)


@given(SAMPLE, SAMPLE)
def test_feature_of_any_samples_keeps_its_bounds(
    affected: list[dict[str, list[str]]], others: list[dict[str, list[str]]]
) -> None:
    feature: Feature | None = find_common_feature(affected, others)

    if feature is not None:
        assert 0.7 <= feature.coverage <= 1
        assert 0 < feature.precision <= 1
        assert feature.p_value <= 0.01


@pytest.mark.parametrize(
    ("target", "route", "features"),
    [
        ("/prices/7?currency=JPY", "/prices/{id}", {"path.id": ["7"], "query.currency": ["JPY"]}),
        ("/a%20b?x=&x=1", "/{name:path}", {"path.name": ["a b"], "query.x": ["", "1"]}),
        ("/files/a/b", "/files/{name}", {}),
        ("/", "(no route)", {}),
        ("", "", {}),
    ],
)
def test_collect_target_features_reads_path_and_query(target: str, route: str, features: dict[str, list[str]]) -> None:
    assert collect_target_features(target, route) == features
