"""A real Envoy that a real sidecar steers."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
from support_serve import Running
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

    async def has(self, key: str, value: str) -> None:
        async def there() -> bool:
            return (await self.runtime()).get(key) == value

        await eventually_async(there, what=f"{key} is {value}")

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
        return sum(bool(one.pair) for one in (*self.old.in_role("live"), *self.new.in_role("live")))


@asynccontextmanager
async def edge(port: int, *, service: str = "shop", node: str = "edge-1", option: str = "") -> AsyncIterator[Edge]:
    """`node` stands in the file, `option` is what Envoy is started with."""
    async with Upstream() as old, Upstream() as new:
        listen, admin_port = free_ports(2)
        settings = EnvoySettings(
            service=service,
            node_id=node,
            listen=SocketAddress("127.0.0.1", listen),
            admin=SocketAddress("127.0.0.1", admin_port),
            sidecar=SocketAddress("127.0.0.1", port),
            old=(SocketAddress("127.0.0.1", old.port),),
            new=(SocketAddress("127.0.0.1", new.port),),
        )
        async with (
            started(settings, option) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.listen.port}", timeout=10) as client,
        ):
            found = Edge(server, client, old, new)
            await _healthy(found)
            yield found


async def _healthy(found: Edge) -> None:
    async def reached() -> bool:
        async with httpx.AsyncClient(base_url=found.server.admin_url) as admin:
            text = (await admin.get("/stats", params={"filter": "membership_healthy"})).text
        return "cluster.old.membership_healthy: 1" in text and "cluster.new.membership_healthy: 1" in text

    await eventually_async(reached, what="both versions are healthy")


async def update(sidecar: Running, **changes: Any) -> pb.UpdateTrafficResponse:
    answer: pb.UpdateTrafficResponse = await sidecar.traffic.UpdateTraffic(
        pb.UpdateTrafficRequest(service="shop", actor="ada", reason="a test", **{"wait": LONG, **changes})
    )
    return answer


async def acknowledged(sidecar: Running, *, envoys: int = 1) -> None:
    async def all_of_them() -> bool:
        held = sidecar.sidecar.control.current("shop")
        if held is None:
            return False
        states = sidecar.sidecar.control.connections.list_all("shop")
        return sum(state.acknowledged_version == held.traffic.version for state in states) == envoys

    await eventually_async(all_of_them, what=f"{envoys} Envoys have acknowledged")
