"""Users that send constant load over keep-alive connections, and record the result of every request."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from support import eventually_async

PAUSE = 0.02  # seconds between two requests of one user
PATHS = ("/items/{}", "/pages/{}")


@dataclass(frozen=True)
class UserResponse:
    """Result of one request. `trouble` is empty, a status, `cut off` (half an answer), or `no answer`."""

    method: str
    trouble: str
    version: str
    seconds: float


@dataclass
class Users:
    port: int
    paths: tuple[str, ...] = PATHS
    responses: list[UserResponse] = field(default_factory=list)

    def by(self, method: str) -> list[UserResponse]:
        return [response for response in self.responses if response.method == method]

    def safe(self) -> list[UserResponse]:
        return self.by("GET")

    async def wait_for(self, count: int, method: str = "GET") -> list[UserResponse]:
        """Wait for `count` more answers, and return them."""
        before = len(self.by(method))

        async def enough() -> bool:
            return len(self.by(method)) >= before + count

        await eventually_async(enough, description=f"{count} more answers to {method}")
        return self.by(method)[before:]

    async def user(self, method: str) -> None:
        link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            for number in itertools.count():
                try:
                    link = link or await asyncio.open_connection("127.0.0.1", self.port)
                except ConnectionError:
                    self.responses.append(UserResponse(method, "no answer", "", 0.0))
                    await asyncio.sleep(PAUSE)
                    continue
                path = self.paths[number % len(self.paths)].format(number)
                start = time.monotonic()
                trouble, version = await ask(*link, method, path)
                self.responses.append(UserResponse(method, trouble, version, time.monotonic() - start))
                if trouble in {"cut off", "no answer"}:
                    link[1].close()
                    link = None
                await asyncio.sleep(PAUSE)
        finally:
            if link:
                link[1].close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str) -> tuple[str, str]:
    """Send a request, and return its trouble and the version that answered."""
    body = b"order" if method == "POST" else b""
    head = f"{method} {path} HTTP/1.1\r\nhost: shop\r\nx-request-id: {uuid.uuid4()}\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    try:
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except (EOFError, ConnectionError):
        return "no answer", ""
    headers = dict(line.split(": ", 1) for line in answer[1:] if line)
    version = headers.get("x-abreast-version", "")
    try:
        await reader.readexactly(int(headers["content-length"]))
    except (EOFError, ConnectionError):
        return "cut off", version
    code = answer[0].split(" ")[1]
    return "" if code == "200" else code, version


@asynccontextmanager
async def users(
    port: int, *, readers: int = 3, writers: int = 2, paths: tuple[str, ...] = PATHS
) -> AsyncIterator[Users]:
    load = Users(port, paths)
    methods = ["GET"] * readers + ["POST"] * writers
    tasks = [asyncio.create_task(load.user(method)) for method in methods]
    try:
        yield load
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
