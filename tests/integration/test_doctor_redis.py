"""What doctor reads from a Redis."""

from __future__ import annotations

import pytest
from redis import Redis

from abreast import join
from abreast_sidecar.cli.checks import redis


@pytest.mark.parametrize("hints", [["shop"], []])
def test_captures_of_a_service_that_is_not_registered_are_found(redis_url: str, hints: list[str]) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.zadd(join.Keys("shop", 0).due, {"pair": 1000})
    facts = redis.look(redis_url, hints)
    (check,) = redis.judge_registration(facts, "shop")

    assert (check.state, "registration missing" in check.found) == ("fail", True)
    assert facts.total("shop", "received") == 3
    assert facts.shards["shop"][0].overdue > redis.STUCK


def test_a_registered_service_is_not_called_missing(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.hset(join.SERVICES, "shop", "1")

    assert list(redis.judge_registration(redis.look(redis_url, ["shop"]), "shop")) == []
