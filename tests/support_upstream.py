"""A version of a service for Envoy tests: speaks HTTP/1.1 on a plain socket and keeps the very bytes it was sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

HEALTH = "/healthz"
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455


@dataclass(frozen=True)
class Received:
    """One request as it stood on the wire; `body` is what the framing held, `head` ends before the empty line."""

    head: bytes
    body: bytes
    trailers: bytes = b""

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.header_list)

    @property
    def header_list(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]

    @property
    def role(self) -> str:
        """Return the role. Requests that are not sampled have none in their headers, and are live."""
        return self.headers.get("x-abreast-role", "live")

    @property
    def captures(self) -> int:
        """The number of captures of its pair, 1 if the request is not sampled."""
        return int(self.headers.get("x-abreast-copies", "1").split()[0])

    @property
    def sent_ms(self) -> int:
        """When Envoy got the request or sent the copy."""
        return int(self.headers["x-abreast-copies"].split()[1])

    @property
    def pair(self) -> str:
        return self.headers.get("x-abreast-pair", "")

    def without(self, *names: str) -> bytes:
        """Return the bytes without some headers. The others are sorted by name, with repeated names in their order."""
        request_line, *lines = self.head.split(b"\r\n")
        lines = [line for line in lines if line.split(b":")[0].decode() not in names]
        return (
            b"\r\n".join((request_line, *sorted(lines, key=lambda line: line.split(b":")[0]))) + b"\r\n\r\n" + self.body
        )


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


async def ok(request: Received, writer: asyncio.StreamWriter) -> None:
    await respond(writer, b"ok", head=request.method == "HEAD")


async def respond(
    writer: asyncio.StreamWriter, body: bytes, status: int = 200, *, headers: str = "", head: bool = False
) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode())
    writer.write(b"" if head else body)
    await writer.drain()


def failing(status: int) -> Answer:
    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        await respond(writer, b"failed", status)

    return answer


def slow(seconds: float) -> Answer:
    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await ok(request, writer)

    return answer


@dataclass
class Upstream:
    """Answers in the test's own event loop. Set `answer` to change what it says; clear `reading` to freeze it."""

    answer: Answer = ok
    tls: ssl.SSLContext | None = None
    health_status: int = 200
    accepts_websockets: bool = True
    port: int = 0
    received: list[Received] = field(default_factory=list)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> Self:
        self.reading.set()
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, ssl=self.tls, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def in_role(self, role: str) -> list[Received]:
        return [request for request in self.received if request.role == role]

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._exchange(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
        await self.reading.wait()
        request = Received(head, *await _body(head, reader))
        if request.path == HEALTH:
            await respond(writer, b"", self.health_status)
            return
        self.received.append(request)
        if self.accepts_websockets and request.headers.get("upgrade") == "websocket":
            await _echo(request, reader, writer)
        await self.answer(request, writer)


async def _body(head: bytes, reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    headers = Received(head, b"").headers
    if "chunked" not in headers.get("transfer-encoding", ""):
        return await reader.readexactly(int(headers.get("content-length", "0"))), b""
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    trailers = b""
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        trailers += line
    return b"".join(chunks), trailers


async def _echo(request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept a websocket, then send back whatever comes."""
    key = request.headers["sec-websocket-key"].encode()
    accept = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID, usedforsecurity=False).digest())
    writer.write(b"HTTP/1.1 101 X\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: " + accept)
    writer.write(b"\r\n\r\n")
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError
