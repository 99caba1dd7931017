"""Checks of the sidecar's endpoints, and of the middleware in both versions."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from abreast_sidecar.cli.doctor import Check, CheckFactory
from abreast_sidecar.client.output import enum_name, format_count, format_quantity, format_seconds, to_printable
from abreast_sidecar.client.sidecar_client import CHANNEL_OPTIONS, Credentials
from abreast_sidecar.settings import is_loopback

if TYPE_CHECKING:
    from abreast.v1.traffic_pb2 import GetTrafficResponse

SIDECAR_CHECKS = CheckFactory("sidecar")
SECURITY_CHECKS = CheckFactory("security")
LIST_PAIRS_METHOD = "/abreast.v1.ComparisonService/ListPairs"
STREAM_RUNTIME_METHOD = "/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime"
SIDECAR_PROBE_TIMEOUT_S = 3.0
MAX_READINESS_BYTES = 4096
SERVICE_CHECKS = CheckFactory("services")
SERVICE_VERSIONS = ("old", "new")
TRAFFIC_ADVICE = "see docs/traffic.md"
MAX_REPORT_AGE_S = 20.0  # a process reports every five seconds
DEPENDENCY_ADVICE = "see the checks of Redis and Postgres, and the sidecar's log"
MIDDLEWARE_LINE = 'app.add_middleware(ParallelRunMiddleware, service="{}", redis_url=…)'


def check_sidecar(address: str, http_url: str, service: str) -> Iterator[Check]:
    health_check, traffic = asyncio.run(_probe_grpc(address, service))
    yield health_check
    yield _check_readiness(http_url)
    if traffic is not None:
        for warning in traffic.warnings:
            yield SIDECAR_CHECKS.make("traffic", to_printable(warning), TRAFFIC_ADVICE, fails=True)
        yield from check_duplicate_node_ids([envoy.node for envoy in traffic.envoys])


def check_security(address: str, http_url: str, admin_addresses: Sequence[str]) -> Iterator[Check]:
    """Try what a stranger would try. On loopback, an open door is a warning, because only this machine can use it."""
    codes = asyncio.run(_probe_without_token(address))
    doors = {
        "token": (codes["call"] == "OK", "calls need no token", "set ABREAST_ADMIN_TOKEN"),
        "envoys": (codes["envoy"] == "INVALID_ARGUMENT", "Envoys need no token", "set ABREAST_ENVOY_TOKEN"),
        "tls": (codes["call"] != "UNAVAILABLE", "calls without TLS are answered", "set ABREAST_TLS_CERT_FILE"),
        "page": (_get_status(f"{http_url}/metrics") == http.HTTPStatus.OK, "the page needs no login", "see `token`"),
        "host": (
            _get_status(f"{http_url}/healthz", {"host": "rebound.invalid"}) == http.HTTPStatus.OK,
            "the page answers to any host name",
            "use the HTTP address of the sidecar, not of a proxy without a check",
        ),
    }
    for name, (is_open, observation, advice) in doors.items():
        is_local = is_loopback(address)
        text = observation if is_open else "protected"
        yield SECURITY_CHECKS.make(name, text, advice, fails=is_open and not is_local, warns=is_open)
    for admin in admin_addresses:
        is_open = _get_status(f"http://{admin.removeprefix('http://').rstrip('/')}/help") == http.HTTPStatus.OK
        text = f"Envoy at {admin} {'lets any web page and program change weights' if is_open else 'is read-only'}"
        yield SECURITY_CHECKS.make("admin", text, "render its file again with `abreast envoy render`", warns=is_open)


async def _probe_without_token(address: str) -> dict[str, str]:
    """Return the status codes of a call and of a stream of an Envoy without a token and without TLS."""
    import grpc.aio

    codes = {}
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        for name, method in (("call", LIST_PAIRS_METHOD), ("envoy", STREAM_RUNTIME_METHOD)):
            codes[name] = "OK"
            try:
                # An empty request of an Envoy has no node, so that it is refused with INVALID_ARGUMENT at the latest.
                probe: Any = channel.stream_stream(method)
                await probe(iter([b""]), timeout=SIDECAR_PROBE_TIMEOUT_S).read()
            except grpc.aio.AioRpcError as error:
                codes[name] = error.code().name
    return codes


def _get_status(url: str, headers: Mapping[str, str] | None = None) -> int:
    """Return the status of a GET request, 0 without an answer."""
    try:
        request = urllib.request.Request(url, headers=dict(headers or {}))  # noqa: S310  # the user's address
        with urllib.request.urlopen(request, timeout=SIDECAR_PROBE_TIMEOUT_S) as response:  # noqa: S310  # same
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return 0


async def _probe_grpc(address: str, service: str) -> tuple[Check, GetTrafficResponse | None]:
    """Return the check of the health service, and the traffic of the service. If it is empty, that of the only one."""
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from abreast.v1 import traffic_pb2, traffic_pb2_grpc

    credentials = Credentials.from_environment()
    async with credentials.open_channel(address) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=SIDECAR_PROBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            observation = f"no answer at {address} ({error.code().name.lower()})"
            advice = "start it (abreast up, abreast sidecar), or set its address with --address or ABREAST_SIDECAR"
            return SIDECAR_CHECKS.make("gRPC", observation, advice, fails=True), None
        traffic = None
        with contextlib.suppress(grpc.aio.AioRpcError):
            traffic = await traffic_pb2_grpc.TrafficServiceStub(channel).GetTraffic(
                traffic_pb2.GetTrafficRequest(service=service),
                timeout=SIDECAR_PROBE_TIMEOUT_S,
                metadata=credentials.metadata,
            )
    status = enum_name(health_pb2.HealthCheckResponse.ServingStatus, response.status)
    is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
    return SIDECAR_CHECKS.make("gRPC", f"{status} at {address}", DEPENDENCY_ADVICE, fails=not is_serving), traffic


def check_duplicate_node_ids(nodes: Sequence[str]) -> Iterator[Check]:
    for node, number in Counter(nodes).items():
        if number > 1:
            yield SIDECAR_CHECKS.make(
                "envoys",
                f"{number} Envoys share the node id {to_printable(node)}, so their acknowledgements can't be distinguished",
                "start each with `envoy --service-node NAME`, or render its file with --node-id NAME",
                warns=True,
            )


def _check_readiness(url: str) -> Check:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=SIDECAR_PROBE_TIMEOUT_S) as response:  # noqa: S310  # the user's address
            return SIDECAR_CHECKS.make("ready", _format_readiness_parts(response) or "yes")
    except urllib.error.HTTPError as error:
        observation = f"not ready: {_format_readiness_parts(error) or error.code}"
        return SIDECAR_CHECKS.make("ready", observation, DEPENDENCY_ADVICE, fails=True)
    except (OSError, http.client.HTTPException) as error:
        observation = f"no answer at {url}/readyz ({str(getattr(error, 'reason', error)).lower()})"
        return SIDECAR_CHECKS.make("ready", observation, "set its HTTP address with --http", warns=True)


def _format_readiness_parts(response: IO[bytes]) -> str:
    """Return `redis ok, workers ok` for {"parts": {…}}, or "" for any other body."""
    try:
        parts = json.loads(response.read(MAX_READINESS_BYTES))["parts"]
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
    redaction_key_id: str = ""

    @property
    def is_live(self) -> bool:
        return self.report_age_s < MAX_REPORT_AGE_S

    @classmethod
    def from_report(cls, report: dict[str, Any], server_time_s: float) -> ServiceProcess:
        return cls(
            host=f"{report.get('host', '?')}:{report.get('pid', '?')}",
            release=str(report.get("release") or ""),
            captures_by_version=_parse_counts(report.get("versions")),
            drops_by_reason=_parse_counts(report.get("dropped")),
            queued_captures=int((report.get("queue") or {}).get("count", 0)),
            report_age_s=server_time_s - float(report.get("seen") or 0.0),
            redaction_key_id=str(report.get("redaction_key") or ""),
        )


def _parse_counts(value: object) -> dict[str, int]:
    return {str(name): int(number) for name, number in value.items()} if isinstance(value, dict) else {}


def check_services(
    service: str,
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
    other_services: Sequence[str],
    captures_off: Collection[str] = (),
) -> Iterator[Check]:
    """Check the middleware. `mirrored_requests` is Envoy's count, or None if it is unknown.

    `other_services` are the services in Redis with another name. `captures_off` are the versions that nothing captures.
    """
    if not processes and set(captures_off) == set(SERVICE_VERSIONS):
        yield from map(_make_off_check, SERVICE_VERSIONS)
        return
    if not processes:
        other_text = f" (but of {', '.join(map(to_printable, other_services))})" if other_services else ""
        yield SERVICE_CHECKS.make(
            "middleware",
            f"no process of {service or 'any service'} has reported to this Redis{other_text}",
            f"add it to both versions: {MIDDLEWARE_LINE.format(service or 'shop')}; "
            "the service's name and redis_url must be the same as here",
            fails=True,
        )
        return
    live_count = sum(process.is_live for process in processes)
    observation = f"{_format_processes(live_count)} reported in the last {format_seconds(MAX_REPORT_AGE_S)}"
    if not live_count:
        observation = f"the last report of a process is {_format_last_report_age(processes)} old"
    advice = "check that the versions run and that they reach Redis"
    yield SERVICE_CHECKS.make("middleware", observation, advice, fails=not live_count)
    for version in SERVICE_VERSIONS:
        check = _check_version(version, processes, service, mirrored_requests)
        yield _make_off_check(version) if version in captures_off and check.state == "fail" else check
    yield _check_drops(processes)
    key_ids = {process.redaction_key_id for process in processes if process.is_live and process.captures_by_version}
    if len(key_ids) > 1:
        yield SERVICE_CHECKS.make(
            "keys",
            f"{_format_processes(live_count)} hash secrets with {len(key_ids)} keys, so these hashes are not compared",
            "set the same ABREAST_REDACT_KEY_FILE in both versions and the collector: see docs/middleware.md#key",
            warns=True,
        )


def _make_off_check(version: str) -> Check:
    observation = f"captures of {version} are off (ABREAST_{version.upper()}_CAPTURE)"
    return SERVICE_CHECKS.make(version, observation, "its requests are gaps: see docs/any-service.md", warns=True)


def _format_processes(number: int) -> str:
    return format_quantity(number, "process", "processes")


def _format_last_report_age(processes: Iterable[ServiceProcess]) -> str:
    return format_seconds(min(process.report_age_s for process in processes))


def _check_version(
    version: str, processes: Sequence[ServiceProcess], service: str, mirrored_requests: int | None
) -> Check:
    capturing_processes = [process for process in processes if process.captures_by_version.get(version)]
    live_processes = [process for process in capturing_processes if process.is_live]
    if live_processes:
        captures = sum(process.captures_by_version[version] for process in capturing_processes)
        releases = sorted({to_printable(process.release or "(no release)") for process in live_processes})
        origin = f"release {', '.join(releases)}, {_format_processes(len(live_processes))}"
        return SERVICE_CHECKS.make(version, f"{format_quantity(captures, 'capture')} from {origin}")
    if capturing_processes:
        return _check_silent_version(version, capturing_processes, processes, mirrored_requests)
    if mirrored_requests == 0:
        observation = "no capture yet, because Envoy has not mirrored any request yet"
        return SERVICE_CHECKS.make(version, observation, "see the checks of Envoy", warns=True)
    observation = "no capture"
    if any(process.captures_by_version for process in processes):
        observation += f", but {'new' if version == 'old' else 'old'} has captures"
    middleware_line = MIDDLEWARE_LINE.format(service)
    advice = f"check that {version} has the middleware, with the same service and redis_url: {middleware_line}"
    return SERVICE_CHECKS.make(version, observation, advice, fails=True)


def _check_silent_version(
    version: str,
    capturing_processes: Sequence[ServiceProcess],
    processes: Sequence[ServiceProcess],
    mirrored_requests: int | None,
) -> Check:
    observation = f"no process of {version} has reported for {_format_last_report_age(capturing_processes)}"
    if mirrored_requests == 0:
        advice = "check that the version runs; Envoy has not mirrored any request since it started"
    elif any(process.is_live and not process.captures_by_version for process in processes):
        observation += "; it may be one of the processes without captures so far"
        advice = "send requests through Envoy, and run doctor again"
    else:
        return SERVICE_CHECKS.make(
            version, observation, "check that it has the middleware, and uses this Redis", fails=True
        )
    return SERVICE_CHECKS.make(version, observation, advice, warns=True)


def _check_drops(processes: Sequence[ServiceProcess]) -> Check:
    drops_by_reason = Counter[str]()
    for process in processes:
        drops_by_reason.update(process.drops_by_reason)
    drops = [f"{to_printable(reason)} {format_count(n)}" for reason, n in sorted(drops_by_reason.items()) if n]
    queued_captures = format_quantity(sum(process.queued_captures for process in processes), "capture")
    advice = (
        "queue_*: Redis is slow or was unreachable; redis_rejected_*: Redis is at its limit; "
        "unproven_*: ABREAST_EDGE_KEY differs from Envoy's; invalid_headers: a client or proxy changed x-abreast-* headers; "
        "for other reasons, see the service's log"
    )
    dropped_text = f"captures dropped so far: {', '.join(drops)}"
    observation = dropped_text if drops else f"none; {queued_captures} in flight to Redis"
    return SERVICE_CHECKS.make("drops", observation, advice, warns=bool(drops))
