"""Doctor's reading of a real Redis."""

from __future__ import annotations

import pytest
from redis import Redis

from abreast.protocol import join
from abreast_sidecar.cli.doctor import servers


@pytest.mark.parametrize("expected_services", [["shop"], []])
def test_unregistered_service_is_found_by_its_captures(redis_url: str, expected_services: list[str]) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.zadd(join.Keys("shop", 0).due, {"pair": 1000})
    facts = servers.read_redis_facts(redis_url, expected_services)
    (check,) = servers.check_registration(facts, "shop")

    assert (check.state, "registration missing" in check.found) == ("fail", True)
    assert facts.total_counter("shop", "received") == 3
    assert facts.shards["shop"][0].overdue_s > servers.MAX_OVERDUE_S


def test_registered_service_is_not_reported(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(join.Keys("shop", 0).stats, "received", "3")
        client.hset(join.SERVICES_KEY, "shop", "1")

    assert list(servers.check_registration(servers.read_redis_facts(redis_url, ["shop"]), "shop")) == []
