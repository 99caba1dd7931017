"""A real Envoy that a real sidecar steers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async, free_ports
from support_envoy import started
from support_serve import RunningSidecar
from support_upstream import Upstream

REQUESTS = 40
LONG = Duration(seconds=10)


@dataclass
class Edge:
    """An Envoy with two versions behind it."""

    server: EnvoyServer
    client: httpx.AsyncClient
    old: Upstream
    new: Upstream

    async def runtime(self) -> dict[str, str]:
        async with httpx.AsyncClient(base_url=self.server.admin_url) as admin:
            entries = (await admin.get("/runtime")).json()["entries"]
        return {key: entry["final_value"] for key, entry in entries.items() if key.startswith("abreast.")}

    async def wait_for_value(self, key: str, value: str) -> None:
        async def has_values() -> bool:
            return (await self.runtime()).get(key) == value

        await eventually_async(has_values, description=f"{key} is {value}")

    async def ask(self, count: int = REQUESTS) -> tuple[int, int, int]:
        """Send GETs; how many old and new answered live, and how many were mirrored."""
        before = len(self.old.in_role("live")), len(self.new.in_role("live")), self.sampled()
        for _ in range(count):
            (await self.client.get("/products/7")).raise_for_status()
        return (
            len(self.old.in_role("live")) - before[0],
            len(self.new.in_role("live")) - before[1],
            self.sampled() - before[2],
        )

    def sampled(self) -> int:
        return sum(bool(request.pair) for request in (*self.old.in_role("live"), *self.new.in_role("live")))


@asynccontextmanager
async def edge(
    port: int,
    *,
    service: str = "shop",
    node: str = "edge-1",
    option: str = "",
    environment: Mapping[str, str] | None = None,
    **changes: Any,
) -> AsyncIterator[Edge]:
    """`node` stands in the file, `option` is what Envoy is started with, `changes` are settings of Envoy."""
    async with Upstream() as old, Upstream() as new:
        listen, admin_port = free_ports(2)
        settings = EnvoySettings(
            service=service,
            node_id=node,
            listen=SocketAddress("127.0.0.1", listen),
            sidecar=SocketAddress("127.0.0.1", port),
            old=(SocketAddress("127.0.0.1", old.port),),
            new=(SocketAddress("127.0.0.1", new.port),),
            **{"admin": SocketAddress("127.0.0.1", admin_port), **changes},
        )
        async with (
            started(settings, option, environment) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.listen.port}", timeout=10) as client,
        ):
            envoy = Edge(server, client, old, new)
            await _healthy(envoy)
            yield envoy


async def _healthy(envoy: Edge) -> None:
    async def reached() -> bool:
        async with httpx.AsyncClient(base_url=envoy.server.admin_url) as admin:
            text = (await admin.get("/stats", params={"filter": "membership_healthy"})).text
        return "cluster.old.membership_healthy: 1" in text and "cluster.new.membership_healthy: 1" in text

    await eventually_async(reached, description="both versions are healthy")


async def update(sidecar: RunningSidecar, **changes: Any) -> pb.UpdateTrafficResponse:
    answer: pb.UpdateTrafficResponse = await sidecar.traffic.UpdateTraffic(
        pb.UpdateTrafficRequest(service="shop", actor="ada", reason="a test", **{"wait": LONG, **changes})
    )
    return answer


async def acknowledged(sidecar: RunningSidecar, *, envoys: int = 1) -> None:
    async def all_of_them() -> bool:
        settings = sidecar.sidecar.control.current("shop")
        if settings is None:
            return False
        states = sidecar.sidecar.control.connections.list_all("shop")
        return sum(state.acknowledged == settings.traffic.stamp for state in states) == envoys

    await eventually_async(all_of_them, description=f"{envoys} Envoys have acknowledged")
