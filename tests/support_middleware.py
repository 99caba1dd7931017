"""Helpers for tests of the middleware: requests with Envoy's headers, and the captures in Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import uvicorn

from abreast.middleware import App, ParallelRunMiddleware
from abreast.protocol.capture import Capture, Role, Version, decode
from abreast.protocol.join import Keys
from abreast.recorder import Message, Scope
from support import eventually_async, find_free_port

SERVICE = "shop"
NUMBERS = itertools.count(1)
EXTENSIONS: dict[str, dict[str, object]] = {
    "http.response.trailers": {},
    "http.response.pathsend": {},
    "http.response.zerocopysend": {},
    "http.response.early_hint": {},
}


def pair_id() -> str:
    return f"00000000-0000-4000-8000-{next(NUMBERS):012d}"


def marks(pair: str, *, version: str = "old", role: str = "live", arms: int = 2) -> dict[str, str]:
    return {"x-abreast-pair": pair, "x-abreast-version": version, "x-abreast-role": role, "x-abreast-copies": str(arms)}


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def http_scope(path: str = "/", method: str = "GET", headers: dict[str, str] | None = None, **fields: Any) -> Scope:
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"shop.example"), *raw(headers or {})],
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 80),
        "extensions": EXTENSIONS,
        **fields,
    }


async def call(
    app: App, scope: Scope, body: Sequence[bytes] = (b"",), *, left_after: int | None = None
) -> tuple[list[Message], BaseException | None]:
    """Return the messages that the app sends, and its exception. The client leaves after `left_after` messages."""
    messages: list[Message] = []
    chunks = list(body)
    disconnected = asyncio.Event()

    async def receive() -> Message:
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.append(message)
        if left_after is not None and len(messages) >= left_after:
            disconnected.set()
        await asyncio.sleep(0)

    exception: BaseException | None = None
    try:
        await app(scope, receive, send)
    except BaseException as error:  # noqa: BLE001  # includes cancellation
        exception = error
    return messages, exception


def untagged(messages: Iterable[Message]) -> list[Message]:
    """Return the messages without the headers that the middleware adds."""
    return [
        {**message, "headers": [row for row in message["headers"] if not row[0].startswith(b"x-abreast-")]}
        if message["type"] == "http.response.start"
        else message
        for message in messages
    ]


async def captures(url: str, service: str = SERVICE, shard: int = 0) -> list[Capture]:
    """Return the captures of all pairs in Redis, complete and incomplete."""
    keys, blobs = Keys(service, shard), []
    async with redis.asyncio.Redis.from_url(url) as client:
        connection: Any = client  # its annotations include text replies
        async for key in connection.scan_iter(keys.pair("*")):
            blobs += list((await connection.hgetall(key)).values())
        for _, entry in await connection.xrange(keys.ready):
            blobs += [value for name, value in entry.items() if b":" in name]
    return [decode(blob) for blob in blobs]


async def captured(app: App, url: str, scope: Scope, **how: Any) -> Capture:
    """Send a sampled request to the app behind the middleware, and return its capture."""
    middleware = ParallelRunMiddleware(app, service=SERVICE, redis_url=url, release="r1")
    await call(middleware, scope, **how)
    await middleware.aclose()
    (capture,) = await captures(url)
    return capture


def sampled(
    path: str = "/",
    method: str = "GET",
    *,
    version: Version = "old",
    role: Role = "live",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Scope:
    return http_scope(path, method, {**(headers or {}), **marks(pair_id(), version=version, role=role)}, **fields)


@asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[tuple[str, uvicorn.Server]]:
    """Run uvicorn on a free port."""
    port = find_free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False, **options))
    task = asyncio.create_task(server._serve())

    async def started() -> bool:
        if task.done():
            task.result()
        return server.started

    try:
        await eventually_async(started, description="uvicorn starts")
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        await task
