"""Checks of an Envoy: its control plane, both versions behind it, and its mirroring."""

from __future__ import annotations

import errno
import http.client
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
from abreast_sidecar.jobs.reports import (
    COPY_CLUSTERS,
    SCOPE,
    EnvoyError,
    count_copies,
    list_captures_off,
    list_scopes,
    read_admin,
    read_stats,
    select_service,
)

ENVOY_CHECKS = CheckFactory("Envoy")
FRACTION_DENOMINATOR = 1_000_000
STATS_FILTER = (
    rf"^(cluster\.{SCOPE}(old|new)(_shadow|_baseline)?\.(membership_|upstream_|lua\.copy\.)|vhost\..+\.route\.|"
    rf"runtime\.(control_plane|admin_overrides_active)|http\.ingress\.lua\.{SCOPE}(copies|websocket)\.)"
)
SHARED_STATS = ("runtime.control_plane.connected_state", "runtime.admin_overrides_active")
LOGIN_STAT = "http.ingress.lua.copies.connection_logins"
WEBSOCKET_STAT = "http.ingress.lua.websocket.ignored"
UNSAMPLED_STATS = {
    "a body was longer than announced or allowed": "http.ingress.lua.copies.too_large",
    "no memory to hold the request": "http.ingress.lua.copies.over_memory",
    "live requests of the version fail": "http.ingress.lua.copies.shed_failing",
    "live requests of the version queue": "http.ingress.lua.copies.shed_queueing",
    "baseline, live requests of the version fail": "http.ingress.lua.copies.baseline_shed_failing",
    "baseline, live requests of the version queue": "http.ingress.lua.copies.baseline_shed_queueing",
}
COPY_LOSS_STATS = {
    "copies queue": "lua.copy.shed",
    "too many at once": "upstream_rq_pending_overflow",
    "not connected": "upstream_rq_pending_failure_eject",
    "no endpoint": "upstream_cx_none_healthy",
}
UNMIRRORED_ROUTES = ("safe_plain", "unsafe_plain", "safe_uncopied", "unsafe_uncopied")
NUMERATOR_PATTERN = re.compile(r'"numerator"\s+value \{\s+number_value: ([0-9.e+]+)')
CONNECT_TIMEOUT_S = 1.0
STATS_INTERVAL_S = 1.0  # between two readings of Envoy's counters, if a connection from here fails
CONNECTION_REFUSED_TEXT = os.strerror(errno.ECONNREFUSED).lower()
OLD_CLUSTERS = ("old", "old_shadow", "old_baseline")  # one version with three connection pools
LIVE_CLUSTERS = ("old", "new")
PROBE_PATH = "/healthz"  # any status will do
PROBE_TIMEOUT_S = 5.0
MIN_OTHER_WAIT_S, MAX_OTHER_WAIT_S = 0.3, 1.5  # for a response while another connection is open: users may wait as long
MIN_CONNECTION_WAIT_S = 0.25  # more than a response on a new connection takes


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
        for host in hosts:
            totals.update({str(stat.get("name")): int(stat.get("value", 0)) for stat in host.get("stats", ())})
        is_ejected = any(host.get("health_status", {}).get("failed_outlier_check") for host in hosts)
        return cls(totals["cx_connect_fail"], totals["cx_active"], totals["rq_success"], is_ejected)


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
    """State of one Envoy and one of its services. `sampling` has the mirrored share of `safe` and `unsafe` requests."""

    url: str
    version: str
    service: str
    state: str
    stats: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)
    rule_sampling: Mapping[str, float] = field(default_factory=dict)  # share of each sampling rule
    old_endpoints: Sequence[EndpointReachability] = ()
    connection_waits: Sequence[str] = ()  # how responses of endpoints wait behind a connection
    services: Sequence[str] = ()  # of this Envoy
    captures_off: Sequence[str] = ()  # versions that nothing captures

    def count_requests(self, *routes: str) -> int:
        return sum(self.stats.get(f"vhost.service.route.{route}.upstream_rq_total", 0) for route in routes)

    @property
    def copy_counts(self) -> Mapping[str, int]:
        return count_copies([{"name": name, "value": value} for name, value in self.stats.items()])

    @property
    def mirrored_requests(self) -> int:
        """Count as the ledger does. The counters of the routes include retries."""
        return self.copy_counts["sampled"]


def read_envoy_facts(url: str, service: str = "") -> EnvoyFacts:
    """Read an Envoy's admin interface. Raise UnreachableError. An empty or unknown service means its first one.

    The call takes a second longer if a connection from this machine to old fails.
    """
    address = url.removeprefix("http://").rstrip("/")
    stats_path = f"/stats?format=json&filter={quote(STATS_FILTER)}"
    info, stats, runtime = _read_admin(address, "/server_info", stats_path, "/runtime")
    entries = runtime.get("entries", {})
    version = str(info.get("version", "")).split("/")
    info["node"] = {"cluster": "", **info.get("node", {})}
    scopes = list_scopes(info)
    service = service if service in scopes else next(iter(scopes))
    scope, values = scopes[service], read_stats(stats.get("stats", []))
    values = read_stats(select_service(stats.get("stats", []), scope)) | {  # those of the whole Envoy too
        name: values[name] for name in (*SHARED_STATS, WEBSOCKET_STAT) if name in values
    }
    return EnvoyFacts(
        url=url,
        version=version[1] if len(version) > 1 else "?",
        service=service,
        state=str(info.get("state", "")),
        stats=values,
        sampling={
            kind: _parse_runtime_share(entries.get(f"abreast.sample.{scope}{kind}", {})) for kind in ("safe", "unsafe")
        },
        rule_sampling={
            match[1]: _parse_runtime_share(entry)
            for key, entry in entries.items()
            if (match := re.fullmatch(rf"abreast\.rule\.{scope}([a-z0-9_-]+)\.sampled", key))
        },
        old_endpoints=tuple(probe_old_endpoints(address, scope)),
        connection_waits=tuple(probe_connections(address, scope)),
        services=tuple(scopes),
        captures_off=list_captures_off(info, service),
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


def probe_old_endpoints(admin_address: str, scope: str = "") -> Iterator[EndpointReachability]:
    """Connect to each endpoint of old. If a connection fails, Envoy's counters over a second decide."""

    def read_counts() -> dict[tuple[str, int], ConnectionCounts]:
        (clusters,) = _read_admin(admin_address, "/clusters?format=json")
        return count_connections(clusters, [scope + name for name in OLD_CLUSTERS])

    counts_before = counts_after = read_counts()
    connect_errors = {endpoint: try_connect(*endpoint) for endpoint in counts_before}
    if any(connect_errors[endpoint] or counts.failed_connects for endpoint, counts in counts_before.items()):
        time.sleep(STATS_INTERVAL_S)
        counts_after = read_counts()
    is_local_envoy = _is_loopback(urlsplit(f"//{admin_address}").hostname or "")
    for endpoint, before in counts_before.items():
        after = counts_after.get(endpoint, before)
        yield judge_reachability(endpoint, connect_errors[endpoint], before, after, is_local_envoy=is_local_envoy)


def probe_connections(admin_address: str, scope: str = "") -> Iterator[str]:
    """Send a few GET requests to each endpoint, and describe how its responses wait behind a connection."""
    (clusters,) = _read_admin(admin_address, "/clusters?format=json")
    for host, port in count_connections(clusters, [scope + name for name in LIVE_CLUSTERS]):
        if wait := find_connection_wait(host, port):
            yield f"{host}:{port} {wait}"


def find_connection_wait(host: str, port: int) -> str:
    """Return how a response of an endpoint waits behind a connection. Empty: it does not, or does not speak HTTP/1.1."""
    first = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    other = http.client.HTTPConnection(host, port)
    try:
        times = [_time_probe(first)]
        if first.sock is None:
            return ""  # the service closes each connection, so nothing waits behind it
        times += [_time_probe(first), _time_probe(first)]
        other.timeout = min(max(5 * max(times), MIN_OTHER_WAIT_S), MAX_OTHER_WAIT_S)
        try:
            times.append(_time_probe(other))
        except TimeoutError:
            if other.sock is None:
                return ""
            first.close()
            other.sock.settimeout(PROBE_TIMEOUT_S)
            other.sock.recv(1)  # raises TimeoutError if it answers neither way
            return "serves one connection at a time, so that users wait until another one's connection ends"
        wait = min(times[1:3]) - max(times[0], times[3])
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        first.close()
        other.close()
    if wait < MIN_CONNECTION_WAIT_S:
        return ""
    return f"works on after a response, so that the next one on its connection waits {wait:.2f} s"


def _time_probe(connection: http.client.HTTPConnection) -> float:
    """Return the seconds until the start of a response."""
    began = time.monotonic()
    connection.request("GET", PROBE_PATH)
    response = connection.getresponse()
    seconds = time.monotonic() - began
    response.read()
    return seconds


def count_connections(
    clusters: Mapping[str, Any], names: Sequence[str] = OLD_CLUSTERS
) -> dict[tuple[str, int], ConnectionCounts]:
    """Sum the counters of endpoints in Envoy's /clusters?format=json over the named clusters."""
    hosts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cluster in clusters.get("cluster_statuses", ()):
        for host in cluster.get("host_statuses", ()) if cluster.get("name") in names else ():
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
    is_live = facts.state == "LIVE"
    description += "" if is_live else f", is {facts.state}"
    yield ENVOY_CHECKS.make("admin", description, "wait, or see Envoy's log", warns=not is_live)
    if facts.stats.get("runtime.control_plane.connected_state"):
        yield ENVOY_CHECKS.make("control", "receives weights and sampling from a sidecar")
    else:
        observation = "not connected to a sidecar, so weights and sampling can't change"
        advice = "start the sidecar, or check its address in envoy.yaml (cluster `sidecar`)"
        yield ENVOY_CHECKS.make("control", observation, advice, fails=True)
    if facts.stats.get("runtime.admin_overrides_active"):
        observation = "values set on its admin interface override the sidecar's weights and sampling"
        advice = "remove them with POST /runtime_modify?KEY= on its socket, for each key that /runtime shows in the layer admin"
        yield ENVOY_CHECKS.make("override", observation, advice, warns=True)
    if facts.stats.get(LOGIN_STAT):
        observation = (
            "responses ask for a login that belongs to a connection (NTLM, Negotiate), so users can share logins"
        )
        yield ENVOY_CHECKS.make("logins", observation, "render with --connection-per-client", fails=True)
    if ignored := facts.stats.get(WEBSOCKET_STAT):
        observation = (
            f"{format_quantity(ignored, 'websocket request')} got 502, because the service answered 2xx with a body"
        )
        yield ENVOY_CHECKS.make("websockets", observation, "refuse websockets with 4xx in the service", warns=True)
    yield _check_old_endpoints(facts.old_endpoints)
    if facts.connection_waits:
        advice = "render with --max-requests-per-connection 1"
        yield ENVOY_CHECKS.make("connections", "; ".join(facts.connection_waits), advice, warns=True)
    healthy, total = (facts.stats.get(f"cluster.new.membership_{state}", 0) for state in ("healthy", "total"))
    observation = f"{healthy} of {format_quantity(total, 'endpoint')} healthy"
    advice = "start it, and check that its health path answers with a status below 500 within a second"
    yield ENVOY_CHECKS.make("new", observation, advice, fails=not healthy, warns=healthy != total)
    yield _check_sampling(facts)
    yield _check_requests(facts)
    if facts.mirrored_requests:
        yield _check_copies(facts)


def _check_old_endpoints(endpoints: Sequence[EndpointReachability]) -> Check:
    down = [endpoint for endpoint in endpoints if endpoint.problem]
    count_text = format_quantity(len(endpoints), "endpoint")
    if endpoints and not down:
        return ENVOY_CHECKS.make("old", f"{count_text} reached")
    problems = [f"{endpoint.address}: {endpoint.problem}" for endpoint in down]
    observation = "; ".join([f"{len(endpoints) - len(down)} of {count_text} reached", *problems])
    if down and not any(endpoint.is_certain for endpoint in down):
        advice = "run doctor on the machine of Envoy"
        return ENVOY_CHECKS.make("old", f"{observation} (from this machine)", advice, warns=True)
    advice = "start it: while it is down, users have no fallback for new"
    return ENVOY_CHECKS.make("old", observation, advice, fails=len(down) == len(endpoints), warns=True)


def _check_sampling(facts: EnvoyFacts) -> Check:
    safe, unsafe = facts.sampling.get("safe", 0.0), facts.sampling.get("unsafe", 0.0)
    is_sampling = bool(safe or unsafe or any(facts.rule_sampling.values()))
    rules = ", ".join(f"{name} {format_percent(share)}" for name, share in sorted(facts.rule_sampling.items()))
    rules_text = f"; by rules: {rules}" if rules else ""
    observation = (
        f"{format_percent(safe)} of safe requests (GET, HEAD, OPTIONS) "
        f"and {format_percent(unsafe)} of others are mirrored{rules_text}"
        f"{'' if is_sampling else ', so that no request is compared'}"
    )
    advice = 'abreast traffic set --sample-safe 10% --reason "compare"'
    return ENVOY_CHECKS.make("sampling", observation, advice, fails=not is_sampling)


def _check_requests(facts: EnvoyFacts) -> Check:
    total = facts.mirrored_requests + facts.count_requests(*UNMIRRORED_ROUTES)
    observation = f"{format_quantity(total, 'request')}, {format_count(facts.mirrored_requests)} of them mirrored"
    advice = "send more requests, or raise the sampling: abreast traffic set --sample-safe"
    if not total:
        observation = "no request has passed through Envoy since it started"
        advice = "send requests to Envoy's listener, not to the versions"
    elif (
        not facts.mirrored_requests
        and not facts.count_requests("safe_plain")
        and not facts.sampling.get("unsafe")
        and not any(facts.rule_sampling.values())
    ):
        observation += ": all have unsafe methods (POST, PUT, …), which Envoy does not mirror by default"
        advice = "send GET requests, or consider: abreast traffic set --sample-unsafe"
    return ENVOY_CHECKS.make("requests", observation, advice, warns=not facts.mirrored_requests)


def _check_copies(facts: EnvoyFacts) -> Check:
    sent_copies = sum(facts.copy_counts[cluster] for cluster in COPY_CLUSTERS) - facts.copy_counts["not_sent"]
    loss_counts = {
        f"{cluster} {cause}": facts.stats.get(f"cluster.{cluster}.{stat}", 0)
        for cluster in COPY_CLUSTERS
        for cause, stat in COPY_LOSS_STATS.items()
    }
    loss_counts |= {cause: facts.stats.get(stat, 0) for cause, stat in UNSAMPLED_STATS.items()}
    losses = [f"{name} {format_count(number)}" for name, number in loss_counts.items() if number]
    loss_text = f"; lost since Envoy started: {', '.join(losses)}" if losses else ""
    observation = f"{format_quantity(sent_copies, 'copy', 'copies')} sent{loss_text}"
    return ENVOY_CHECKS.make(
        "copies",
        observation,
        "check that this version runs; if copies queue, give it more processes, or lower the sampling: abreast traffic set",
        warns=bool(losses),
    )
