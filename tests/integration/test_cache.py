"""The cache with a real Redis, for users and for shadow requests."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import redis.asyncio

from abreast.cache import PROBE_DELAY_S, Cache
from abreast.errors import SettingError
from abreast.protocol.capture import Role
from abreast_sidecar.stack.servers import RedisServer
from support import eventually_async, find_free_port
from support_integrations import in_request

pytestmark = pytest.mark.redis


@dataclass(frozen=True)
class Product:
    id: int
    name: str


class Source:
    """A load that counts its calls."""

    def __init__(self, value: Any = "from the database") -> None:
        self.value = value
        self.call_count = 0

    async def __call__(self) -> Any:
        self.call_count += 1
        await asyncio.sleep(0)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def make(url: str | redis.asyncio.Redis, **changes: Any) -> Cache:
    return Cache(url, **{"namespace": "shop", "schema_version": "1", "timeout": 2.0, **changes})


@pytest.fixture
async def cache(redis_url: str) -> AsyncIterator[Cache]:
    async with make(redis_url) as cache:
        yield cache


def read_keys(url: str) -> dict[str, dict[bytes, bytes]]:
    with redis.Redis.from_url(url) as client:
        return {name.decode(): client.hgetall(name) for name in client.scan_iter()}


async def test_loaded_value_is_read_from_the_cache(cache: Cache) -> None:
    source = Source({"id": 7})

    assert [await cache.get("product:7", source) for _ in range(3)] == [{"id": 7}] * 3
    assert source.call_count == 1


async def test_versions_share_values_of_the_same_schema(redis_url: str) -> None:
    async with make(redis_url) as old, make(redis_url) as new:
        await old.get("product:7", Source("by old"))

        assert await new.get("product:7", Source("by new")) == "by old"


async def test_versions_with_different_schemas_are_separate(redis_url: str) -> None:
    async with make(redis_url, schema_version="1") as old, make(redis_url, schema_version="2") as new:
        other_source = Source()
        for _ in range(2):
            assert await old.get("product:7", Source("by old")) == "by old"
            assert await new.get("product:7", Source("by new")) == "by new"
        assert await old.get("product:7", other_source) == "by old"

    assert other_source.call_count == 0


async def test_delete_removes_all_schema_versions(redis_url: str) -> None:
    async with make(redis_url, schema_version="1") as old, make(redis_url, schema_version="2") as new:
        await new.get("product:7", Source("stale"))
        await old.delete("product:7")

        assert await new.get("product:7", Source("fresh")) == "fresh"


async def test_schema_version_is_the_release_by_default(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABREAST_RELEASE", "shop-2.0")
    async with make(redis_url, schema_version=None) as cache:
        await cache.get("product:7", Source())

    assert list(read_keys(redis_url)["shop:product:7"]) == [b"shop-2.0"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"no json", b"\xff" * 8 + b'{"id":7}'])
async def test_unreadable_value_is_a_miss(cache: Cache, redis_url: str, content: bytes) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.hset("shop:product:7", "1", content)
    value = await cache.get(
        "product:7", Source(Product(7, "Tea")), parse=lambda value: Product(value["id"], value["name"])
    )

    assert value == Product(7, "Tea")


async def test_parse_converts_the_cached_value(cache: Cache) -> None:
    def parse(value: Any) -> Product:
        return Product(**value)

    source = Source(Product(7, "Tea"))

    assert [await cache.get("product:7", source, parse=parse) for _ in range(2)] == [Product(7, "Tea")] * 2
    assert source.call_count == 1


async def test_value_expires_within_ttl_and_jitter(redis_url: str) -> None:
    async with make(redis_url, ttl=100, jitter=0.2) as cache:
        for number in range(20):
            await cache.get(f"product:{number}", Source())
    with redis.Redis.from_url(redis_url) as client:
        times = [int(client.pttl(f"shop:product:{number}")) / 1000 for number in range(20)]

    assert all(75 < ttl <= 100 for ttl in times)
    assert max(times) - min(times) > 1


async def test_expired_field_is_a_miss_while_the_key_lives(redis_url: str) -> None:
    async with (
        make(redis_url, schema_version="1", ttl=0.3, jitter=0) as old,
        make(redis_url, schema_version="2") as new,
    ):
        await old.get("product:7", Source("long ago"))
        await new.get("product:7", Source())
        await asyncio.sleep(0.35)  # time has to pass

        assert await old.get("product:7", Source("now")) == "now"


async def test_errors_none_and_large_values_are_not_cached(redis_url: str) -> None:
    async with make(redis_url, max_bytes=100) as cache:
        with pytest.raises(LookupError):
            await cache.get("error", Source(LookupError("gone")))
        await cache.get("none", Source(None))
        await cache.get("large", Source("x" * 101))
        await cache.get("object", Source(object()))

    assert read_keys(redis_url) == {}


# Concurrent loads


async def waiting(cache: Cache, source: Callable[[], Awaitable[Any]], number: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(cache.get("product:7", source)) for _ in range(number)]

    async def all_wait() -> bool:
        flights: list[Any] = list(cache._single_flight._loads.values())
        return [len(future._callbacks or ()) for future in flights] == [number - 1]

    await eventually_async(all_wait, description="all but the first wait for its load")
    return tasks


async def test_concurrent_callers_share_one_load(cache: Cache) -> None:
    gate, call_count = asyncio.Event(), 0

    async def load() -> str:
        nonlocal call_count
        call_count += 1
        await gate.wait()
        return "loaded"

    tasks = await waiting(cache, load, 50)
    gate.set()

    assert await asyncio.gather(*tasks) == ["loaded"] * 50
    assert call_count == 1


async def test_exception_reaches_all_waiting_callers(cache: Cache) -> None:
    gate = asyncio.Event()

    loads = []

    async def load() -> str:
        loads.append("once")
        await gate.wait()
        raise LookupError("gone")

    tasks = await waiting(cache, load, 5)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert loads == ["once"]
    assert [type(result) for result in results] == [LookupError] * 5


@pytest.mark.parametrize("victim", [0, 3])
async def test_cancelled_caller_does_not_affect_the_others(cache: Cache, victim: int) -> None:
    """Caller 0 loads."""
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "loaded"

    tasks = await waiting(cache, load, 5)
    tasks[victim].cancel()
    await asyncio.wait([tasks[victim]])
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in results].count(asyncio.CancelledError) == 1
    assert results.count("loaded") == 4


async def test_value_deleted_during_its_load_is_not_cached(cache: Cache) -> None:
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "from before"

    (task,) = await waiting(cache, load, 1)
    await cache.delete("product:7")
    gate.set()

    assert await task == "from before"
    assert await cache.get("product:7", Source("from after")) == "from after"


# Shadows


async def test_shadow_reads_values_of_users(cache: Cache) -> None:
    await cache.get("product:7", Source("a user's"))
    with in_request():
        assert await cache.get("product:7", Source("a shadow's")) == "a user's"


@pytest.mark.parametrize("role", ["shadow", "baseline"])
async def test_shadow_changes_no_value_of_users(cache: Cache, redis_url: str, role: Role) -> None:
    await cache.get("product:7", Source("a user's"))
    before = read_keys(redis_url)
    with in_request(role):
        await cache.get("product:8", Source("a shadow's"))
        await cache.delete("product:7")

    assert read_keys(redis_url) == before
    assert await cache.get("product:8", Source("a user's too")) == "a user's too"


async def test_shadow_does_not_see_values_that_it_deleted(cache: Cache) -> None:
    await cache.get("product:7", Source("a user's"))
    with in_request():
        await cache.delete("product:7")
        assert await cache.get("product:7", Source("as it wrote it")) == "as it wrote it"
    with in_request():
        assert await cache.get("product:7", Source("another's")) == "a user's"


async def test_isolated_shadow_caches_its_own_values(redis_url: str) -> None:
    async with make(redis_url, shadow_writes="isolated") as cache:
        with in_request():
            source = Source("a shadow's")
            assert [await cache.get("product:7", source) for _ in range(2)] == ["a shadow's"] * 2
        assert source.call_count == 1
        assert list(read_keys(redis_url)) == ["abreast:shadow:new:shop:product:7"]
        assert await cache.get("product:7", Source("a user's")) == "a user's"
        with in_request():
            assert await cache.get("product:7", Source()) == "a user's"
            await cache.delete("product:7")

    assert list(read_keys(redis_url)) == ["shop:product:7"]


async def test_user_neither_waits_for_nor_gets_a_load_of_a_shadow(cache: Cache) -> None:
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "not committed"

    with in_request():
        tasks = await waiting(cache, load, 1)
    value = await asyncio.wait_for(cache.get("product:7", Source("a user's")), 5)
    gate.set()

    assert value == "a user's"
    assert await asyncio.gather(*tasks) == ["not committed"]


async def test_delete_is_an_effect_of_both_roles(cache: Cache) -> None:
    noted = []
    roles: tuple[Role, ...] = ("live", "shadow")
    for role in roles:
        with in_request(role) as request:
            await cache.delete("product:7")
            records, _ = request.close_effect_log(lambda payload: payload)
            noted += [(record["kind"], record["key"], record["payload"]) for record in records]

    assert noted == [("cache.delete", "product:7", {"namespace": "shop", "key": "product:7"})] * 2


async def test_hits_and_misses_are_spans(cache: Cache) -> None:
    with in_request("live", "old") as request:
        for key in ("product:7", "product:7", "price:7"):
            await cache.get(key, Source())

    assert request.spans is not None
    assert (request.spans.hits, request.spans.misses) == (1, 2)
    assert [(kind, name, note) for kind, name, _, _, note in request.spans.rows] == [
        ("cache", "product", "miss"),
        ("cache", "product", "hit"),
        ("cache", "price", "miss"),
    ]


# Outages


async def test_redis_down_loads_values() -> None:
    async with make(f"redis://127.0.0.1:{find_free_port()}/0") as cache:
        assert await cache.get("product:7", Source("loaded")) == "loaded"
        await cache.delete("product:7")


@pytest.mark.parametrize("most", [None, 5])
async def test_many_concurrent_calls_do_not_count_as_an_outage(
    redis_url: str, most: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A client of the service with few connections is no outage either."""
    client = redis.asyncio.Redis.from_url(redis_url, max_connections=most)
    async with client, make(client if most else redis_url) as cache:
        await cache.get("product:7", Source("kept"))
        value = await asyncio.gather(*[cache.get("product:7", Source("loaded")) for _ in range(300)])
        second_value = await cache.get("product:7", Source("loaded"))

    assert (second_value, caplog.records) == ("kept", [])
    assert most or set(value) == {"kept"}


async def test_other_event_loop_raises_nothing(cache: Cache) -> None:
    """In another loop, the connections can't wait for replies."""

    async def ask() -> list[Any]:
        return await asyncio.gather(*[cache.get(f"product:{number}", Source(number)) for number in range(60)])

    assert await ask() == list(range(60))
    await cache.redis.client_pause(100)
    assert await asyncio.to_thread(asyncio.run, ask()) == list(range(60))


@pytest.mark.parametrize("has_client", [False, True], ids=["own client", "a client without timeouts"])
async def test_hanging_redis_is_probed_once_per_delay(has_client: bool) -> None:
    with RedisServer() as server:
        client = redis.asyncio.Redis.from_url(server.url, socket_timeout=None)
        async with (
            client,
            make(server.url) as patient,
            make(client if has_client else server.url, timeout=0.1) as cache,
        ):
            await patient.get("product:7", Source("kept"))
            assert server.process is not None
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                start = time.monotonic()
                value = [await cache.get("product:7", Source("loaded")) for _ in range(50)]
                duration = time.monotonic() - start
            finally:
                os.kill(server.process.pid, signal.SIGCONT)

            assert value == ["loaded"] * 50
            assert duration < 50 * 0.1 / 2

            async def back() -> bool:
                return bool(await cache.get("product:7", Source(None)) == "kept")

            await eventually_async(back, within=PROBE_DELAY_S + 10, description="the cache is used again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"namespace": ""}, "namespace='shop'"),
        ({"namespace": "abreast:mine"}, "namespace='shop'"),
        ({"ttl": 0}, "ttl"),
        ({"jitter": 1}, "jitter"),
        ({"shadow_writes": "somewhere"}, "'isolated' or 'discard', got 'somewhere'"),
    ],
)
def test_invalid_argument_raises_setting_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make("redis://127.0.0.1/0", **changes)
