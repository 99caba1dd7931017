"""The content of captures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from abreast.middleware import App, ParallelRunMiddleware
from abreast.protocol.capture import Version, digest
from abreast.recorder import Message, Receive, Scope, Send
from abreast_sidecar.compare.pair import compare_pair
from abreast_sidecar.compare.rules import CompareOptions
from support_middleware import call, captured, captures, http_scope, sampled

MEGABYTE = bytes(1024 * 1024)
TEXT = b"a line\n" * 150_000


def answering(*messages: Message) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def start(status: int = 200, *headers: tuple[bytes, bytes], **fields: object) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers), **fields}


def body(chunk: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


async def test_capture_has_the_request(redis_url: str) -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await request.body())

    app = Starlette(routes=[Mount("/v1", routes=[Route("/products/{id}", endpoint, methods=["POST"])])])
    scope = sampled(
        "/v1/products/a%20b?x=1&y=%20",
        "POST",
        headers={
            "accept": "text/plain",
            "x-other": "1",
            "authorization": "Bearer hunter2",
            "x-envoy-attempt-count": "2",
        },
    )
    scope["path"] = "/v1/products/a b"
    capture = await captured(app, redis_url, scope, body=(b"one", b"two"))

    request = capture.request
    assert (request.method, request.path, request.query) == ("POST", "/v1/products/a%20b", "x=1&y=%20")
    assert request.route == "/v1/products/{id}"
    assert [name for name, _ in request.headers] == ["host", "accept", "authorization"]
    assert request.headers[2][1].startswith("hmac:")
    assert (request.body.content, request.body.length) == (b"onetwo", 6)
    assert (capture.version, capture.role, capture.attempt, capture.expected_captures) == ("old", "live", 2, 2)
    assert (capture.service, capture.release) == ("shop", "r1")


async def test_capture_has_the_load_of_the_process(redis_url: str) -> None:
    """Requests without marks count too, and requests that have ended don't."""
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/waits":
            await release.wait()
        await answering(start(200), body(b""))(scope, receive, send)

    wrapped = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    waiting = [asyncio.create_task(call(wrapped, http_scope("/waits"))) for _ in range(3)]
    await asyncio.sleep(0)
    await call(wrapped, http_scope("/"))
    timed = sampled("/busy")
    timed["headers"][-1] = (b"x-abreast-copies", b"2 %d" % (time.time() * 1000 - 5000))
    await call(wrapped, timed)
    release.set()
    await asyncio.gather(*waiting)
    await call(wrapped, sampled("/idle"))
    await wrapped.aclose()
    first, second = sorted(await captures(redis_url), key=lambda capture: capture.request.path)

    assert (first.in_flight, second.in_flight, second.wait_us) == (3, 0, None)
    assert first.expected_captures == 2
    assert first.wait_us is not None
    assert 5_000_000 <= first.wait_us < 60_000_000


async def test_capture_has_the_answer_without_tags(redis_url: str) -> None:
    headers = ((b"X-Twice", b"1"), (b"x-twice", b"2"), (b"x-latin", "ü".encode("latin-1")))
    capture = await captured(answering(start(201, *headers), body(b"a", more=True), body(b"b")), redis_url, sampled())

    assert capture.answer.status == 201
    assert capture.answer.headers == (("x-twice", "1"), ("x-twice", "2"), ("x-latin", "ü"))
    assert (capture.answer.body.content, capture.answer.body.length) == (b"ab", 2)
    assert (capture.complete, capture.client_left, capture.exception) == (True, False, "")


async def test_times_exclude_background_tasks(redis_url: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        await send(start())
        await asyncio.sleep(0.02)
        await send(body())
        await asyncio.sleep(0.5)

    before = time.time()
    capture = await captured(app, redis_url, sampled())

    assert capture.first_byte_us is not None
    assert 20_000 <= capture.first_byte_us <= capture.total_us - 20_000
    assert capture.total_us < 450_000
    assert before - 0.01 <= capture.started_at <= before + 0.2


@pytest.mark.parametrize("limit", [0, 10, 100_000])
@pytest.mark.parametrize("chunk", [1, 1000, 50_000, 3_000_000])
async def test_long_answer_is_captured_as_beginning_and_digest(limit: int, chunk: int, redis_url: str) -> None:
    content = os.urandom(3_000_000 if chunk >= 1000 else 300)
    parts = [body(content[offset : offset + chunk], more=True) for offset in range(0, len(content), chunk)]
    middleware = ParallelRunMiddleware(
        answering(start(), *parts, body()),
        service="shop",
        redis_url=redis_url,
        body_limit=limit,
        redact_allow=["GET / body"],
    )
    await call(middleware, sampled(), body=[part["body"] for part in parts])
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    recorded = capture.answer.body
    assert (recorded.length, recorded.content) == (len(content), content[:limit])
    assert recorded.fingerprint() == digest(content)


async def test_long_request_body_is_captured_as_beginning_and_digest(redis_url: str) -> None:
    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send(start())
        await send(body())

    capture = await captured(app, redis_url, sampled(method="POST"), body=[TEXT] * 3)

    assert (capture.request.body.length, len(capture.request.body.content)) == (3 * len(TEXT), 256 * 1024)
    assert capture.request.body.digest.startswith("hmac:")


async def test_reused_buffer_is_copied(redis_url: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        buffer = bytearray(b"first")
        await send(start())
        await send({"type": "http.response.body", "body": memoryview(buffer), "more_body": True})
        buffer[:] = b"later"
        await send(body())

    assert (await captured(app, redis_url, sampled())).answer.body.content == b"first"


async def test_head_has_no_body(redis_url: str) -> None:
    capture = await captured(answering(start(), body(b"ignored")), redis_url, sampled(method="HEAD"))

    assert capture.answer.body.length == 0


async def test_capture_has_trailers(redis_url: str) -> None:
    first: Message = {"type": "http.response.trailers", "headers": [(b"a", b"1")], "more_trailers": True}
    second: Message = {"type": "http.response.trailers", "headers": [(b"b", b"2")]}
    capture = await captured(answering(start(trailers=True), body(b"x"), first, second), redis_url, sampled())

    assert capture.answer.trailers == (("a", "1"), ("b", "2"))
    assert capture.complete


async def test_file_is_captured_even_if_it_is_deleted_at_once(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        file.write_bytes(MEGABYTE + b"end")
        await send(start())
        await send({"type": "http.response.pathsend", "path": str(file)})
        file.unlink()

    recorded = (await captured(app, redis_url, sampled())).answer.body

    assert (recorded.length, recorded.content) == (len(MEGABYTE) + 3, b"")
    assert recorded.digest.startswith("hmac:")


async def test_parts_of_files_are_captured_in_order(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        with file.open("rb") as opened:
            os.lseek(opened.fileno(), 7, os.SEEK_SET)
            await send(start())
            await send(body(b"<", more=True))
            await send({"type": "http.response.zerocopysend", "file": opened.fileno(), "more_body": True})
            part = {"file": opened.fileno(), "offset": 1, "count": 3, "more_body": True}
            await send({"type": "http.response.zerocopysend", **part})
            await send(body(b">"))

    assert (await captured(app, redis_url, sampled())).answer.body.content == b"<789123>"


async def test_descriptors_are_closed(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    app = answering(start(), {"type": "http.response.pathsend", "path": str(file)})
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url, queue_count=5)
    for _ in range(200):
        await call(middleware, sampled())
    await middleware.aclose()

    assert file not in _open_files()
    assert middleware.queue.captured_count == 200


def _open_files() -> set[Path]:
    paths = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listing
            paths.add(link.readlink())
    return paths


async def test_unreadable_body_is_dropped_and_counted(redis_url: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        reading, writing = os.pipe()
        try:
            await send(start())
            await send({"type": "http.response.zerocopysend", "file": reading})
        finally:
            os.close(reading)
            os.close(writing)

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    messages, error = await call(middleware, sampled())
    await middleware.aclose()

    assert (len(messages), error) == (2, None)
    assert middleware.queue.drop_counts == {"capture_error": 1}


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_exception_of_the_app_is_captured_and_raised(after: int, redis_url: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in (start(), body(b"half", more=True))[:after]:
            await send(message)
        raise KeyError("unchanged")

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    _, error = await call(middleware, sampled())
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert repr(error) == "KeyError('unchanged')"
    assert (capture.exception, capture.complete) == ("KeyError", False)
    assert capture.answer.status == (200 if after else 0)
    assert (capture.first_byte_us is None) == (after == 0)


async def test_cancelled_request_is_captured(redis_url: str) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(start())
        waiting.set()
        await asyncio.sleep(60)

    waiting = asyncio.Event()
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    task = asyncio.create_task(call(middleware, sampled()))
    await waiting.wait()
    task.cancel()
    _, error = await task
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert isinstance(error, asyncio.CancelledError)
    assert (capture.exception, capture.complete) == ("CancelledError", False)


async def test_disconnect_of_the_client_is_captured(redis_url: str) -> None:
    async def endpoint(request: Request) -> Response:
        async def content() -> AsyncIterator[bytes]:
            while not await request.is_disconnected():
                yield b"more"

        return StreamingResponse(content())

    capture = await captured(Starlette(routes=[Route("/", endpoint)]), redis_url, sampled(), left_after=3)

    assert capture.client_left


async def test_endless_answer_is_captured_before_its_deadline_and_continues(redis_url: str) -> None:
    """The capture does not wait for later chunks, effects and exceptions."""
    chunks = [body(b"%d\n" % n, more=True) for n in range(30)]

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(start())
        for chunk in chunks:
            await asyncio.sleep(0.02)
            await send(chunk)
        await send(body(b""))
        raise KeyError("late")

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url, pair_timeout=0.25)
    messages, error = await call(middleware, sampled())
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert [message.get("body") for message in messages[1:]] == [message["body"] for message in chunks] + [b""]
    assert isinstance(error, KeyError)
    assert (capture.truncated_by_deadline, capture.complete, capture.client_left, capture.exception) == (
        True,
        False,
        False,
        "",
    )
    assert capture.answer.body.content.startswith(b"0\n1\n")
    assert capture.answer.body.is_complete
    assert 0.15e6 < capture.total_us < 0.6e6
    assert len(capture.answer.body.content) < len(b"".join(message["body"] for message in chunks))


async def test_answer_in_chunks_is_captured_once_and_complete(redis_url: str) -> None:
    app = answering(start(), body(b"a", more=True), body(b"b"))
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url, pair_timeout=0.05)
    await call(middleware, sampled())
    await asyncio.sleep(0.1)  # longer than the pair timeout
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert (capture.truncated_by_deadline, capture.complete, capture.answer.body.content) == (False, True, b"ab")


async def test_failed_send_is_a_disconnect(redis_url: str) -> None:
    async def send(_message: Message) -> None:
        raise BrokenPipeError

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    middleware = ParallelRunMiddleware(answering(start(), body()), service="shop", redis_url=redis_url)
    with pytest.raises(BrokenPipeError):
        await middleware(sampled(), receive, send)
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert (capture.client_left, capture.complete, capture.exception) == (True, False, "BrokenPipeError")


async def test_app_without_answer_is_captured(redis_url: str) -> None:
    capture = await captured(answering(), redis_url, sampled())

    assert (capture.answer.status, capture.complete, capture.exception) == (0, False, "")


async def test_exception_of_a_background_task_is_not_captured(redis_url: str) -> None:
    async def task() -> None:
        raise ValueError("late")

    async def endpoint(_request: Request) -> Response:
        return PlainTextResponse("done", background=BackgroundTask(task))

    capture = await captured(Starlette(routes=[Route("/", endpoint)]), redis_url, sampled())

    assert (capture.complete, capture.exception) == (True, "")


@pytest.mark.parametrize("keys", [("k" * 32, "k" * 32), ("k" * 32, "l" * 32)])
async def test_secrets_are_compared_if_versions_have_the_same_key(keys: tuple[str, str], redis_url: str) -> None:
    versions: tuple[Version, Version] = ("old", "new")
    for version, key in zip(versions, keys, strict=True):
        content = b'{"password": "hunter2 of %s"}' % version.encode()
        answer = answering(start(200, (b"content-length", b"%d" % len(content)), (b"x-key", b"hunter2")), body(content))
        middleware = ParallelRunMiddleware(
            answer, service="shop", redis_url=redis_url, redact_key=key, secret_headers=["x-key"]
        )
        scope = sampled(version=version, headers={"authorization": "Bearer hunter2"})
        await call(middleware, scope)
        await middleware.aclose()
    first, second = await captures(redis_url)
    result = compare_pair([first, second], CompareOptions())

    assert "hunter2" not in str((first, second))
    is_same_key = keys[0] == keys[1]
    assert (first.answer.headers == second.answer.headers) == is_same_key
    assert [difference.path for difference in result.differences] == (["$.password"] if is_same_key else [])
    assert result.outcome == ("mismatch" if is_same_key else "match")


async def test_no_key_is_in_redis(redis_url: str) -> None:
    await captured(answering(start(200), body(b"a")), redis_url, sampled())

    with redis.Redis.from_url(redis_url) as client:
        assert not [key for key in client.scan_iter() if b"secret" in key]


@pytest.mark.parametrize(
    ("headers", "reason"),
    [(None, "capture_error"), (7, "capture_error"), ([(b"a",)], "encode_error"), ([("text", "text")], "encode_error")],
)
async def test_internal_errors_are_counted_and_never_reach_the_app(
    headers: object, reason: str, redis_url: str
) -> None:
    """The server may refuse such headers. The app is responsible for them."""
    message: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    middleware = ParallelRunMiddleware(answering(message, body(b"x")), service="shop", redis_url=redis_url)
    messages, error = await call(middleware, sampled())
    await middleware.aclose()

    assert error is None
    assert len(messages) == 2
    assert middleware.queue.drop_counts == {reason: 1}
    assert middleware.report_error.counts.total() == 1
