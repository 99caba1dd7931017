"""A running Envoy between a test and two recorded versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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

    async def give_new(self, share: float) -> None:
        await self.sidecar.set(weights(share))

    async def stat(self, name: str) -> int:
        """Return the value of a counter or gauge, or 0 if it does not exist."""
        answer = await self.admin.get("/stats", params={"filter": f"^{name}$", "format": "json"})
        values = [entry["value"] for entry in answer.json()["stats"] if "value" in entry]
        return int(values[0]) if values else 0

    async def arrived(self, upstream: Upstream, count: int) -> None:
        async def enough() -> bool:
            return len(upstream.received) >= count

        await eventually_async(enough, what=f"{count} requests arrived, {len(upstream.received)} so far")

    async def healthy(self, cluster: str = "new", count: int = 1) -> None:
        async def reached() -> bool:
            return await self.stat(f"cluster.{cluster}.membership_healthy") == count

        await eventually_async(reached, what=f"{cluster} has {count} healthy endpoints")

    async def settled(self) -> None:
        """Wait until Envoy has no copy under way any more."""

        async def idle() -> bool:
            names = [f"cluster.{name}.upstream_rq_active" for name in ("old_shadow", "new_shadow", "old_baseline")]
            return not any([await self.stat(name) for name in names])

        await eventually_async(idle, what="all copies are done")


def weights(new_share: float) -> dict[str, Any]:
    new = round(new_share * EVERYTHING)
    return {"abreast.weight.old": EVERYTHING - new, "abreast.weight.new_or_old": new}


@asynccontextmanager
async def abreast(
    *, old: Upstream | None = None, new: Upstream | None = None, weight: float = 0.0, **changes: Any
) -> AsyncIterator[Abreast]:
    """By default every safe request is mirrored, nothing else is, and old answers."""
    async with old or Upstream() as first, new or Upstream() as second:
        listen, admin_port, sidecar_port = free_ports(3)
        settings = EnvoySettings(
            **{
                "listen": SocketAddress("127.0.0.1", listen),
                "admin": SocketAddress("127.0.0.1", admin_port),
                "sidecar": SocketAddress("127.0.0.1", sidecar_port),
                "old": (SocketAddress("127.0.0.1", first.port),),
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
                running = Abreast(first, second, client, admin, settings, server, sidecar)
                await running.healthy("old")
                await running.healthy("new")
                yield running
                assert server.process is not None
                assert server.process.is_alive, server.process.read_log_tail()


@asynccontextmanager
async def started(settings: EnvoySettings, node: str = "") -> AsyncIterator[EnvoyServer]:
    """Start in a thread: Envoy asks the versions, which live in this one, for their health."""
    server = EnvoyServer(render_config(settings), node=node)
    await asyncio.to_thread(server.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def exchange(port: int, sent: bytes, *, until: bytes = b"", within: float = 20.0) -> bytes:
    """Send bytes as they are; read until some bytes came, or to the end, or until time is up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    got = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while not (until and until in got) and (data := await reader.read(65536)):
                got += data
    writer.close()
    return got


async def burst(port: int, requests: int, connections: int = 8) -> None:
    """Many small GETs, pipelined; every one of them must be answered with 200."""
    each, request = requests // connections, b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
    got = await asyncio.gather(*[exchange(port, request * (each - 1) + last) for _ in range(connections)])
    assert sum(answers.count(b"HTTP/1.1 200") for answers in got) == each * connections
