"""HTTP/1.1 as raw bytes: a client and a recording service that follow scripts and keep all that they receive."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

MAX_LINE_BYTES = 8 * 2**20
CLOSE_WAIT_S = 5.0  # for the end of a connection that the response announces
OPEN_WAIT_S = 0.25  # for the end of any other connection
CASE_HEADER = b"x-case"
COPY_ROLES = frozenset({b"shadow", b"baseline"})
HEALTH_TARGET = b"/healthz"


class Step(Enum):
    """A step of a script that sends no bytes."""

    READ = "read the rest of the request"
    AWAIT_HEAD = "wait for a response"
    END = "close the direction to the peer"
    CLOSE = "close the connection"
    RESET = "reset the connection"


Script = Sequence[bytes | float | Step]  # bytes are sent, and a number is a pause in seconds
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OK_HEAD = OK.removesuffix(b"ok")
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Message:
    """A request or a response. `framing` says how its body ends: none, length, chunked, close, cut or malformed."""

    first_line: bytes
    headers: Headers
    body: bytes = b""
    trailers: Headers = ()
    framing: str = "none"

    def values(self, name: bytes) -> list[bytes]:
        return [value for present, value in self.headers if present.lower() == name]

    def first(self, name: bytes) -> bytes:
        return next(iter(self.values(name)), b"")

    @property
    def status(self) -> int:
        part = self.first_line.split(b" ")[1:2]
        return int(part[0]) if part and part[0].isdigit() else 0

    @property
    def is_final(self) -> bool:
        return not 100 <= self.status < 200 or self.status == 101


@dataclass
class Exchange:
    """All messages of a case, in order. `ending` is open, closed or reset."""

    requests: list[Message] = field(default_factory=list)
    copies: list[Message] = field(default_factory=list)
    responses: list[Message] = field(default_factory=list)
    early_copies: list[Message] = field(default_factory=list)  # copies that arrived before the live response began
    ending: str = "open"


def split_headers(block: bytes) -> Headers:
    pairs = (line.partition(b":") for line in block.split(b"\r\n") if line)
    return tuple((name, value.strip(b" \t")) for name, _, value in pairs)


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, Headers]:
    first = b"\r\n"
    while first == b"\r\n":  # empty lines before a request
        first = await _read_line(reader)
    block = b""
    while (line := await _read_line(reader)) != b"\r\n":
        block += line
    return first.removesuffix(b"\r\n"), split_headers(block)


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readuntil(b"\n")
    return line if line.endswith(b"\r\n") else line[:-1] + b"\r\n"


async def read_body(reader: asyncio.StreamReader, message: Message, *, is_response: bool = False) -> Message:
    """Return the message with its body. A body that ends too early has the framing `cut`."""
    codings = b",".join(message.values(b"transfer-encoding")).lower()
    length = message.first(b"content-length")
    body, trailers = bytearray(), b""
    try:
        if b"chunked" in codings:
            while size := int((await _read_line(reader)).split(b";")[0], 16):
                await _read_exactly(reader, size, body)
                await _read_line(reader)
            while (line := await _read_line(reader)) != b"\r\n":
                trailers += line
            framing = "chunked"
        elif length:
            await _read_exactly(reader, int(length), body)
            framing = "length"
        elif is_response:
            while data := await reader.read(65536):
                body += data
            framing = "close"
        else:
            framing = "none"
    except ValueError:
        framing = "malformed"
    except (ConnectionError, asyncio.IncompleteReadError):
        framing = "cut"
    return Message(message.first_line, message.headers, bytes(body), split_headers(trailers), framing)


async def _read_exactly(reader: asyncio.StreamReader, size: int, body: bytearray) -> None:
    end = len(body) + size
    while len(body) < end:
        data = await reader.read(min(65536, end - len(body)))
        if not data:
            raise ConnectionResetError
        body += data


async def exchange(port: int, script: Script, *, responses: int = 1, timeout: float = 10.0) -> Exchange:
    """Send what the script says, and read this number of final responses or as many as arrive in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE_BYTES)
    result, head_arrived = Exchange(), asyncio.Event()
    sent = b"".join(step for step in script if isinstance(step, bytes))
    methods = [match[1] for match in re.finditer(rb"(?:^|\n)([^\s:]+) [^\r\n]* HTTP/1\.[01]\r?\n", sent)]
    sending = asyncio.create_task(_send(writer, script, head_arrived))
    try:
        async with asyncio.timeout(timeout):
            await _read_responses(reader, methods, responses, result, head_arrived)
        await _observe_ending(reader, result, is_announced=Step.END in script)
    except TimeoutError:
        result.ending = "timeout"
    except asyncio.IncompleteReadError as error:
        result.ending = "closed in a head" if error.partial else "closed"
    except ConnectionError:
        result.ending = "reset"
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await sending
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return result


async def _send(writer: asyncio.StreamWriter, script: Script, head_arrived: asyncio.Event) -> None:
    for step in script:
        if isinstance(step, bytes):
            with suppress(ConnectionError):  # the reader sees the end too, after the response
                writer.write(step)
                await writer.drain()
        elif isinstance(step, float | int):
            await asyncio.sleep(step)
        elif step is Step.AWAIT_HEAD:
            await head_arrived.wait()
            head_arrived.clear()
        elif step is Step.END:
            writer.write_eof()


async def _read_responses(
    reader: asyncio.StreamReader, methods: list[bytes], count: int, result: Exchange, head_arrived: asyncio.Event
) -> None:
    final = 0
    while final < count:
        first_line, headers = await read_head(reader)
        head = Message(first_line, headers)
        head_arrived.set()
        method = methods[final] if final < len(methods) else b""
        has_body = head.is_final and method != b"HEAD" and head.status not in {101, 204, 304}
        result.responses.append(await read_body(reader, head, is_response=True) if has_body else head)
        final += head.is_final


async def _observe_ending(reader: asyncio.StreamReader, result: Exchange, *, is_announced: bool) -> None:
    last = result.responses[-1]
    is_announced |= b"close" in b",".join(last.values(b"connection")).lower() or last.framing in {"close", "cut"}
    try:
        data = await asyncio.wait_for(reader.read(65536), CLOSE_WAIT_S if is_announced else OPEN_WAIT_S)
    except TimeoutError:
        return
    except ConnectionError:
        data = b""
    result.ending = "more bytes" if data else "closed"


@dataclass
class Recorder:
    """A service that answers each request by the script of its case, and keeps the request.

    The header `x-case` names the case. Copies are kept apart from live requests, which `x-abreast-role` tells.
    """

    ports: tuple[int, ...]
    scripts: dict[bytes, Script] = field(default_factory=dict)
    idle_timeout: float = 60.0
    live: dict[bytes, list[Message]] = field(default_factory=lambda: defaultdict(list))
    copies: dict[bytes, list[Message]] = field(default_factory=lambda: defaultdict(list))
    early_copies: dict[bytes, list[Message]] = field(default_factory=lambda: defaultdict(list))
    _responded: set[bytes] = field(default_factory=set)  # pairs whose live response has begun
    _servers: list[asyncio.Server] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        for port in self.ports:
            server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=MAX_LINE_BYTES, backlog=1000)
            self._servers.append(server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget(self) -> None:
        self.live.clear()
        self.copies.clear()
        self.early_copies.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return true if the connection stays open."""
        head = Message(*await asyncio.wait_for(read_head(reader), self.idle_timeout))
        if b" " + HEALTH_TARGET + b" " in head.first_line:
            writer.write(OK)
            return True
        case = head.first(CASE_HEADER)
        pair = head.first(b"x-abreast-pair")
        is_copy = pair and head.first(b"x-abreast-role") in COPY_ROLES
        if is_copy and pair not in self._responded:
            self.early_copies[case].append(head)
        requests = (self.copies if is_copy else self.live)[case]
        place = len(requests)
        requests.append(head)
        for step in self.scripts.get(case, (Step.READ, OK)):
            if step is Step.READ:
                requests[place] = await read_body(reader, head)
                if requests[place].framing in {"cut", "malformed"}:
                    return False
                continue
            if isinstance(step, float | int):
                await asyncio.sleep(step)
                continue
            self._responded.add(pair)
            if isinstance(step, bytes):
                has_body = step is not OK or not head.first_line.startswith(b"HEAD ")
                writer.write(step if has_body else OK_HEAD)
                await writer.drain()
            elif step is Step.END:
                writer.write_eof()
            else:
                if step is Step.RESET:
                    writer.transport.abort()
                return False
        return _is_persistent(head)


def _is_persistent(request: Message) -> bool:
    options = b",".join(request.values(b"connection")).lower()
    return b"close" not in options and (request.first_line.endswith(b"HTTP/1.1") or b"keep-alive" in options)
