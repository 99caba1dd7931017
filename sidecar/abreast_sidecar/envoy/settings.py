"""What an envoy.yaml can be made of; each setting is also the variable ABREAST_<NAME>."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import EnvironmentSettings, address, count, flag, setting, share

MAX_DURATION_S = 86_400.0  # seconds
MIN_DURATION_S = 0.001  # seconds; Envoy's timers have milliseconds
TOKEN_PATTERN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's or a cookie's name, RFC 9110
HOST_PATTERN = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]*[0-9A-Za-z_])?")
SYSTEM_CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
TCP_HEALTH_CHECK = "tcp"


class SocketAddress(NamedTuple):
    host: str
    port: int

    @property
    def is_ip(self) -> bool:
        return _is_ip(self.host)

    @property
    def is_loopback(self) -> bool:
        return self.is_ip and ipaddress.ip_address(self.host).is_loopback


class StickyKey(NamedTuple):
    """What keeps a user on one version: kind is "header", "cookie", "source-ip" or "" for nothing."""

    kind: str = ""
    name: str = ""


def parse_address(value: str) -> SocketAddress:
    expected_format = "an address such as 10.0.0.7:8000, [::1]:8000 or shop.internal:8000"
    stripped = value.strip().removeprefix("http://").removesuffix("/")
    host, colon, port = stripped.rpartition(":")
    bare_host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= 65535:
        raise ValueError(expected_format)
    if (bare_host != host) != (":" in bare_host) or not (_is_ip(bare_host) or HOST_PATTERN.fullmatch(bare_host)):
        raise ValueError(expected_format)
    return SocketAddress(bare_host, int(port))


def parse_addresses(value: str) -> tuple[SocketAddress, ...]:
    addresses = tuple(parse_address(part) for part in value.split(",") if part.strip())
    if not addresses:
        raise ValueError("one or more addresses such as 10.0.0.7:8000,10.0.0.8:8000")
    return addresses


def parse_listener(value: str) -> SocketAddress:
    try:
        listen_address = parse_address(address(value))
    except ValueError:
        listen_address = None
    if listen_address is None or not listen_address.is_ip:
        raise ValueError("an IP address and port such as 127.0.0.1:8080, or :8080 for all addresses")
    return listen_address


def parse_duration(value: str) -> float:
    return _parse_bounded_duration(
        value, f"a number of seconds from {MIN_DURATION_S:g} to {MAX_DURATION_S:g}", MIN_DURATION_S
    )


def parse_optional_duration(value: str) -> float:
    expected_format = f"a number of seconds from {MIN_DURATION_S:g} to {MAX_DURATION_S:g}, or 0 for none"
    return 0.0 if value.strip() in {"0", "0.0"} else _parse_bounded_duration(value, expected_format, MIN_DURATION_S)


def parse_line(value: str) -> str:
    """Text on one line, since it becomes part of a configuration."""
    if not value.strip() or not value.strip().isprintable():
        raise ValueError("some text on one line")
    return value.strip()


def parse_name(value: str) -> str:
    text = parse_line(value)
    if len(text) > 100 or re.search(r"[{}/ ]", text):
        raise ValueError("a name such as shop: without spaces, at most 100 characters, none of { } / in it")
    return text


def parse_server_name(value: str) -> str:
    if not HOST_PATTERN.fullmatch(value.strip()):
        raise ValueError("the name in the version's certificate, such as shop.internal")
    return value.strip()


def parse_health_check(value: str) -> str:
    path = parse_line(value)
    if path != TCP_HEALTH_CHECK and (not path.startswith("/") or " " in path):
        raise ValueError(f"a path such as /healthz, or {TCP_HEALTH_CHECK} to check that the port accepts connections")
    return path


def parse_sticky(value: str) -> StickyKey:
    kind, _, name = value.strip().partition(":")
    if (kind in {"header", "cookie"} and TOKEN_PATTERN.fullmatch(name)) or (kind == "source-ip" and not name):
        return StickyKey(kind, name.lower() if kind == "header" else name)
    raise ValueError("header:NAME, cookie:NAME or source-ip")


def parse_secret(value: str) -> str:
    if not re.fullmatch(r"[!-~]{16,200}", value.strip()):
        raise ValueError("16 to 200 printable ASCII characters without spaces, such as `openssl rand -hex 16` prints")
    return value.strip()


def parse_positive(value: str) -> int:
    number = count(value)
    if not 0 < number < 2**32:
        raise ValueError("a whole number, 1 or more")
    return number


@dataclass(frozen=True)
class EnvoySettings(EnvironmentSettings):
    service: str = setting("service", parse_name, "Name of the service, as in the middleware")
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
    connect_timeout: float = setting(1.0, parse_duration, "Seconds to connect to an endpoint")
    per_try_timeout: float = setting(
        5.0,
        parse_optional_duration,
        "Seconds without a response after which a safe request also goes to another endpoint. The first response wins. 0 disables it",
    )
    request_timeout: float = setting(
        0.0, parse_optional_duration, "Seconds for a whole request, including streaming responses. 0 sets no limit"
    )
    idle_timeout: float = setting(
        300.0,
        parse_optional_duration,
        "Seconds without a byte in either direction after which a request ends. 0 sets no limit",
    )
    shadow_timeout: float = setting(30.0, parse_duration, "Seconds after which a copy is canceled")
    shadow_concurrency: int = setting(
        256, parse_positive, "Maximum number of concurrent copies per version. More copies are dropped and counted"
    )
    mirror_body_limit: int = setting(
        8 * 2**20,
        parse_positive,
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
        parse_secret,
        "Secret for testers, who choose a version with the header x-abreast-use: new SECRET (or old SECRET). Empty disables the choice",
    )
    sidecar: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 50051), parse_address, "gRPC address of the sidecar, which sets weights and sampling"
    )
    admin: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 9901),
        parse_listener,
        "Address of Envoy's admin interface. It is read-only unless the address is loopback",
    )
    node_id: str = setting("abreast", parse_line, "Name of this Envoy in its logs and in the logs of the sidecar")
    trusted_hops: int = setting(0, count, "Number of trusted proxies in front of Envoy that set x-forwarded-* headers")
    tls_certificate: str = setting(
        "", parse_line, "File with the certificate chain of the listener (PEM). Empty disables TLS"
    )
    tls_key: str = setting("", parse_line, "File with the private key of the listener (PEM)")
    old_tls: str = setting("", parse_server_name, "Name in the certificate of old. Empty disables TLS to old")
    old_ca: str = setting(
        SYSTEM_CA_FILE, parse_line, "File with the authorities that may sign the certificate of old (PEM)"
    )
    new_tls: str = setting("", parse_server_name, "Name in the certificate of new. Empty disables TLS to new")
    new_ca: str = setting(
        SYSTEM_CA_FILE, parse_line, "File with the authorities that may sign the certificate of new (PEM)"
    )
    upstream_http2: bool = setting(False, flag, "Use HTTP/2 instead of HTTP/1.1 to both versions. gRPC needs it")
    access_log: bool = setting(False, flag, "Write a JSON line to stdout for each request")

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise SettingError(
                "ABREAST_TLS_CERTIFICATE and ABREAST_TLS_KEY go together: set both for TLS on the listener, or neither"
            )
        if self.listen == self.admin:
            raise SettingError(
                f"ABREAST_LISTEN and ABREAST_ADMIN must differ, both are {self.listen.host}:{self.listen.port}"
            )


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _parse_bounded_duration(value: str, expected_format: str, minimum_s: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(expected_format) from None
    if math.isnan(number) or not minimum_s <= number <= MAX_DURATION_S:
        raise ValueError(expected_format)
    return number


def to_env_value(value: object) -> str:
    """A setting's value as it would stand in its variable."""
    match value:
        case SocketAddress():
            return f"[{value.host}]:{value.port}" if ":" in value.host else f"{value.host}:{value.port}"
        case StickyKey():
            return f"{value.kind}:{value.name}" if value.name else value.kind
        case tuple():
            return ",".join(map(to_env_value, value))
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)
