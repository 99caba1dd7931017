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
    if (bare_host != host) != (":" in bare_host) or not (
        _is_ip(bare_host) or HOST_PATTERN.fullmatch(bare_host)
    ):
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
    return (
        0.0
        if value.strip() in {"0", "0.0"}
        else _parse_bounded_duration(value, expected_format, MIN_DURATION_S)
    )


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
        raise ValueError(
            f"a path such as /healthz, or {TCP_HEALTH_CHECK} to check that the port accepts connections"
        )
    return path


def parse_sticky(value: str) -> StickyKey:
    kind, _, name = value.strip().partition(":")
    if (kind in {"header", "cookie"} and TOKEN_PATTERN.fullmatch(name)) or (kind == "source-ip" and not name):
        return StickyKey(kind, name.lower() if kind == "header" else name)
    raise ValueError("header:NAME, cookie:NAME or source-ip")


def parse_secret(value: str) -> str:
    if not re.fullmatch(r"[!-~]{16,200}", value.strip()):
        raise ValueError(
            "16 to 200 printable ASCII characters without spaces, such as `openssl rand -hex 16` prints"
        )
    return value.strip()


def parse_positive(value: str) -> int:
    number = count(value)
    if not 0 < number < 2**32:
        raise ValueError("a whole number, 1 or more")
    return number


@dataclass(frozen=True)
class EnvoySettings(EnvironmentSettings):
    service: str = setting("service", parse_name, "name of the service, as in the middleware")
    listen: SocketAddress = setting(  # noqa: RUF009  # setting() is dataclasses.field
        SocketAddress("127.0.0.1", 8080), parse_listener, "where users' requests arrive"
    )
    old: tuple[SocketAddress, ...] = setting(
        (SocketAddress("127.0.0.1", 8001),),
        parse_addresses,
        "endpoints of the old version, comma separated: IP addresses, or DNS names whose every address is used",
    )
    new: tuple[SocketAddress, ...] = setting(
        (SocketAddress("127.0.0.1", 8002),), parse_addresses, "endpoints of the new version"
    )
    health_path: str = setting(
        "/healthz",
        parse_health_check,
        "path that new is asked once a second, any answer below 500 is healthy; tcp: only connect",
    )
    connect_timeout: float = setting(1.0, parse_duration, "seconds to connect to an endpoint")
    per_try_timeout: float = setting(
        5.0,
        parse_optional_duration,
        "seconds without an answer after which a safe request is also tried on another endpoint, the first that answers wins; 0: never",
    )
    request_timeout: float = setting(
        0.0,
        parse_optional_duration,
        "seconds that a whole request may take, 0 for no limit; cuts streaming answers too",
    )
    idle_timeout: float = setting(
        300.0,
        parse_optional_duration,
        "seconds without a byte either way after which a request is ended; 0: never",
    )
    shadow_timeout: float = setting(30.0, parse_duration, "seconds after which a copy is given up")
    shadow_concurrency: int = setting(
        256, parse_positive, "copies under way at once to each version, more are dropped and counted"
    )
    mirror_body_limit: int = setting(
        8 * 2**20,
        parse_positive,
        "bytes; requests that announce a longer body are not mirrored, and copies wait in memory up to it",
    )
    sample_safe: float = setting(
        0.1,
        share,
        "share of safe requests (GET, HEAD, OPTIONS) that are mirrored, until the sidecar says otherwise",
    )
    sample_unsafe: float = setting(
        0.0, share, "share of unsafe requests that are mirrored, until the sidecar says otherwise"
    )
    baseline_share: float = setting(
        0.1,
        share,
        "share of the mirrored safe requests that old gets twice, until the sidecar says otherwise",
    )
    sticky: StickyKey = setting(  # noqa: RUF009  # same
        StickyKey(),
        parse_sticky,
        "what keeps a user on one version: header:NAME, cookie:NAME or source-ip; empty: each request by itself",
    )
    tester_secret: str = setting(
        "",
        parse_secret,
        "secret of testers, who choose a version with the header x-abreast-use: new SECRET (or old SECRET); empty: nobody may",
    )
    sidecar: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 50051),
        parse_address,
        "gRPC address of the sidecar, which sets weights and sampling",
    )
    admin: SocketAddress = setting(  # noqa: RUF009  # same
        SocketAddress("127.0.0.1", 9901),
        parse_listener,
        "address of Envoy's admin interface; one that is not loopback can only be read from",
    )
    node_id: str = setting("abreast", parse_line, "name of this Envoy, in its own and the sidecar's logs")
    trusted_hops: int = setting(
        0, count, "proxies in front of this Envoy whose x-forwarded-* headers are right"
    )
    tls_certificate: str = setting(
        "", parse_line, "file with the listener's certificate chain (PEM); empty: no TLS"
    )
    tls_key: str = setting("", parse_line, "file with the listener's private key (PEM)")
    old_tls: str = setting(
        "", parse_server_name, "name in old's certificate, to speak TLS to old; empty: no TLS"
    )
    old_ca: str = setting(
        SYSTEM_CA_FILE, parse_line, "file with the authorities that may sign old's certificate (PEM)"
    )
    new_tls: str = setting(
        "", parse_server_name, "name in new's certificate, to speak TLS to new; empty: no TLS"
    )
    new_ca: str = setting(
        SYSTEM_CA_FILE, parse_line, "file with the authorities that may sign new's certificate (PEM)"
    )
    upstream_http2: bool = setting(False, flag, "speak HTTP/2 to both versions (gRPC needs it), not HTTP/1.1")
    access_log: bool = setting(False, flag, "a JSON line on stdout for each request")

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
