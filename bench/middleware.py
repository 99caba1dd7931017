"""Measure the time that the middleware adds to a request in the process: python bench/middleware.py [runs].

One app is called directly: bare, with the middleware and an unsampled request, and with a sampled one. The three take
turns, so that other load affects all of them alike. The cost is the median of the differences. The background work is
measured separately, as time of the event loop per capture. The WSGI app returns an iterable to close, as Flask and
Django do. The encoding of an ordinary capture is measured with and without the redaction of secrets. The capture has
20 headers, and 2 KB of JSON in the request and in the response, with values that differ in each request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any
from wsgiref.util import setup_testing_defaults

from rows import Row, row

import abreast.wsgi
from abreast.export.redaction import Redactor
from abreast.export.serializer import CaptureSerializer
from abreast.middleware import App, ParallelRunMiddleware
from abreast.protocol.capture import Body, Headers
from abreast.recorder import Message, Receive, RequestRecorder, Scope, Send
from abreast.settings import Settings
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


class WsgiResponse:
    def __iter__(self) -> Iterator[bytes]:
        return iter((BODY,))

    def close(self) -> None:
        pass


def wsgi_app(_environ: abreast.wsgi.Environ, start_response: abreast.wsgi.StartResponse) -> WsgiResponse:
    start_response("200 OK", [(name.decode(), value.decode()) for name, value in HEADERS])
    return WsgiResponse()


def start_response(_status: str, _headers: list[tuple[str, str]]) -> Callable[[bytes], None]:
    return lambda _chunk: None


def environ(*, sampled: bool, number: int) -> abreast.wsgi.Environ:
    """Return the environ for the same request."""
    rows = scope(sampled=sampled, number=number)["headers"]
    headers = {"HTTP_" + name.decode().upper().replace("-", "_"): value.decode() for name, value in rows}
    result = {"PATH_INFO": "/products/17", "QUERY_STRING": "currency=EUR", **headers}
    setup_testing_defaults(result)
    return result


def wsgi_turn(target: abreast.wsgi.App, *, sampled: bool, first: int) -> float:
    """Return the µs of CPU time per request, with the iteration of the server. Another thread exports meanwhile."""
    environs = [environ(sampled=sampled, number=first + i) for i in range(REQUESTS)]
    began = time.thread_time()
    for request_environ in environs:
        response: Any = target(request_environ, start_response)
        for _ in response:
            pass
        response.close()
    return (time.thread_time() - began) / REQUESTS * 1e6


def measure_wsgi(redis_url: str, runs: int) -> dict[str, list[float]]:
    middleware = abreast.wsgi.ParallelRunMiddleware(wsgi_app, service="bench-wsgi", redis_url=redis_url)
    results: dict[str, list[float]] = {"wsgi_bare_app": [], "wsgi_unsampled": [], "wsgi_sampled": []}
    for run in range(runs + 1):
        bare = wsgi_turn(wsgi_app, sampled=False, first=0)
        unsampled = wsgi_turn(middleware, sampled=False, first=0)
        sampled = wsgi_turn(middleware, sampled=True, first=run * REQUESTS)
        while middleware.queue.count:
            time.sleep(0.01)
        if run:  # the first run warms up
            results["wsgi_bare_app"].append(bare)
            results["wsgi_unsampled"].append(unsampled - bare)
            results["wsgi_sampled"].append(sampled - bare)
    middleware.close()
    assert middleware.queue.shipped_count == (runs + 1) * REQUESTS, middleware.queue.build_report()
    return results


class NoRedactor(Redactor):
    """Leaves a capture as it is."""

    def redact_headers(self, headers: Headers, allowed: frozenset[str] = frozenset()) -> Headers:  # noqa: ARG002
        return headers

    def redact_path(self, path: str) -> str:
        return path

    def redact_query(self, query: str, allowed: frozenset[str] = frozenset()) -> str:  # noqa: ARG002
        return query

    def redact_body(self, body: Body, *_arguments: object, **_options: object) -> Body:
        return body


def order(number: int) -> bytes:
    """Return about 2 KB of JSON, with values that are unlike those of other orders."""
    ids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{number} {index}")) for index in range(9)]
    item_names = (
        "Trail running shoe, blue",
        "Merino T-Shirt, long sleeve",
        "Head torch with 400 lm",
        "Water bottle, 0.75 l",
    )
    document = {
        "id": ids[0],
        "number": 10_000_000 + number,
        "state": "paid",
        "created_at": f"2026-11-30T{number % 24:02}:{number % 60:02}:07.{number % 1_000_000:06}Z",
        "customer": {"id": ids[1], "name": f"Ann Example {number}", "email": f"ann.{number}@example.com", "vip": False},
        "items": [
            {
                "id": ids[2 + index],
                "sku": f"SKU-{number * 7919 % 100_000:05}-{index}",
                "name": name,
                "quantity": 1 + (number + index) % 3,
                "price": {"amount": (number * 37 + index * 101) % 20_000 / 100, "currency": "EUR"},
                "image": f"https://cdn.example.com/images/{number % 977}/{ids[2 + index]}.jpg?width=640&format=webp",
                "tags": ["outdoor", "sale", None],
            }
            for index, name in enumerate(item_names)
        ],
        "shipping": {"street": f"{number % 200} High Street", "zip": f"{number % 90_000 + 10_000}", "country": "DE", "phone": f"+49 170 {number:07}"},
        "totals": {"net": number % 30_000 / 100, "tax": number % 5_000 / 100, "discount": 0, "weight_kg": 1.25},
        "note": f"Please ring twice, and leave the parcel with the neighbour at number {number % 90}.",
        "etag": hashlib.sha256(ids[0].encode()).hexdigest(),
        "next": f"/orders?page_token={number}&limit=50",
    }  # fmt: skip
    return json.dumps(document).encode()


ORDER_HEADERS = [
    (b"host", b"shop.example"),
    (b"accept", b"application/json, text/plain, */*"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"accept-language", b"de-DE,de;q=0.9,en;q=0.8"),
    (b"content-type", b"application/json"),
    (b"origin", b"https://shop.example"),
    (b"sec-fetch-mode", b"cors"),
    (b"sec-fetch-site", b"same-origin"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36"),
    (b"x-forwarded-proto", b"https"),
]  # fmt: skip


def order_response_headers(number: int) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(order(number))),
        (b"cache-control", b"private, max-age=0, must-revalidate"),
        (b"date", b"Mon, 30 Nov 2026 10:%02d:%02d GMT" % (number // 60 % 60, number % 60)),
        (b"etag", b'"%s"' % hashlib.sha256(b"%d" % number).hexdigest().encode()),
        (b"location", b"/orders/%d" % number),
        (b"strict-transport-security", b"max-age=31536000; includeSubDomains"),
        (b"vary", b"accept-encoding, origin"),
    ]


async def order_app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 201, "headers": order_response_headers(scope["number"])})
    await send({"type": "http.response.body", "body": order(scope["number"] + 1_000_000)})


def order_scope(number: int) -> Scope:
    request_scope = scope(sampled=True, number=number)
    tags = request_scope["headers"][len(REQUEST_HEADERS) :]
    cookie = (b"cookie", b"theme=dark; session=%032x" % (number * 7919))
    request_id = (b"x-request-id", str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))).encode())
    target = {"method": "POST", "path": "/orders", "raw_path": b"/orders"}
    return {**request_scope, **target, "headers": [*ORDER_HEADERS, cookie, request_id, *tags], "number": number}


async def measure_encoding(redis_url: str, runs: int) -> dict[str, list[float]]:
    """Return the µs of CPU time to encode a capture, and the part of the redaction in it."""
    settings = Settings(service="bench")
    redacting, plain = (CaptureSerializer(settings, kind("key")) for kind in (Redactor, NoRedactor))
    middleware = ParallelRunMiddleware(order_app, service="bench", redis_url=redis_url)
    results: dict[str, list[float]] = {"encoding": [], "redaction": []}
    for run in range(runs + 1):
        for number in range(run * REQUESTS, (run + 1) * REQUESTS):

            async def receive_order(number: int = number) -> Message:
                return {"type": "http.request", "body": order(number), "more_body": False}

            await middleware(order_scope(number), receive_order, send)
        recorders = [recorder for recorder, _ in middleware.queue.recorders]
        with_redaction, without = (encode_all(serializer, recorders) for serializer in (redacting, plain))
        if run:  # the first run warms up
            results["encoding"].append(with_redaction)
            results["redaction"].append(with_redaction - without)
        await drain(middleware)
    await middleware.aclose()
    return results


def encode_all(serializer: CaptureSerializer, recorders: Sequence[RequestRecorder]) -> float:
    began = time.thread_time()
    for recorder in recorders:
        serializer.serialize(recorder)
    return (time.thread_time() - began) / len(recorders) * 1e6


async def drain(middleware: ParallelRunMiddleware) -> float:
    """Wait until Redis has all captures, and return the µs of CPU time per capture."""
    began = time.thread_time()
    while middleware.queue.count:  # noqa: ASYNC110  # the queue has no event
        await asyncio.sleep(0.01)
    return (time.thread_time() - began) / REQUESTS * 1e6


async def measure(redis_url: str, runs: int) -> dict[str, list[float]]:
    middleware = ParallelRunMiddleware(app, service="bench", redis_url=redis_url)
    results: dict[str, list[float]] = {"bare_app": [], "unsampled": [], "sampled": [], "background": []}
    for run in range(runs + 1):
        bare = await turn(app, sampled=False, first=0)
        unsampled = await turn(middleware, sampled=False, first=0)
        sampled = await turn(middleware, sampled=True, first=run * REQUESTS)
        background = await drain(middleware)
        if run:  # the first run warms up
            results["bare_app"].append(bare)
            results["unsampled"].append(unsampled - bare)
            results["sampled"].append(sampled - bare)
            results["background"].append(background)
    await middleware.aclose()
    assert middleware.queue.shipped_count == (runs + 1) * REQUESTS, middleware.queue.build_report()
    return results


def rows(*, quick: bool = False, runs: int = 0) -> list[Row]:
    runs = runs or (QUICK_RUNS if quick else RUNS)
    with RedisServer() as server:
        results = asyncio.run(measure(server.url, runs)) | measure_wsgi(server.url, runs)
        results |= asyncio.run(measure_encoding(server.url, runs))
    return [row(f"middleware_{name}_us", "us", values) for name, values in results.items()]


def main() -> None:
    print(f"{'':28}{'median':>10}{'min':>10}{'max':>10}")
    for result in rows(runs=int(sys.argv[1]) if len(sys.argv) > 1 else RUNS):
        print(f"{result['name']:28}{result['value']:10.2f}{result['min']:10.2f}{result['max']:10.2f}  {result['unit']}")


if __name__ == "__main__":
    main()
