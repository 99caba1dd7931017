"""Flask, Django and plain WSGI apps on gunicorn, with the middleware and without it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from asgiref.wsgi import WsgiToAsgi

from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.capture import Capture
from abreast.wsgi import Environ, StartResponse
from support import eventually, eventually_async, find_free_port
from support_middleware import captures, marks, pair_id, serving

PLAIN = [("GET", "/write"), ("GET", "/length"), ("GET", "/none"), ("GET", "/raise"), ("GET", "/raise-late")]
PAGES = [
    ("GET", "/products/17?a=%20b"),
    ("HEAD", "/products/17"),
    ("POST", "/echo"),
    ("GET", "/stream"),
    ("GET", "/file"),
    ("GET", "/empty"),
    ("GET", "/fail"),
    ("GET", "/none"),
]
TAGS = (b"x-abreast-pair", b"x-abreast-version", b"date")


@contextmanager
def gunicorn(app: str, redis_url: str, *options: str, **settings: str) -> Iterator[int]:
    """Serve an app of tests/wsgi_service.py, and yield the port. The end of the block ends the server gracefully."""
    port = find_free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", f"wsgi_service:{app}", "-b", f"127.0.0.1:{port}", *options],
        env=os.environ | {"ABREAST_SERVICE": "shop", "ABREAST_REDIS_URL": redis_url, **settings},
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
    )

    def is_up() -> bool:
        assert server.poll() is None, "gunicorn ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(is_up, description="gunicorn listens")
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def ask(port: int, method: str, target: str, headers: dict[str, str]) -> bytes:
    """Return the bytes that the server sends until it closes the connection, without the date and the tags."""
    body = b"one=1&two=2" if method == "POST" else b""
    fields = {"Host": "shop", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    start, separator, rest = answer.partition(b"\r\n\r\n")
    lines = [line for line in start.split(b"\r\n") if not line.lower().startswith(TAGS)]
    return b"\r\n".join(lines) + separator + rest


@pytest.mark.parametrize("kind", [("gthread", "--threads=4"), ("sync",)], ids=lambda kind: kind[0])
@pytest.mark.parametrize("app", ["flask", "django", "plain"])
async def test_gunicorn_sends_the_same_bytes_and_every_request_is_captured(
    app: str, kind: tuple[str, ...], redis_url: str
) -> None:
    name = "django_app" if app == "django" else app
    pages = PLAIN if app == "plain" else PAGES
    with gunicorn(name, redis_url, "-k", *kind) as port:
        expected = [await asyncio.to_thread(ask, port, *page, {}) for page in pages]
    pairs = [pair_id() for _ in pages]
    with gunicorn(f"{app}_recorded", redis_url, "-k", *kind) as port:
        unmarked = [await asyncio.to_thread(ask, port, *page, {}) for page in pages]
        marked = [
            await asyncio.to_thread(ask, port, *page, marks(pair)) for pair, page in zip(pairs, pages, strict=True)
        ]

    assert unmarked == expected
    assert marked == expected
    found = {capture.pair: capture for capture in await captures(redis_url)}
    assert sorted(found) == sorted(pairs)
    for pair, (method, target), answer in zip(pairs, pages, expected, strict=True):
        check_capture(found[pair], method, target, answer)


def check_capture(capture: Capture, method: str, target: str, answer: bytes) -> None:
    """Compare a capture with the bytes that a client received."""
    path, _, query = target.partition("?")
    assert (capture.request.method, capture.request.path, capture.request.query) == (method, path, query)
    if target == "/raise":  # gunicorn makes the answer
        assert (capture.answer.status, capture.exception, capture.complete) == (0, "ZeroDivisionError", False)
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert capture.answer.status == int(head.split()[1])
    if target == "/raise-late":
        assert (capture.exception, capture.complete) == ("ZeroDivisionError", False)
        assert capture.answer.body.content == b"begun"
        return
    assert (capture.exception, capture.complete, capture.client_left) == ("", True, False)
    if b"chunked" not in head:
        assert capture.answer.body.content == body
    elif target == "/stream":
        assert capture.answer.body.content == b"0\n1\n2\n"
    if method == "POST":
        assert capture.request.body.content == b"one=1&two=2"
    routes = {"/products/17": "/products/{number}", "/none": ""}
    if b"text/plain" not in head or target == "/stream":
        assert capture.request.route == routes.get(path, path) or target in {"/write", "/length"}


def open_endless(port: int, pair: str) -> socket.socket:
    """Return a connection that received the beginning of a response without an end."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = "".join(f"{name}: {value}\r\n" for name, value in marks(pair).items())
    connection.sendall(f"GET /endless HTTP/1.1\r\nHost: shop\r\n{head}\r\n".encode())
    assert connection.recv(10)
    return connection


async def test_client_that_leaves_is_captured(redis_url: str) -> None:
    pair = pair_id()
    with gunicorn("plain_recorded", redis_url, "-k", "gthread") as port:
        open_endless(port, pair).close()
        (capture,) = await wait_for_captures(redis_url)

    assert (capture.pair, capture.client_left, capture.complete) == (pair, True, False)
    assert capture.answer.body.content.startswith(b"0\n")


async def test_long_response_is_captured_before_its_pair_times_out(redis_url: str) -> None:
    server = gunicorn("plain_recorded", redis_url, "-k", "gthread", ABREAST_PAIR_TIMEOUT="2")
    with server as port, open_endless(port, pair_id()):
        (capture,) = await wait_for_captures(redis_url)

    assert capture.truncated_by_deadline
    assert (capture.client_left, capture.complete) == (False, False)
    assert capture.answer.body.content.startswith(b"0\n1\n")


async def wait_for_captures(redis_url: str) -> list[Capture]:
    async def is_captured() -> bool:
        return bool(await captures(redis_url))

    await eventually_async(is_captured, description="the capture arrives")
    return await captures(redis_url)


@pytest.mark.parametrize("options", [(), ("--preload", "--workers=2")], ids=["lazy", "preload"])
async def test_shadow_holds_effects_back_also_in_threads(options: tuple[str, ...], redis_url: str) -> None:
    with gunicorn("flask_recorded", redis_url, "-k", "gthread", "--threads=4", *options) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            answers = [
                (await client.post("/mail", headers=marks(pair_id(), role="shadow", version="new"))).json()
                for _ in range(4)
            ]
            live = [(await client.post("/mail", headers=marks(pair_id()))).json() for _ in range(2)]

    assert answers == [{"sent": []}] * 4
    assert all(set(answer["sent"]) == {"hello"} for answer in live)
    found = await captures(redis_url)
    assert len(found) == 6
    assert [[effect["kind"] for effect in capture.effects] for capture in found] == [["mail.send"]] * 6


async def test_threads_share_a_queue_without_losing_a_capture(redis_url: str) -> None:
    pairs = [pair_id() for _ in range(300)]
    with gunicorn("flask_recorded", redis_url, "-k", "gthread", "--threads=8") as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            slots = asyncio.Semaphore(16)

            async def get(pair: str, number: int) -> None:
                async with slots:
                    await client.get(f"/products/{number}", headers=marks(pair))

            await asyncio.gather(*[get(pair, number) for number, pair in enumerate(pairs)])
    found = {capture.pair: capture for capture in await captures(redis_url)}

    assert sorted(found) == sorted(pairs)
    for number, pair in enumerate(pairs):
        assert found[pair].request.path == f"/products/{number}"
        assert [effect["payload"] for effect in found[pair].effects] == [{"number": number}]


async def test_captures_through_wsgi_and_asgi_are_equal(redis_url: str) -> None:
    from wsgi_service import flask

    def close_response(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:  # asgiref does not
        with closing(flask(environ, start_response)) as response:  # type: ignore[type-var]  # has close()
            yield from response

    pages = [(*page, pair_id()) for page in PAGES]
    key = "k" * 32
    with gunicorn("flask_recorded", redis_url, "-k", "gthread", ABREAST_REDACT_KEY=key) as port:
        await send_pages(f"http://127.0.0.1:{port}", pages, "old")
    asgi_app = WsgiToAsgi(close_response)  # type: ignore[no-untyped-call]
    middleware = ParallelRunMiddleware(asgi_app, service="shop", redis_url=redis_url, redact_key=key)
    async with serving(middleware, lifespan="off") as (url, _):
        await send_pages(url, pages, "new")
    await middleware.aclose()
    found = {(capture.version, capture.pair): normalise(capture) for capture in await captures(redis_url)}

    assert len(found) == 2 * len(pages)
    for _, target, pair in pages:
        assert found["old", pair] == found["new", pair], target


async def send_pages(url: str, pages: list[tuple[str, str, str]], version: str) -> None:
    # uvicorn starts the second request of a connection in the context of the first, where asgiref's executor has ended.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        for method, target, pair in pages:
            content = b"one" if method == "POST" else None
            await client.request(method, target, headers=marks(pair, version=version), content=content)


def normalise(capture: Capture) -> Capture:
    """Remove times, also Flask's date, the port, and the route, which only the middleware for WSGI gets from Flask.

    The previous request may still be in flight, because an ASGI app returns after the client has its response.
    """
    request = msgspec.structs.replace(
        capture.request, route="", headers=tuple(sorted(row for row in capture.request.headers if row[0] != "host"))
    )
    answer = msgspec.structs.replace(
        capture.answer, headers=tuple(row for row in capture.answer.headers if row[0] != "date")
    )
    return msgspec.structs.replace(
        capture,
        version="old",
        request=request,
        answer=answer,
        started_at=0,
        first_byte_us=None,
        total_us=0,
        in_flight=0,
        effects=tuple({**effect, "at_us": 0} for effect in capture.effects),
    )
