from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from abreast_demo.load import MAX_CONCURRENT_REQUESTS, USER_HEADER, LoadGenerator, UserRequest
from support import eventually_async, find_free_port

GET = UserRequest("GET", "/x", "user-1")


class Server:
    """Answers each request with `status`, once `open` is set."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.open = asyncio.Event()
        self.open.set()
        self.under_way = self.most_under_way = 0
        self.heads: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                await self.open.wait()
                self.under_way -= 1
                writer.write(f"HTTP/1.1 {self.status} X\r\ncontent-length: 0\r\n\r\n".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_it_ends_when_there_are_no_more_requests() -> None:
    server = Server()
    async with serving(server) as url, LoadGenerator(url) as load:
        await load.send(itertools.repeat(GET, 20), seconds=60, rate=1000)

    assert load.tally.requests == load.tally.safe_requests == len(server.heads) == 20
    assert load.tally.statuses == {200: 20}


async def test_it_ends_when_the_time_is_over() -> None:
    async with serving(Server()) as url, LoadGenerator(url) as load:
        began = time.monotonic()
        await load.send(itertools.repeat(GET), seconds=0.3, rate=50)

    assert time.monotonic() - began < 5
    assert 1 <= load.tally.requests <= 15


async def test_a_slow_service_is_not_flooded() -> None:
    server = Server()
    server.open.clear()

    async def full() -> bool:
        return server.under_way == MAX_CONCURRENT_REQUESTS

    async with serving(server) as url, LoadGenerator(url) as load, asyncio.TaskGroup() as group:
        group.create_task(load.send(itertools.repeat(GET, 3 * MAX_CONCURRENT_REQUESTS), seconds=60, rate=10_000))
        await eventually_async(full, what="as many are under way as may be")
        server.open.set()

    assert server.most_under_way == MAX_CONCURRENT_REQUESTS
    assert load.tally.requests == 3 * MAX_CONCURRENT_REQUESTS


async def test_an_answer_of_500_is_a_user_error_and_404_is_none() -> None:
    for status, errors in ((404, 0), (500, 4), (503, 4)):
        async with serving(Server(status)) as url, LoadGenerator(url) as load:
            await load.send(itertools.repeat(GET, 4), seconds=60, rate=1000)

        assert load.tally.user_errors == errors


async def test_no_answer_at_all_is_a_user_error() -> None:
    async with LoadGenerator(f"http://127.0.0.1:{find_free_port()}") as load:
        await load.send(itertools.repeat(GET, 2), seconds=60, rate=1000)

    assert load.tally.user_errors == load.tally.requests == 2
    assert load.tally.failures == {"ConnectError": 2}


async def test_a_user_says_who_they_are() -> None:
    server = Server()
    async with serving(server) as url, LoadGenerator(url) as load:
        await load.send(iter([UserRequest("GET", "/x", "user-9")]), seconds=60, rate=1000)

    assert f"{USER_HEADER}: user-9\r\n".encode() in server.heads[0]
