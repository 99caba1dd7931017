from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from abreast_demo import load as traffic
from abreast_demo.load import DECK_SIZE, REQUEST_MIX, UserRequest, generate_requests
from abreast_demo.planted_changes import PLANTED_NOISE

SHORTEST = 5  # seconds that `abreast demo` takes at least


def some(number: int, seed: int = 1) -> list[UserRequest]:
    return list(itertools.islice(generate_requests(seed), number))


def test_one_seed_always_sends_the_same() -> None:
    assert some(500) == some(500)


def test_another_seed_sends_others() -> None:
    assert some(500, seed=1) != some(500, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_every_deck_holds_what_is_rare(seed: int) -> None:
    for number in range(4):
        deck = some(DECK_SIZE * (number + 1), seed)[-DECK_SIZE:]
        paths = [request.path for request in deck]

        assert sum("%2B%2B" in path for path in paths) == 1
        assert sum("currency=JPY" in path for path in paths) == 4
        assert sum(bool(re.fullmatch(r"/products/\d+", path)) and int(path[10:]) % 9 == 0 for path in paths) >= 4
        assert sum(path.endswith("/reviews") and int(path.split("/")[2]) > traffic.PRODUCT_COUNT for path in paths) == 2


def test_the_mix_counts_in_percent() -> None:
    assert DECK_SIZE == 100
    assert all(often > 0 for often, _ in REQUEST_MIX)


def test_each_endpoint_comes_often_enough_to_learn_its_noise() -> None:
    """In the shortest run, the chance that an endpoint has no copy to old twice is below one in 1,000."""
    from abreast_demo.deploy import BASELINE_SHARE, SAFE_SAMPLE_SHARE
    from abreast_demo.run import DemoOptions

    endpoints = Counter(
        re.sub(r"(categories|products)/\w+", r"\1/*", request.path.partition("?")[0])
        for request in some(round(SHORTEST * DemoOptions().requests_per_s))
        if request.is_safe
    )

    assert len(endpoints) == 8
    assert PLANTED_NOISE
    assert max((1 - BASELINE_SHARE * SAFE_SAMPLE_SHARE) ** often for often in endpoints.values()) < 0.001


def test_unsafe_requests_carry_a_body_and_safe_ones_none() -> None:
    sent = some(1000)

    assert {request.method for request in sent} == {"GET", "POST"}
    assert all(bool(request.body) is not request.is_safe for request in sent)


def test_users_come_again() -> None:
    users = Counter(request.user for request in some(4000))

    assert len(users) == traffic.USER_COUNT
    assert max(users.values()) > 5
