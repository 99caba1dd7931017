"""Measure the time that the middleware adds to a request in the process: python bench/middleware.py [runs].

One app is called directly: bare, with the middleware and an unsampled request, and with a sampled one. The three take
turns, so that other load affects all of them alike. The cost is the median of the differences. The background work is
measured separately, as time of the event loop per capture.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from rows import Row, row

from abreast.middleware import App, ParallelRunMiddleware
from abreast.recorder import Message, Scope
from abreast_sidecar.stack.servers import RedisServer

REQUESTS = 200  # per turn
RUNS, QUICK_RUNS = 200, 30
BODY = b'{"id":17,"name":"a product","tags":["one","two"]}'.ljust(2048)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2048"), (b"cache-control", b"no-store")]
REQUEST_HEADERS = [
    (b"host", b"shop.example"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64)"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"gzip, br"),
    (b"accept-language", b"en"),
    (b"cookie", b"session=0123456789abcdef"),
    (b"x-forwarded-for", b"203.0.113.7"),
    (b"x-forwarded-proto", b"https"),
    (b"x-request-id", b"7b0bbbd0-8d3c-4a53-9d3d-6f8f5a5c5f7b"),
    (b"x-envoy-attempt-count", b"1"),
]


async def app(_scope: Scope, _receive: object, send: Callable[[Message], Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(_message: MutableMapping[str, Any]) -> None:
    pass


def scope(*, sampled: bool, number: int) -> Scope:
    """Return a scope like uvicorn's, with the headers that Envoy adds."""
    tags = [
        (b"x-abreast-pair", b"%036d" % number),
        (b"x-abreast-copies", b"2"),
        (b"x-abreast-version", b"old"),
        (b"x-abreast-role", b"live"),
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/products/17",
        "raw_path": b"/products/17",
        "query_string": b"currency=EUR",
        "root_path": "",
        "headers": [*REQUEST_HEADERS, *(tags if sampled else ())],
    }


async def turn(target: App, *, sampled: bool, first: int) -> float:
    """Return the µs per request. The loop never yields, so background work does not run."""
    scopes = [scope(sampled=sampled, number=first + i) for i in range(REQUESTS)]
    began = time.perf_counter()
    for request_scope in scopes:
        await target(request_scope, receive, send)
    return (time.perf_counter() - began) / REQUESTS * 1e6


async def drain(middleware: ParallelRunMiddleware) -> float:
    """Wait until Redis has all captures, and return the µs of CPU time per capture."""
    began = time.thread_time()
    while middleware.queue.count:  # noqa: ASYNC110  # the queue has no event
        await asyncio.sleep(0.01)
    return (time.thread_time() - began) / REQUESTS * 1e6


async def measure(redis_url: str, runs: int) -> dict[str, list[float]]:
    middleware = ParallelRunMiddleware(app, service="bench", redis_url=redis_url)
    results: dict[str, list[float]] = {"bare": [], "unsampled": [], "sampled": [], "background": []}
    for run in range(runs + 1):
        bare = await turn(app, sampled=False, first=0)
        unsampled = await turn(middleware, sampled=False, first=0)
        sampled = await turn(middleware, sampled=True, first=run * REQUESTS)
        background = await drain(middleware)
        if run:  # the first run warms up
            results["bare"].append(bare)
            results["unsampled"].append(unsampled - bare)
            results["sampled"].append(sampled - bare)
            results["background"].append(background)
    await middleware.aclose()
    assert middleware.queue.shipped_count == (runs + 1) * REQUESTS, middleware.queue.build_report()
    return results


def rows(*, quick: bool = False, runs: int = 0) -> list[Row]:
    runs = runs or (QUICK_RUNS if quick else RUNS)
    with RedisServer() as server:
        results = asyncio.run(measure(server.url, runs))
    return [
        row("middleware_bare_app_us", "us", results["bare"]),
        row("middleware_unsampled_us", "us", results["unsampled"]),
        row("middleware_sampled_us", "us", results["sampled"]),
        row("middleware_background_us", "us", results["background"]),
    ]


def main() -> None:
    print(f"{'':28}{'median':>10}{'min':>10}{'max':>10}")
    for result in rows(runs=int(sys.argv[1]) if len(sys.argv) > 1 else RUNS):
        print(f"{result['name']:28}{result['value']:10.2f}{result['min']:10.2f}{result['max']:10.2f}  {result['unit']}")


if __name__ == "__main__":
    main()
