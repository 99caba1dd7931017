"""A running Envoy between a test and two recorded versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async, free_ports
from support_rtds import RuntimeServer
from support_upstream import Upstream

EVERYTHING = 10_000  # the sum of the weights


@dataclass
class Abreast:
    old: Upstream
    new: Upstream
    client: httpx.AsyncClient
    admin: httpx.AsyncClient
    settings: EnvoySettings
    server: EnvoyServer
    sidecar: RuntimeServer

    @property
    def port(self) -> int:
        return self.settings.listen.port

    async def restart_with(self, new_share: float) -> None:
        """Change the share of new, and forget the requests so far."""
        await self.settled()
        await self.give_new(new_share)
        self.old.received.clear()
        self.new.received.clear()

    async def give_new(self, share: float) -> None:
        await self.sidecar.set(weights(share))

    async def override(self, values: str) -> None:
        """Set runtime values on the socket of the admin interface."""
        assert await asyncio.to_thread(self.server.ask_admin, "POST", f"/runtime_modify?{values}") == b"OK\n"

    async def stat(self, name: str) -> int:
        """Return the value of a counter or gauge, or 0 if it does not exist."""
        values = [entry["value"] for entry in await self.stats(f"^{name}$") if "value" in entry]
        return int(values[0]) if values else 0

    async def stats(self, pattern: str) -> list[dict[str, Any]]:
        answer = await self.admin.get("/stats", params={"filter": pattern, "format": "json"})
        stats: list[dict[str, Any]] = answer.json()["stats"]
        return stats

    async def wait_for_requests(self, upstream: Upstream, count: int) -> None:
        async def enough() -> bool:
            return len(upstream.received) >= count

        await eventually_async(enough, description=f"{count} requests arrived, {len(upstream.received)} so far")

    async def healthy(self, cluster: str = "new", count: int = 1) -> None:
        async def reached() -> bool:
            return await self.stat(f"cluster.{cluster}.membership_healthy") == count

        await eventually_async(reached, description=f"{cluster} has {count} healthy endpoints")

    async def settled(self) -> None:
        """Wait until Envoy has no copy under way any more."""

        async def idle() -> bool:
            names = [
                f"cluster.{name}.upstream_rq_active"
                for name in ("old_shadow", "new_shadow", "old_baseline", "new_baseline")
            ]
            return not any([await self.stat(name) for name in names])

        await eventually_async(idle, description="all copies are done")


def weights(new_share: float) -> dict[str, Any]:
    new = round(new_share * EVERYTHING)
    return {"abreast.weight.old": EVERYTHING - new, "abreast.weight.new_or_old": new}


@asynccontextmanager
async def abreast(
    *,
    old: Upstream | None = None,
    new: Upstream | None = None,
    weight: float = 0.0,
    more_old: tuple[int, ...] = (),
    **changes: Any,
) -> AsyncIterator[Abreast]:
    """By default every safe request is mirrored, nothing else is, and old answers. `more_old`: ports of old."""
    async with old or Upstream() as first, new or Upstream() as second:
        listen, admin_port, sidecar_port = free_ports(3)
        settings = EnvoySettings(
            **{
                "listen": SocketAddress("127.0.0.1", listen),
                "admin": SocketAddress("127.0.0.1", admin_port),
                "sidecar": SocketAddress("127.0.0.1", sidecar_port),
                "old": tuple(SocketAddress("127.0.0.1", port) for port in (first.port, *more_old)),
                "new": (SocketAddress("127.0.0.1", second.port),),
                "sample_safe": 1.0,
                "baseline_share": 0.0,
                **changes,
            }
        )
        async with RuntimeServer(settings.sidecar.port, weights(weight)) as sidecar, started(settings) as server:
            scheme = "https" if settings.tls_certificate else "http"
            listener = f"{scheme}://127.0.0.1:{settings.listen.port}"
            async with (
                httpx.AsyncClient(base_url=listener, verify=False, timeout=30) as client,  # noqa: S501  # self-signed
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.admin.port}", timeout=30) as admin,
            ):
                proxy = Abreast(first, second, client, admin, settings, server, sidecar)
                await proxy.healthy("old", 1 + len(more_old))
                await proxy.healthy("new")
                yield proxy
                assert server.process is not None
                assert server.process.is_alive, server.process.read_log_tail()


@asynccontextmanager
async def started(
    settings: EnvoySettings, node: str = "", environment: Mapping[str, str] | None = None
) -> AsyncIterator[EnvoyServer]:
    """Start in a thread: Envoy asks the versions, which live in this one, for their health."""
    server = EnvoyServer(render_config(settings), node=node, environment=environment)
    await asyncio.to_thread(server.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def exchange(port: int, request: bytes, *, until: bytes = b"", within: float = 20.0) -> bytes:
    """Send bytes as they are; read until some bytes came, or to the end, or until time is up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    response = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while not (until and until in response) and (data := await reader.read(65536)):
                response += data
    writer.close()
    return response


async def burst(port: int, requests: int, connections: int = 8) -> None:
    """Many small GETs, pipelined; every one of them must be answered with 200."""
    per_connection, request = requests // connections, b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
    responses = await asyncio.gather(
        *[exchange(port, request * (per_connection - 1) + last, within=90) for _ in range(connections)]
    )
    assert sum(answers.count(b"HTTP/1.1 200") for answers in responses) == per_connection * connections
