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

CONNECT_TIMEOUT = 1.0  # seconds
WATCHED = 1.0  # seconds between two looks at Envoy's counts, where connecting leaves a doubt
REFUSED = os.strerror(errno.ECONNREFUSED).lower()
CLUSTERS = ("old", "old_shadow", "old_baseline")  # one version, three pools of connections
STATS = {"cx_connect_fail": "failed", "cx_active": "active", "rq_success": "answered"}


@dataclass(frozen=True)
class Counts:
    """Of one endpoint, since Envoy's start; `active` connections are those of now."""

    failed: int = 0
    active: int = 0
    answered: int = 0
    ejected: bool = False

    @classmethod
    def of(cls, hosts: Sequence[Mapping[str, Any]]) -> Counts:
        seen = Counter[str]()
        for stat in (stat for host in hosts for stat in host.get("stats", ())):
            seen[STATS.get(stat.get("name"), "")] += int(stat.get("value", 0))
        ejected = any(host.get("health_status", {}).get("failed_outlier_check") for host in hosts)
        return cls(seen["failed"], seen["active"], seen["answered"], ejected)


@dataclass(frozen=True)
class Endpoint:
    """`trouble` says why Envoy can't reach it, empty where it can. Not `sure`: this machine can't, Envoy may."""

    address: str
    trouble: str = ""
    sure: bool = True


def counts(clusters: Mapping[str, Any]) -> dict[tuple[str, int], Counts]:
    """Old's endpoints, by what Envoy's /clusters?format=json says."""
    hosts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cluster in clusters.get("cluster_statuses", ()):
        for host in cluster.get("host_statuses", ()) if cluster.get("name") in CLUSTERS else ():
            where = host.get("address", {}).get("socket_address", {})
            hosts.setdefault((str(where.get("address")), int(where.get("port_value", 0))), []).append(host)
    return {where: Counts.of(found) for where, found in hosts.items()}


def look(admin: str, clusters: Callable[[], Mapping[str, Any]]) -> Iterator[Endpoint]:
    """By connecting, and where that leaves a doubt by what Envoy counts meanwhile."""
    before = counts(clusters())
    refusals = {where: refusal(*where) for where in before}
    doubtful = any(refusals[where] or seen.failed for where, seen in before.items())
    if doubtful:
        time.sleep(WATCHED)
    after = counts(clusters()) if doubtful else before
    for where, seen in before.items():
        yield judged(where, refusals[where], seen, after.get(where, seen), near=_loopback(_host(admin)))


def judged(
    where: tuple[str, int], refused: str, before: Counts, after: Counts, *, near: bool = True
) -> Endpoint:
    """`near`: Envoy runs on this machine, so that its loopback addresses are ours."""
    host, port = where
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if after.ejected:
        return Endpoint(address, "Envoy has put it out for not being reachable")
    if after.failed > before.failed:
        return Endpoint(address, "Envoy's connections to it fail")
    if not refused or after.answered > before.answered or after.active:
        return Endpoint(address)
    return Endpoint(
        address, refused, sure=bool(after.failed) or (near and (_loopback(host) or refused == REFUSED))
    )


def refusal(host: str, port: int) -> str:
    """Why a connection from this machine does not come about; empty where it does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _host(admin: str) -> str:
    return urlsplit(admin if "://" in admin else f"http://{admin}").hostname or ""


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
