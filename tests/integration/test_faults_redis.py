"""Whatever Redis does under load: what it took has one row in the end, and none counts twice."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from abreast.protocol.join import Keys
from abreast.settings import Settings as ServiceSettings
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import RedisServer
from support import eventually_async, find_free_port
from support_load import Load, agrees, complete, empty, loading, stopped
from support_pairs import SERVICE, query_value, ready, rows, run_jobs, run_worker, stats
from support_redis import admin, server

pytestmark = pytest.mark.redis

PAIRS = 400
AWAY = 10  # seconds
READY = Keys(SERVICE, 0).ready


def settings(redis: RedisServer, postgres_url: str) -> Settings:
    return Settings(redis_url=redis.url, postgres_url=postgres_url, claim_idle=0.5, batch_size=20)


async def reach(url: str, count: int) -> None:
    async def is_there() -> bool:
        return int(query_value(url, "select count(*) from abreast.pair")) >= count

    await eventually_async(is_there, description=f"{count} rows")


async def test_redis_full_read_only_or_without_scripts_recovers(postgres_url: str) -> None:
    with server() as started, admin(started) as client:
        load = Load(started.url)
        async with run_worker(settings(started, postgres_url)), loading(load, PAIRS):
            await reach(postgres_url, 20)
            client.config_set("maxmemory", 1)
            await refused(load)
            client.config_set("maxmemory", 0)
            client.script_flush()
            await reach(postgres_url, 100)
            client.replicaof("127.0.0.1", find_free_port())
            await refused(load)
            client.replicaof("NO", "ONE")
            client.script_flush()
        async with run_worker(settings(started, postgres_url)):
            await complete(postgres_url, load)
            await empty(started.url)


async def refused(load: Load) -> None:
    before = load.errors

    async def has_more() -> bool:
        return load.errors > before + 1

    await eventually_async(has_more, description="services are refused")


async def test_redis_at_memory_limit_can_be_drained(postgres_url: str) -> None:
    """No worker has read it before, so the group is created at the limit too. Incomplete pairs expire."""
    with server() as started, admin(started) as client:
        load = Load(started.url, pace=0)
        await load.run(200)
        client.config_set("maxmemory", 1)
        client.script_flush()
        async with run_worker(settings(started, postgres_url)):
            await complete(postgres_url, load)
            await empty(started.url)


async def test_frozen_redis_loses_nothing(postgres_url: str) -> None:
    with server() as started:
        load = Load(started.url)
        async with run_worker(settings(started, postgres_url)), loading(load, PAIRS):
            await reach(postgres_url, 50)
            assert started.process is not None
            with stopped(started.process.pid):
                await asyncio.sleep(AWAY)  # the fault itself
        async with run_worker(settings(started, postgres_url)):
            await complete(postgres_url, load)
            await empty(started.url)


def kill(started: RedisServer) -> None:
    assert started.process is not None
    started.process.popen.send_signal(signal.SIGKILL)
    started.process.popen.wait()


async def test_killed_redis_with_append_only_file_loses_nothing(postgres_url: str, tmp_path: Path) -> None:
    """While it loads its data it answers LOADING, to services and sidecars."""
    options = ("--key-load-delay", "1000", "--appendfsync", "always")  # everysec may answer before it has written
    with server(*options, folder=tmp_path) as started:
        load = Load(started.url)
        async with run_worker(settings(started, postgres_url)), loading(load, PAIRS):
            await reach(postgres_url, 50)
            with admin(started) as client:
                client.hset("ballast", mapping={str(n): "x" for n in range(20)})
                for number in range(30):
                    client.set(f"ballast:{number}", number)
            await asyncio.to_thread(bring_back, started)
        async with run_worker(settings(started, postgres_url)):
            await complete(postgres_url, load)
            await empty(started.url)
    assert load.errors > 0


def bring_back(started: RedisServer) -> None:
    kill(started)
    started.start()


async def test_killed_redis_without_persistence_loses_only_its_data(postgres_url: str) -> None:
    """The number of lost pairs is known: the sampled requests without a row."""
    with server() as started:
        load = Load(started.url)
        async with run_worker(settings(started, postgres_url)), loading(load, PAIRS):
            await reach(postgres_url, 100)
            kill(started)
            await refused(load)  # so that all that it has ever taken is known
            before = set(load.pairs)
            await asyncio.to_thread(started.start)
        async with run_worker(settings(started, postgres_url)):
            await eventually_async(lambda: all_after(postgres_url, load, before), description="the rest arrives")
            await empty(started.url)
    stored = {pair for (pair,) in rows(postgres_url, "select id from abreast.pair")}

    assert stored <= set(load.pairs)
    assert len(stored) >= PAIRS - 60
    agrees(postgres_url)


async def all_after(url: str, load: Load, before: set[str]) -> bool:
    stored = {pair for (pair,) in rows(url, "select id from abreast.pair")}
    return set(load.pairs) - before <= stored


async def test_redis_stays_within_limits_while_sidecar_is_away(postgres_url: str) -> None:
    """Redis takes what it may, refuses and counts the rest; once the sidecar is back, the backlog comes first."""
    with server() as started:
        service = ServiceSettings(service=SERVICE, redis_url=started.url, redis_pairs=150, redis_bytes=10_000_000)
        load = Load(started.url, pace=0, service=service)
        await load.run(600)
        full = ready(started.url)
        shed, refused = stats(started.url), load.refused  # a slow worker may leave no room for some of the next 100
        backlog = set(load.pairs)
        stop = asyncio.Event()
        housekeeping = asyncio.create_task(run_jobs(settings(started, postgres_url), stop))
        async with run_worker(settings(started, postgres_url)):
            await reach(postgres_url, 20)
            await load.run(100)
            await complete(postgres_url, load)
            await empty(started.url)
            await eventually_async(
                lambda: reports_rejected(postgres_url, stats(started.url)["rejected_pairs"]),
                description="refusals are told",
            )
        stop.set()
        await housekeeping

    order = [pair for (pair,) in rows(postgres_url, "select id from abreast.pair order by at")]
    assert full == 150
    assert len(backlog) == 150
    assert shed["rejected_pairs"] == 2 * refused == 2 * 450
    assert set(order[:150]) == backlog


async def reports_rejected(url: str, shed: int) -> bool:
    count = query_value(url, "select coalesce(max((report->>'rejected_pairs')::int), 0) from abreast.shard_report")
    return bool(count == shed)
