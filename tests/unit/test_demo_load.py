from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from abreast_demo.deploy import BASELINE_SHARE, SAFE_SAMPLE_SHARE
from abreast_demo.load import (
    DECK_SIZE,
    MAX_CONCURRENT_REQUESTS,
    PRODUCT_COUNT,
    USER_COUNT,
    USER_HEADER,
    LoadGenerator,
    UserRequest,
    generate_requests,
)
from abreast_demo.run import DemoOptions
from support import eventually_async, find_free_port

GET = UserRequest("GET", "/x", "user-1")
MIN_DURATION_S = 5


def take_requests(count: int, seed: int = 1) -> list[UserRequest]:
    return list(itertools.islice(generate_requests(seed), count))


class StubServer:
    """Answer each request with `status`, once `is_open` is set."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.in_flight = self.max_in_flight = 0
        self.request_heads: list[bytes] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.request_heads.append(await reader.readuntil(b"\r\n\r\n"))
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                await self.is_open.wait()
                self.in_flight -= 1
                writer.write(f"HTTP/1.1 {self.status} X\r\ncontent-length: 0\r\n\r\n".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serve(server: StubServer) -> AsyncIterator[str]:
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def test_requests_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert take_requests(500) == take_requests(500)
    assert take_requests(500, seed=1) != take_requests(500, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_deck_contains_every_rare_request(seed: int) -> None:
    assert DECK_SIZE == 100
    requests = take_requests(4 * DECK_SIZE, seed)
    for start in range(0, len(requests), DECK_SIZE):
        paths = [request.path for request in requests[start : start + DECK_SIZE]]

        assert sum("%2B%2B" in path for path in paths) == 1
        assert sum("currency=JPY" in path for path in paths) == 4
        assert sum(bool(re.fullmatch(r"/products/\d+", path)) and int(path[10:]) % 9 == 0 for path in paths) >= 4
        assert sum(path.endswith("/reviews") and int(path.split("/")[2]) > PRODUCT_COUNT for path in paths) == 2


def test_each_endpoint_is_frequent_enough_to_measure_noise() -> None:
    """In the shortest run, an endpoint lacks a baseline with a probability below 0.001."""
    endpoints = Counter(
        re.sub(r"(categories|products)/\w+", r"\1/*", request.path.partition("?")[0])
        for request in take_requests(round(MIN_DURATION_S * DemoOptions().requests_per_s))
        if request.is_safe
    )

    assert len(endpoints) == 8
    assert max((1 - BASELINE_SHARE * SAFE_SAMPLE_SHARE) ** count for count in endpoints.values()) < 0.001


def test_only_unsafe_requests_have_a_body() -> None:
    requests = take_requests(1000)

    assert {request.method for request in requests} == {"GET", "POST"}
    assert all(bool(request.body) is not request.is_safe for request in requests)


def test_users_return() -> None:
    users = Counter(request.user for request in take_requests(4000))

    assert len(users) == USER_COUNT
    assert max(users.values()) > 5


async def test_load_generator_ends_with_the_requests() -> None:
    server = StubServer()
    async with serve(server) as url, LoadGenerator(url) as load:
        await load.send(itertools.repeat(GET, 20), requests_per_s=1000)

    assert load.tally.requests == load.tally.safe_requests == len(server.request_heads) == 20
    assert load.tally.statuses == {200: 20}
    assert f"{USER_HEADER}: user-1\r\n".encode() in server.request_heads[0]


async def test_load_generator_ends_at_its_timeout() -> None:
    async with serve(StubServer()) as url, LoadGenerator(url) as load:
        started_at = time.monotonic()
        await load.send(itertools.repeat(GET), requests_per_s=50, timeout_s=0.3)

    assert time.monotonic() - started_at < 30
    assert 1 <= load.tally.requests <= 15


async def test_load_generator_limits_concurrent_requests() -> None:
    server = StubServer()
    server.is_open.clear()

    async def is_full() -> bool:
        return server.in_flight == MAX_CONCURRENT_REQUESTS

    async with serve(server) as url, LoadGenerator(url) as load, asyncio.TaskGroup() as group:
        requests = itertools.repeat(GET, 3 * MAX_CONCURRENT_REQUESTS)
        group.create_task(load.send(requests, requests_per_s=10_000))
        await eventually_async(is_full, description="all slots are taken")
        server.is_open.set()

    assert server.max_in_flight == MAX_CONCURRENT_REQUESTS
    assert load.tally.requests == 3 * MAX_CONCURRENT_REQUESTS


@pytest.mark.parametrize(("status", "errors"), [(404, 0), (500, 4), (503, 4)])
async def test_load_generator_counts_5xx_as_user_errors(status: int, errors: int) -> None:
    async with serve(StubServer(status)) as url, LoadGenerator(url) as load:
        await load.send(itertools.repeat(GET, 4), requests_per_s=1000)

    assert load.tally.user_errors == errors


async def test_load_generator_counts_missing_responses_as_user_errors() -> None:
    async with LoadGenerator(f"http://127.0.0.1:{find_free_port()}") as load:
        await load.send(itertools.repeat(GET, 2), requests_per_s=1000)

    assert load.tally.user_errors == load.tally.requests == 2
    assert load.tally.failures == {"ConnectError": 2}
