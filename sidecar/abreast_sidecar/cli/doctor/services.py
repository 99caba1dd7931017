"""Do both versions capture? What their processes last said of themselves."""

from __future__ import annotations

import asyncio
import errno
import http.client
import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from abreast_sidecar.cli.doctor.check import Check, CheckFactory
from abreast_sidecar.client.output import format_count, format_quantity, format_seconds, to_printable

OLD_CONNECT_TIMEOUT_S = 1.0  # seconds
STATS_INTERVAL_S = 1.0  # seconds between two looks at Envoy's counts, where connecting leaves a doubt
CONNECTION_REFUSED_TEXT = os.strerror(errno.ECONNREFUSED).lower()
OLD_CLUSTERS = ("old", "old_shadow", "old_baseline")  # one version, three pools of connections
HOST_STAT_FIELDS = {"cx_connect_fail": "failed", "cx_active": "active", "rq_success": "answered"}


@dataclass(frozen=True)
class ConnectionCounts:
    """Of one endpoint, since Envoy's start; `active` connections are those of now."""

    failed_connects: int = 0
    active_connections: int = 0
    successful_requests: int = 0
    is_ejected: bool = False

    @classmethod
    def from_hosts(cls, hosts: Sequence[Mapping[str, Any]]) -> ConnectionCounts:
        totals = Counter[str]()
        for stat in (stat for host in hosts for stat in host.get("stats", ())):
            totals[HOST_STAT_FIELDS.get(stat.get("name"), "")] += int(stat.get("value", 0))
        is_ejected = any(host.get("health_status", {}).get("failed_outlier_check") for host in hosts)
        return cls(totals["failed"], totals["active"], totals["answered"], is_ejected)


@dataclass(frozen=True)
class EndpointReachability:
    """`trouble` says why Envoy can't reach it, empty where it can. Not `sure`: this machine can't, Envoy may."""

    address: str
    problem: str = ""
    is_certain: bool = True


def count_connections(clusters: Mapping[str, Any]) -> dict[tuple[str, int], ConnectionCounts]:
    """Old's endpoints, by what Envoy's /clusters?format=json says."""
    hosts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cluster in clusters.get("cluster_statuses", ()):
        for host in cluster.get("host_statuses", ()) if cluster.get("name") in OLD_CLUSTERS else ():
            socket_address = host.get("address", {}).get("socket_address", {})
            hosts.setdefault((str(socket_address.get("address")), int(socket_address.get("port_value", 0))), []).append(
                host
            )
    return {
        socket_address: ConnectionCounts.from_hosts(endpoint_hosts) for socket_address, endpoint_hosts in hosts.items()
    }


def probe_old_endpoints(
    admin_address: str, read_clusters: Callable[[], Mapping[str, Any]]
) -> Iterator[EndpointReachability]:
    """By connecting, and where that leaves a doubt by what Envoy counts meanwhile."""
    counts_before = count_connections(read_clusters())
    connect_errors = {endpoint: try_connect(*endpoint) for endpoint in counts_before}
    is_uncertain = any(
        connect_errors[endpoint] or endpoint_counts.failed_connects
        for endpoint, endpoint_counts in counts_before.items()
    )
    if is_uncertain:
        time.sleep(STATS_INTERVAL_S)
    counts_after = count_connections(read_clusters()) if is_uncertain else counts_before
    for endpoint, endpoint_counts in counts_before.items():
        yield judge_reachability(
            endpoint,
            connect_errors[endpoint],
            endpoint_counts,
            counts_after.get(endpoint, endpoint_counts),
            is_local_envoy=_is_loopback(_admin_host(admin_address)),
        )


def judge_reachability(
    endpoint: tuple[str, int],
    connect_error: str,
    before: ConnectionCounts,
    after: ConnectionCounts,
    *,
    is_local_envoy: bool = True,
) -> EndpointReachability:
    """`near`: Envoy runs on this machine, so that its loopback addresses are ours."""
    host, port = endpoint
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if after.is_ejected:
        return EndpointReachability(address, "Envoy has put it out for not being reachable")
    if after.failed_connects > before.failed_connects:
        return EndpointReachability(address, "Envoy's connections to it fail")
    if not connect_error or after.successful_requests > before.successful_requests or after.active_connections:
        return EndpointReachability(address)
    return EndpointReachability(
        address,
        connect_error,
        is_certain=bool(after.failed_connects)
        or (is_local_envoy and (_is_loopback(host) or connect_error == CONNECTION_REFUSED_TEXT)),
    )


def try_connect(host: str, port: int) -> str:
    """Why a connection from this machine does not come about; empty where it does."""
    try:
        socket.create_connection((host, port), timeout=OLD_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _admin_host(admin_address: str) -> str:
    return urlsplit(admin_address if "://" in admin_address else f"http://{admin_address}").hostname or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


SERVICE_CHECKS = CheckFactory("services")
MAX_REPORT_AGE_S = 20.0  # seconds since the last report; one comes every five
SERVICE_VERSIONS = ("old", "new")
MIDDLEWARE_LINE = 'app.add_middleware(ParallelRunMiddleware, service="{}", redis_url=…)'


@dataclass(frozen=True)
class ServiceProcess:
    """`ago` is seconds since its last report, by Redis's clock against its own."""

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
    """`mirrored`: requests that Envoy says it mirrored, None for unknown. `others`: further services in Redis."""
    if not processes:
        yield SERVICE_CHECKS.fail(
            "middleware",
            f"no process of {service or 'any service'} has reported to this Redis{_format_other_services(other_services)}",
            f"add it to both versions: {MIDDLEWARE_LINE.format(service or 'shop')}; the service's name and redis_url must be the same as here",
        )
        return
    live_processes = [process for process in processes if process.report_age_s < MAX_REPORT_AGE_S]
    yield _check_middleware(processes, live_processes)
    for version in SERVICE_VERSIONS:
        yield _check_version_captures(version, processes, service, mirrored_requests)
    yield from _check_drops(processes)


def _format_other_services(other_services: Sequence[str]) -> str:
    return f" (but of {', '.join(map(to_printable, other_services))})" if other_services else ""


def _check_middleware(processes: Sequence[ServiceProcess], live_processes: Sequence[ServiceProcess]) -> Check:
    observation = f"{format_quantity(len(live_processes), 'process', 'processes')} with it, heard from in the last {format_seconds(MAX_REPORT_AGE_S)}"
    if live_processes:
        return SERVICE_CHECKS.ok("middleware", observation)
    youngest_report_s = min(process.report_age_s for process in processes)
    return SERVICE_CHECKS.fail(
        "middleware",
        f"the last process was heard from {format_seconds(youngest_report_s)} ago",
        "are the versions running, and do they reach Redis?",
    )


def _check_version_captures(
    version: str, processes: Sequence[ServiceProcess], service: str, mirrored_requests: int | None
) -> Check:
    capturing_processes = [process for process in processes if process.captures_by_version.get(version)]
    live_processes = [process for process in capturing_processes if process.report_age_s < MAX_REPORT_AGE_S]
    captures = sum(process.captures_by_version[version] for process in capturing_processes)
    releases = sorted({process.release or "(no release said)" for process in live_processes})
    if live_processes:
        origin = f"release {', '.join(map(to_printable, releases))}, {format_quantity(len(live_processes), 'process', 'processes')}"
        return SERVICE_CHECKS.ok(version, f"{format_quantity(captures, 'capture')} from {origin}")
    if capturing_processes:
        return _check_silent_version(version, capturing_processes, processes, mirrored_requests)
    if mirrored_requests == 0:
        return SERVICE_CHECKS.warn(
            version, "nothing captured yet, since nothing was mirrored yet", "see what is said of Envoy above"
        )
    if any(process.captures_by_version for process in processes):
        observation = f"nothing captured, while {'new' if version == 'old' else 'old'} is"
    else:
        observation = "nothing captured"
    advice = f"is the middleware in {version}, with the same service and redis_url? {MIDDLEWARE_LINE.format(service)}"
    return SERVICE_CHECKS.fail(version, observation, advice)


def _check_silent_version(
    version: str,
    capturing_processes: Sequence[ServiceProcess],
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
) -> Check:
    observation = f"no process of {version} has reported for {format_seconds(min(process.report_age_s for process in capturing_processes))}"
    if mirrored_requests == 0:
        return SERVICE_CHECKS.warn(
            version, observation, "nothing was mirrored since Envoy started: is the version running?"
        )
    if any(process.report_age_s < MAX_REPORT_AGE_S and not process.captures_by_version for process in processes):
        return SERVICE_CHECKS.warn(
            version,
            f"{observation}; processes that have captured nothing yet may be it",
            "send requests through Envoy, and look again",
        )
    return SERVICE_CHECKS.fail(version, observation, "is the middleware in it, and does it use this Redis?")


def _check_drops(processes: Sequence[ServiceProcess]) -> Iterator[Check]:
    drops_by_reason: dict[str, int] = {}
    for process in processes:
        for reason, number in process.drops_by_reason.items():
            drops_by_reason[reason] = drops_by_reason.get(reason, 0) + number
    queued_captures = sum(process.queued_captures for process in processes)
    if not sum(drops_by_reason.values()):
        yield SERVICE_CHECKS.ok("drops", f"none; {format_quantity(queued_captures, 'capture')} on the way to Redis")
        return
    observation = ", ".join(
        f"{to_printable(reason)} {format_count(number)}" for reason, number in sorted(drops_by_reason.items()) if number
    )
    advice = "queue: Redis is slow or was away; refused: it holds as much as it may; error: see the service's log"
    yield SERVICE_CHECKS.warn("drops", f"captures dropped so far: {observation}", advice)


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
            advice = "start it (abreast up, abreast sidecar), or say where it is with --address or ABREAST_SIDECAR"
            return SIDECAR_CHECKS.fail("gRPC", f"no answer at {address} ({error.code().name.lower()})", advice)
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return SIDECAR_CHECKS.ok("gRPC", f"serving at {address}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status).lower().replace("_", " ")
    return SIDECAR_CHECKS.fail(
        "gRPC", f"{status} at {address}", "see what is said of Redis and Postgres, and the sidecar's log"
    )


def _check_readiness(url: str) -> Check:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=SIDECAR_PROBE_TIMEOUT_S) as response:  # noqa: S310  # the user's address
            return SIDECAR_CHECKS.ok("ready", _format_readiness_parts(response.read(MAX_READINESS_BYTES)) or "yes")
    except urllib.error.HTTPError as error:
        advice = "see what is said of Redis and Postgres, and the sidecar's log"
        return SIDECAR_CHECKS.fail(
            "ready", f"not ready: {_format_readiness_parts(error.read(MAX_READINESS_BYTES)) or error.code}", advice
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
