from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from abreast.protocol.join import CONSUMER_GROUP, SERVICES_KEY, Keys, Limits
from abreast_sidecar.errors import RedisError
from abreast_sidecar.ingest.stream import StreamConsumer, StreamEntry
from abreast_sidecar.jobs.streams import delete_idle_consumers, expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis, list_shards
from support import eventually_async, find_free_port
from support_pairs import SERVICE, add_entry, pair_of, ready, send, stats

pytestmark = pytest.mark.redis

KEYS = Keys(SERVICE, 0)


@asynccontextmanager
async def reader(url: str, name: str = "one", **changes: Any) -> AsyncIterator[StreamConsumer]:
    made = StreamConsumer(url, name=name, **{"batch_size": 100, "claim_idle_s": 30.0, **changes})
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    made = connect_redis(redis_url)
    yield made
    await made.aclose()


async def read_all(one: StreamConsumer, count: int) -> list[StreamEntry]:
    found: list[StreamEntry] = []

    async def enough() -> bool:
        found.extend(await one.read())
        return len(found) >= count

    await eventually_async(enough, what=f"{count} entries")
    return found


@pytest.mark.parametrize("suffix", ["", "?protocol=2", "?protocol=3"])
async def test_stream_reads_entries_with_resp2_and_resp3(redis_url: str, suffix: str) -> None:
    captures = pair_of()
    send(redis_url, captures)
    async with reader(redis_url + suffix) as one:
        found = await read_all(one, 1)
        await one.acknowledge(found)

    assert [(entry.pair_id, entry.ready_reason, len(entry.blobs)) for entry in found] == [
        (captures[0].pair, "joined", 2)
    ]
    assert ready(redis_url) == 0


async def test_stream_consumers_share_a_stream(redis_url: str) -> None:
    async with reader(redis_url, "one", batch_size=3) as one, reader(redis_url, "two", batch_size=3) as two:
        for _ in range(6):
            send(redis_url, pair_of())
        first, second = await read_all(one, 3), await read_all(two, 3)
        for each, found in ((one, first), (two, second)):
            await each.acknowledge(found)

    assert not {entry.id for entry in first} & {entry.id for entry in second}


async def test_acknowledge_twice_subtracts_bytes_once(redis_url: str) -> None:
    send(redis_url, pair_of())
    async with reader(redis_url) as one:
        found = await read_all(one, 1)
        send(redis_url, pair_of())
        held = stats(redis_url)["bytes"]
        for _ in range(3):
            await one.acknowledge(found)
        left = stats(redis_url)["bytes"]
        await one.acknowledge(await read_all(one, 1))

    assert left == held - found[0].size_bytes
    assert stats(redis_url)["bytes"] == 0


async def test_stream_claims_only_idle_entries(redis_url: str) -> None:
    send(redis_url, pair_of())
    left = StreamConsumer(redis_url, name="dead", batch_size=10, claim_idle_s=30.0)
    first = await read_all(left, 1)
    await left._client.aclose()
    async with reader(redis_url, "patient") as patient:
        untouched = await patient.read()
    async with reader(redis_url, "eager", claim_idle_s=0.1) as eager:
        taken = await read_all(eager, 1)
        await eager.acknowledge(taken)

    assert untouched == []
    assert [entry.id for entry in taken] == [entry.id for entry in first]


async def test_stream_reads_lost_response_again(redis_url: str) -> None:
    async with reader(redis_url) as one:
        send(redis_url, pair_of())
        first = await read_all(one, 1)
        one.reread_pending()
        again = await one.read()
        await one.acknowledge(again)

    assert again == first


async def test_stream_discovers_services_and_drains_old_shards(client: Redis) -> None:
    await client.hset(SERVICES_KEY, mapping={"shop": "2", "b{ad}": "1", "odd": "many", "pay": "1"})
    await client.xadd(Keys("shop", 2).ready, {"a": "b"})

    assert await list_shards(client) == [Keys("pay", 0), Keys("shop", 0), Keys("shop", 1), Keys("shop", 2)]


async def test_stream_recreates_groups_after_flush(redis_url: str, client: Redis) -> None:
    async with reader(redis_url) as one:
        send(redis_url, pair_of())
        await one.acknowledge(await read_all(one, 1))
        await client.flushall()
        send(redis_url, pair_of())
        await one.acknowledge(await read_all(one, 1))

    assert ready(redis_url) == 0


async def test_stream_raises_redis_error_without_server() -> None:
    one = StreamConsumer(f"redis://127.0.0.1:{find_free_port()}", name="one", batch_size=10, claim_idle_s=1.0)
    with pytest.raises(RedisError, match="check ABREAST_REDIS_URL"):
        await one.read()
    await one.close()


async def test_stream_skips_deleted_pending_entries(redis_url: str, client: Redis) -> None:
    async with reader(redis_url) as one:
        send(redis_url, pair_of())
        found = await read_all(one, 1)
        await client.xdel(KEYS.ready, found[0].id)
        one.reread_pending()
        assert await one.read() == []

        pending = await client.xpending(KEYS.ready, CONSUMER_GROUP)
    assert pending["pending"] == 0


async def test_stream_reads_large_entries_in_small_batches(redis_url: str) -> None:
    for _ in range(60):
        add_entry(redis_url, {"pair": "p", "why": "joined", "old:live:1": b"x" * 4_000_000})
    async with reader(redis_url, batch_size=1000) as one:
        await read_all(one, 1)
        sizes = [sum(entry.size_bytes for entry in await one.read()) for _ in range(2)]

    assert 0 < max(sizes) <= 64 * 1024 * 1024


async def test_delete_idle_consumers_keeps_consumers_with_pending_entries(redis_url: str, client: Redis) -> None:
    await client.xgroup_create(KEYS.ready, CONSUMER_GROUP, id="0", mkstream=True)
    add_entry(redis_url, {"pair": "p"})
    await client.xreadgroup(CONSUMER_GROUP, "owes", {KEYS.ready: ">"})
    await client.xgroup_createconsumer(
        KEYS.ready, CONSUMER_GROUP, "done"
    )  # reading nothing makes none before Redis 7.2

    async def idle() -> bool:
        consumers = await client.xinfo_consumers(KEYS.ready, CONSUMER_GROUP)
        return all(consumer["idle"] > 10 for consumer in consumers)

    await eventually_async(idle, what="both are idle")
    too_soon = await delete_idle_consumers(client, KEYS, idle_s=60)
    forgotten = await delete_idle_consumers(client, KEYS, idle_s=0.01)

    assert (too_soon, forgotten) == (0, 1)
    assert [consumer["name"] for consumer in await client.xinfo_consumers(KEYS.ready, CONSUMER_GROUP)] == [b"owes"]


async def test_stream_close_deletes_consumer_without_pending_entries(redis_url: str) -> None:
    send(redis_url, pair_of())
    async with reader(redis_url, "owes") as one, reader(redis_url, "done") as two:
        await read_all(one, 1)
        await two.read()
    with redis.Redis.from_url(redis_url) as sync:
        names = [consumer["name"] for consumer in sync.xinfo_consumers(KEYS.ready, CONSUMER_GROUP)]

    assert names == [b"owes"]


async def test_expiry_skips_invalid_pairs(redis_url: str, client: Redis) -> None:
    send(redis_url, pair_of()[:1], bounds=Limits(wait_ms=1))
    await client.set(KEYS.pair("wrong"), "type")
    await client.hset(KEYS.pair("large"), mapping={str(n): "x" for n in range(5000)})
    await client.zadd(KEYS.due, {"wrong": 1, "large": 2})

    async def swept() -> bool:
        await expire_incomplete_pairs(client, KEYS)
        return await client.zcard(KEYS.due) == 0

    await eventually_async(swept, what="all three are swept")
    assert await client.xlen(KEYS.ready) == 3
