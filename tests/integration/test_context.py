"""The context is known in all code of a request, and in no other code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import abreast
from abreast import ParallelRunMiddleware
from abreast.context import CURRENT_CONTEXT, NO_REQUEST
from abreast.protocol.capture import Role
from support import eventually_async
from support_middleware import call, http_scope, marks, pair_id, raw, sampled, serving

NOBODY = "redis://127.0.0.1:1/0"
Settings = dict[str, Any]


def wrapped(app: ASGIApp, **settings: Any) -> ParallelRunMiddleware:
    return ParallelRunMiddleware(app, **{"service": "shop", "redis_url": NOBODY, **settings})


async def contexts_during_and_after(app: ASGIApp, scope: Any) -> tuple[abreast.RequestContext, abreast.RequestContext]:
    """Return the context in the app, and the context of the caller after the request."""
    contexts: list[abreast.RequestContext] = []

    async def looking(scope: Scope, receive: Receive, send: Send) -> None:
        contexts.append(abreast.current())
        await app(scope, receive, send)

    middleware = wrapped(looking)
    await call(middleware, scope)
    await middleware.aclose()
    return contexts[0], abreast.current()


async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(("role", "shadow"), [("live", False), ("shadow", True), ("baseline", True)])
async def test_context_has_version_role_pair_and_release(role: Role, shadow: bool) -> None:
    contexts: list[abreast.RequestContext] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        contexts.append(abreast.current())
        assert abreast.is_shadow() is shadow
        await answer(scope, receive, send)

    middleware = wrapped(app, release="r7")
    await call(middleware, http_scope(headers=marks("pair-1", version="new", role=role)))
    await middleware.aclose()

    (context,) = contexts
    assert (context.version, context.role, context.pair, context.release) == ("new", role, "pair-1", "r7")
    assert (context.is_shadow, context.is_captured) == (shadow, True)


async def test_context_outside_of_a_sampled_request_is_live() -> None:
    inside, after = await contexts_during_and_after(answer, http_scope())

    assert (inside, after, abreast.is_shadow()) == (NO_REQUEST, NO_REQUEST, False)


async def test_context_after_a_shadow_request_in_the_same_task_is_live() -> None:
    inside, after = await contexts_during_and_after(answer, sampled(role="shadow"))

    assert (inside.is_shadow, after) == (True, NO_REQUEST)


@pytest.mark.parametrize(
    "settings",
    [
        {"enabled": False},
        {"body_limit": "nonsense"},  # an invalid setting disables the middleware
        {"service": ""},
        {"queue_count": 1},  # full after one capture
    ],
)
async def test_shadow_without_capture_is_a_shadow(settings: Settings) -> None:
    roles: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        roles.append(abreast.current().role)
        abreast.record("mail", {})
        await answer(scope, receive, send)

    middleware = wrapped(app, **settings)
    for role in ("shadow", "baseline", "live", "shadow"):
        await call(middleware, sampled(role=role))
    await middleware.aclose()

    assert roles == ["shadow", "baseline", "live", "shadow"]


@pytest.mark.parametrize(
    ("wrong", "shadow"),
    [
        ({"x-abreast-role": "shadow", "x-abreast-copies": "9"}, True),
        ({"x-abreast-role": "shadow", "x-abreast-version": "newer"}, True),
        ({"x-abreast-role": "something later"}, True),
        ({"x-abreast-role": "shadow", "x-abreast-pair": "no, pair"}, True),
        ({"x-abreast-role": "live", "x-abreast-copies": "9"}, False),
    ],
)
async def test_invalid_headers_make_the_request_a_shadow(wrong: dict[str, str], shadow: bool) -> None:
    inside, _ = await contexts_during_and_after(answer, http_scope(headers={**marks(pair_id()), **wrong}))

    assert (inside.is_shadow, inside.is_captured) == (shadow, False)


async def test_websocket_has_a_role() -> None:
    scope = {**sampled(role="shadow"), "type": "websocket"}

    inside, _ = await contexts_during_and_after(answer, scope)

    assert inside.is_shadow


def endpoints() -> FastAPI:
    app = FastAPI()
    sub = FastAPI()

    @app.get("/sync")
    def sync() -> bool:
        return abreast.is_shadow()

    @app.get("/pool")
    async def pool() -> bool:
        return await run_in_threadpool(abreast.is_shadow)

    @app.get("/task")
    async def task() -> bool:
        async def inner() -> bool:
            await asyncio.sleep(0)
            return abreast.is_shadow()

        return await asyncio.create_task(inner())

    @app.get("/to_thread")
    async def to_thread() -> bool:
        return await asyncio.to_thread(abreast.is_shadow)

    @sub.get("/below")
    async def below() -> bool:
        return abreast.is_shadow()

    app.mount("/sub", sub)
    failing(app)
    return app


class BrokenError(Exception):
    pass


def failing(app: FastAPI) -> None:
    @app.get("/handled")
    async def handled() -> None:
        raise BrokenError

    @app.get("/crash")
    async def crash() -> None:
        raise ValueError

    @app.exception_handler(BrokenError)
    async def on_broken(_request: Request, _error: Exception) -> Response:
        return JSONResponse(abreast.is_shadow())

    @app.exception_handler(Exception)  # runs outside of the added middleware
    async def on_crash(_request: Request, _error: Exception) -> Response:
        return JSONResponse(abreast.is_shadow(), 500)


async def passing_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    return await call_next(request)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("path", ["/sync", "/pool", "/task", "/to_thread", "/handled", "/crash", "/sub/below"])
async def test_context_reaches_tasks_threads_handlers_and_mounts(path: str, between: bool) -> None:
    app = endpoints()
    if between:
        app.add_middleware(BaseHTTPMiddleware, dispatch=passing_on)
    app.add_middleware(ParallelRunMiddleware, service="shop", redis_url=NOBODY)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        for role, is_shadow in (("shadow", True), ("live", False), ("baseline", True)):
            task = asyncio.create_task(client.get(path, headers=marks(pair_id(), role=role)))

            assert (await task).json() is is_shadow


async def test_background_task_of_a_shadow_stays_a_shadow_after_the_request() -> None:
    roles: dict[str, bool] = {}
    done = asyncio.Event()

    async def later() -> None:
        await done.wait()
        roles["task"] = abreast.is_shadow()

    def in_thread() -> None:
        roles["thread"] = abreast.is_shadow()

    async def in_loop() -> None:
        roles["background"] = abreast.is_shadow()

    tasks = []

    async def home(_request: Request) -> Response:
        tasks.append(asyncio.create_task(later()))
        return PlainTextResponse("", background=BackgroundTasks([BackgroundTask(in_loop), BackgroundTask(in_thread)]))

    middleware = wrapped(Starlette(routes=[Route("/", home)]))
    await call(middleware, sampled(role="shadow"))
    done.set()
    await tasks[0]
    await middleware.aclose()

    assert roles == {"background": True, "thread": True, "task": True}


async def test_call_within_the_process_keeps_the_context_of_its_caller() -> None:
    """A call through httpx.ASGITransport has no headers of Envoy, and is no request of a user."""
    inner: list[bool] = []

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        inner.append(abreast.is_shadow())
        await answer(scope, receive, send)

    behind = wrapped(other)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await call(behind, http_scope())
        await answer(scope, receive, send)

    middleware = wrapped(app)
    await call(middleware, sampled(role="shadow"))
    await middleware.aclose()

    assert inner == [True]


async def test_inner_middleware_keeps_the_context() -> None:
    contexts: list[abreast.RequestContext] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        contexts.append(abreast.current())
        await answer(scope, receive, send)

    inner = wrapped(app, service="other")

    async def afresh(scope: Scope, receive: Receive, send: Send) -> None:
        before = abreast.current()
        await inner(scope, receive, send)
        assert abreast.current() is before
        CURRENT_CONTEXT.set(NO_REQUEST)  # as in a separate context
        await inner(scope, receive, send)

    outer = wrapped(afresh)
    await call(outer, sampled(role="shadow"))
    await outer.aclose()

    first, second = contexts
    assert first is second
    assert first.is_captured


class Recording:
    """Read the body, because uvicorn then resumes reading, and answer with the role."""

    def __init__(self) -> None:
        self.roles: list[str] = []
        self.lifespan: list[bool] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                self.lifespan.append(abreast.is_shadow())
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        while (await receive()).get("more_body"):
            pass
        self.roles.append(abreast.current().role)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        for _ in range(10):  # a background task during the next request
            await asyncio.sleep(0)


def request(headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [b"POST / HTTP/1.1", b"host: shop", b"content-length: %d" % len(body)]
    lines += [name + b": " + value for name, value in raw(headers)]
    return b"\r\n".join([*lines, b"", b""]) + body


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("settings", [{}, {"enabled": False}], ids=["on", "off"])
@pytest.mark.parametrize("pipelined", [True, False])
async def test_request_does_not_inherit_the_context_of_its_connection(
    http: str, settings: Settings, pipelined: bool
) -> None:
    """Uvicorn starts a pipelined request in the context of the previous one, and resumes reading in it."""
    app = Recording()
    large = b"x" * 1_000_000  # more than uvicorn buffers before it pauses
    shadow = request(marks(pair_id(), role="shadow"), large)
    async with serving(wrapped(app, **settings), http=http) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        for number in range(2):
            writer.write(shadow + request({}) if pipelined else shadow)
            if not pipelined:
                await eventually_async(_count(app, 2 * number + 1), description="the shadow is answered")
                writer.write(request({}))
            await eventually_async(_count(app, 2 * number + 2), description="both are answered")
        writer.close()
        assert await reader.read(15) == b"HTTP/1.1 200 OK"

    assert app.roles == ["shadow", "live"] * 2
    assert app.lifespan == [False, False]


def _count(app: Recording, count: int) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return len(app.roles) == count

    return reached


async def test_mounted_app_has_the_same_answer() -> None:
    async def home(_request: Request) -> Response:
        return JSONResponse(abreast.is_shadow())

    app = Starlette(routes=[Mount("/shop", Starlette(routes=[Route("/home", home)]))])
    messages, _ = await call(wrapped(app), sampled("/shop/home", role="shadow"))

    assert messages[1]["body"] == b"true"
