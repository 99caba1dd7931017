"""Checks of the sidecar's endpoints, and of the middleware in both versions."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from abreast_sidecar.cli.doctor import Check, CheckFactory
from abreast_sidecar.client.output import format_count, format_quantity, format_seconds, to_printable
from abreast_sidecar.client.sidecar_client import CHANNEL_OPTIONS

SIDECAR_CHECKS = CheckFactory("sidecar")
SIDECAR_PROBE_TIMEOUT_S = 3.0
MAX_READINESS_BYTES = 4096
SERVICE_CHECKS = CheckFactory("services")
SERVICE_VERSIONS = ("old", "new")
MAX_REPORT_AGE_S = 20.0  # a process reports every five seconds
MIDDLEWARE_LINE = 'app.add_middleware(ParallelRunMiddleware, service="{}", redis_url=…)'


def check_sidecar(address: str, http_url: str) -> Iterator[Check]:
    yield asyncio.run(_check_grpc_health(address))
    yield _check_readiness(http_url)
    yield from check_duplicate_node_ids(asyncio.run(_list_envoy_nodes(address)))


async def _list_envoy_nodes(address: str) -> list[str]:
    """Return the node ids of the connected Envoys, or nothing if the sidecar does not answer."""
    import grpc.aio

    from abreast.v1 import traffic_pb2, traffic_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
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
                f"{number} Envoys share the node id {to_printable(node)}, so their acknowledgements can't be distinguished",
                "start each with `envoy --service-node NAME`, or render its file with --node-id NAME",
            )


async def _check_grpc_health(address: str) -> Check:
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=SIDECAR_PROBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            advice = "start it (abreast up, abreast sidecar), or set its address with --address or ABREAST_SIDECAR"
            return SIDECAR_CHECKS.fail("gRPC", f"no answer at {address} ({error.code().name.lower()})", advice)
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return SIDECAR_CHECKS.ok("gRPC", f"serving at {address}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status).lower().replace("_", " ")
    return SIDECAR_CHECKS.fail(
        "gRPC", f"{status} at {address}", "see the checks of Redis and Postgres, and the sidecar's log"
    )


def _check_readiness(url: str) -> Check:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=SIDECAR_PROBE_TIMEOUT_S) as response:  # noqa: S310  # the user's address
            return SIDECAR_CHECKS.ok("ready", _format_readiness_parts(response.read(MAX_READINESS_BYTES)) or "yes")
    except urllib.error.HTTPError as error:
        advice = "see the checks of Redis and Postgres, and the sidecar's log"
        return SIDECAR_CHECKS.fail(
            "ready", f"not ready: {_format_readiness_parts(error.read(MAX_READINESS_BYTES)) or error.code}", advice
        )
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)).lower()
        return SIDECAR_CHECKS.warn("ready", f"no answer at {url}/readyz ({reason})", "set its HTTP address with --http")


def _format_readiness_parts(body: bytes) -> str:
    """Return `redis ok, workers ok` for {"parts": {…}}, or "" for any other body."""
    try:
        parts = json.loads(body)["parts"]
        return to_printable(", ".join(f"{name} {state}" for name, state in parts.items()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


@dataclass(frozen=True)
class ServiceProcess:
    """A process with the middleware, as it last reported to Redis. The age relies on the clocks of both machines."""

    host: str
    release: str
    captures_by_version: dict[str, int]
    drops_by_reason: dict[str, int]
    queued_captures: int
    report_age_s: float

    @classmethod
    def from_report(cls, report: dict[str, Any], server_time_s: float) -> ServiceProcess:
        return cls(
            host=f"{report.get('host', '?')}:{report.get('pid', '?')}",
            release=str(report.get("release") or ""),
            captures_by_version=_parse_counts(report.get("versions")),
            drops_by_reason=_parse_counts(report.get("dropped")),
            queued_captures=int((report.get("queue") or {}).get("count", 0)),
            report_age_s=server_time_s - float(report.get("seen") or 0.0),
        )


def _parse_counts(value: object) -> dict[str, int]:
    return {str(name): int(number) for name, number in value.items()} if isinstance(value, dict) else {}


def check_services(
    service: str, processes: Sequence[ServiceProcess], mirrored_requests: int | None, other_services: Sequence[str]
) -> Iterator[Check]:
    """Check the middleware. `mirrored_requests` is Envoy's count, or None if it is unknown.

    `other_services` are the services in Redis with another name.
    """
    if not processes:
        others = f" (but of {', '.join(map(to_printable, other_services))})" if other_services else ""
        yield SERVICE_CHECKS.fail(
            "middleware",
            f"no process of {service or 'any service'} has reported to this Redis{others}",
            f"add it to both versions: {MIDDLEWARE_LINE.format(service or 'shop')}; "
            "the service's name and redis_url must be the same as here",
        )
        return
    live_processes = [process for process in processes if process.report_age_s < MAX_REPORT_AGE_S]
    yield _check_middleware(processes, live_processes)
    for version in SERVICE_VERSIONS:
        yield _check_version_captures(version, processes, service, mirrored_requests)
    yield from _check_drops(processes)


def _check_middleware(processes: Sequence[ServiceProcess], live_processes: Sequence[ServiceProcess]) -> Check:
    if live_processes:
        number = format_quantity(len(live_processes), "process", "processes")
        return SERVICE_CHECKS.ok("middleware", f"{number} reported in the last {format_seconds(MAX_REPORT_AGE_S)}")
    last_report_age_s = min(process.report_age_s for process in processes)
    observation = f"the last report of a process is {format_seconds(last_report_age_s)} old"
    return SERVICE_CHECKS.fail("middleware", observation, "check that the versions run and that they reach Redis")


def _check_version_captures(
    version: str, processes: Sequence[ServiceProcess], service: str, mirrored_requests: int | None
) -> Check:
    capturing_processes = [process for process in processes if process.captures_by_version.get(version)]
    live_processes = [process for process in capturing_processes if process.report_age_s < MAX_REPORT_AGE_S]
    captures = sum(process.captures_by_version[version] for process in capturing_processes)
    if live_processes:
        releases = sorted({process.release or "(no release)" for process in live_processes})
        number = format_quantity(len(live_processes), "process", "processes")
        origin = f"release {', '.join(map(to_printable, releases))}, {number}"
        return SERVICE_CHECKS.ok(version, f"{format_quantity(captures, 'capture')} from {origin}")
    if capturing_processes:
        return _check_silent_version(version, capturing_processes, processes, mirrored_requests)
    if mirrored_requests == 0:
        observation = "no capture yet, because Envoy has not mirrored any request yet"
        return SERVICE_CHECKS.warn(version, observation, "see the checks of Envoy")
    observation = "no capture"
    if any(process.captures_by_version for process in processes):
        observation += f", but {'new' if version == 'old' else 'old'} has captures"
    advice = (
        f"check that {version} has the middleware, with the same service and redis_url: "
        f"{MIDDLEWARE_LINE.format(service)}"
    )
    return SERVICE_CHECKS.fail(version, observation, advice)


def _check_silent_version(
    version: str,
    capturing_processes: Sequence[ServiceProcess],
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
) -> Check:
    last_report_age_s = min(process.report_age_s for process in capturing_processes)
    observation = f"no process of {version} has reported for {format_seconds(last_report_age_s)}"
    if mirrored_requests == 0:
        advice = "check that the version runs; Envoy has not mirrored any request since it started"
        return SERVICE_CHECKS.warn(version, observation, advice)
    if any(process.report_age_s < MAX_REPORT_AGE_S and not process.captures_by_version for process in processes):
        observation += "; it may be one of the processes without captures so far"
        return SERVICE_CHECKS.warn(version, observation, "send requests through Envoy, and run doctor again")
    return SERVICE_CHECKS.fail(version, observation, "check that it has the middleware, and uses this Redis")


def _check_drops(processes: Sequence[ServiceProcess]) -> Iterator[Check]:
    drops_by_reason = Counter[str]()
    for process in processes:
        drops_by_reason.update(process.drops_by_reason)
    if not drops_by_reason.total():
        queued_captures = sum(process.queued_captures for process in processes)
        yield SERVICE_CHECKS.ok("drops", f"none; {format_quantity(queued_captures, 'capture')} in flight to Redis")
        return
    observation = ", ".join(
        f"{to_printable(reason)} {format_count(number)}" for reason, number in sorted(drops_by_reason.items()) if number
    )
    advice = (
        "queue_*: Redis is slow or was unreachable; redis_rejected_*: Redis is at its limit; "
        "for other reasons, see the service's log"
    )
    yield SERVICE_CHECKS.warn("drops", f"captures dropped so far: {observation}", advice)
