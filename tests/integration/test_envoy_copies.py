"""When Envoy sends the copies of a request, and when it sends none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from abreast_sidecar.jobs.reports import count_streams
from support import eventually_async
from support_envoy import Abreast, abreast, exchange
from support_upstream import Answer, Received, Upstream, ok, respond, slow

LINKS = 1000
CLIENTS = 20


def one_time_links(links: set[str]) -> Answer:
    """Respond with 200 to the first request of each link, and with 410 to any later one."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)
        status = 200 if request.path in links else 410
        links.discard(request.path)
        await respond(writer, b"", status)

    return answer


async def follow_links(proxy: Abreast, count: int) -> list[int]:
    async def client(number: int) -> list[int]:  # one connection: an httpx client costs 20 times the CPU
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        statuses = []
        for path in range(number, count, CLIENTS):
            writer.write(f"GET /links/{path} HTTP/1.1\r\nhost: shop\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 0\r\n" in head
            statuses.append(int(head.split(maxsplit=2)[1]))
        writer.close()
        return statuses

    statuses = await asyncio.gather(*[client(number) for number in range(CLIENTS)])
    return [status for part in statuses for status in part]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_copy_never_takes_the_one_time_link_of_a_user(share: float, is_shared: bool) -> None:
    paths = [f"/links/{number}" for number in range(LINKS)]
    old_links = set(paths)
    new_links = old_links if is_shared else set(paths)
    old, new = Upstream(answer=one_time_links(old_links)), Upstream(answer=one_time_links(new_links))
    async with abreast(old=old, new=new, weight=share, baseline_share=1.0) as proxy:
        statuses = await follow_links(proxy, LINKS)
        await proxy.settled()

        assert statuses == [200] * LINKS
        assert len(old.in_role("live")) + len(new.in_role("live")) == LINKS
        assert [len(side.in_role("baseline")) for side in (old, new)] == [
            len(side.in_role("live")) for side in (old, new)
        ]
        assert len(old.in_role("shadow")) + len(new.in_role("shadow")) == LINKS


async def test_copies_start_after_the_response_has_begun() -> None:
    arrivals: dict[str, float] = {}

    def record(next_answer: Answer) -> Answer:
        async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
            arrivals[request.role] = time.monotonic()
            await next_answer(request, writer)

        return answer

    async def stream(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.role == "live":
            await asyncio.sleep(0.3)
            arrivals["response"] = time.monotonic()
        writer.write(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await writer.drain()
        if request.role == "live":
            await asyncio.sleep(0.5)
            arrivals["end"] = time.monotonic()
        writer.write(b"0\r\n\r\n")

    old, new = Upstream(answer=record(stream)), Upstream(answer=record(ok))
    async with abreast(old=old, new=new, baseline_share=1.0) as proxy:
        await proxy.client.get("/")
        await proxy.wait_for_requests(new, 1)
        await proxy.wait_for_requests(old, 2)

    assert arrivals["response"] < min(arrivals["shadow"], arrivals["baseline"])
    assert max(arrivals["shadow"], arrivals["baseline"]) < arrivals["end"]


async def test_concurrent_path_sends_shadow_with_the_live_request_and_no_baseline() -> None:
    async with abreast(old=Upstream(answer=slow(1.0)), baseline_share=1.0, concurrent_paths=("/search*",)) as proxy:
        request = asyncio.create_task(proxy.client.get("/search/books?q=x"))
        await proxy.wait_for_requests(proxy.new, 1)

        assert not request.done()
        assert [received.role for received in proxy.old.received] == ["live"]
        await request
        await proxy.settled()
        assert [(received.role, received.captures) for received in proxy.old.received] == [("live", 2)]
        assert [(received.role, received.captures) for received in proxy.new.received] == [("shadow", 2)]


async def test_client_that_leaves_before_the_response_gets_no_copy() -> None:
    async with abreast(old=Upstream(answer=slow(30.0))) as proxy:
        await exchange(proxy.port, b"GET /left HTTP/1.1\r\nhost: shop\r\n\r\n", until=b"never", within=0.3)
        await proxy.wait_for_requests(proxy.old, 1)
        proxy.old.answer = ok
        await proxy.client.get("/stayed")
        await proxy.wait_for_requests(proxy.new, 1)
        await proxy.settled()

        assert [received.path for received in proxy.new.received] == ["/stayed"]
        assert sum(count_streams(await proxy.stats("http.ingress.lua.copies.sampled")).values()) == 2


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_client_that_leaves_ends_its_live_request(share: float) -> None:
    ends: list[float] = []

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")  # fails once the connection has ended
                await writer.drain()
                await asyncio.sleep(0.02)
        except ConnectionError:
            ends.append(time.monotonic())
            raise

    async with abreast(old=Upstream(answer=answer), new=Upstream(answer=answer), weight=share) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /left HTTP/1.1\r\nhost: shop\r\n\r\n")
        await proxy.wait_for_requests(proxy.new if share else proxy.old, 1)
        left = time.monotonic()
        writer.close()

        async def has_ended() -> bool:
            return bool(ends)

        await eventually_async(has_ended, description="the live request has ended")

    assert ends[0] - left < 2.0, "0.1 s on a quiet machine"


async def test_chunked_body_over_the_limit_is_not_copied_and_counted() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    async with abreast(sample_unsafe=1.0, mirror_body_limit=100_000) as proxy:
        response = await proxy.client.post("/", content=chunks())
        await proxy.settled()

        assert response.status_code == 200
        assert len(proxy.old.received[0].body) == 200_000
        assert not proxy.new.received
        assert await proxy.stat("http.ingress.lua.copies.too_large") == 1


async def test_memory_of_waiting_requests_is_bounded_and_freed_when_clients_leave() -> None:
    body = b"x" * 400_000
    head = f"POST /left HTTP/1.1\r\nhost: shop\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with abreast(
        sample_unsafe=1.0, held_bytes_limit=1_000_000, old=Upstream(answer=slow(30.0)), new=Upstream()
    ) as proxy:
        uploads = [exchange(proxy.port, head + body, until=b"never", within=1.0) for _ in range(12)]
        await asyncio.gather(*uploads)
        await proxy.wait_for_requests(proxy.old, 12)
        refused = await proxy.stat("http.ingress.lua.copies.over_memory")
        proxy.old.answer = ok

        assert refused >= 12 - 2 * 2  # two worker threads, two bodies in each

        async def is_copied() -> bool:
            await proxy.client.post("/stayed", content=body)
            return bool(proxy.new.received)

        await eventually_async(is_copied, description="a request has room again")
        assert {received.path for received in proxy.new.received} == {"/stayed"}
