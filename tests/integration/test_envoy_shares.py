"""Shares hold over many requests, users stay where they are, and a tester may choose where that is allowed."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Self

import pytest

from abreast_sidecar.envoy.settings import StickyKey
from support_envoy import abreast, exchange
from support_upstream import Upstream, failing

REQUESTS = 20_000
FEW = 4_000  # enough for a small share, whose count strays less
CONNECTIONS = 8
TOLERANCE = 0.01  # one percentage point
SECRET = "0123456789abcdef"


class Quick(asyncio.Protocol):
    """Answers every request of a connection, and looks at none."""

    ANSWER = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nok"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.rest = transport, b""

    def data_received(self, data: bytes) -> None:
        *heads, self.rest = (self.rest + data).split(b"\r\n\r\n")
        self.transport.write(self.ANSWER * len(heads))


@dataclass
class QuickUpstream(Upstream):
    async def start(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(Quick, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self


async def ask(port: int, header: str, requests: int = REQUESTS) -> list[str]:
    """Who answered each of many users, in their order: the same users each time, so chance has no say."""

    def request(number: int, *, last: bool) -> bytes:
        closing = "connection: close\r\n" if last else ""
        return f"GET / HTTP/1.1\r\nhost: shop\r\n{header}: user-{number}\r\n{closing}\r\n".encode()

    async def some(numbers: range) -> list[str]:
        sent = b"".join(request(number, last=number == numbers[-1]) for number in numbers)
        answers = await exchange(port, sent, within=60)
        return [found.decode() for found in re.findall(rb"x-abreast-version: (\w+)", answers)]

    each = requests // CONNECTIONS
    parts = await asyncio.gather(*[some(range(first, first + each)) for first in range(0, requests, each)])
    return [version for part in parts for version in part]


async def test_a_share_holds_within_a_percentage_point_and_a_rising_one_only_moves_users_to_new() -> None:
    async with abreast(
        old=QuickUpstream(), new=QuickUpstream(), sticky=StickyKey("header", "x-user"), sample_safe=0.01
    ) as running:
        before: list[str] = []
        for share, requests in ((0.01, FEW), (0.5, REQUESTS)):
            await running.give_new(share)
            answered = await ask(running.port, "x-user", requests)

            assert len(answered) == requests
            assert answered.count("new")
            assert abs(answered.count("new") / requests - share) < TOLERANCE
            assert ("new", "old") not in set(zip(before, answered, strict=False))
            before = answered


async def test_without_a_sticky_key_a_share_holds_too() -> None:
    async with abreast(weight=0.25, old=QuickUpstream(), new=QuickUpstream(), sample_safe=0.01) as running:
        answered = await ask(running.port, "x-request-id")

        assert len(answered) == REQUESTS
        assert abs(answered.count("new") / REQUESTS - 0.25) < TOLERANCE


@pytest.mark.parametrize(("weight", "use"), [(0.0, "new"), (1.0, "old")])
async def test_a_tester_gets_the_version_that_he_asks_for_and_the_other_one_a_copy(weight: float, use: str) -> None:
    async with abreast(weight=weight, tester_secret=SECRET, sample_unsafe=1.0) as running:
        headers = {"x-abreast-use": f"{use} {SECRET}", "x-abreast-role": "live", "x-abreast-used": "1"}
        answers = [await running.client.request(method, "/", headers=headers) for method in ("GET", "POST")]
        usual = await running.client.get("/")
        await running.settled()
        other = running.old if use == "new" else running.new

        assert {answer.headers["x-abreast-version"] for answer in answers} == {use}
        assert usual.headers["x-abreast-version"] != use
        assert [request.method for request in other.in_role("shadow")] == ["GET", "POST"]
        for request in (*running.old.received, *running.new.received):
            assert not {"x-abreast-use", "x-abreast-used"} & set(request.headers)
            assert SECRET.encode() not in request.head


async def test_a_tester_of_a_failing_new_is_answered_by_old() -> None:
    async with abreast(tester_secret=SECRET, new=Upstream(answer=failing(500))) as running:
        answer = await running.client.get("/", headers={"x-abreast-use": f"new {SECRET}"})

        assert (answer.status_code, answer.headers["x-abreast-version"]) == (200, "old")
        assert len(running.new.in_role("live")) == 1


@pytest.mark.parametrize(
    ("testers", "asked"), [("", "new"), ("", f"new {SECRET}"), (SECRET, "new"), (SECRET, f"new {SECRET}0")]
)
async def test_nobody_else_can_ask_for_a_version(testers: str, asked: str) -> None:
    async with abreast(tester_secret=testers, sample_safe=0.0) as running:
        answer = await running.client.get("/", headers={"x-abreast-use": asked})

        assert answer.headers["x-abreast-version"] == "old"
        assert not running.new.received
        assert "x-abreast-use" not in running.old.received[0].headers
