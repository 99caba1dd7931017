"""Settings of Envoy's configuration. The engine is in abreast.settings."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import NamedTuple

from abreast.settings import DeclaredSettings, count, flag, matching, number, service_name, setting, share, text
from abreast_sidecar.errors import SettingError

DURATION_REQUIREMENT = "a number of seconds from 0.001 to 86400"  # Envoy's timers have a resolution of 1 ms
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # the name of a header or cookie, RFC 9110
HOST_NAME = r"[0-9A-Za-z_]([0-9A-Za-z_.-]*[0-9A-Za-z_])?"
MAX_PORT = 65535
SYSTEM_CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
TCP_HEALTH_CHECK = "tcp"


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


duration = number(float, DURATION_REQUIREMENT, ge=0.001, le=86_400)
server_name = matching(HOST_NAME, "the name in the version's certificate, such as shop.internal")
tester_secret = matching(
    "[!-~]{16,200}", "16 to 200 printable ASCII characters without spaces, such as `openssl rand -hex 16` prints"
)
parse_health_check = matching(
    f"{TCP_HEALTH_CHECK}|/[!-~]*",
    f"a path such as /healthz, or {TCP_HEALTH_CHECK} to check that the port accepts connections",
)
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
    health_path: str = setting(
        "/healthz",
        parse_health_check,
        "Path that Envoy requests from new once a second. Any status below 500 is healthy. With tcp, Envoy only connects",
    )
    connect_timeout: float = setting(1.0, duration, "Seconds to connect to an endpoint")
    per_try_timeout: float = setting(
        5.0,
        optional_duration,
        "Seconds without a response after which a safe request also goes to another endpoint. The first response wins. 0 disables it",
    )
    request_timeout: float = setting(
        0.0, optional_duration, "Seconds for a whole request, including streaming responses. 0 sets no limit"
    )
    idle_timeout: float = setting(
        300.0,
        optional_duration,
        "Seconds without a byte in either direction after which a request ends. 0 sets no limit",
    )
    shadow_timeout: float = setting(30.0, duration, "Seconds after which a copy is canceled")
    shadow_concurrency: int = setting(
        256, positive_count, "Maximum number of concurrent copies per version. More copies are dropped and counted"
    )
    mirror_body_limit: int = setting(
        8 * 2**20,
        positive_count,
        "Bytes. Requests that announce a longer body are not mirrored, and copies wait in memory up to this size",
    )
    sample_safe: float = setting(
        0.1, share, "Initial share of safe requests (GET, HEAD, OPTIONS) that are mirrored, until the sidecar sets it"
    )
    sample_unsafe: float = setting(
        0.0, share, "Initial share of unsafe requests that are mirrored, until the sidecar sets it"
    )
    baseline_share: float = setting(
        0.1, share, "Initial share of mirrored safe requests that old receives twice, until the sidecar sets it"
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
    sidecar: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 50051), parse_address, "gRPC address of the sidecar, which sets weights and sampling"
    )
    admin: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 9901),
        parse_listener,
        "Address of Envoy's admin interface. It is read-only unless the address is loopback",
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
        if self.listen == self.admin:
            raise SettingError(f"ABREAST_LISTEN and ABREAST_ADMIN must differ, both are {self.listen}")
