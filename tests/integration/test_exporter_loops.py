"""Exporters of one app in several event loops and processes, and their shutdown."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
import redis
import redis.asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from abreast.export.transport import JoinResult, RedisTransport
from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.join import CaptureRow, reports_key
from abreast.recorder import Message, Receive, Scope, Send
from support import eventually_async, find_free_port
from support_middleware import call, captures, marks, pair_id, sampled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns about the version of httpx
    from starlette.testclient import TestClient


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def starlette(url: str, **options: object) -> Starlette:
    async def endpoint(_request: Request) -> Response:
        return PlainTextResponse("ok")

    application = Starlette(routes=[Route("/", endpoint)], **options)  # type: ignore[arg-type]
    application.add_middleware(ParallelRunMiddleware, service="shop", redis_url=url)
    return application


def test_each_loop_has_its_exporter(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    for _ in range(5):
        asyncio.run(_ask(middleware))

    assert len(asyncio.run(captures(redis_url))) == 5
    assert middleware.queue.shipped_count == 5


async def _ask(middleware: ParallelRunMiddleware) -> None:
    _, error = await call(middleware, sampled())
    assert error is None


def test_end_of_the_loop_flushes_without_lifespan(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url, export_interval=60)
    asyncio.run(_ask(middleware))

    assert middleware.queue.shipped_count == 1


def test_swallowed_cancellation_ends_the_exporter(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swallowed = []

    async def swallowing(_link: RedisTransport, _shard: int, rows: Sequence[CaptureRow]) -> JoinResult:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.append(True)
        return JoinResult(len(rows), 0, 0, 0, 0)

    async def ask() -> None:
        await _ask(middleware)
        while not middleware._exporter_pool._exporter._batches:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    monkeypatch.setattr(RedisTransport, "join", swallowing)
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    start = time.monotonic()
    asyncio.run(ask())

    assert swallowed == [True]
    assert time.monotonic() - start < 10


def test_next_loop_sends_the_captures_of_a_closed_one(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url, export_interval=60)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_ask(middleware))
    (task,) = asyncio.all_tasks(loop)
    task.cancel()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # thrown away on purpose
    loop.close()
    asyncio.run(_ask(middleware))

    assert middleware.queue.shipped_count == 2


@pytest.mark.parametrize("entered", [True, False])
def test_test_client_of_starlette_works(entered: bool, redis_url: str) -> None:
    """Without `with`, the client starts a loop per request."""
    client = TestClient(starlette(redis_url))
    if entered:
        with client:
            answers = [client.get("/", headers=marks(pair_id())) for _ in range(3)]
    else:
        answers = [client.get("/", headers=marks(pair_id())) for _ in range(3)]
    gc.collect()  # a leaked task or socket would warn

    assert [answer.text for answer in answers] == ["ok"] * 3
    assert len(asyncio.run(captures(redis_url))) == 3


def test_test_client_without_redis_ends_in_time() -> None:
    start = time.monotonic()
    with TestClient(starlette(f"redis://127.0.0.1:{find_free_port()}/0")) as client:
        answer = client.get("/", headers=marks(pair_id()))

    assert answer.text == "ok"
    assert time.monotonic() - start < 5


async def lifespan(app: ParallelRunMiddleware) -> list[Message]:
    messages: list[Message] = []
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        if len(incoming) == 1:
            await call(app, sampled())
        return incoming.pop(0)

    async def send(message: Message) -> None:
        messages.append({**message, "shipped": app.queue.shipped_count})

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return messages


async def test_lifespan_shutdown_flushes_before_the_server_continues(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(
        Starlette(routes=[Route("/", app)]), service="shop", redis_url=redis_url, export_interval=60
    )
    messages = await lifespan(middleware)

    assert messages == [
        {"type": "lifespan.startup.complete", "shipped": 0},
        {"type": "lifespan.shutdown.complete", "shipped": 1},
    ]


async def test_process_reports_from_its_start(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(Starlette(), service="shop", redis_url=redis_url)
    messages: list[Message] = []
    stop = asyncio.Event()
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        if len(incoming) == 1:
            await stop.wait()
        return incoming.pop(0)

    async def send(message: Message) -> None:
        messages.append(message)

    running = asyncio.create_task(middleware({"type": "lifespan"}, receive, send))
    async with redis.asyncio.Redis.from_url(redis_url) as admin:

        async def is_registered() -> bool:
            return await admin.hlen(reports_key("shop")) == 1

        await eventually_async(is_registered, description="the process reports")
    stop.set()
    await running


async def test_app_without_lifespan_still_rejects_it(redis_url: str) -> None:
    async def refusing(scope: Scope, _receive: Receive, _send: Send) -> None:
        raise NotImplementedError(scope["type"])

    middleware = ParallelRunMiddleware(refusing, service="shop", redis_url=redis_url)
    _, error = await call(middleware, {"type": "lifespan"})
    await middleware.aclose()

    assert repr(error) == "NotImplementedError('lifespan')"


async def test_lifespan_state_reaches_requests(redis_url: str) -> None:
    states: list[object] = []

    async def stateful(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        scope["state"]["pool"] = "ready"
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    middleware = ParallelRunMiddleware(stateful, service="shop", redis_url=redis_url)
    state: dict[str, object] = {}
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        states.append(message["type"])

    await middleware({"type": "lifespan", "state": state}, receive, send)

    assert state == {"pool": "ready"}
    assert states == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_middleware_can_be_closed_twice_and_reused(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    await middleware.aclose()
    for _ in range(2):
        await call(middleware, sampled())
        await middleware.aclose()
        await middleware.aclose()

    assert middleware.queue.shipped_count == 2


PROGRAM = textwrap.dedent(
    """
    import asyncio, os, sys
    sys.path.insert(0, sys.argv[2])
    from abreast import ParallelRunMiddleware
    from support_middleware import call, sampled

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=sys.argv[1])

    async def ask(count):
        for _ in range(count):
            await call(middleware, sampled())
    """
)


def run(program: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM + textwrap.dedent(program), url, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_forked_processes_report_separately(redis_url: str) -> None:
    """Gunicorn with --preload loads the app before it forks."""
    process = run(
        """
        asyncio.run(ask(1))
        children = []
        for count in (2, 3):
            child = os.fork()
            if not child:
                asyncio.run(ask(count))
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        """,
        redis_url,
    )
    with redis.Redis.from_url(redis_url) as admin:
        reports = admin.hgetall(reports_key("shop"))

    assert (process.returncode, process.stderr) == (0, "")
    assert sorted(orjson.loads(text)["shipped"] for text in reports.values()) == [1, 2, 3]
    assert len({orjson.loads(text)["pid"] for text in reports.values()}) == 3


def test_fork_within_a_running_loop_starts_empty(redis_url: str) -> None:
    process = run(
        """
        async def main():
            await ask(1)
            child = os.fork()
            if not child:
                asyncio._set_running_loop(None)
                asyncio.run(ask(2))
                os._exit(0 if middleware.queue.shipped_count == 2 else 1)
            assert os.waitpid(child, 0)[1] == 0

        asyncio.run(main())
        assert middleware.queue.shipped_count == 1
        """,
        redis_url,
    )

    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), 2)"])
def test_process_ends_in_time_with_redis_down(ending: str) -> None:
    start = time.monotonic()
    run(f"asyncio.run(ask(3)); {ending}", f"redis://127.0.0.1:{find_free_port()}/0")

    assert time.monotonic() - start < 10
