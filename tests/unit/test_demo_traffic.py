from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from abreast_demo import traffic
from abreast_demo.plants import NOISE
from abreast_demo.traffic import DECK, MIX, Request, requests

SHORTEST = 5  # seconds that `abreast demo` takes at least


def some(number: int, seed: int = 1) -> list[Request]:
    return list(itertools.islice(requests(seed), number))


def test_one_seed_always_sends_the_same() -> None:
    assert some(500) == some(500)


def test_another_seed_sends_others() -> None:
    assert some(500, seed=1) != some(500, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_every_deck_holds_what_is_rare(seed: int) -> None:
    for number in range(4):
        deck = some(DECK * (number + 1), seed)[-DECK:]
        paths = [request.path for request in deck]

        assert sum("%2B%2B" in path for path in paths) == 1
        assert sum("currency=JPY" in path for path in paths) == 4
        assert (
            sum(bool(re.fullmatch(r"/products/\d+", path)) and int(path[10:]) % 9 == 0 for path in paths) >= 4
        )
        assert (
            sum(path.endswith("/reviews") and int(path.split("/")[2]) > traffic.PRODUCTS for path in paths)
            == 2
        )


def test_the_mix_counts_in_percent() -> None:
    assert DECK == 100
    assert all(often > 0 for often, _ in MIX)


def test_each_endpoint_comes_often_enough_to_learn_its_noise() -> None:
    """In the shortest run, the chance that an endpoint has no copy to old twice is below one in 1,000."""
    from abreast_demo.deploy import BASELINE, SAMPLE
    from abreast_demo.run import Options

    endpoints = Counter(
        re.sub(r"(categories|products)/\w+", r"\1/*", request.path.partition("?")[0])
        for request in some(round(SHORTEST * Options().rate))
        if request.safe
    )

    assert len(endpoints) == 8
    assert NOISE
    assert max((1 - BASELINE * SAMPLE) ** often for often in endpoints.values()) < 0.001


def test_unsafe_requests_carry_a_body_and_safe_ones_none() -> None:
    sent = some(1000)

    assert {request.method for request in sent} == {"GET", "POST"}
    assert all(bool(request.body) is not request.safe for request in sent)


def test_users_come_again() -> None:
    users = Counter(request.user for request in some(4000))

    assert len(users) == traffic.USERS
    assert max(users.values()) > 5
