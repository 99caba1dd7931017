"""Effects in the capture that arrives in Redis, including the effects of background tasks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import redis.asyncio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import abreast
from abreast import ParallelRunMiddleware
from abreast.protocol.capture import HASH_PREFIX, Capture
from abreast.protocol.join import reports_key
from support import eventually_async
from support_middleware import call, captured, captures, sampled


def shop(background: Any) -> Starlette:
    async def order(_request: Request) -> Response:
        abreast.record("order.placed", {"id": 7, "card": {"cvv": "123"}}, key="7")
        abreast.record("cache.miss", "products", note=True)
        return PlainTextResponse("ok", background=BackgroundTask(background))

    return Starlette(routes=[Route("/", order)])


def kinds(capture: Capture) -> list[str]:
    return [effect["kind"] for effect in capture.effects]


async def test_capture_contains_effects_with_hashed_secrets(redis_url: str) -> None:
    async def later() -> None:
        await asyncio.sleep(0.1)
        abreast.record("email.send", {"to": "a@b"})

    capture = await captured(shop(later), redis_url, sampled())
    placed, miss, mail = capture.effects

    assert placed.pop("at_us") <= miss.pop("at_us") <= mail.pop("at_us") - 90_000
    assert placed["payload"]["card"].pop("cvv").startswith(HASH_PREFIX)
    assert placed == {"kind": "order.placed", "key": "7", "payload": {"id": 7, "card": {}}}
    assert miss == {"kind": "cache.miss", "payload": "products", "note": True}
    assert mail == {"kind": "email.send", "payload": {"to": "a@b"}}
    assert capture.total_us < 90_000, "the answer's time is its own"


async def test_capture_waits_for_background_tasks_up_to_effect_wait(redis_url: str) -> None:
    """The process continues, so that no shutdown flushes the queue."""
    release, finished = asyncio.Event(), asyncio.Event()

    async def later() -> None:
        abreast.record("email.send", 1)
        await release.wait()
        abreast.record("email.send", 2)
        finished.set()

    middleware = ParallelRunMiddleware(shop(later), service="shop", redis_url=redis_url, effect_wait=0.3)
    start = time.monotonic()
    request = asyncio.create_task(call(middleware, sampled()))
    await eventually_async(lambda: has_capture(redis_url), description="the capture is sent")
    waited = time.monotonic() - start
    release.set()
    await finished.wait()
    await request
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert waited >= 0.3
    assert kinds(capture) == ["order.placed", "cache.miss", "email.send"]
    assert middleware.queue.late_effect_count == 1
    assert (await report(redis_url))["late_effects"] == 1


async def test_capture_leaves_once_background_tasks_ended(redis_url: str) -> None:
    async def later() -> None:
        await asyncio.sleep(0.1)
        abreast.record("email.send", 1)

    middleware = ParallelRunMiddleware(
        shop(later), service="shop", redis_url=redis_url, effect_wait=20, pair_timeout=60
    )
    await call(middleware, sampled())
    await eventually_async(lambda: has_capture(redis_url), within=5, description="the capture is sent")
    (capture,) = await captures(redis_url)
    await middleware.aclose()

    assert kinds(capture) == ["order.placed", "cache.miss", "email.send"]


async def test_shutdown_does_not_wait_for_background_tasks(redis_url: str) -> None:
    async def later() -> None:
        await asyncio.Event().wait()

    middleware = ParallelRunMiddleware(
        shop(later), service="shop", redis_url=redis_url, effect_wait=60, pair_timeout=200
    )
    request = asyncio.create_task(call(middleware, sampled()))
    await eventually_async(lambda: has_queued(middleware), description="the answer is complete")
    await middleware.aclose()
    (capture,) = await captures(redis_url)
    request.cancel()

    assert kinds(capture) == ["order.placed", "cache.miss"]
    assert not middleware.queue.drop_counts


async def test_queue_accounts_for_bytes_of_effects() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        abreast.record("mail", "x" * 10_000)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        abreast.record("mail", "x" * 20_000)

    middleware = ParallelRunMiddleware(app, service="shop", redis_url="redis://127.0.0.1:1/0", queue_bytes=40_000)
    await call(middleware, sampled())
    first = middleware.queue.bytes
    await eventually_async(lambda: has_queued(middleware), description="the capture is queued")
    settled = middleware.queue.bytes
    await call(middleware, sampled())
    await middleware.aclose()

    assert 12_000 < first < 13_000
    assert 32_000 < settled < 33_000
    assert middleware.queue.drop_counts == {"queue_bytes": 1, "shutdown": 1}
    assert middleware.queue.bytes == 0


async def has_capture(url: str) -> bool:
    return len(await captures(url)) == 1


async def has_queued(middleware: ParallelRunMiddleware) -> bool:
    return bool(middleware.queue.outbox or middleware.queue.awaiting_effects)


async def report(url: str) -> dict[str, Any]:
    async with redis.asyncio.Redis.from_url(url) as client:
        connection: Any = client
        (content,) = (await connection.hgetall(reports_key("shop"))).values()
    report: dict[str, Any] = orjson.loads(content)
    return report
