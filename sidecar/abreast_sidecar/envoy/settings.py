"""Settings of Envoy's configuration. The engine is in abreast.settings."""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from abreast.settings import (
    DeclaredSettings,
    count,
    flag,
    matching,
    number,
    secret_key,
    service_name,
    setting,
    share,
    text,
)
from abreast_sidecar.envoy.sampling import SampleRule, parse_rules
from abreast_sidecar.errors import SettingError

DURATION_REQUIREMENT = "a number of seconds from 0.001 to 86400"  # Envoy's timers have a resolution of 1 ms
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # the name of a header or cookie, RFC 9110
HOST_NAME = r"[0-9A-Za-z_]([0-9A-Za-z_.-]*[0-9A-Za-z_])?"
MAX_PORT = 65535
SYSTEM_CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
TCP_HEALTH_CHECK = "tcp"
ENVIRONMENT_PREFIX = "env:"
SERVER_KEEPALIVE_S = {"gunicorn": 2.0, "uvicorn": 5.0, "Node": 5.0}  # their defaults


CAPTURE_MODES = ("auto", "envoy", "middleware", "off")
ANY_HOST, ANY_PREFIX = "*", "/"
ENVOY_WIDE_SETTINGS = (  # the others belong to one service
    *(
        "listen",
        "admin",
        "admin_socket",
        "node_id",
        "trusted_hops",
        "tls_certificate",
        "tls_key",
        "access_log",
        "tester_secret",
    ),
    *("sidecar", "sidecar_token", "sidecar_tls", "sidecar_ca", "sidecar_cert", "sidecar_key"),
    *("collector", "edge_key", "pair_timeout"),
)
SERVICE_NAME_PATTERN = re.compile("[0-9A-Za-z_-]{1,60}")  # part of the names of clusters and runtime keys

RUNTIME_LAYER = "abreast"


def name_scope(service: str) -> str:
    """Return the start of the names of a service's clusters, routes and statistics in an Envoy with several services."""
    return f"{service}-"


def rule_scope(scope: str) -> str:
    """Return the start of a rule's runtime keys for a scope of `name_scope`. Names of services and rules can contain hyphens."""
    return f"{scope.removesuffix('-')}/" if scope else ""


def name_layer(service: str) -> str:
    """Return the name of the runtime layer of a service, empty for the only service of an Envoy."""
    return f"{RUNTIME_LAYER}/{service}" if service else RUNTIME_LAYER


class SocketAddress(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_ip(self) -> bool:
        return _is_ip(self.host)

    @property
    def is_loopback(self) -> bool:
        return self.is_ip and ipaddress.ip_address(self.host).is_loopback


class StickyKey(NamedTuple):
    """The key that keeps a user on one version: kind is "header", "cookie", "source-ip", or "" for no key."""

    kind: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def parse_address(value: str) -> SocketAddress:
    requirement = "an address such as 10.0.0.7:8000, [::1]:8000 or shop.internal:8000"
    host, colon, port = value.strip().removeprefix("http://").removesuffix("/").rpartition(":")
    bare_host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= MAX_PORT:
        raise ValueError(requirement)
    if (bare_host != host) != (":" in bare_host) or not (_is_ip(bare_host) or re.fullmatch(HOST_NAME, bare_host)):
        raise ValueError(requirement)
    return SocketAddress(bare_host, int(port))


def parse_addresses(value: str) -> tuple[SocketAddress, ...]:
    addresses = tuple(parse_address(part) for part in value.split(",") if part.strip())
    if not addresses:
        raise ValueError("one or more addresses such as 10.0.0.7:8000,10.0.0.8:8000")
    return addresses


def parse_listener(value: str) -> SocketAddress:
    stripped = value.strip()
    try:
        listener = parse_address(f"0.0.0.0{stripped}" if stripped.startswith(":") else stripped)
    except ValueError:
        listener = None
    if listener is None or not listener.is_ip:
        raise ValueError("an IP address and port such as 127.0.0.1:8080, or :8080 for all addresses")
    return listener


capture_mode = matching("|".join(CAPTURE_MODES), "auto, envoy, middleware or off")
duration = number(float, DURATION_REQUIREMENT, ge=0.001, le=86_400)
server_name = matching(HOST_NAME, "the name in the version's certificate, such as shop.internal")
tester_secret = matching(
    "[!-~]{16,200}", "16 to 200 printable ASCII characters without spaces, such as `openssl rand -hex 16` prints"
)
parse_health_check = matching(
    f"{TCP_HEALTH_CHECK}|/[!-~]*",
    f"a path such as /healthz, or {TCP_HEALTH_CHECK} to check that the port accepts connections",
)
path_pattern = matching("/[A-Za-z0-9._~!$&'()*+;=:@%/-]*", "paths such as /search,/reports/*")


def parse_path_patterns(value: str) -> tuple[str, ...]:
    return tuple(path_pattern(part.strip()) for part in value.split(",") if part.strip())


host_pattern = matching(r"(\*\.)?" + HOST_NAME, "hosts such as shop.example,*.shop.example")


def parse_hosts(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(host_pattern(part).lower() for part in value.split(",") if part.strip()))


def parse_prefixes(value: str) -> tuple[str, ...]:
    requirement = "path prefixes such as /shop,/api/v2"
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(re.fullmatch("/[A-Za-z0-9._~!$&'()+;=:@%/-]*", part) and "//" not in part for part in parts):
        raise ValueError(requirement)
    return tuple(dict.fromkeys(part.rstrip("/") or ANY_PREFIX for part in parts))


def parse_edge_key(value: object) -> str:
    """Parse a key, or the name of the variable from which Envoy reads it, such as env:ABREAST_EDGE_KEY."""
    if isinstance(value, str) and re.fullmatch(f"{ENVIRONMENT_PREFIX}[A-Za-z_][A-Za-z0-9_]*", value.strip()):
        return value.strip()
    key: str = secret_key(value)
    return key


positive_count = number(int, "a whole number from 1 to 4294967295", ge=1, lt=2**32)


def optional_duration(value: str) -> float:
    if value.strip() in {"0", "0.0"}:
        return 0.0
    seconds: float = number(float, f"{DURATION_REQUIREMENT}, or 0 for none", ge=0.001, le=86_400)(value)
    return seconds


def parse_sticky(value: str) -> StickyKey:
    kind, _, name = value.strip().partition(":")
    if (kind in {"header", "cookie"} and re.fullmatch(TOKEN, name)) or (kind == "source-ip" and not name):
        return StickyKey(kind, name.lower() if kind == "header" else name)
    raise ValueError("header:NAME, cookie:NAME or source-ip")


@dataclass(frozen=True, repr=False)
class EnvoySettings(DeclaredSettings):
    error_class = SettingError

    service: str = setting("service", service_name, "Name of the service, as in the middleware")
    listen: SocketAddress = setting(  # noqa: RUF009  # setting() is dataclasses.field
        SocketAddress("127.0.0.1", 8080), parse_listener, "Address for users' requests"
    )
    old: tuple[SocketAddress, ...] = setting(
        (SocketAddress("127.0.0.1", 8001),),
        parse_addresses,
        "Endpoints of the old version, comma separated: IP addresses, or DNS names. Envoy uses every address of a name",
    )
    new: tuple[SocketAddress, ...] = setting(
        (SocketAddress("127.0.0.1", 8002),), parse_addresses, "Endpoints of the new version"
    )
    hosts: tuple[str, ...] = setting(
        (),
        parse_hosts,
        "Host names of the service, comma separated, such as shop.example,*.shop.example. Empty means all hosts",
    )
    prefixes: tuple[str, ...] = setting(
        (),
        parse_prefixes,
        "Paths of the service, comma separated: /shop stands for /shop and all paths below it. Empty means all paths",
    )
    health_path: str = setting(
        "/healthz",
        parse_health_check,
        "Path that Envoy requests from new once a second. Any status below 500 is healthy. With tcp, Envoy only connects",
    )
    connect_timeout: float = setting(1.0, duration, "Seconds to connect to an endpoint of new, and of old for a copy")
    old_connect_timeout: float = setting(
        0.0,
        optional_duration,
        "Seconds to connect to an endpoint of old. 0 means 60 if old has one endpoint, and 5 if another one can answer",
    )
    old_keepalive: float = setting(
        1.0,
        duration,
        "Seconds after which Envoy closes an idle connection to old. Keep it below the keep-alive time of the service",
    )
    new_keepalive: float = setting(1.0, duration, "Seconds after which Envoy closes an idle connection to new")
    max_requests_per_connection: int = setting(
        0,
        count(0, "requests"),
        "Requests after which Envoy closes a connection to a version. 0 sets no limit. Use 1 for servers that serve one connection at a time, or that work on after a response",
    )
    connection_per_client: bool = setting(
        False,
        flag,
        "Use separate connections to the versions for each connection of a client. Logins that belong to a connection (NTLM, Negotiate) need it",
    )
    per_try_timeout: float = setting(
        5.0,
        optional_duration,
        "Seconds without a response of new after which a safe request also goes to old. The first response wins. 0 disables it",
    )
    request_timeout: float = setting(
        0.0, optional_duration, "Seconds for a whole request, including streaming responses. 0 sets no limit"
    )
    idle_timeout: float = setting(
        0.0, optional_duration, "Seconds without a byte in either direction after which a request ends. 0 sets no limit"
    )
    shadow_timeout: float = setting(30.0, duration, "Seconds after which a copy is canceled")
    shadow_concurrency: int = setting(
        256, positive_count, "Maximum number of concurrent copies per version. More copies are dropped and counted"
    )
    shadow_calls: str = setting(
        "old",
        matching("old|new", "old or new"),
        "Version that answers requests which a shadow of another service makes: old or new. They need an edge key",
    )
    mirror_body_limit: int = setting(
        8 * 2**20,
        positive_count,
        "Bytes. Requests that announce a longer body are not mirrored, and copies wait in memory up to this size",
    )
    held_bytes_limit: int = setting(
        64 * 2**20,
        positive_count,
        "Bytes. Memory for sampled requests that wait for their live response, per worker thread of Envoy. Requests above it get no copy and are counted",
    )
    concurrent_paths: tuple[str, ...] = setting(
        (),
        parse_path_patterns,
        "Paths whose copy to the other version starts together with the live request, comma separated, such as /search,/reports/*. Elsewhere a copy waits for the live response",
    )
    uncopied_paths: tuple[str, ...] = setting(
        (),
        parse_path_patterns,
        "Paths that are never copied, because each request has an effect once, such as /links/*",
    )
    sample: tuple[SampleRule, ...] = setting(
        (),
        parse_rules,
        "Sampling rules: conditions of requests and the share of them to mirror, such as `POST /search read-only 100%`. The first rule that matches decides. Separate rules with `; `",
        repeatable="; ",
    )
    sample_safe: float = setting(
        0.1,
        share,
        "Initial share of the other safe requests (GET, HEAD, OPTIONS) that are mirrored, until the sidecar sets it",
    )
    sample_unsafe: float = setting(
        0.0, share, "Initial share of the other unsafe requests that are mirrored, until the sidecar sets it"
    )
    baseline_share: float = setting(
        0.1,
        share,
        "Initial share of mirrored safe requests that the answering version receives twice, until the sidecar sets it",
    )
    sticky: StickyKey = setting(  # noqa: RUF009  # same
        StickyKey(),
        parse_sticky,
        "Key that keeps a user on one version: header:NAME, cookie:NAME or source-ip. If empty, Envoy chooses a version per request",
    )
    tester_secret: str = setting(
        "",
        tester_secret,
        "Secret for testers, who choose a version with the header x-abreast-use: new SECRET (or old SECRET). Empty disables the choice",
        secret=True,
    )
    edge_key: str = setting(
        "",
        parse_edge_key,
        "Key by which services recognise sampled requests and copies of this Envoy, as in the middleware. With env:NAME, Envoy reads it from the variable NAME when it starts",
        secret=True,
    )
    sidecar: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 50051), parse_address, "gRPC address of the sidecar, which sets weights and sampling"
    )
    sidecar_token: str = setting(
        "",
        parse_edge_key,
        "Token that this Envoy sends to the sidecar. With env:NAME, Envoy reads it from the variable NAME when it starts",
        secret=True,
    )
    sidecar_tls: str = setting(
        "", server_name, "Name in the certificate of the sidecar. Empty disables TLS to the sidecar"
    )
    sidecar_ca: str = setting(
        SYSTEM_CA_FILE, text, "File with the authorities that may sign the certificate of the sidecar (PEM)"
    )
    sidecar_cert: str = setting("", text, "File with the certificate that Envoy shows to the sidecar (PEM)")
    sidecar_key: str = setting("", text, "File with the private key of this certificate (PEM)")
    collector: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 50052), parse_address, "Address of the collector, which receives Envoy's captures"
    )
    old_capture: str = setting(
        "auto",
        capture_mode,
        "Part that captures old: envoy, middleware, off (none), or auto. With auto, Envoy captures responses that no middleware marks as captured",
    )
    new_capture: str = setting("auto", capture_mode, "Part that captures new, as for old")
    body_limit: int = setting(
        256 * 1024,
        positive_count,
        "Bytes of each body that Envoy captures, as in the middleware. Longer bodies also get their length and a checksum",
    )
    captured_bytes_limit: int = setting(
        16 * 2**20,
        positive_count,
        "Bytes. Memory for captures whose response has not ended, per cluster and worker thread of Envoy. Requests above it are not captured and are counted",
    )
    pair_timeout: float = setting(
        10.0, duration, "Seconds that a pair waits for its captures, as in the middleware. Envoy sends a capture before"
    )
    admin: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 9901),
        parse_listener,
        "Address to read statistics, runtime values and state of Envoy. The sidecar reads its counts there",
    )
    admin_socket: str = setting(
        "",
        text,
        "Path of the Unix socket of Envoy's admin interface, which can change Envoy. Only Envoy's user can open it. Empty means /tmp/abreast-envoy-PORT.sock, with the port of ABREAST_ADMIN",
    )
    node_id: str = setting("abreast", text, "Name of this Envoy in its logs and in the logs of the sidecar")
    trusted_hops: int = setting(
        0, count(0, "proxies"), "Number of trusted proxies in front of Envoy that set x-forwarded-* headers"
    )
    tls_certificate: str = setting(
        "", text, "File with the certificate chain of the listener (PEM). Empty disables TLS"
    )
    tls_key: str = setting("", text, "File with the private key of the listener (PEM)")
    old_tls: str = setting("", server_name, "Name in the certificate of old. Empty disables TLS to old")
    old_ca: str = setting(SYSTEM_CA_FILE, text, "File with the authorities that may sign the certificate of old (PEM)")
    new_tls: str = setting("", server_name, "Name in the certificate of new. Empty disables TLS to new")
    new_ca: str = setting(SYSTEM_CA_FILE, text, "File with the authorities that may sign the certificate of new (PEM)")
    upstream_http2: bool = setting(False, flag, "Use HTTP/2 instead of HTTP/1.1 to both versions. gRPC needs it")
    access_log: bool = setting(False, flag, "Write a JSON line to stdout for each request")

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise SettingError(
                "ABREAST_TLS_CERTIFICATE and ABREAST_TLS_KEY go together: set both for TLS on the listener, or neither"
            )
        if bool(self.sidecar_cert) != bool(self.sidecar_key):
            raise SettingError("ABREAST_SIDECAR_CERT and ABREAST_SIDECAR_KEY go together: set both, or neither")
        if self.listen == self.admin:
            raise SettingError(f"ABREAST_LISTEN and ABREAST_ADMIN must differ, both are {self.listen}")
        for timeout in ("request_timeout", "idle_timeout"):
            if 0 < getattr(self, timeout) <= self.per_try_timeout:
                raise SettingError(
                    f"ABREAST_PER_TRY_TIMEOUT must be below ABREAST_{timeout.upper()}, which ends the request first: "
                    f"got {self.per_try_timeout:g} and {getattr(self, timeout):g} seconds"
                )

    @property
    def admin_socket_path(self) -> str:
        return self.admin_socket or f"/tmp/abreast-envoy-{self.admin.port}.sock"  # noqa: S108  # Envoy removes an old one of its user

    @property
    def captures_off(self) -> list[str]:
        """Return the versions that nothing captures."""
        return [name for name, mode in (("old", self.old_capture), ("new", self.new_capture)) if mode == "off"]

    @property
    def old_connect_seconds(self) -> float:
        """Return the time to connect to old. A service may accept late, as long as no other endpoint can answer."""
        return self.old_connect_timeout or (5.0 if len(self.old) > 1 else 60.0)

    @property
    def has_secrets(self) -> bool:
        """True if the rendered configuration contains a secret."""
        keys = [key for key in (self.edge_key, self.sidecar_token) if not key.startswith(ENVIRONMENT_PREFIX)]
        return any([self.tester_secret, *keys])

    def list_warnings(self) -> list[str]:
        """Return a sentence for each setting that works only with some services."""
        return [
            f"ABREAST_{version.upper()}_KEEPALIVE is {getattr(self, f'{version}_keepalive'):g} seconds: a service that closes "
            f"idle connections sooner ({servers}) closes some while a request arrives on them"
            for version in ("old", "new")
            if (
                servers := ", ".join(
                    f"{name} after {seconds:g}"
                    for name, seconds in SERVER_KEEPALIVE_S.items()
                    if seconds <= getattr(self, f"{version}_keepalive")
                )
            )
        ]


def covers_host(host: str, other: str) -> bool:
    """Return True if each name that `other` matches also matches `host`."""
    return host in {ANY_HOST, other} or (host.startswith("*.") and other.endswith(host[1:]))


def _covers_prefix(prefix: str, other: str) -> bool:
    return prefix in {ANY_PREFIX, other} or other.startswith(f"{prefix}/")


def list_conflicts(services: Sequence[EnvoySettings]) -> Iterator[tuple[tuple[str, str], str]]:
    """Return pairs of services that match the same requests, with an example, unless one of them is more specific."""
    for first, second in itertools.combinations(services, 2):
        for host, prefix, other_host, other_prefix in itertools.product(
            first.hosts or (ANY_HOST,), first.prefixes or (ANY_PREFIX,),
            second.hosts or (ANY_HOST,), second.prefixes or (ANY_PREFIX,),
        ):  # fmt: skip
            hosts = covers_host(host, other_host), covers_host(other_host, host)
            paths = _covers_prefix(prefix, other_prefix), _covers_prefix(other_prefix, prefix)
            is_second_more_specific, is_first_more_specific = hosts[0] and paths[0], hosts[1] and paths[1]
            if any(hosts) and any(paths) and is_first_more_specific == is_second_more_specific:
                name, path = (other_host if hosts[0] else host), (other_prefix if paths[0] else prefix)
                yield (first.service, second.service), f"{path} at {'any host' if name == ANY_HOST else name}"
                break
