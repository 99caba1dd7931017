"""What an envoy.yaml can be made of; each setting is also the variable ABREAST_<NAME>."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from abreast_sidecar.errors import SettingError
from abreast_sidecar.settings import FromEnvironment, address, count, flag, setting, share

LONGEST = 86_400.0  # seconds
SMALLEST = 0.001  # seconds; Envoy's timers have milliseconds
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's or a cookie's name, RFC 9110
HOST = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]*[0-9A-Za-z_])?")
SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"
TCP = "tcp"


class Endpoint(NamedTuple):
    host: str
    port: int

    @property
    def is_ip(self) -> bool:
        return _ip(self.host)

    @property
    def is_loopback(self) -> bool:
        return self.is_ip and ipaddress.ip_address(self.host).is_loopback


class Sticky(NamedTuple):
    """What keeps a user on one version: kind is "header", "cookie", "source-ip" or "" for nothing."""

    kind: str = ""
    name: str = ""


def endpoint(value: str) -> Endpoint:
    wanted = "an address such as 10.0.0.7:8000, [::1]:8000 or shop.internal:8000"
    stripped = value.strip().removeprefix("http://").removesuffix("/")
    host, colon, port = stripped.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= 65535:
        raise ValueError(wanted)
    if (bare != host) != (":" in bare) or not (_ip(bare) or HOST.fullmatch(bare)):
        raise ValueError(wanted)
    return Endpoint(bare, int(port))


def endpoints(value: str) -> tuple[Endpoint, ...]:
    found = tuple(endpoint(part) for part in value.split(",") if part.strip())
    if not found:
        raise ValueError("one or more addresses such as 10.0.0.7:8000,10.0.0.8:8000")
    return found


def listener(value: str) -> Endpoint:
    try:
        found = endpoint(address(value))
    except ValueError:
        found = None
    if found is None or not found.is_ip:
        raise ValueError("an IP address and port such as 127.0.0.1:8080, or :8080 for all addresses")
    return found


def duration(value: str) -> float:
    return _duration(value, f"a number of seconds from {SMALLEST:g} to {LONGEST:g}", SMALLEST)


def duration_or_none(value: str) -> float:
    wanted = f"a number of seconds from {SMALLEST:g} to {LONGEST:g}, or 0 for none"
    return 0.0 if value.strip() in {"0", "0.0"} else _duration(value, wanted, SMALLEST)


def line(value: str) -> str:
    """Text on one line, since it becomes part of a configuration."""
    if not value.strip() or not value.strip().isprintable():
        raise ValueError("some text on one line")
    return value.strip()


def name(value: str) -> str:
    text = line(value)
    if len(text) > 100 or re.search(r"[{}/ ]", text):
        raise ValueError("a name such as shop: without spaces, at most 100 characters, none of { } / in it")
    return text


def server_name(value: str) -> str:
    if not HOST.fullmatch(value.strip()):
        raise ValueError("the name in the version's certificate, such as shop.internal")
    return value.strip()


def health(value: str) -> str:
    path = line(value)
    if path != TCP and (not path.startswith("/") or " " in path):
        raise ValueError(f"a path such as /healthz, or {TCP} to check that the port accepts connections")
    return path


def sticky(value: str) -> Sticky:
    kind, _, name = value.strip().partition(":")
    if (kind in {"header", "cookie"} and TOKEN.fullmatch(name)) or (kind == "source-ip" and not name):
        return Sticky(kind, name.lower() if kind == "header" else name)
    raise ValueError("header:NAME, cookie:NAME or source-ip")


def secret(value: str) -> str:
    if not re.fullmatch(r"[!-~]{16,200}", value.strip()):
        raise ValueError(
            "16 to 200 printable ASCII characters without spaces, such as `openssl rand -hex 16` prints"
        )
    return value.strip()


def positive(value: str) -> int:
    number = count(value)
    if not 0 < number < 2**32:
        raise ValueError("a whole number, 1 or more")
    return number


@dataclass(frozen=True)
class EnvoySettings(FromEnvironment):
    service: str = setting("service", name, "name of the service, as in the middleware")
    listen: Endpoint = setting(  # noqa: RUF009  # setting() is dataclasses.field
        Endpoint("127.0.0.1", 8080), listener, "where users' requests arrive"
    )
    old: tuple[Endpoint, ...] = setting(
        (Endpoint("127.0.0.1", 8001),),
        endpoints,
        "endpoints of the old version, comma separated: IP addresses, or DNS names whose every address is used",
    )
    new: tuple[Endpoint, ...] = setting(
        (Endpoint("127.0.0.1", 8002),), endpoints, "endpoints of the new version"
    )
    health_path: str = setting(
        "/healthz",
        health,
        "path that new is asked once a second, any answer below 500 is healthy; tcp: only connect",
    )
    connect_timeout: float = setting(1.0, duration, "seconds to connect to an endpoint")
    try_timeout: float = setting(
        5.0,
        duration_or_none,
        "seconds without an answer after which a safe request is also tried on another endpoint, the first that answers wins; 0: never",
    )
    request_timeout: float = setting(
        0.0,
        duration_or_none,
        "seconds that a whole request may take, 0 for no limit; cuts streaming answers too",
    )
    idle_timeout: float = setting(
        300.0, duration_or_none, "seconds without a byte either way after which a request is ended; 0: never"
    )
    shadow_timeout: float = setting(30.0, duration, "seconds after which a copy is given up")
    shadow_concurrency: int = setting(
        256, positive, "copies under way at once to each version, more are dropped and counted"
    )
    mirror_body_limit: int = setting(
        8 * 2**20,
        positive,
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
    sticky: Sticky = setting(  # noqa: RUF009  # same
        Sticky(),
        sticky,
        "what keeps a user on one version: header:NAME, cookie:NAME or source-ip; empty: each request by itself",
    )
    testers: str = setting(
        "",
        secret,
        "secret of testers, who choose a version with the header x-abreast-use: new SECRET (or old SECRET); empty: nobody may",
    )
    sidecar: Endpoint = setting(  # noqa: RUF009  # same
        Endpoint("127.0.0.1", 50051), endpoint, "gRPC address of the sidecar, which sets weights and sampling"
    )
    admin: Endpoint = setting(  # noqa: RUF009  # same
        Endpoint("127.0.0.1", 9901),
        listener,
        "address of Envoy's admin interface; one that is not loopback can only be read from",
    )
    node_id: str = setting("abreast", line, "name of this Envoy, in its own and the sidecar's logs")
    trusted_hops: int = setting(
        0, count, "proxies in front of this Envoy whose x-forwarded-* headers are right"
    )
    tls_certificate: str = setting(
        "", line, "file with the listener's certificate chain (PEM); empty: no TLS"
    )
    tls_key: str = setting("", line, "file with the listener's private key (PEM)")
    old_tls: str = setting("", server_name, "name in old's certificate, to speak TLS to old; empty: no TLS")
    old_ca: str = setting(SYSTEM_CA, line, "file with the authorities that may sign old's certificate (PEM)")
    new_tls: str = setting("", server_name, "name in new's certificate, to speak TLS to new; empty: no TLS")
    new_ca: str = setting(SYSTEM_CA, line, "file with the authorities that may sign new's certificate (PEM)")
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


def _ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _duration(value: str, wanted: str, low: float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(wanted) from None
    if math.isnan(number) or not low <= number <= LONGEST:
        raise ValueError(wanted)
    return number


def written(value: object) -> str:
    """A setting's value as it would stand in its variable."""
    match value:
        case Endpoint():
            return f"[{value.host}]:{value.port}" if ":" in value.host else f"{value.host}:{value.port}"
        case Sticky():
            return f"{value.kind}:{value.name}" if value.name else value.kind
        case tuple():
            return ",".join(map(written, value))
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)
