"""The middleware in uvicorn, with real sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from abreast.export.redaction import Redactor
from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.capture import digest
from support import eventually_async
from support_middleware import captures, marks, pair_id, serving

UPLOAD = os.urandom(5 * 1024 * 1024)
pytestmark = pytest.mark.parametrize("http", ["h11", "httptools"])


async def upload(request: Request) -> Response:
    return PlainTextResponse(digest(await request.body()))


async def stream(_request: Request) -> Response:
    async def content() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(content())


async def events(_request: Request) -> Response:
    async def content() -> AsyncIterator[str]:
        number = 0
        while True:
            number += 1
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(content(), media_type="text/event-stream")


def application(url: str) -> Starlette:
    routes = [Route("/upload", upload, methods=["POST"]), Route("/stream", stream), Route("/events", events)]
    app = Starlette(routes=routes)
    app.add_middleware(ParallelRunMiddleware, service="shop", redis_url=url, release="r1")
    return app


async def test_large_upload_arrives_complete(http: str, redis_url: str) -> None:
    async with serving(application(redis_url), http=http) as (url, _), httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/upload", content=UPLOAD, headers=marks(pair_id()))
    (capture,) = await captures(redis_url)

    assert answer.text == digest(UPLOAD)
    assert answer.headers["x-abreast-release"] == "r1"
    assert (capture.request.body.length, capture.request.body.digest) == (len(UPLOAD), Redactor().hash(digest(UPLOAD)))


async def test_stream_is_not_buffered(http: str, redis_url: str) -> None:
    async with (
        serving(application(redis_url), http=http) as (url, _),
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/stream", headers=marks(pair_id())) as answer,
    ):
        chunks = [chunk async for chunk in answer.aiter_text()]
    (capture,) = await captures(redis_url)

    assert chunks == ["0\n", "1\n", "2\n"]
    assert capture.answer.body.content == b"0\n1\n2\n"
    assert capture.complete


async def test_disconnect_from_server_sent_events_is_captured(http: str, redis_url: str) -> None:
    async with serving(application(redis_url), http=http) as (url, _), httpx.AsyncClient(base_url=url) as client:
        async with client.stream("GET", "/events", headers=marks(pair_id())) as answer:
            first = await anext(answer.aiter_lines())

        async def recorded() -> bool:
            return bool(await captures(redis_url))

        await eventually_async(recorded, description="the capture of a client that left")
    (capture,) = await captures(redis_url)

    assert first == "data: 1"
    assert (capture.client_left, capture.complete) == (True, False)
    assert capture.answer.body.content.startswith(b"data: 1\n\n")


async def test_connection_is_kept_alive(http: str, redis_url: str) -> None:
    async with serving(application(redis_url), http=http) as (url, server), httpx.AsyncClient(base_url=url) as client:
        for _ in range(5):
            await client.get("/stream", headers=marks(pair_id()))
        connections = len(server.server_state.connections)

    assert connections == 1
    assert len(await captures(redis_url)) == 5


async def test_middleware_can_wrap_an_app(http: str, redis_url: str) -> None:
    app = FastAPI()

    @app.get("/items/{item}")
    async def item(item: int) -> dict[str, int]:
        return {"item": item}

    around = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    async with serving(around, http=http) as (url, _), httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/items/7", headers=marks(pair_id()))
    (capture,) = await captures(redis_url)

    assert answer.json() == {"item": 7}
    assert capture.request.route == "/items/{item}"
    assert around.queue.shipped_count == 1


async def test_middleware_works_without_lifespan(http: str, redis_url: str) -> None:
    async with (
        serving(application(redis_url), http=http, lifespan="off") as (url, _),
        httpx.AsyncClient(base_url=url) as client,
    ):
        await client.get("/stream", headers=marks(pair_id()))

        async def recorded() -> bool:
            return bool(await captures(redis_url))

        await eventually_async(recorded, description="the capture arrives")
