"""Calls from service to service through Envoy: the call of a shadow is a shadow too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import abreast
from abreast import ParallelRunMiddleware
from abreast.context import CURRENT_CONTEXT, RequestContext
from abreast.integrations.httpx import AsyncRecordingTransport, RecordingTransport
from abreast.protocol.capture import Role
from abreast_sidecar.envoy.config import parse_config
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.stack.servers import EnvoyServer
from abreast_sidecar.store.records import Window
from support import eventually_async, free_ports
from support_envoy import exchange
from support_middleware import serving
from support_serve import RunningSidecar, run_sidecar
from support_upstream import Received, Upstream, respond

KEY = "0123456789abcdef0123456789abcdef"
REQUESTS = 15
SERVICE = "{{sample_safe: 1, sample_unsafe: 0, baseline_share: 0, prefixes: [/{0}], old: {{endpoints: 127.0.0.1:{1}}}, new: {{endpoints: 127.0.0.1:{2}}}"


@dataclass
class Caller:
    """One version of a service with the middleware. It calls the next service through Envoy."""

    name: str
    target: str  # the URL of the next service
    roles: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)  # roles whose effect ran

    def app(self, redis_url: str) -> ParallelRunMiddleware:
        async def answer(request: Request) -> JSONResponse:
            context = abreast.current()
            self.roles.append(context.role)
            await abreast.effect("order.send", {"n": 1}).run(self.send, context.role)
            host = httpx.URL(self.target).netloc.decode()
            transport = AsyncRecordingTransport(envoy_hosts=[host])
            async with httpx.AsyncClient(transport=transport) as client:
                response = await client.get(f"{self.target}/{request.path_params['n']}")
            return JSONResponse({"status": response.status_code})

        routes = [Route(f"/{self.name}/{{n}}", answer), Route("/healthz", lambda _request: JSONResponse({}))]
        return ParallelRunMiddleware(Starlette(routes=routes), service=self.name, redis_url=redis_url, edge_key=KEY)

    async def send(self, role: str) -> None:
        self.sent.append(role)


@dataclass
class Chain:
    """shop calls cart, and cart calls stock."""

    callers: dict[str, Caller]  # shop_old, shop_new, cart_old, cart_new
    stock: dict[str, Upstream]
    listen: int
    sidecar: RunningSidecar


@asynccontextmanager
async def chain(redis_url: str, postgres_url: str, **shadow_calls: str) -> AsyncIterator[Chain]:
    """Run the services behind one Envoy. `shadow_calls` are settings by service."""
    listen, admin, collector, grpc_port = free_ports(4)
    async with AsyncExitStack() as opening:
        stock = {version: await opening.enter_async_context(Upstream()) for version in ("old", "new")}
        ports: dict[str, list[Any]] = {"stock": [upstream.port for upstream in stock.values()]}
        callers = {}
        for name, following in (("cart", "stock"), ("shop", "cart")):
            for version in ("old", "new"):
                caller = callers[f"{name}_{version}"] = Caller(name, f"http://127.0.0.1:{listen}/{following}")
                url, _server = await opening.enter_async_context(serving(caller.app(redis_url)))
                ports.setdefault(name, []).append(url.rpartition(":")[2])
        services = "".join(
            f"  {name}: {SERVICE.format(name, *pair)}, shadow_calls: {shadow_calls.get(name, 'old')}}}\n"
            for name, pair in ports.items()
        )
        config = parse_config(f"envoy: {{edge_key: 'env:SHOP_KEY'}}\nservices:\n{services}")
        settings = config.build_services(
            {},
            {
                "listen": f"127.0.0.1:{listen}",
                "admin": f"127.0.0.1:{admin}",
                "collector": f"127.0.0.1:{collector}",
                "sidecar": f"127.0.0.1:{grpc_port}",
            },
        )
        sidecar = await opening.enter_async_context(
            run_sidecar(
                redis_url,
                postgres_url,
                services=settings,
                grpc_port=grpc_port,
                envoy_admin=(f"127.0.0.1:{admin}",),
                collector_listen=f"127.0.0.1:{collector}",
            )
        )
        server = EnvoyServer(render_config(*settings), environment={"SHOP_KEY": KEY})
        await asyncio.to_thread(server.__enter__)
        opening.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)

        async def has_settings() -> bool:
            connections = sidecar.sidecar.control.connections
            return all(
                any(state.acknowledged for state in connections.list_all(name)) for name in ("shop", "cart", "stock")
            )

        await eventually_async(has_settings, description="Envoy has the settings of all services")
        yield Chain(callers, stock, listen, sidecar)


async def test_calls_of_shadows_are_shadows_and_no_pairs(redis_url: str, postgres_url: str) -> None:
    async with chain(redis_url, postgres_url) as services:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{services.listen}") as client:
            responses = [await client.get(f"/shop/{number}") for number in range(REQUESTS)]

        async def is_accounted(service: str) -> bool:
            summary = await services.sidecar.sidecar.reader.read_summary(service, Window(None, None))
            return summary.sampled == summary.pairs == summary.outcomes.get("match") == REQUESTS

        for name in ("shop", "cart", "stock"):
            await eventually_async(
                lambda name=name: is_accounted(name),  # type: ignore[misc]  # the present name
                description=f"{name} has one pair for each user's request",
            )
        callers, stock = services.callers, services.stock

        assert {response.text for response in responses} == {'{"status":200}'}
        assert callers["shop_old"].roles == ["live"] * REQUESTS
        assert callers["shop_new"].roles == ["shadow"] * REQUESTS
        assert (
            sorted(callers["cart_old"].roles) == ["live"] * REQUESTS + ["shadow"] * REQUESTS
        )  # calls of users, of shadows
        assert callers["cart_new"].roles == ["shadow"] * REQUESTS  # copies
        assert [caller.sent for caller in callers.values()] == [["live"] * REQUESTS, [], ["live"] * REQUESTS, []]
        assert count_roles(stock["old"]) == (REQUESTS, 2 * REQUESTS)  # shadows of shadows end in the same place
        assert count_roles(stock["new"]) == (0, REQUESTS)
        assert all(
            "abreast-shadow" not in request.headers for version in stock.values() for request in version.received
        )


def count_roles(upstream: Upstream) -> tuple[int, int]:
    return len(upstream.in_role("live")), len(upstream.in_role("shadow"))


async def test_setting_selects_the_version_that_answers_shadows(redis_url: str, postgres_url: str) -> None:
    async with chain(redis_url, postgres_url, stock="new") as services:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{services.listen}") as client:
            marked = await client.get("/stock/1", headers={"abreast-shadow": KEY})
            response = await client.post("/stock/1", headers={"abreast-shadow": KEY}, content=b"x")

        assert (marked.status_code, marked.text, marked.headers["x-abreast-version"]) == (200, "ok", "new")
        assert response.headers["x-abreast-version"] == "new"
        assert count_roles(services.stock["new"]) == (0, 2)
        assert not services.stock["old"].received


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], f"{KEY}\r\nabreast-shadow: {KEY}"])
async def test_mark_without_the_key_is_refused(redis_url: str, postgres_url: str, key: str) -> None:
    async with chain(redis_url, postgres_url) as services:
        head = f"GET /stock/1 HTTP/1.1\r\nhost: shop\r\nabreast-shadow: {key}\r\n\r\n"
        response = await exchange(services.listen, head.encode(), until=b"\r\n\r\n")

        assert response.startswith(b"HTTP/1.1 403")
        assert not services.stock["old"].received
        assert not services.stock["new"].received


@pytest.mark.parametrize("role", ["live", "shadow", "baseline"])
async def test_mark_reaches_only_hosts_of_envoy(role: Role) -> None:
    context = RequestContext("new", role, "pair", "", edge_key=KEY)
    token = CURRENT_CONTEXT.set(context)
    try:
        async with Upstream() as edge, Upstream() as other:

            async def redirect(_request: Received, writer: asyncio.StreamWriter) -> None:
                await respond(writer, b"", 302, headers=f"location: http://127.0.0.1:{other.port}/\r\n")

            edge.answer = redirect
            url, hosts = f"http://127.0.0.1:{edge.port}/", [f"127.0.0.1:{edge.port}"]
            transport = AsyncRecordingTransport(envoy_hosts=hosts)
            async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
                await client.get(url, headers=[(b"x-test", "é".encode())])
            with httpx.Client(transport=RecordingTransport(envoy_hosts=hosts)) as blocking:
                await asyncio.to_thread(copy_context().run, blocking.get, url)
            marks = [request.headers.get("abreast-shadow") for request in edge.received]

            assert marks == ([None, None] if role == "live" else [KEY, KEY])
            assert edge.received[0].headers["x-test"] == other.received[0].headers["x-test"]
            assert ["abreast-shadow" in request.headers for request in other.received] == [False]
    finally:
        CURRENT_CONTEXT.reset(token)
