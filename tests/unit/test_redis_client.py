from __future__ import annotations

import pytest
from redis.asyncio import Redis, RedisCluster

from abreast.protocol.redis_client import URL_FORMATS, Address, connect, parse_address


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "name", "server"),
    [
        ("redis://u:p@h:1/2", "server", (), "", "redis://u:p@h:1/2"),
        ("redis+cluster://h", "cluster", (("h", 6379),), "", "redis://h:6379/0"),
        ("rediss+cluster://u:p@a:7000,b", "cluster", (("a", 7000), ("b", 6379)), "", "rediss://u:p@a:7000/0"),
        ("redis+sentinel://a,[::1]:5/main", "sentinel", (("a", 26379), ("::1", 5)), "main", "redis://a:26379/0"),
        ("redis+sentinel://a/main/3?health_check_interval=2", "sentinel", (("a", 26379),), "main", "redis://a:26379/3?health_check_interval=2"),
    ],
)  # fmt: skip
def test_every_url_format_is_parsed(
    url: str, kind: str, nodes: tuple[tuple[str, int], ...], name: str, server: str
) -> None:
    address = parse_address(url)

    assert (address.kind, address.nodes, address.name, address.server) == (kind, nodes, name, server)


def test_sentinels_have_separate_credentials_and_passwords_are_not_shown() -> None:
    address = parse_address("redis+sentinel://u:hunter1@h/main?sentinel_username=s&sentinel_password=hunter2")

    assert address.sentinel_credentials == {"username": "s", "password": "hunter2"}
    assert address.server == "redis://u:hunter1@h:26379/0"
    assert "hunter" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "redis+ring://h",
        "unix+cluster://h",
        "redis+cluster://",
        "redis+cluster://h/1",
        "redis+cluster://h:port",
        "redis+cluster://:7000",
        "redis+sentinel://h",
        "redis+sentinel://h/main/x",
        "redis+sentinel://h/main/0/more",
    ],
)
def test_other_urls_are_rejected_with_the_accepted_formats(url: str) -> None:
    with pytest.raises(ValueError, match=r"^a URL such as") as error:
        parse_address(url)

    assert str(error.value) == URL_FORMATS


async def test_client_connects_on_first_use() -> None:
    urls = ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/main")
    clients = [connect(url, timeout=1, connect_timeout=1) for url in urls]
    for client in clients:
        await client.aclose()

    assert [isinstance(client, RedisCluster) for client in clients] == [False, True, False]
    assert isinstance(clients[2], Redis)
    assert isinstance(parse_address(urls[0]), Address)
