"""Checks of an Envoy: its control plane, both versions behind it, and its mirroring."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from abreast_sidecar.cli.doctor import Check, CheckFactory, UnreachableError
from abreast_sidecar.client.output import format_count, format_percent, format_quantity
from abreast_sidecar.jobs.envoy_counts import COPY_CLUSTERS, EnvoyError, count_copies, read_admin

ENVOY_CHECKS = CheckFactory("Envoy")
FRACTION_DENOMINATOR = 1_000_000
STATS_FILTER = (
    r"^(cluster\.(old|new)(_shadow|_baseline)?\.(membership_|upstream_)|vhost\.service\.route\.|"
    r"runtime\.(control_plane|admin_overrides_active))"
)
COPY_LOSS_STATS = {
    "too many at once": "rq_pending_overflow",
    "not connected": "rq_pending_failure_eject",
    "no endpoint": "cx_none_healthy",
}
UNMIRRORED_ROUTES = ("safe_plain", "unsafe_plain")
NUMERATOR_PATTERN = re.compile(r'"numerator"\s+value \{\s+number_value: ([0-9.e+]+)')
CONNECT_TIMEOUT_S = 1.0
STATS_INTERVAL_S = 1.0  # between two readings of Envoy's counters, if a connection from here fails
CONNECTION_REFUSED_TEXT = os.strerror(errno.ECONNREFUSED).lower()
OLD_CLUSTERS = ("old", "old_shadow", "old_baseline")  # one version with three connection pools
HOST_STAT_FIELDS = {"cx_connect_fail": "failed", "cx_active": "active", "rq_success": "answered"}


@dataclass(frozen=True)
class ConnectionCounts:
    """Envoy's counters of one endpoint since Envoy's start, and its present connections."""

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
    """`problem` is the reason why Envoy can't reach the endpoint: empty if it can.

    If the problem is not certain, only this machine can't reach the endpoint.
    """

    address: str
    problem: str = ""
    is_certain: bool = True


@dataclass(frozen=True)
class EnvoyFacts:
    """State of one Envoy. `sampling` has the mirrored share of `safe` and `unsafe` requests."""

    url: str
    version: str
    service: str
    state: str
    stats: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)
    old_endpoints: Sequence[EndpointReachability] = ()

    def count_requests(self, *routes: str) -> int:
        return sum(self.stats.get(f"vhost.service.route.{route}.upstream_rq_total", 0) for route in routes)

    @property
    def copy_counts(self) -> Mapping[str, int]:
        return count_copies({"name": name, "value": value} for name, value in self.stats.items())

    @property
    def mirrored_requests(self) -> int:
        """Count as the ledger does. The counters of the routes include retries."""
        return self.copy_counts["sampled"]


def read_envoy_facts(url: str) -> EnvoyFacts:
    """Read an Envoy's admin interface. Raise UnreachableError.

    The call takes a second longer if a connection from this machine to old fails.
    """
    address = url.removeprefix("http://").rstrip("/")
    stats_path = f"/stats?format=json&filter={quote(STATS_FILTER)}"
    info, stats, runtime = _read_admin(address, "/server_info", stats_path, "/runtime")
    entries = runtime.get("entries", {})
    version = str(info.get("version", "")).split("/")
    return EnvoyFacts(
        url=url,
        version=version[1] if len(version) > 1 else "?",
        service=str(info.get("node", {}).get("cluster", "")),
        state=str(info.get("state", "")),
        stats={s["name"]: s["value"] for s in stats.get("stats", []) if isinstance(s.get("value"), int)},
        sampling={kind: _parse_runtime_share(entries.get(f"abreast.sample.{kind}", {})) for kind in ("safe", "unsafe")},
        old_endpoints=tuple(probe_old_endpoints(address)),
    )


def _read_admin(address: str, *paths: str) -> list[Any]:
    try:
        return read_admin(address, *paths)
    except EnvoyError as error:
        raise UnreachableError(str(error.__cause__ or error).lower()) from error


def _parse_runtime_share(entry: Mapping[str, Any]) -> float:
    """Parse a fraction with the denominator MILLION, in the form of /runtime."""
    value = str(entry.get("final_value", ""))
    match = NUMERATOR_PATTERN.search(value)
    return float(match[1]) / FRACTION_DENOMINATOR if match and "MILLION" in value else 0.0


def probe_old_endpoints(admin_address: str) -> Iterator[EndpointReachability]:
    """Connect to each endpoint of old. If a connection fails, Envoy's counters over a second decide."""

    def read_counts() -> dict[tuple[str, int], ConnectionCounts]:
        (clusters,) = _read_admin(admin_address, "/clusters?format=json")
        return count_connections(clusters)

    counts_before = counts_after = read_counts()
    connect_errors = {endpoint: try_connect(*endpoint) for endpoint in counts_before}
    if any(connect_errors[endpoint] or counts.failed_connects for endpoint, counts in counts_before.items()):
        time.sleep(STATS_INTERVAL_S)
        counts_after = read_counts()
    is_local_envoy = _is_loopback(urlsplit(f"//{admin_address}").hostname or "")
    for endpoint, before in counts_before.items():
        after = counts_after.get(endpoint, before)
        yield judge_reachability(endpoint, connect_errors[endpoint], before, after, is_local_envoy=is_local_envoy)


def count_connections(clusters: Mapping[str, Any]) -> dict[tuple[str, int], ConnectionCounts]:
    """Sum the counters of old's endpoints in Envoy's /clusters?format=json over its clusters."""
    hosts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cluster in clusters.get("cluster_statuses", ()):
        for host in cluster.get("host_statuses", ()) if cluster.get("name") in OLD_CLUSTERS else ():
            address = host.get("address", {}).get("socket_address", {})
            endpoint = (str(address.get("address")), int(address.get("port_value", 0)))
            hosts.setdefault(endpoint, []).append(host)
    return {endpoint: ConnectionCounts.from_hosts(endpoint_hosts) for endpoint, endpoint_hosts in hosts.items()}


def judge_reachability(
    endpoint: tuple[str, int],
    connect_error: str,
    before: ConnectionCounts,
    after: ConnectionCounts,
    *,
    is_local_envoy: bool = True,
) -> EndpointReachability:
    """Decide whether Envoy reaches an endpoint. A local Envoy shares this machine's loopback addresses."""
    host, port = endpoint
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if after.is_ejected:
        return EndpointReachability(address, "Envoy has ejected it because it is unreachable")
    if after.failed_connects > before.failed_connects:
        return EndpointReachability(address, "Envoy's connections to it fail")
    if not connect_error or after.successful_requests > before.successful_requests or after.active_connections:
        return EndpointReachability(address)
    is_same_view = is_local_envoy and (_is_loopback(host) or connect_error == CONNECTION_REFUSED_TEXT)
    return EndpointReachability(address, connect_error, is_certain=bool(after.failed_connects) or is_same_view)


def try_connect(host: str, port: int) -> str:
    """Connect from this machine. Return the error, or "" for success."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_envoy(facts: EnvoyFacts) -> Iterator[Check]:
    description = f"Envoy {facts.version} at {facts.url}, for the service {facts.service}"
    if facts.state == "LIVE":
        yield ENVOY_CHECKS.ok("admin", description)
    else:
        yield ENVOY_CHECKS.warn("admin", f"{description}, is {facts.state}", "wait, or see Envoy's log")
    yield _check_control_plane(facts)
    yield from _check_admin_overrides(facts)
    yield _check_old_endpoints(facts.old_endpoints)
    yield _check_new_endpoints(facts)
    yield _check_sampling(facts)
    yield _check_requests(facts)
    if facts.mirrored_requests:
        yield _check_copies(facts)


def _check_control_plane(facts: EnvoyFacts) -> Check:
    if facts.stats.get("runtime.control_plane.connected_state"):
        return ENVOY_CHECKS.ok("control", "receives weights and sampling from a sidecar")
    return ENVOY_CHECKS.fail(
        "control",
        "not connected to a sidecar, so weights and sampling can't change",
        "start the sidecar, or check its address in envoy.yaml (cluster `sidecar`)",
    )


def _check_admin_overrides(facts: EnvoyFacts) -> Iterator[Check]:
    if facts.stats.get("runtime.admin_overrides_active"):
        yield ENVOY_CHECKS.warn(
            "override",
            "values set on its admin address override the sidecar's weights and sampling",
            "remove them with POST /runtime_modify?KEY= for each key that /runtime shows in the layer admin",
        )


def _check_old_endpoints(endpoints: Sequence[EndpointReachability]) -> Check:
    down = [endpoint for endpoint in endpoints if endpoint.problem]
    if endpoints and not down:
        return ENVOY_CHECKS.ok("old", f"{format_quantity(len(endpoints), 'endpoint')} reached")
    observation = f"{len(endpoints) - len(down)} of {format_quantity(len(endpoints), 'endpoint')} reached"
    observation = "; ".join([observation, *(f"{endpoint.address}: {endpoint.problem}" for endpoint in down)])
    if down and not any(endpoint.is_certain for endpoint in down):
        return ENVOY_CHECKS.warn("old", f"{observation} (from this machine)", "run doctor on the machine of Envoy")
    make_check = ENVOY_CHECKS.fail if len(down) == len(endpoints) else ENVOY_CHECKS.warn
    return make_check("old", observation, "start it: while it is down, users have no fallback for new")


def _check_new_endpoints(facts: EnvoyFacts) -> Check:
    healthy, total = (facts.stats.get(f"cluster.new.membership_{state}", 0) for state in ("healthy", "total"))
    observation = f"{healthy} of {format_quantity(total, 'endpoint')} healthy"
    if healthy and healthy == total:
        return ENVOY_CHECKS.ok("new", observation)
    advice = "start it, and check that its health path answers with a status below 500 within a second"
    return ENVOY_CHECKS.warn("new", observation, advice) if healthy else ENVOY_CHECKS.fail("new", observation, advice)


def _check_sampling(facts: EnvoyFacts) -> Check:
    safe, unsafe = facts.sampling.get("safe", 0.0), facts.sampling.get("unsafe", 0.0)
    observation = (
        f"{format_percent(safe)} of safe requests (GET, HEAD, OPTIONS) "
        f"and {format_percent(unsafe)} of others are mirrored"
    )
    if safe or unsafe:
        return ENVOY_CHECKS.ok("sampling", observation)
    advice = 'abreast traffic set --sample-safe 10% --reason "compare"'
    return ENVOY_CHECKS.fail("sampling", f"{observation}, so that no request is compared", advice)


def _check_requests(facts: EnvoyFacts) -> Check:
    total = facts.mirrored_requests + facts.count_requests(*UNMIRRORED_ROUTES)
    observation = f"{format_quantity(total, 'request')}, {format_count(facts.mirrored_requests)} of them mirrored"
    if not total:
        observation = "no request has passed through Envoy since it started"
        return ENVOY_CHECKS.warn("requests", observation, "send requests to Envoy's listener, not to the versions")
    if facts.mirrored_requests:
        return ENVOY_CHECKS.ok("requests", observation)
    if not facts.count_requests("safe_plain") and not facts.sampling.get("unsafe"):
        observation += ": all have unsafe methods (POST, PUT, …), which Envoy does not mirror by default"
        advice = "send GET requests, or consider: abreast traffic set --sample-unsafe"
        return ENVOY_CHECKS.warn("requests", observation, advice)
    advice = "send more requests, or raise the sampling: abreast traffic set --sample-safe"
    return ENVOY_CHECKS.warn("requests", observation, advice)


def _check_copies(facts: EnvoyFacts) -> Check:
    sent_copies = sum(facts.copy_counts[cluster] for cluster in COPY_CLUSTERS) - facts.copy_counts["not_sent"]
    loss_counts = {
        f"{cluster} {cause}": facts.stats.get(f"cluster.{cluster}.upstream_{stat}", 0)
        for cluster in COPY_CLUSTERS
        for cause, stat in COPY_LOSS_STATS.items()
    }
    observation = f"{format_quantity(sent_copies, 'copy', 'copies')} sent"
    if not any(loss_counts.values()):
        return ENVOY_CHECKS.ok("copies", observation)
    loss_text = ", ".join(f"{name} {format_count(number)}" for name, number in loss_counts.items() if number)
    observation += f"; lost since Envoy started: {loss_text}"
    return ENVOY_CHECKS.warn("copies", observation, "check that this version runs and is fast enough")
