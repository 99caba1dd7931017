"""Users as keep-alive connections that cost little CPU, so that the server dominates the measurement."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
PAIR = re.compile(rb"x-abreast-pair: ([^\r]+)", re.IGNORECASE)


@dataclass
class Answers:
    """`seconds` are the times of the answers, `pairs` the ids of sampled requests with the monotonic time of their answer."""

    seconds: list[float] = field(default_factory=list)
    pairs: list[tuple[str, float]] = field(default_factory=list)
    errors: int = 0  # statuses other than 2xx


class User(asyncio.Protocol):
    """One connection with at most one request in flight."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answered: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if end and length and len(body) >= int(length[1]) and self._answered is not None:
            self._buffer = b""
            self._answered.set_result(head)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> bytes:
        """Send a request, and return the head of the answer."""
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Users:
    """An async context manager. `request` returns the bytes of the request with a given number."""

    def __init__(self, port: int, request: Callable[[int], bytes], *, count: int) -> None:
        self._port = port
        self._request = request
        self._count = count
        self._users: list[User] = []
        self._sent = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for _ in range(self._count):
            _, user = await loop.create_connection(User, "127.0.0.1", self._port)
            self._users.append(user)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for user in self._users:
            user.close()

    async def saturate(self, seconds: float) -> float:
        """Return the answers per second if every user sends its next request at once."""
        answers, began = Answers(), time.perf_counter()

        async def ask(user: User) -> None:
            while time.perf_counter() - began < seconds:
                await self._ask(user, answers)

        await asyncio.gather(*(ask(user) for user in self._users))
        return len(answers.seconds) / (time.perf_counter() - began)

    async def pace(self, rate: float, seconds: float) -> Answers:
        """Send requests at a fixed rate, also while earlier ones are in flight.

        The time of a request starts when it is due, even if all users are busy then.
        """
        answers, began = Answers(), time.perf_counter()
        numbers = iter(range(int(rate * seconds)))

        async def ask(user: User) -> None:
            for number in numbers:
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await self._ask(user, answers, due)

        await asyncio.gather(*(ask(user) for user in self._users))
        return answers

    async def _ask(self, user: User, answers: Answers, due: float | None = None) -> None:
        self._sent += 1
        began = due or time.perf_counter()
        head = await user.ask(self._request(self._sent))
        answers.seconds.append(time.perf_counter() - began)
        if not head.startswith(b"HTTP/1.1 2"):
            answers.errors += 1
        if pair := PAIR.search(head):
            answers.pairs.append((pair[1].decode(), time.monotonic()))
