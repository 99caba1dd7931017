"""Shares over many requests, users that stay on one version, and testers that select one."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Self

import pytest

from abreast_sidecar.envoy.settings import StickyKey
from support_envoy import abreast, exchange
from support_upstream import Upstream, failing

REQUESTS = 6_000
FEW = 2_000  # enough for a small share, whose count strays less
CONNECTIONS = 8
TOLERANCE = 0.015  # 2.3 standard deviations of the larger share, and the users are always the same
SECRET = "0123456789abcdef"


class Quick(asyncio.Protocol):
    """Answers every request of a connection, and looks at none."""

    ANSWER = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nok"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        *heads, self.buffer = (self.buffer + data).split(b"\r\n\r\n")
        self.transport.write(self.ANSWER * len(heads))


@dataclass
class QuickUpstream(Upstream):
    async def start(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(Quick, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self


async def ask(port: int, header: str, requests: int = REQUESTS) -> list[str]:
    """Return the version that served each user. The users are the same in each call, which excludes chance."""

    def request(number: int, *, last: bool) -> bytes:
        closing = "connection: close\r\n" if last else ""
        return f"GET / HTTP/1.1\r\nhost: shop\r\n{header}: user-{number}\r\n{closing}\r\n".encode()

    async def some(numbers: range) -> list[str]:
        content = b"".join(request(number, last=number == numbers[-1]) for number in numbers)
        answers = await exchange(port, content, within=60)
        return [version.decode() for version in re.findall(rb"x-abreast-version: (\w+)", answers)]

    per_connection = requests // CONNECTIONS
    parts = await asyncio.gather(
        *[some(range(first, first + per_connection)) for first in range(0, requests, per_connection)]
    )
    return [version for part in parts for version in part]


async def test_share_is_accurate_and_a_rising_one_moves_users_only_to_new() -> None:
    async with abreast(
        old=QuickUpstream(), new=QuickUpstream(), sticky=StickyKey("header", "x-user"), sample_safe=0.01
    ) as proxy:
        before: list[str] = []
        for share, requests in ((0.01, FEW), (0.5, REQUESTS)):
            await proxy.give_new(share)
            answered = await ask(proxy.port, "x-user", requests)

            assert len(answered) == requests
            assert answered.count("new")
            assert abs(answered.count("new") / requests - share) < TOLERANCE
            assert ("new", "old") not in set(zip(before, answered, strict=False))
            before = answered


async def test_share_is_accurate_without_sticky_key() -> None:
    async with abreast(weight=0.25, old=QuickUpstream(), new=QuickUpstream(), sample_safe=0.01) as proxy:
        answered = await ask(proxy.port, "x-request-id")

        assert len(answered) == REQUESTS
        assert abs(answered.count("new") / REQUESTS - 0.25) < TOLERANCE


async def test_tester_selects_version_and_other_version_gets_copy() -> None:
    async with abreast(tester_secret=SECRET, sample_unsafe=1.0) as proxy:
        for share, use, other in ((0.0, "new", proxy.old), (1.0, "old", proxy.new)):
            await proxy.restart_with(share)
            headers = {"x-abreast-use": f"{use} {SECRET}", "x-abreast-role": "live", "x-abreast-used": "1"}
            answers = [await proxy.client.request(method, "/", headers=headers) for method in ("GET", "POST")]
            usual = await proxy.client.get("/")
            await proxy.wait_for_requests(proxy.old, 3)
            await proxy.wait_for_requests(proxy.new, 3)
            await proxy.settled()

            assert {answer.headers["x-abreast-version"] for answer in answers} == {use}
            assert usual.headers["x-abreast-version"] != use
            assert [request.method for request in other.in_role("shadow")] == ["GET", "POST"]
            for request in (*proxy.old.received, *proxy.new.received):
                assert not {"x-abreast-use", "x-abreast-used"} & set(request.headers)
                assert SECRET.encode() not in request.head


async def test_tester_of_failing_new_is_served_by_old() -> None:
    async with abreast(tester_secret=SECRET, new=Upstream(answer=failing(500))) as proxy:
        answer = await proxy.client.get("/", headers={"x-abreast-use": f"new {SECRET}"})

        assert (answer.status_code, answer.headers["x-abreast-version"]) == (200, "old")
        assert len(proxy.new.in_role("live")) == 1


@pytest.mark.parametrize(("secret", "values"), [("", ("new", f"new {SECRET}")), (SECRET, ("new", f"new {SECRET}0"))])
async def test_version_selection_requires_secret(secret: str, values: tuple[str, str]) -> None:
    async with abreast(tester_secret=secret, sample_safe=0.0) as proxy:
        answers = [await proxy.client.get("/", headers={"x-abreast-use": value}) for value in values]

        assert [answer.headers["x-abreast-version"] for answer in answers] == ["old", "old"]
        assert not proxy.new.received
        assert not [request for request in proxy.old.received if "x-abreast-use" in request.headers]
