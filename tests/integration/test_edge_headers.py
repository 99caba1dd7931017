"""Forged x-abreast-* headers and trailers: sent straight to a service, and through Envoy."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import redis.asyncio

import abreast
from abreast.export.queue import INVALID_HEADERS, UNPROVEN_COPY, UNPROVEN_LIVE
from abreast.middleware import ParallelRunMiddleware
from abreast.protocol.join import reports_key
from abreast.recorder import Message, Receive, Scope, Send
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async, free_ports
from support_middleware import call, captures, http_scope, marks, pair_id, raw, serving

KEY, OTHER_KEY = "0123456789abcdef" * 2, "fedcba9876543210" * 2
PROOF = {"x-abreast-key": KEY}
SMUGGLED = "GET /smuggled HTTP/1.1\r\nhost: shop\r\n\r\n"
BOTH_LENGTHS = f"content-length: {len(SMUGGLED) + 5}\r\ntransfer-encoding: "
LAST_CHUNK = f"0\r\n\r\n{SMUGGLED}"  # a reader of chunks finds two requests, and a reader of the length one
# Heads and bodies of which servers disagree where the request ends.
AMBIGUOUS_REQUESTS = {
    "both lengths": (f"{BOTH_LENGTHS}chunked", LAST_CHUNK),
    "both lengths, chunks first": (f"transfer-encoding: chunked\r\ncontent-length: {len(SMUGGLED) + 5}", LAST_CHUNK),
    "both lengths, short": (
        "content-length: 4\r\ntransfer-encoding: chunked",
        f"{len(SMUGGLED):x}\r\n{SMUGGLED}\r\n0\r\n\r\n",
    ),
    "unknown coding": (f"{BOTH_LENGTHS}xchunked", LAST_CHUNK),
    "tab": (f"{BOTH_LENGTHS}\tchunked", LAST_CHUNK),
    "vertical tab": (f"{BOTH_LENGTHS}\x0bchunked", LAST_CHUNK),
    "quotes": (f'{BOTH_LENGTHS}"chunked"', LAST_CHUNK),
    "capitals": (f"{BOTH_LENGTHS}CHUNKED", LAST_CHUNK),
    "space before the colon": (f"content-length: {len(SMUGGLED) + 5}\r\ntransfer-encoding : chunked", LAST_CHUNK),
    "list": (f"{BOTH_LENGTHS}chunked, identity", LAST_CHUNK),
    "two codings": (f"{BOTH_LENGTHS}identity\r\ntransfer-encoding: chunked", LAST_CHUNK),
    "folded line": (f"content-length: {len(SMUGGLED) + 5}\r\nx-a: b\r\n transfer-encoding: chunked", LAST_CHUNK),
    "folded value": (f"{BOTH_LENGTHS}\r\n chunked", LAST_CHUNK),
    "line feed": (f"content-length: {len(SMUGGLED) + 5}\r\nx-a: b\ntransfer-encoding: chunked", LAST_CHUNK),
    "carriage return": (f"content-length: {len(SMUGGLED) + 5}\r\nx-a: b\rtransfer-encoding: chunked", LAST_CHUNK),
    "zero byte": (f"{BOTH_LENGTHS}chunked\0", LAST_CHUNK),
    "underscore": (f"content-length: {len(SMUGGLED) + 5}\r\ntransfer_encoding: chunked", LAST_CHUNK),
    "two lengths": (f"content-length: 0\r\ncontent-length: {len(SMUGGLED)}", SMUGGLED),
    "list of lengths": (f"content-length: 0, {len(SMUGGLED)}", SMUGGLED),
    "signed length": (f"content-length: +{len(SMUGGLED)}", SMUGGLED),
    "hexadecimal length": (f"content-length: 0x{len(SMUGGLED):x}", SMUGGLED),
    "length in a connection header": (f"connection: content-length\r\ncontent-length: {len(SMUGGLED)}", SMUGGLED),
    "coding in a connection header": (
        "connection: transfer-encoding\r\ntransfer-encoding: chunked",
        f"{len(SMUGGLED):x}\r\n{SMUGGLED}\r\n0\r\n\r\n",
    ),
    "extension with a line feed": (
        "transfer-encoding: chunked",
        f"2;\nxx\r\n{len(SMUGGLED):x}\r\n{SMUGGLED}\r\n0\r\n\r\n",
    ),
    "long extension": ("transfer-encoding: chunked", f"{len(SMUGGLED):x};a={'b' * 200}\r\n{SMUGGLED}\r\n0\r\n\r\n"),
    "signed chunk": ("transfer-encoding: chunked", f"-1\r\n{SMUGGLED}"),
}
both_parsers = pytest.mark.parametrize("http", ["h11", "httptools"])


@dataclass
class Shop:
    """An app that charges once per live POST. It keeps the roles, paths and headers of its requests."""

    paths: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    charges: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": (await receive())["type"] + ".complete"})
            return
        while (await receive()).get("more_body"):
            pass
        is_charged = scope["method"] == "POST" and not abreast.is_shadow()
        if scope["path"] != "/healthz":
            self.paths.append(scope["path"])
            self.roles.append(abreast.current().role)
            self.headers += scope["headers"]
            self.charges += is_charged
        content = b"charged" if is_charged else b"stand-in"
        length = [(b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": content})

    @property
    def header_names(self) -> set[bytes]:
        return {name for name, _ in self.headers}


@dataclass
class Service:
    shop: Shop
    middleware: ParallelRunMiddleware
    port: int

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.middleware.queue.drop_counts)


@asynccontextmanager
async def service(redis_url: str, http: str = "httptools", **settings: Any) -> AsyncIterator[Service]:
    shop = Shop()
    middleware = ParallelRunMiddleware(shop, service="shop", redis_url=redis_url, **settings)
    async with serving(middleware, http=http) as (url, _):
        yield Service(shop, middleware, int(url.rpartition(":")[2]))


def chunked(headers: dict[str, str], trailers: list[tuple[str, str]]) -> bytes:
    """Return a chunked POST for one segment, so that the server has the trailers before it calls the app."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    tail = "".join(f"{name}: {value}\r\n" for name, value in trailers)
    lines = f"POST /pay HTTP/1.1\r\nhost: shop\r\n{head}transfer-encoding: chunked\r\n\r\n"
    return f"{lines}3\r\nabc\r\n0\r\n{tail}\r\n".encode()


async def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    writer.close()
    return int(head.split(b" ")[1]), body


@both_parsers
@pytest.mark.parametrize("settings", [{}, {"edge_key": KEY}])
async def test_trailers_of_unsampled_request_change_nothing(
    http: str, settings: dict[str, str], redis_url: str
) -> None:
    forged = [*marks(pair_id(), version="new", role="shadow").items(), ("x-abreast-key", OTHER_KEY)]
    async with service(redis_url, http, **settings) as target:
        response = await exchange(target.port, chunked({}, forged[: 5 if settings else 4]))

    assert response == (200, b"charged")
    assert (target.shop.roles, target.shop.charges) == (["live"], 1)
    assert not [name for name in target.shop.header_names if name.startswith(b"x-abreast-")]
    expected_drops = {} if http == "h11" else {UNPROVEN_LIVE if settings else INVALID_HEADERS: 1}
    assert target.drops == expected_drops
    assert not await captures(redis_url)


@both_parsers
@pytest.mark.parametrize("settings", [{}, {"edge_key": KEY}])
@pytest.mark.parametrize("name", ["x-abreast-role", "x-abreast-version", "x-abreast-pair", "x-abreast-copies"])
async def test_trailers_of_sampled_request_can_not_change_its_marks(
    name: str, http: str, settings: dict[str, str], redis_url: str
) -> None:
    forged = marks(pair_id(), version="new", role="shadow", arms=3)[name]
    head = {**marks(pair_id()), **(PROOF if settings else {})}
    async with service(redis_url, http, **settings) as target:
        response = await exchange(target.port, chunked(head, [(name, forged)]))

    assert response == (200, b"charged")
    assert target.shop.roles == ["live"]
    assert target.drops == ({} if http == "h11" else {INVALID_HEADERS: 1})
    assert [capture.role for capture in await captures(redis_url)] == (["live"] if http == "h11" else [])


@both_parsers
async def test_sampled_chunked_request_is_captured(http: str, redis_url: str) -> None:
    async with service(redis_url, http) as target:
        response = await exchange(target.port, chunked(marks(pair_id()), [("x-sum", "1")]))
    (capture,) = await captures(redis_url)

    assert response == (200, b"charged")
    assert (capture.request.method, capture.request.body.content) == ("POST", b"abc")
    assert target.drops == {}


async def ask(middleware: ParallelRunMiddleware, rows: list[tuple[bytes, bytes]], kind: str = "http") -> list[Any]:
    scope = {**http_scope("/pay", "POST"), "headers": [(b"host", b"shop"), *rows], "type": kind}
    messages, error = await call(middleware, scope)
    assert error is None
    return messages


@pytest.mark.parametrize("name", ["x-abreast-role", "x-abreast-version", "x-abreast-pair", "x-abreast-copies"])
@pytest.mark.parametrize("times", [0, 2])
async def test_mark_that_does_not_occur_once_makes_the_request_live(name: str, times: int, redis_url: str) -> None:
    shop = Shop()
    middleware = ParallelRunMiddleware(shop, service="shop", redis_url=redis_url)
    rows = raw(marks(pair_id(), role="shadow"))
    rows = [row for row in rows for _ in range(times if row[0] == name.encode() else 1)]
    await ask(middleware, rows)
    await middleware.aclose()

    is_sampled = (b"x-abreast-pair") in [row[0] for row in rows]
    assert shop.roles == ["live"]
    assert dict(middleware.queue.drop_counts) == ({INVALID_HEADERS: 1} if is_sampled else {})
    assert not await captures(redis_url)


async def test_repeated_header_of_the_client_does_not_matter(redis_url: str) -> None:
    shop = Shop()
    middleware = ParallelRunMiddleware(shop, service="shop", redis_url=redis_url)
    cookies = [(b"cookie", b"a=1"), (b"cookie", b"b=2")]
    await ask(middleware, [*cookies, *raw(marks(pair_id(), role="shadow")), (b"cookie", b"c=3")])
    await middleware.aclose()

    assert shop.headers == [(b"host", b"shop"), *cookies, (b"cookie", b"c=3")]
    assert [capture.role for capture in await captures(redis_url)] == ["shadow"]


async def test_trailers_that_arrive_during_the_request_change_nothing(redis_url: str) -> None:
    """The server appends to its own list while the app reads the body."""
    rows = [(b"host", b"shop"), *raw(marks(pair_id()))]
    roles = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        rows.extend([(b"x-abreast-role", b"shadow"), (b"accept", b"trailer")])
        roles.append((abreast.current().role, list(scope["headers"])))
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    middleware = ParallelRunMiddleware(app, service="shop", redis_url=redis_url)
    await call(middleware, {**http_scope(), "headers": rows})
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert roles == [("live", [(b"host", b"shop")])]
    assert (capture.role, capture.request.headers) == ("live", (("host", "shop"),))


@pytest.mark.parametrize(
    "proof", [{}, {"x-abreast-key": OTHER_KEY}, {"x-abreast-key": ""}, {"x-abreast-key": "unknown"}]
)
@pytest.mark.parametrize("role", ["live", "shadow", "baseline", "unknown"])
async def test_request_without_proof_is_live_or_refused(role: str, proof: dict[str, str], redis_url: str) -> None:
    shop = Shop()
    middleware = ParallelRunMiddleware(shop, service="shop", redis_url=redis_url, edge_key=KEY)
    start, *_, end = await ask(middleware, raw({**marks(pair_id(), role=role), **proof}))
    await middleware.aclose()

    if role == "live":
        assert (shop.roles, start["status"], end["body"]) == (["live"], 200, b"charged")
        assert not [name for name in shop.header_names if name.startswith(b"x-abreast-")]
    else:
        assert (shop.roles, start["status"]) == ([], 403)
    assert [name for name, _ in start["headers"] if name.startswith(b"x-abreast-")] == []
    assert dict(middleware.queue.drop_counts) == {UNPROVEN_LIVE if role == "live" else UNPROVEN_COPY: 1}
    assert not await captures(redis_url)


async def test_websocket_copy_without_proof_is_refused(redis_url: str) -> None:
    middleware = ParallelRunMiddleware(Shop(), service="shop", redis_url=redis_url, edge_key=KEY)
    messages = await ask(middleware, raw(marks(pair_id(), role="shadow")), kind="websocket")
    await middleware.aclose()

    assert messages == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("keys", [KEY, f"{KEY},{OTHER_KEY}", f"{OTHER_KEY}, {KEY}", [KEY], (OTHER_KEY, KEY)])
@pytest.mark.parametrize("role", ["live", "shadow", "baseline"])
async def test_request_with_proof_is_captured_and_the_proof_is_nowhere(
    role: Any, keys: Any, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shop = Shop()
    middleware = ParallelRunMiddleware(
        shop, service="shop", redis_url=redis_url, edge_key=keys, request_headers=("host", "x-abreast-key")
    )
    messages = await ask(middleware, raw({**marks(pair_id(), role=role), **PROOF}))
    await middleware.aclose()
    (capture,) = await captures(redis_url)

    assert shop.roles == [capture.role] == [role]
    assert shop.headers == [(b"host", b"shop")]
    for place in (messages, capture, caplog.text, middleware.settings, middleware.queue.build_report()):
        assert KEY not in str(place)


async def test_proof_is_ignored_without_a_key(redis_url: str) -> None:
    shop = Shop()
    middleware = ParallelRunMiddleware(shop, service="shop", redis_url=redis_url)
    await ask(middleware, raw({**marks(pair_id(), role="shadow"), **PROOF}))
    await middleware.aclose()

    assert (shop.roles, shop.headers) == (["shadow"], [(b"host", b"shop")])
    assert len(await captures(redis_url)) == 1


@pytest.mark.parametrize(
    ("settings", "proof", "status"),
    [
        ({"edge_key": KEY, "enabled": False}, KEY, 200),
        ({"edge_key": KEY, "enabled": False}, OTHER_KEY, 403),
        ({"edge_key": KEY, "body_limit": "nonsense"}, KEY, 200),
        ({"edge_key": KEY, "body_limit": "nonsense"}, OTHER_KEY, 403),
        ({"edge_key": "short"}, "short", 403),
        ({"edge_key": f"{KEY},"}, "", 403),
        ({"edge_key": [KEY, KEY, KEY]}, KEY, 403),
    ],
)
async def test_proof_is_checked_even_if_the_middleware_is_off(
    settings: dict[str, Any], proof: str, status: int, redis_url: str
) -> None:
    middleware = ParallelRunMiddleware(Shop(), service="shop", redis_url=redis_url, **settings)
    start, _end = await ask(middleware, raw({**marks(pair_id(), role="shadow"), "x-abreast-key": proof}))

    assert start["status"] == status
    assert proof not in middleware.problem or not proof


async def test_counts_are_reported_without_any_capture(redis_url: str) -> None:
    async with service(redis_url, edge_key=KEY, export_interval=0.01) as target:
        request = "GET / HTTP/1.1\r\nhost: shop\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in marks(pair_id(), role="shadow").items()
        )
        status, _ = await exchange(target.port, f"{request}\r\n".encode())

        async def is_reported() -> bool:
            async with redis.asyncio.Redis.from_url(redis_url) as client:
                connection: Any = client
                reports = await connection.hvals(reports_key("shop"))
            return [json.loads(report)["dropped"] for report in reports] == [{UNPROVEN_COPY: 1}]

        await eventually_async(is_reported, description="the refused copy is in the report")

    assert status == 403


@asynccontextmanager
async def behind_envoy(
    redis_url: str,
    http: str,
    *,
    service_key: str,
    passes_trailers: bool = False,
    key_in_environment: bool = False,
    **changes: Any,
) -> AsyncIterator[tuple[Service, Service, int]]:
    """Run both versions behind Envoy, and return its port. All requests are sampled, unless `changes` set it."""
    listen, admin, unused = free_ports(3)
    settings: dict[str, Any] = {"edge_key": service_key} if service_key else {}
    async with service(redis_url, http, **settings) as old, service(redis_url, http, **settings) as new:
        envoy_settings = EnvoySettings(
            **{
                "service": "shop",
                "listen": SocketAddress("127.0.0.1", listen),
                "admin": SocketAddress("127.0.0.1", admin),
                "sidecar": SocketAddress("127.0.0.1", unused),
                "old": (SocketAddress("127.0.0.1", old.port),),
                "new": (SocketAddress("127.0.0.1", new.port),),
                "sample_safe": 1.0,
                "sample_unsafe": 1.0,
                "baseline_share": 0.0,
                **changes,
            }
        )
        config = render_config(envoy_settings)
        if passes_trailers:
            config = pass_trailers(config)
        server = EnvoyServer(config, environment={"SHOP_KEY": KEY} if key_in_environment else {})
        await asyncio.to_thread(server.__enter__)
        try:
            yield old, new, listen
        finally:
            await asyncio.to_thread(server.__exit__, None, None, None)


def pass_trailers(config: str) -> str:
    """Return a configuration like one of a user who copied parts of ours, but lets trailers pass."""
    parts = {
        "accept_http_10: true": "{indent}enable_trailers: true",
        "allow_custom_methods: true": "{indent}enable_trailers: true",
    }
    lines = []
    for line in config.splitlines():
        text = line.strip()
        if text.startswith(
            ("request_trailers_mutations:", '- remove_on_match: {key_matcher: {safe_regex: {regex: ".+"')
        ):
            continue
        lines.append(line)
        if text in parts and "enable_trailers" not in lines[-2]:
            lines.append(line[: len(line) - len(line.lstrip())] + "enable_trailers: true")
    return "\n".join(lines)


async def wait_for_captures(redis_url: str, count: int) -> set[tuple[str, str]]:
    async def has_all() -> bool:
        return len(await captures(redis_url)) >= count

    await eventually_async(has_all, description=f"{count} captures")
    return {(capture.version, capture.role) for capture in await captures(redis_url)}


@both_parsers
@pytest.mark.parametrize("passes_trailers", [False, True])
@pytest.mark.parametrize("key", ["", KEY])
@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_trailers_through_envoy_change_no_request(
    share: float, key: str, passes_trailers: bool, http: str, redis_url: str
) -> None:
    forged = [*marks(pair_id(), version="new", role="shadow").items(), ("x-abreast-key", OTHER_KEY)]
    options: dict[str, Any] = {"edge_key": key, "service_key": key, "passes_trailers": passes_trailers}
    async with behind_envoy(redis_url, http, sample_unsafe=share, **options) as (old, new, port):
        responses = [await exchange(port, chunked({}, forged)) for _ in range(3)]
        is_captured = share and (http == "h11" or not passes_trailers)
        if is_captured:
            assert await wait_for_captures(redis_url, 6) == {("old", "live"), ("new", "shadow")}
        elif share:
            assert await wait_for_captures(redis_url, 3) == {("new", "shadow")}

    assert responses == [(200, b"charged")] * 3
    assert (old.shop.charges, new.shop.charges) == (3, 0)
    assert set(new.shop.roles) <= {"shadow"}
    assert new.drops == {}
    if not passes_trailers or http == "h11":
        assert old.drops == {}
    else:
        assert sum(old.drops.values()) == 3


async def converse(port: int, request: bytes) -> list[int]:
    """Return the statuses of all responses until the end of the connection, which a last request asks for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request + b"GET /end HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(20):
        response = await reader.read(-1)
    writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", response)]


@both_parsers
async def test_ambiguous_request_hides_no_second_one(http: str, redis_url: str) -> None:
    """Envoy refuses it, or gives both versions one request with one length."""
    async with behind_envoy(redis_url, http, service_key="") as (old, new, port):
        requests = {
            f"/{name.replace(' ', '-')}": f"host: shop\r\n{head}\r\n\r\n{body}"
            for name, (head, body) in AMBIGUOUS_REQUESTS.items()
        }
        conversations = [converse(port, f"POST {path} HTTP/1.1\r\n{rest}".encode()) for path, rest in requests.items()]
        statuses = dict(zip(requests, await asyncio.gather(*conversations), strict=True))
        accepted = [path for path, answers in statuses.items() if answers == [200, 200]]
        expected = Counter([*accepted, *["/end"] * len(accepted)])

        async def count_captures() -> Counter[str]:
            return Counter(capture.request.path for capture in await captures(redis_url))

        async def has_all() -> bool:
            return expected + expected <= await count_captures()

        await eventually_async(has_all, description="all pairs of accepted requests are captured")
        captured = await count_captures()

    assert all(answers in ([400], [501]) for path, answers in statuses.items() if path not in accepted), statuses
    assert accepted
    assert Counter(new.shop.paths) == expected
    # Envoy streams, so the head of a request whose chunks are damaged may have reached old.
    damaged = {"/extension-with-a-line-feed", "/signed-chunk"}
    for paths, copies in ((Counter(old.shop.paths), 1), (captured, 2)):
        assert {path: count for path, count in paths.items() if path not in damaged} == {
            path: copies * count for path, count in expected.items()
        }


@pytest.mark.parametrize("key_in_environment", [False, True])
async def test_envoy_proves_sampled_requests_and_copies(key_in_environment: bool, redis_url: str) -> None:
    options: dict[str, Any] = {
        "edge_key": "env:SHOP_KEY" if key_in_environment else KEY,
        "key_in_environment": key_in_environment,
        "service_key": KEY,
        "baseline_share": 1.0,
    }
    async with behind_envoy(redis_url, "httptools", **options) as (old, new, port):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            response = await client.get("/", headers={"x-abreast-key": OTHER_KEY, "x-abreast-role": "shadow"})
        roles = await wait_for_captures(redis_url, 3)

    assert (response.status_code, response.text) == (200, "stand-in")
    assert roles == {("old", "live"), ("new", "shadow"), ("old", "baseline")}
    assert (old.drops, new.drops) == ({}, {})
    assert not [name for name in old.shop.header_names | new.shop.header_names if name.startswith(b"x-abreast-")]


async def test_unsampled_request_through_envoy_has_no_key(redis_url: str) -> None:
    options: dict[str, Any] = {"edge_key": KEY, "service_key": "", "sample_safe": 0.0}
    async with behind_envoy(redis_url, "httptools", **options) as (old, _new, port):
        await exchange(port, b"GET / HTTP/1.1\r\nhost: shop\r\nx-abreast-key: forged\r\n\r\n")

    assert not [name for name in old.shop.header_names if name.startswith(b"x-abreast-")]


async def test_services_with_another_key_refuse_copies_and_serve_users(redis_url: str) -> None:
    options: dict[str, Any] = {"edge_key": OTHER_KEY, "service_key": KEY}
    async with behind_envoy(redis_url, "httptools", **options) as (old, new, port):
        response = await exchange(port, b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")

        async def is_refused() -> bool:
            return new.drops == {UNPROVEN_COPY: 1}

        await eventually_async(is_refused, description="new refuses the copy")

    assert response == (200, b"stand-in")
    assert (old.drops, new.shop.roles) == ({UNPROVEN_LIVE: 1}, [])


def test_copy_without_proof_is_refused_without_an_event_loop_of_asyncio() -> None:
    """Under trio, the exporter can't start."""
    middleware = ParallelRunMiddleware(Shop(), service="shop", edge_key=KEY)
    messages: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        messages.append(message)

    with pytest.raises(StopIteration):
        middleware(http_scope(headers=marks(pair_id(), role="shadow")), receive, send).send(None)

    assert [message.get("status") for message in messages] == [403, None]
    assert dict(middleware.queue.drop_counts) == {UNPROVEN_COPY: 1}
