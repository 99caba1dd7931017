"""Collectors that are slow, full, or killed again and again: users notice nothing, and each lost capture is counted."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
import redis

from abreast.protocol.join import reports_key
from abreast_sidecar.collector.server import Collector
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.jobs.reports import read_envoy
from abreast_sidecar.settings import CollectorSettings
from abreast_sidecar.stack.servers import RedisServer
from support import eventually, eventually_async, find_free_port
from support_envoy import Abreast, abreast
from support_up import Up, kill_sidecar, plain_service
from support_upstream import Received, Upstream

REQUESTS = 300
KILLS = 3
HANGING_S = 3600.0
MAX_LOST_PER_KILL = 100  # captures that the collector had accepted, and not sent to Redis
MAX_FIRST_BYTE_S = 2.0  # at p90; a response that waits for the collector waits for 5 s


@asynccontextmanager
async def slow_collector(delay_s: float) -> AsyncIterator[SocketAddress]:
    """Accept a capture on each connection after the delay."""
    tasks = set[asyncio.Task[None] | None]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                [size] = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(size.partition(b":")[2]))
                await asyncio.sleep(delay_s)
                writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield SocketAddress("127.0.0.1", server.sockets[0].getsockname()[1])
        for task in filter(None, tasks):
            task.cancel()
    await asyncio.gather(*filter(None, tasks), return_exceptions=True)


async def get_first_byte_time(proxy: Abreast) -> float:
    started_at = time.monotonic()
    async with proxy.client.stream("GET", "/products/7") as response:
        elapsed_s = time.monotonic() - started_at
        assert response.status_code == 200
        assert await response.aread() == b"ok"
    return elapsed_s


async def read_counts(proxy: Abreast) -> tuple[int, int, int]:
    """Return the captures that Envoy sent, those that the collector accepted, and those that Envoy counts as undelivered."""
    [counts] = [part.counts for part in await read_envoy(f"127.0.0.1:{proxy.settings.admin.port}")]
    accepted = await proxy.stat("cluster.collector.upstream_rq_2xx")
    return counts["captures_sent"], accepted, counts["captures_undelivered"]


@pytest.mark.parametrize("delay_s", [1, HANGING_S])
async def test_no_first_byte_waits_for_a_collector_that_does_not_keep_up(delay_s: float) -> None:
    async with slow_collector(delay_s) as address, abreast(collector=address) as proxy:
        slots = asyncio.Semaphore(8)

        async def ask() -> float:
            async with slots:
                return await get_first_byte_time(proxy)

        times = await asyncio.gather(*[ask() for _ in range(REQUESTS)])

        async def is_accounted() -> bool:
            sent, accepted, undelivered = await read_counts(proxy)
            return sent == accepted + undelivered == 2 * REQUESTS

        await eventually_async(is_accounted, description="each capture is accepted, or counted as undelivered")
        assert statistics.quantiles(times, n=10)[-1] < MAX_FIRST_BYTE_S


async def test_each_chunk_of_a_stream_passes_while_the_collector_hangs() -> None:
    """The service sends a chunk only after the client has got the previous one."""
    received = asyncio.Event()

    async def stream(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(20):
            writer.write(b"1\r\n%d\r\n" % (number % 10))
            if request.role == "live":
                await received.wait()
                received.clear()
        writer.write(b"0\r\n\r\n")

    async with (
        slow_collector(HANGING_S) as address,
        abreast(old=Upstream(stream), new=Upstream(stream), collector=address) as proxy,
        proxy.client.stream("GET", "/stream") as response,
    ):
        content = b""
        async for chunk in response.aiter_raw():
            content += chunk
            received.set()
        assert content == b"01234567890123456789"


async def test_full_collector_counts_what_it_drops() -> None:
    with RedisServer() as server:
        assert server.process is not None
        settings = CollectorSettings(
            redis_url=server.url, collector_listen=f"127.0.0.1:{find_free_port()}", queue_count=20, pair_timeout=60
        )
        collector, redis_process = Collector(settings), psutil.Process(server.process.pid)
        await collector.start()
        redis_process.suspend()
        try:
            async with abreast(collector=SocketAddress("127.0.0.1", collector.port)) as proxy:
                for _ in range(REQUESTS // 3):
                    assert (await proxy.client.get("/products/7")).status_code == 200

                async def is_delivered() -> bool:
                    return await read_counts(proxy) == (2 * REQUESTS // 3, 2 * REQUESTS // 3, 0)

                await eventually_async(is_delivered, description="the collector accepts all captures")
        finally:
            redis_process.resume()
        client = redis.Redis.from_url(server.url)

        async def is_reported() -> bool:
            reports = await asyncio.to_thread(client.hvals, reports_key("service"))
            [report] = map(json.loads, reports or [b"{}"])
            if not report or report["queue"]["count"]:
                return False
            dropped = report["dropped"]
            assert dropped["queue_count"] > 0
            return bool(report["captured"] == report["shipped"] + sum(dropped.values()) == 2 * REQUESTS // 3)

        await eventually_async(is_reported, description="the collector reports each capture as shipped or dropped")
        await collector.stop()
        client.close()


def test_collector_that_is_killed_again_and_again_harms_no_user() -> None:
    """The sidecar contains the collector, and `abreast up` starts it again."""
    with (
        Up(find_free_port(), find_free_port(), ("--baseline", "0", "--sample-safe", "1")) as up,
        plain_service("old", up.old),
        plain_service("new", up.new),
        httpx.Client(base_url=f"http://127.0.0.1:{up.listen}", timeout=20) as client,
        ThreadPoolExecutor(1) as users,
    ):
        up.healthy()
        is_over = False

        def ask() -> list[int]:
            statuses: list[int] = []
            while not is_over:
                statuses.append(client.get(f"/products/{len(statuses) % 50}").status_code)
                time.sleep(0.02)
            return statuses

        load = users.submit(ask)
        for _ in range(KILLS):
            kill_sidecar(up)
        pairs = int(up.json("status")["summary"]["pairs"])
        up.wait_for_pairs(pairs + 50)
        is_over = True
        statuses = load.result(timeout=60)

        def is_settled() -> bool:
            summary = up.json("status")["summary"]
            known = int(summary["pairs"]) + int(summary.get("unaccounted", -1))
            return bool(int(summary.get("envoy_sampled", 0)) == known == len(statuses) and summary["pending"] == "0")

        assert set(statuses) == {200}
        eventually(is_settled, description="pairs and lost requests are as many as Envoy sampled")
        summary = up.json("status")["summary"]
        outcomes = {entry["outcome"]: int(entry["count"]) for entry in summary["outcomes"]}
        drops = {(entry["stage"], entry["reason"]): int(entry["count"]) for entry in summary["drops"]}
        captures = {name: int(count) for name, count in summary["captures"].items()}
        undelivered = drops["envoy", "undelivered"]
        assert undelivered > 0
        lost = 2 * len(statuses) - undelivered - captures["received"] - captures["late"]
        assert 0 <= lost <= KILLS * MAX_LOST_PER_KILL, (lost, undelivered, captures)
        assert outcomes["OUTCOME_MISMATCH"] > len(statuses) / 4, outcomes
        [finding] = up.json("findings", "--each")["findings"]
        assert finding["path"] == "$.price"
