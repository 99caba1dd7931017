"""The middleware changes no message of the app, except that it adds tags."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.websockets import WebSocket

from abreast.middleware import App, ParallelRunMiddleware
from abreast.recorder import Message, Receive, Scope, Send
from support_middleware import call, captures, http_scope, marks, pair_id, untagged

Endpoint = Callable[[Request], Any]
Make = Callable[[list[Middleware]], App]
FILE = Path(__file__)
TAGS = {b"x-abreast-pair", b"x-abreast-version", b"x-abreast-release"}
ran: list[str] = []


class Events(Response):
    """Send server-sent events without a library."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"x-twice", b"1"), (b"x-twice", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
        await send({"type": "http.response.body"})


async def numbers() -> AsyncIterator[str]:
    for number in range(5):
        yield f"{number}\n"
        await asyncio.sleep(0)


def sync_numbers() -> Iterator[bytes]:
    yield from (b"%d\n" % number for number in range(5))


async def background() -> None:
    ran.append("background")


async def echo(request: Request) -> Response:
    chunks = [chunk async for chunk in request.stream()]
    return PlainTextResponse(b"|".join(chunks))


async def broken(_request: Request) -> Response:
    raise ValueError("broken")


async def refused(_request: Request) -> Response:
    raise HTTPException(409, "refused")


async def half(_request: Request) -> Response:
    async def content() -> AsyncIterator[str]:
        yield "half"
        raise ValueError("in the middle")

    return StreamingResponse(content())


async def until_left(request: Request) -> Response:
    async def content() -> AsyncIterator[str]:
        while not await request.is_disconnected():
            yield "more"

    return StreamingResponse(content())


def answer(make: Callable[[], Response]) -> Endpoint:
    async def endpoint(_request: Request) -> Response:
        return make()

    return endpoint


ENDPOINTS: dict[str, Endpoint] = {
    "plain": answer(lambda: Response(b"bytes", headers={"x-own": "1"})),
    "memoryview": answer(lambda: Response(memoryview(b"bytes"))),
    "json": answer(lambda: JSONResponse({"a": [1, "ü"]})),
    "html": answer(lambda: HTMLResponse("<p>")),
    "redirect": answer(lambda: RedirectResponse("/elsewhere")),
    "empty": answer(lambda: Response(status_code=204)),
    "not-modified": answer(lambda: Response(status_code=304, headers={"etag": '"1"'})),
    "stream": answer(lambda: StreamingResponse(numbers())),
    "sync-stream": answer(lambda: StreamingResponse(sync_numbers())),
    "file": answer(lambda: FileResponse(FILE)),
    "events": answer(Events),
    "background": answer(lambda: PlainTextResponse("done", background=BackgroundTask(background))),
    "large": answer(lambda: Response(b"x" * 3_000_000)),
    "echo": echo,
    "broken": broken,
    "refused": refused,
    "half": half,
    "until-left": until_left,
}


def starlette(middleware: list[Middleware]) -> App:
    routes = [Route(f"/{name}", endpoint, methods=["GET", "POST"]) for name, endpoint in ENDPOINTS.items()]

    async def handler(_request: Request, error: Exception) -> Response:
        return JSONResponse({"handled": str(error)}, status_code=418)

    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: handler})


def fastapi(middleware: list[Middleware]) -> App:
    app = FastAPI(middleware=middleware)
    for name, endpoint in ENDPOINTS.items():
        app.add_route(f"/{name}", endpoint, methods=["GET", "POST", "HEAD"])

    async def dependency() -> AsyncIterator[str]:
        yield "dependency"
        ran.append("torn down")

    @app.get("/model/{number}")
    async def model(number: int, value: Annotated[str, Depends(dependency)]) -> dict[str, Any]:
        return {"number": number, "given": value}

    @app.post("/body")
    async def body(payload: dict[str, int]) -> dict[str, int]:
        return payload

    return app


async def call_both(
    make: Make, redis_url: str, scope: dict[str, Any], **how: Any
) -> tuple[list[Message], list[Message]]:
    """Return the messages without the middleware, and with it for a sampled request. Exceptions must be equal."""
    own = {name.decode(): value.decode() for name, value in scope.get("headers", ())}
    with_pair = {**scope, "headers": [*scope["headers"], *_marks()]}
    middleware = Middleware(ParallelRunMiddleware, service="shop", redis_url=redis_url, release="r1")
    bare, error = await call(make([]), dict(scope), **how)
    unsampled, raised_unsampled = await call(make([middleware]), dict(scope), **how)
    sampled, raised_sampled = await call(make([middleware]), with_pair, **how)

    assert unsampled == bare, own
    assert repr(raised_unsampled) == repr(error)
    assert repr(raised_sampled) == repr(error)
    return bare, sampled


def _marks() -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in marks(pair_id()).items()]


CASES = [
    *((f"/{name}", "GET", {}) for name in ENDPOINTS),
    *((f"/{name}", "HEAD", {}) for name in ("plain", "json", "stream", "file")),
    ("/file", "GET", {"range": "bytes=2-5"}),
    ("/file", "GET", {"range": "bytes=2-5,8-9,20-"}),
    ("/file", "GET", {"range": "bytes=900000-"}),
    ("/echo", "POST", {}),
    ("/nowhere", "GET", {}),
    ("/plain", "DELETE", {}),
]


@pytest.mark.parametrize("make", [starlette, fastapi])
@pytest.mark.parametrize(("path", "method", "headers"), CASES)
async def test_app_messages_are_unchanged(
    make: Make, path: str, method: str, headers: dict[str, str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette.responses.token_hex", lambda size: "b" * 2 * size)
    chunk_limit = 4 if path == "/until-left" else None
    scope = http_scope(path, method, headers)
    if path == "/file" and not headers:  # only some servers offer to send files
        bare, sampled = await call_both(make, redis_url, {**scope, "extensions": {}})
        assert untagged(sampled) == bare
    bare, sampled = await call_both(make, redis_url, dict(scope), body=(b"one", b"two"), left_after=chunk_limit)

    if chunk_limit is None:
        assert untagged(sampled) == bare
    else:
        assert untagged(sampled)[:3] == bare[:3]


@pytest.mark.parametrize("path", ["/model/7", "/model/x"])
async def test_fastapi_dependencies_and_validation_are_unchanged(path: str, redis_url: str) -> None:
    bare, sampled = await call_both(fastapi, redis_url, dict(http_scope(path)))

    assert untagged(sampled) == bare


async def test_body_reaches_fastapi_complete(redis_url: str) -> None:
    scope = dict(http_scope("/body", "POST", {"content-type": "application/json"}))
    bare, sampled = await call_both(fastapi, redis_url, scope, body=(b'{"a"', b":1}"))

    assert untagged(sampled) == bare
    assert bare[1]["body"] == b'{"a":1}'


async def test_answer_to_a_sampled_request_is_tagged(redis_url: str) -> None:
    _, sampled = await call_both(starlette, redis_url, dict(http_scope("/plain")))

    tags = {name: value for name, value in sampled[0]["headers"] if name in TAGS}
    assert set(tags) == TAGS
    assert (tags[b"x-abreast-version"], tags[b"x-abreast-release"]) == (b"old", b"r1")


async def passing(_request: Request, call_next: Any) -> Response:
    response: Response = await call_next(_request)
    response.headers["x-passed"] = "1"
    return response


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("other", [Middleware(BaseHTTPMiddleware, dispatch=passing), Middleware(GZipMiddleware)])
@pytest.mark.parametrize("path", ["/plain", "/large", "/stream", "/events", "/broken", "/refused", "/echo"])
async def test_outer_and_inner_middleware_are_unaffected(
    path: str, other: Middleware, outside: bool, redis_url: str
) -> None:
    def make(middleware: list[Middleware]) -> App:
        return starlette([other, *middleware] if outside else [*middleware, other])

    scope = dict(http_scope(path, "POST" if path == "/echo" else "GET", {"accept-encoding": "gzip"}))
    bare, sampled = await call_both(make, redis_url, scope, body=(b"one", b"two"))

    assert untagged(sampled) == bare


async def trailing(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.early_hint", "links": [b"</a>; rel=preload"]})
    await send({"type": "http.response.start", "status": 200, "headers": ((b"trailer", b"x"),), "trailers": True})
    await send({"type": "http.response.body", "body": b"body"})
    await send({"type": "http.response.trailers", "headers": [(b"x-one", b"1")], "more_trailers": True})
    await send({"type": "http.response.trailers", "headers": [(b"x-two", b"2")], "more_trailers": False})


async def by_path(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": iter([(b"a", b"b")])})
    await send({"type": "http.response.pathsend", "path": str(FILE)})


async def by_descriptor(_scope: Scope, _receive: Receive, send: Send) -> None:
    file = os.open(FILE, os.O_RDONLY)
    os.lseek(file, 10, os.SEEK_SET)
    try:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.zerocopysend", "file": file, "more_body": True})
        await send({"type": "http.response.zerocopysend", "file": file, "offset": 2, "count": 5, "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

        assert os.lseek(file, 0, os.SEEK_CUR) == 10
    finally:
        os.close(file)


@pytest.mark.parametrize("app", [trailing, by_path, by_descriptor])
async def test_extensions_are_unchanged(app: App, redis_url: str) -> None:
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    bare, error = await call(app, http_scope())
    sampled, raised_sampled = await call(middleware, http_scope(headers=marks(pair_id())))
    await middleware.aclose()

    assert (error, raised_sampled) == (None, None)
    assert [_comparable(message) for message in untagged(sampled)] == [_comparable(message) for message in bare]


def _comparable(message: Message) -> Message:
    same = {name: value for name, value in message.items() if name != "file"}  # a number
    return {**same, "headers": list(message["headers"])} if message.get("headers") else {**same, "headers": []}


async def test_header_list_of_the_app_is_not_modified(redis_url: str) -> None:
    headers = [(b"a", b"b")]

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    await call(middleware, http_scope(headers=marks(pair_id())))
    await middleware.aclose()

    assert headers == [(b"a", b"b")]


async def test_websockets_are_unchanged(redis_url: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        await socket.send_text(await socket.receive_text())

    async def talk(target: App) -> list[Message]:
        messages: list[Message] = []
        incoming: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}]

        async def receive() -> Message:
            return incoming.pop(0)

        async def send(message: Message) -> None:
            messages.append(message)

        await target({**http_scope(headers=marks(pair_id())), "type": "websocket"}, receive, send)
        return messages

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)

    assert await talk(middleware) == await talk(app)
    assert middleware.queue.captured_count == 0


async def test_scope_headers_may_be_any_iterable(redis_url: str) -> None:
    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(scope["headers"])})
        await send({"type": "http.response.body"})

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    scope = http_scope(headers=marks(pair_id()))
    messages, _ = await call(middleware, {**scope, "headers": (row for row in scope["headers"])})
    await middleware.aclose()

    assert messages[0]["headers"][0] == (b"host", b"shop.example")
    assert middleware.queue.shipped_count == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"x-abreast-pair": "not an id"},
        {"x-abreast-pair": "a" * 65},
        {"x-abreast-pair": ""},
        {"x-abreast-version": "newer"},
        {"x-abreast-role": "spectator"},
        {"x-abreast-copies": "4"},
        {"x-abreast-copies": ""},
    ],
)
async def test_request_with_invalid_headers_is_not_captured(wrong: dict[str, str], redis_url: str) -> None:
    app = starlette([])
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    messages, _ = await call(middleware, http_scope("/plain", headers={**marks(pair_id()), **wrong}))

    assert messages == (await call(app, http_scope("/plain")))[0]
    assert middleware.queue.captured_count == 0


async def test_disabled_middleware_captures_nothing(redis_url: str) -> None:
    app = starlette([])
    middleware = ParallelRunMiddleware(app, enabled=False, redis_url=redis_url)
    messages, _ = await call(middleware, http_scope("/plain", headers=marks(pair_id())))

    assert messages == (await call(app, http_scope("/plain")))[0]
    assert middleware.queue.captured_count == 0


async def test_nested_middleware_captures_once(redis_url: str) -> None:
    inner = ParallelRunMiddleware(starlette([]), service="shop", redis_url=redis_url)
    outer = ParallelRunMiddleware(inner, service="shop", redis_url=redis_url)
    messages, _ = await call(outer, http_scope("/plain", headers=marks(pair_id())))
    await outer.aclose()

    assert [name for name, _ in messages[0]["headers"]].count(b"x-abreast-pair") == 1
    assert len(await captures(redis_url)) == 1


async def test_answer_is_exported_before_the_background_task_ends(redis_url: str) -> None:
    shipped_before: list[int] = []

    async def task() -> None:
        shipped_before.append(middleware.queue.captured_count)

    async def endpoint(_request: Request) -> Response:
        return PlainTextResponse("done", background=BackgroundTask(task))

    middleware = ParallelRunMiddleware(Starlette(routes=[Route("/", endpoint)]), service="shop", redis_url=redis_url)
    await call(middleware, http_scope(headers=marks(pair_id())))
    await middleware.aclose()

    assert shipped_before == [1]
