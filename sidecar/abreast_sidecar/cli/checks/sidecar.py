"""Does the sidecar answer, and is it ready?"""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence

from abreast_sidecar.cli.checks.check import Check, CheckFactory
from abreast_sidecar.cli.humane import to_printable

SIDECAR_CHECKS = CheckFactory("sidecar")
SIDECAR_PROBE_TIMEOUT_S = 3.0  # seconds
MAX_READINESS_BYTES = 4096  # bytes of an answer that are read


def check_sidecar(address: str, http_url: str) -> Iterator[Check]:
    yield asyncio.run(_check_grpc_health(address))
    yield _check_readiness(http_url)
    yield from check_duplicate_node_ids(asyncio.run(_list_envoy_nodes(address)))


async def _list_envoy_nodes(address: str) -> list[str]:
    """Ids of the Envoys that are connected; none where the sidecar does not say."""
    import grpc.aio

    from abreast.v1 import traffic_pb2, traffic_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = traffic_pb2_grpc.TrafficServiceStub(channel).GetTraffic
        try:
            response = await call(traffic_pb2.GetTrafficRequest(), timeout=SIDECAR_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return []
    return [envoy.node for envoy in response.envoys]


def check_duplicate_node_ids(nodes: Sequence[str]) -> Iterator[Check]:
    for node, number in Counter(nodes).items():
        if number > 1:
            yield SIDECAR_CHECKS.warn(
                "envoys",
                f"{number} Envoys have the node id {to_printable(node)}, so who has which settings can't be told",
                "start each as `envoy --service-node NAME`, or render its file with --node-id NAME",
            )


async def _check_grpc_health(address: str) -> Check:
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=SIDECAR_PROBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            advice = (
                "start it (abreast up, abreast sidecar), or say where it is with --address or ABREAST_SIDECAR"
            )
            return SIDECAR_CHECKS.fail(
                "gRPC", f"no answer at {address} ({error.code().name.lower()})", advice
            )
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return SIDECAR_CHECKS.ok("gRPC", f"serving at {address}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status).lower().replace("_", " ")
    return SIDECAR_CHECKS.fail(
        "gRPC", f"{status} at {address}", "see what is said of Redis and Postgres, and the sidecar's log"
    )


def _check_readiness(url: str) -> Check:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=SIDECAR_PROBE_TIMEOUT_S) as response:  # noqa: S310  # the user's address
            return SIDECAR_CHECKS.ok(
                "ready", _format_readiness_parts(response.read(MAX_READINESS_BYTES)) or "yes"
            )
    except urllib.error.HTTPError as error:
        advice = "see what is said of Redis and Postgres, and the sidecar's log"
        return SIDECAR_CHECKS.fail(
            "ready",
            f"not ready: {_format_readiness_parts(error.read(MAX_READINESS_BYTES)) or error.code}",
            advice,
        )
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)).lower()
        return SIDECAR_CHECKS.warn(
            "ready", f"no answer at {url}/readyz ({reason})", "say where its HTTP is with --http"
        )


def _format_readiness_parts(body: bytes) -> str:
    """`redis ok, workers ok` from {"parts": {…}}; empty for anything else."""
    try:
        parts = json.loads(body)["parts"]
        return to_printable(", ".join(f"{name} {state}" for name, state in parts.items()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
