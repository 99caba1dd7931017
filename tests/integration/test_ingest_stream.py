from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from abreast.protocol.join import CONSUMER_GROUP, SERVICES_KEY, Keys, Limits, reports_key
from abreast_sidecar import redis_client
from abreast_sidecar.errors import RedisError
from abreast_sidecar.ingest.stream import StreamConsumer, StreamEntry
from abreast_sidecar.jobs.retention import delete_idle_consumers, expire_incomplete_pairs
from abreast_sidecar.redis_client import connect_redis, list_shards
from support import eventually_async, find_free_port
from support_pairs import SERVICE, add_entry, pair_of, ready, send, stats

pytestmark = pytest.mark.redis

KEYS = Keys(SERVICE, 0)


@asynccontextmanager
async def reader(url: str, name: str = "one", **changes: Any) -> AsyncIterator[StreamConsumer]:
    consumer = StreamConsumer(url, name=name, **{"batch_size": 100, "claim_idle_s": 30.0, **changes})
    try:
        yield consumer
    finally:
        await consumer.close()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    connection = connect_redis(redis_url)
    yield connection
    await connection.aclose()


async def read_all(consumer: StreamConsumer, count: int) -> list[StreamEntry]:
    entries: list[StreamEntry] = []

    async def enough() -> bool:
        entries.extend(await consumer.read())
        return len(entries) >= count

    await eventually_async(enough, description=f"{count} entries")
    return entries


@pytest.mark.parametrize("suffix", ["", "?protocol=2", "?protocol=3"])
async def test_stream_reads_entries_with_resp2_and_resp3(redis_url: str, suffix: str) -> None:
    captures = pair_of()
    send(redis_url, captures)
    async with reader(redis_url + suffix) as consumer:
        entries = await read_all(consumer, 1)
        await consumer.acknowledge(entries)

    assert [(entry.pair_id, entry.ready_reason, len(entry.blobs)) for entry in entries] == [
        (captures[0].pair, "joined", 2)
    ]
    assert ready(redis_url) == 0


async def test_stream_consumers_share_a_stream(redis_url: str) -> None:
    async with (
        reader(redis_url, "one", batch_size=3) as first_consumer,
        reader(redis_url, "two", batch_size=3) as second_consumer,
    ):
        for _ in range(6):
            send(redis_url, pair_of())
        first, second = await read_all(first_consumer, 3), await read_all(second_consumer, 3)
        for consumer, entries in ((first_consumer, first), (second_consumer, second)):
            await consumer.acknowledge(entries)

    assert not {entry.id for entry in first} & {entry.id for entry in second}


async def test_acknowledge_twice_subtracts_bytes_once(redis_url: str) -> None:
    send(redis_url, pair_of())
    async with reader(redis_url) as consumer:
        entries = await read_all(consumer, 1)
        send(redis_url, pair_of())
        bytes_before = stats(redis_url)["bytes"]
        for _ in range(3):
            await consumer.acknowledge(entries)
        bytes_after = stats(redis_url)["bytes"]
        await consumer.acknowledge(await read_all(consumer, 1))

    assert bytes_after == bytes_before - entries[0].size_bytes
    assert stats(redis_url)["bytes"] == 0


async def test_acknowledge_deletes_a_batch_with_few_commands(redis_url: str, client: Redis) -> None:
    for _ in range(50):
        send(redis_url, pair_of())
    async with reader(redis_url) as consumer:
        entries = await read_all(consumer, 50)
        before = (await client.info("stats"))["total_commands_processed"]
        await consumer.acknowledge(entries)
        commands = (await client.info("stats"))["total_commands_processed"] - before

    assert (ready(redis_url), stats(redis_url)["bytes"]) == (0, 0)
    assert commands <= 12


async def test_acknowledge_of_partly_acknowledged_batch_subtracts_bytes_once(redis_url: str) -> None:
    for _ in range(3):
        send(redis_url, pair_of())
    async with reader(redis_url) as consumer:
        entries = await read_all(consumer, 3)
        await consumer.acknowledge(entries[:1])
        await consumer.acknowledge(entries[:2])
        bytes_after = stats(redis_url)["bytes"]

    assert bytes_after == entries[2].size_bytes


async def test_stream_claims_only_idle_entries(redis_url: str) -> None:
    send(redis_url, pair_of())
    dead = StreamConsumer(redis_url, name="dead", batch_size=10, claim_idle_s=30.0)
    first = await read_all(dead, 1)
    await dead._client.aclose()
    async with reader(redis_url, "patient") as patient:
        untouched = await patient.read()
    async with reader(redis_url, "eager", claim_idle_s=0.1) as eager:
        claimed = await read_all(eager, 1)
        await eager.acknowledge(claimed)

    assert untouched == []
    assert [entry.id for entry in claimed] == [entry.id for entry in first]


async def test_stream_reads_lost_response_again(redis_url: str) -> None:
    async with reader(redis_url) as consumer:
        send(redis_url, pair_of())
        first = await read_all(consumer, 1)
        consumer.reread_pending()
        repeated = await consumer.read()
        await consumer.acknowledge(repeated)

    assert repeated == first


async def test_stream_discovers_services_and_drains_old_shards(client: Redis) -> None:
    await client.hset(SERVICES_KEY, mapping={"shop": "2", "b{ad}": "1", "odd": "many", "pay": "1"})
    await client.xadd(Keys("shop", 2).ready, {"a": "b"})

    assert await list_shards(client) == [Keys("pay", 0), Keys("shop", 0), Keys("shop", 1), Keys("shop", 2)]


async def test_forged_registrations_add_no_shards(redis_url: str, client: Redis) -> None:
    send(redis_url, pair_of())
    await client.hset(reports_key("till"), "process", "{}")
    await client.hset(SERVICES_KEY, mapping={"till": "2", **{f"forged {number}": "1024" for number in range(3000)}})

    assert await list_shards(client) == [KEYS, Keys("till", 0), Keys("till", 1)]
    assert await client.hlen(SERVICES_KEY) == 2
    async with reader(redis_url) as consumer:
        assert len(await read_all(consumer, 1)) == 1


async def test_services_above_the_limit_add_no_shards(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "MAX_SERVICES", 3)
    for number in range(redis_client.MAX_UNCHECKED_SHARDS + 1):
        await client.hset(SERVICES_KEY, f"mad {number:03}", "1")
        await client.hset(reports_key(f"mad {number:03}"), "process", "{}")

    shards = await list_shards(client)

    assert [keys.service for keys in shards] == ["mad 000", "mad 001", "mad 002"]
    assert shards.ignored_services == redis_client.MAX_UNCHECKED_SHARDS + 1 - 3


async def test_service_with_many_shards_takes_no_place_of_others(client: Redis) -> None:
    await client.hset(SERVICES_KEY, mapping={"a": "1024", "shop": "2"})
    for service in ("a", "shop"):
        await client.hset(reports_key(service), "process", "{}")
    shards = await list_shards(client)

    assert len(shards) == 1024
    assert {Keys("shop", 0), Keys("shop", 1)} <= set(shards)


async def test_service_whose_pairs_wait_in_its_last_shard_stays(client: Redis) -> None:
    await client.hset(SERVICES_KEY, mapping={"gone": "4", "idle": "1024"})
    await client.zadd(Keys("gone", 3).due, {"pair": 1})

    assert [keys.service for keys in await list_shards(client)] == ["gone"] * 4
    assert await client.hkeys(SERVICES_KEY) == [b"gone"]


async def test_stream_recreates_groups_after_flush(redis_url: str, client: Redis) -> None:
    async with reader(redis_url) as consumer:
        send(redis_url, pair_of())
        await consumer.acknowledge(await read_all(consumer, 1))
        await client.flushall()
        send(redis_url, pair_of())
        await consumer.acknowledge(await read_all(consumer, 1))

    assert ready(redis_url) == 0


async def test_stream_raises_redis_error_without_server() -> None:
    consumer = StreamConsumer(f"redis://127.0.0.1:{find_free_port()}", name="one", batch_size=10, claim_idle_s=1.0)
    with pytest.raises(RedisError, match="check ABREAST_REDIS_URL"):
        await consumer.read()
    await consumer.close()


async def test_stream_skips_deleted_pending_entries(redis_url: str, client: Redis) -> None:
    async with reader(redis_url) as consumer:
        send(redis_url, pair_of())
        entries = await read_all(consumer, 1)
        await client.xdel(KEYS.ready, entries[0].id)
        consumer.reread_pending()
        assert await consumer.read() == []

        pending = await client.xpending(KEYS.ready, CONSUMER_GROUP)
    assert pending["pending"] == 0


async def test_stream_reads_large_entries_in_small_batches(redis_url: str) -> None:
    for _ in range(60):
        add_entry(redis_url, {"pair": "p", "why": "joined", "old:live:1": b"x" * 4_000_000})
    async with reader(redis_url, batch_size=1000) as consumer:
        await read_all(consumer, 1)
        sizes = [sum(entry.size_bytes for entry in await consumer.read()) for _ in range(2)]

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

    await eventually_async(idle, description="both are idle")
    too_soon = await delete_idle_consumers(client, KEYS, idle_s=60)
    forgotten = await delete_idle_consumers(client, KEYS, idle_s=0.01)

    assert (too_soon, forgotten) == (0, 1)
    assert [consumer["name"] for consumer in await client.xinfo_consumers(KEYS.ready, CONSUMER_GROUP)] == [b"owes"]


async def test_delete_idle_consumers_accepts_shards_without_pairs(client: Redis) -> None:
    without_stream = await delete_idle_consumers(client, KEYS, idle_s=0.0)
    await client.xadd(KEYS.ready, {"pair": "p"})
    without_group = await delete_idle_consumers(client, KEYS, idle_s=0.0)

    assert (without_stream, without_group) == (0, 0)


async def test_stream_close_deletes_consumer_without_pending_entries(redis_url: str) -> None:
    send(redis_url, pair_of())
    async with reader(redis_url, "owes") as pending_consumer, reader(redis_url, "done") as empty_consumer:
        await read_all(pending_consumer, 1)
        await empty_consumer.read()
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

    await eventually_async(swept, description="all three are swept")
    assert await client.xlen(KEYS.ready) == 3
