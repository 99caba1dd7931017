"""Mistakes in the use of the middleware: each request gets what it would get without the middleware."""

from __future__ import annotations

import asyncio
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from abreast.middleware import ParallelRunMiddleware
from abreast.recorder import Receive, Scope, Send
from support_middleware import marks, pair_id, serving

NOT_ASGI = "the app is not an ASGI app: it can't be called with scope, receive and send"
StartResponse = Callable[[str, list[tuple[str, str]]], object]


def wsgi_function(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("content-type", "text/plain")])
    return [b"hello ", environ["PATH_INFO"].encode()]


class WsgiObject:
    """A WSGI app like the ones of Flask and Django."""

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return wsgi_function(environ, start_response)

    def wsgi_app(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return wsgi_function(environ, start_response)


class Asgi2App:
    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


class Asgi3Class:
    """An app whose instance is the awaitable, like a Starlette endpoint."""

    def __init__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self.scope = scope
        self.send = send

    def __await__(self) -> Iterator[Any]:
        return self.respond().__await__()

    async def respond(self) -> None:
        if self.scope["type"] == "http":
            await self.send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await self.send({"type": "http.response.body", "body": b"hello"})


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR and record.name == "abreast"
    ]


async def ask(app: Any, **options: Any) -> list[tuple[int, str, bool]]:
    """Send requests, one of them with Envoy's headers, to uvicorn."""
    async with serving(app, **options) as (url, _), httpx.AsyncClient(base_url=url) as client:
        responses = [await client.get("/x", headers=headers) for headers in ({}, marks(pair_id(), role="shadow"))]
    return [(response.status_code, response.text, "x-abreast-pair" in response.headers) for response in responses]


@pytest.mark.parametrize(
    "app", [wsgi_function, WsgiObject(), WsgiObject().wsgi_app], ids=["function", "object", "method"]
)
@pytest.mark.parametrize("interface", ["auto", "wsgi", "asgi3", "asgi2"])
@pytest.mark.filterwarnings("ignore:Uvicorn's native WSGI:DeprecationWarning")
async def test_uvicorn_serves_wsgi_app_as_without_the_middleware(
    app: Any, interface: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await ask(app, interface=interface)
    responses = await ask(ParallelRunMiddleware(app, service="shop"), interface=interface)

    assert responses == expected
    assert [response[0] for response in responses] == [200 if interface == "wsgi" else 500] * 2
    assert errors(caplog) == [f"the middleware is off, requests pass untouched: {NOT_ASGI}"]


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def wsgi_server(app: Any) -> Iterator[str]:
    with make_server("127.0.0.1", 0, app, handler_class=QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_wsgi_server_serves_the_wrapped_app(caplog: pytest.LogCaptureFixture) -> None:
    app = ParallelRunMiddleware(WsgiObject(), service="shop")  # type: ignore[arg-type]  # the mistake
    with wsgi_server(app) as url:
        bodies = [urllib.request.urlopen(f"{url}/{number}").read() for number in range(3)]  # noqa: S310  # loopback

    assert bodies == [b"hello /0", b"hello /1", b"hello /2"]
    assert len(errors(caplog)) == 1


async def test_asgi2_app_is_served(caplog: pytest.LogCaptureFixture) -> None:
    app: Any = ParallelRunMiddleware(Asgi2App, service="shop")  # type: ignore[arg-type]  # the mistake
    responses = await ask(app, interface="asgi2", lifespan="off")

    assert responses == [(200, "hello", False)] * 2
    assert len(errors(caplog)) == 1
    await app.aclose()


@pytest.mark.parametrize("kind", ["class", "function", "any arguments"])
async def test_every_kind_of_asgi_app_is_captured(kind: str, redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def function(scope: Scope, receive: Receive, send: Send) -> Any:
        return Asgi3Class(scope, receive, send)

    def any_arguments(*arguments: Any) -> Any:
        return Asgi3Class(*arguments)

    apps: dict[str, Any] = {"class": Asgi3Class, "function": function, "any arguments": any_arguments}
    app = ParallelRunMiddleware(apps[kind], service="shop", redis_url=redis_url)
    responses = await ask(app, lifespan="off")
    await app.aclose()

    assert responses == [(200, "hello", False), (200, "hello", True)]
    assert not errors(caplog)


async def homepage(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("fine")


@pytest.mark.parametrize(
    ("arguments", "settings", "problem"),
    [
        (("shop",), {}, "settings are keyword arguments such as service='shop', got a positional argument"),
        ((), {"service": "shop", "redis_url": None}, "redis_url must be a URL"),
        ((), {"service": "shop", "body_limit": object()}, "body_limit must be a whole number of bytes"),
        ((), {"service": "shop", "edge_key": object()}, "edge_key must be one key"),
        ((), {"service": "shop", "edge_key": "short"}, "edge_key must be 16 to 200 letters"),
        ((), {"service": "shop", "edge_key": ["a" * 16, 7]}, "edge_key must be 16 to 200 letters"),
        ((), {"service": "shop", "edge_key": ()}, "edge_key must be one key"),
    ],
)
async def test_wrong_arguments_change_no_request(
    arguments: tuple[Any, ...], settings: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Starlette(routes=[Route("/x", homepage)])
    app.add_middleware(ParallelRunMiddleware, *arguments, **settings)
    async with serving(app) as (url, _), httpx.AsyncClient(base_url=url) as client:
        responses = await asyncio.gather(*[client.get("/x") for _ in range(3)])

    assert [(response.status_code, response.text) for response in responses] == [(200, "fine")] * 3
    [message] = errors(caplog)
    assert problem in message
