"""Sampling rules of several services behind one Envoy, with a real sidecar."""

from __future__ import annotations

import asyncio

import httpx

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.envoy.config import parse_config
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.jobs.reports import read_envoy
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async, free_ports
from support_edge import LONG
from support_serve import run_sidecar
from support_upstream import Received, Upstream

KEY = "0123456789abcdef"
FILE = """
services:
  shop:
    prefixes: [/shop]
    old: {{endpoints: '127.0.0.1:{old}'}}
    new: {{endpoints: '127.0.0.1:{new}'}}
    sample_safe: 0
    uncopied_paths: [/shop/links/*]
    sample:
    - POST /shop/search read-only 100%
    - {{path: "/shop/{{id}}", share: 100%, name: item}}
  shop-api:
    prefixes: [/api]
    old: {{endpoints: '127.0.0.1:{old}'}}
    new: {{endpoints: '127.0.0.1:{new}'}}
    sample_safe: 100%
    baseline_share: 0
    sample:
    - {{path: "/api/{{id}}", share: 0, name: item}}
  rest:
    old: {{endpoints: '127.0.0.1:{old}'}}
    new: {{endpoints: '127.0.0.1:{new}'}}
    sample_safe: 0
"""


async def test_rules_belong_to_one_service(redis_url: str, postgres_url: str) -> None:
    grpc_port, listen, admin = free_ports(3)
    async with Upstream() as old, Upstream() as new:
        config = parse_config(FILE.format(old=old.port, new=new.port))
        options = {"listen": f"127.0.0.1:{listen}", "admin": f"127.0.0.1:{admin}", "sidecar": f"127.0.0.1:{grpc_port}"}
        services = config.build_services({}, {**options, "edge_key": KEY})
        async with run_sidecar(redis_url, postgres_url, services=services, grpc_port=grpc_port) as sidecar:
            server = EnvoyServer(render_config(*services))
            await asyncio.to_thread(server.__enter__)
            try:
                connections = sidecar.sidecar.control.connections

                async def has_settings() -> bool:
                    names = [part.service for part in services]
                    return all(any(state.acknowledged for state in connections.list_all(name)) for name in names)

                await eventually_async(has_settings, description="Envoy has the settings of all services")
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listen}") as client:
                    for path in ("/shop/1", "/shop/a/b", "/shop/links/1", "/api/1", "/api/a/b", "/x"):
                        (await client.get(path)).raise_for_status()
                    for path in ("/shop/search", "/shop/1", "/x"):
                        (await client.post(path)).raise_for_status()
                    marked = await client.get("/shop/2", headers={"abreast-shadow": KEY})
                    assert list_sampled(old) == [("GET", "/shop/1"), ("GET", "/api/a/b"), ("POST", "/shop/search")]
                    assert [request.path for request in old.in_role("shadow")] == ["/shop/2"]
                    assert marked.status_code == 200

                    change = pb.UpdateTrafficRequest(service="shop-api", actor="ada", reason="a test", wait=LONG)
                    change.rule_shares["item"] = 1.0
                    await sidecar.traffic.UpdateTraffic(change)
                    old.received.clear()
                    await client.get("/api/1")
                    await client.get("/shop/a/b")
                    assert list_sampled(old) == [("GET", "/api/1")]
                counts = {part.service: part.counts for part in await read_envoy(f"127.0.0.1:{admin}")}
            finally:
                await asyncio.to_thread(server.__exit__, None, None, None)

    assert {name: count["sampled"] for name, count in counts.items()} == {"shop": 2, "shop-api": 2, "rest": 0}
    assert counts["shop"]["rule.item.sampled"] == 1
    assert counts["shop-api"]["rule.item.sampled"] == 1


def list_sampled(upstream: Upstream) -> list[tuple[str, str]]:
    def is_sampled(request: Received) -> bool:
        return bool(request.pair) and request.role == "live"

    return [(request.method, request.path) for request in upstream.received if is_sampled(request)]
