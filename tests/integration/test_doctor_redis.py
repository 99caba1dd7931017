"""What doctor reads from a Redis."""

from __future__ import annotations

import pytest
from redis import Redis

from abreast.protocol import join
from abreast_sidecar.cli.doctor import redis


@pytest.mark.parametrize("hints", [["shop"], []])
def test_captures_of_a_service_that_is_not_registered_are_found(redis_url: str, hints: list[str]) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.zadd(join.Keys("shop", 0).due, {"pair": 1000})
    facts = redis.read_redis_facts(redis_url, hints)
    (check,) = redis.check_registration(facts, "shop")

    assert (check.state, "registration missing" in check.found) == ("fail", True)
    assert facts.total_counter("shop", "received") == 3
    assert facts.shards["shop"][0].overdue_s > redis.MAX_OVERDUE_S


def test_a_registered_service_is_not_called_missing(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.hset(join.SERVICES_KEY, "shop", "1")

    assert list(redis.check_registration(redis.read_redis_facts(redis_url, ["shop"]), "shop")) == []
