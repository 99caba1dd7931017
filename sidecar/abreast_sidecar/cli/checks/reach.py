"""Can Envoy reach old? It has no health check that would tell, or a wrong answer could take old away from users."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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
            hosts.setdefault(
                (str(socket_address.get("address")), int(socket_address.get("port_value", 0))), []
            ).append(host)
    return {
        socket_address: ConnectionCounts.from_hosts(endpoint_hosts)
        for socket_address, endpoint_hosts in hosts.items()
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
    if (
        not connect_error
        or after.successful_requests > before.successful_requests
        or after.active_connections
    ):
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
