"""Settings of the sidecar. The engine is in abreast.settings."""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from abreast.settings import (
    ENV_PREFIX,
    DeclaredSettings,
    comma_list,
    count,
    flag,
    header_names,
    mask_passwords,
    matching,
    redis_url,
    seconds,
    setting,
    share,
    text,
)
from abreast.settings import Settings as CaptureSettings
from abreast_sidecar.compare.endpoints import TemplateError, parse_template
from abreast_sidecar.errors import SettingError

__all__ = [
    "ENV_PREFIX",
    "CollectorSettings",
    "Settings",
    "database_url",
    "mask_passwords",
    "redis_url",
    "seconds",
    "share",
    "text",
]

SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
MIN_CONTROL_KEY_CHARS = 32
MAX_PORT = 65535
PROXY_SCOPES = frozenset({"read", "bodies"})
DEFAULT_COLLECTOR = "127.0.0.1:50052"
COLLECTOR_DOC = "Address of the collector, which receives the captures that Envoy makes"
DESCRIPTORS_DOC = "Descriptors of gRPC services, to compare calls by fields: descriptor sets as files, or addresses with reflection such as grpc://127.0.0.1:8002, comma separated"
ANY_SERVICE = "-"  # each message to the collector names its service


def database_url(value: str) -> str:
    """Parse a URL, or the key-value form of libpq."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        parameters = conninfo_to_dict(text(value))
        for port in str(parameters.get("port") or "5432").split(","):
            listen_address(f":{port or 5432}")
    except (psycopg.Error, ValueError):
        raise ValueError("a URL such as postgresql://127.0.0.1:5432/abreast") from None
    return value.strip()


http_url = matching(r"https?://[^/\s?#]+(/[^\s?#]*)?", "a URL such as http://127.0.0.1:8001")


def webhook_urls(value: str) -> tuple[str, ...]:
    urls = comma_list(value)
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("URLs such as https://hooks.example.com/abreast, comma separated")
    return urls


def webhook_secret(value: str) -> str:
    """Parse a Standard Webhooks secret."""
    requirement = f"{SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64"
    secret = value.strip()
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        raise ValueError(requirement) from None
    if not secret.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(requirement)
    return secret


def control_key(value: str) -> str:
    if len(value.strip()) < MIN_CONTROL_KEY_CHARS:
        raise ValueError(f"at least {MIN_CONTROL_KEY_CHARS} random characters")
    return value.strip()


def listen_address(value: str) -> str:
    """Parse host:port. An empty host, as in `:8080`, means all addresses."""
    host, colon, port = value.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) > MAX_PORT:
        raise ValueError("an address such as 127.0.0.1:8080")
    return f"{host or '0.0.0.0'}:{port}"


def is_loopback(listen: str) -> bool:
    """Return True if only this machine can reach the address host:port."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ip_networks(value: str) -> tuple[str, ...]:
    networks = comma_list(value)
    try:
        for network in networks:
            ipaddress.ip_network(network, strict=False)
    except ValueError:
        raise ValueError("IP addresses or networks such as 10.0.0.0/8, comma separated") from None
    return networks


def proxy_scopes(value: str) -> tuple[str, ...]:
    scopes = comma_list(value)
    if not scopes or not set(scopes) <= PROXY_SCOPES:
        raise ValueError(f"scopes of {', '.join(sorted(PROXY_SCOPES))}, comma separated")
    return scopes


def endpoint_templates(value: str) -> tuple[str, ...]:
    templates = comma_list(value)
    for template in templates:
        try:
            parse_template(template)
        except TemplateError as error:
            raise ValueError(
                f"path templates such as GET /users/{{name}}, comma separated ({template}: {error})"
            ) from None
    return templates


def openapi_documents(value: str) -> tuple[str, ...]:
    documents = comma_list(value)
    for document in documents:
        if not document.startswith(("http://", "https://")) and not Path(document).is_file():
            raise ValueError(f"URLs or files that exist, comma separated ({document} does not)")
    return documents


def descriptor_sources(value: str) -> tuple[str, ...]:
    from abreast_sidecar.compare.messages import DescriptorError, parse_descriptor_set  # protobuf takes long

    sources = comma_list(value)
    for source in sources:
        problem = ""
        if not re.match("grpcs?://", source):
            try:
                parse_descriptor_set(Path(source).read_bytes())
            except OSError as error:
                problem = f"{error.strerror}"
            except DescriptorError as error:
                problem = str(error)
        elif not re.fullmatch(r"grpcs?://[^/\s:]+:\d{1,5}", source):
            problem = "no address with a port"
        if problem:
            raise ValueError(
                "descriptor sets, such as protoc --include_imports --descriptor_set_out writes, or addresses such as "
                f"grpc://127.0.0.1:8002, comma separated ({source}: {problem})"
            )
    return sources


header_name = matching("[0-9A-Za-z-]{1,100}", "the name of a header, such as x-forwarded-email")
access_token = matching(
    "[0-9A-Za-z._~+/=-]{32,200}", "32 to 200 letters, digits or any of ._~+/=-, such as `openssl rand -hex 32` prints"
)


@dataclass(frozen=True, repr=False)
class Settings(DeclaredSettings):
    error_class = SettingError

    redis_url: str = setting("redis://127.0.0.1:6379/0", redis_url, "Redis or Valkey that services send captures to")
    postgres_url: str = setting("postgresql://127.0.0.1:5432/abreast", database_url, "Postgres that holds the ledger")
    postgres_direct_url: str = setting(
        "",
        database_url,
        "Direct Postgres URL for LISTEN/NOTIFY and leader election. Required if ABREAST_POSTGRES_URL goes through a transaction-mode pooler",
    )
    grpc_listen: str = setting(
        "127.0.0.1:50051", listen_address, "Address of the gRPC API and of Envoy's control plane"
    )
    http_listen: str = setting("127.0.0.1:8090", listen_address, "Address of health, metrics and the web page")
    collector_listen: str = setting(DEFAULT_COLLECTOR, listen_address, COLLECTOR_DOC)
    admin_token: str = setting(
        "",
        access_token,
        "Token with all scopes, the same on all sidecars. If it is set, all calls and pages need a token",
        secret=True,
    )
    envoy_token: str = setting(
        "",
        access_token,
        "Token that Envoys send. If it is set, an Envoy without a token gets no traffic settings",
        secret=True,
    )
    tls_cert_file: str = setting("", text, "Certificate chain of both listeners, as a PEM file")
    tls_key_file: str = setting("", text, "Private key of the certificate, as a PEM file")
    tls_client_ca_file: str = setting(
        "", text, "Certificate authority of clients, as a PEM file. If it is set, clients need a certificate"
    )
    insecure: bool = setting(
        False, flag, "true lets the sidecar listen beyond loopback without TLS, tokens or edge key, as in a mesh"
    )
    page_hosts: tuple[str, ...] = setting(
        (),
        comma_list,
        "DNS names of the HTTP listener, comma separated. Other names but localhost are refused; IP addresses are not",
    )
    proxy_user_header: str = setting(
        "", header_name, "Request header in which a trusted proxy names the user of the page. None disables it"
    )
    proxy_addresses: tuple[str, ...] = setting(
        (), ip_networks, "Addresses or networks of the trusted proxy, comma separated"
    )
    proxy_scopes: tuple[str, ...] = setting(
        ("read",), proxy_scopes, "Scopes of users that the trusted proxy names: read, bodies"
    )
    envoy_admin: tuple[str, ...] = setting(
        (),
        comma_list,
        "Admin addresses of the Envoys, comma separated. The sidecar compares their counts with the ledger",
    )
    workers: int = setting(0, count(0, "processes"), "Worker processes. 0 runs the worker inside the main process")
    batch_size: int = setting(500, count(0, "pairs"), "Pairs that a worker reads, compares and commits per batch")
    claim_idle: float = setting(
        30.0, seconds, "Seconds after which another worker takes over the entries of a dead worker"
    )
    batch_bytes: int = setting(
        64 * 1024 * 1024,
        count(0, "bytes"),
        "Target size of a batch in bytes of captures. A worker holds two batches at a time",
    )
    examples_per_finding: int = setting(5, count(0, "pairs"), "Pairs per finding whose bodies are kept as examples")
    examples_bytes: int = setting(
        1024 * 1024 * 1024,
        count(0, "bytes"),
        "Total size of all examples in bytes, compressed. The largest are deleted first, but each open finding keeps one",
    )
    retention_days: int = setting(14, count(0, "days"), "Days that pairs are kept")
    retention_bytes: int = setting(
        0,
        count(0, "bytes"),
        "Total size of the pairs in Postgres in bytes. Above it, the oldest day is deleted, but never today. 0 sets no limit",
    )
    volatile_headers: tuple[str, ...] = setting(
        (), header_names, "Response headers to ignore in addition to the built-in list, comma separated"
    )
    endpoints: tuple[str, ...] = setting(
        (), endpoint_templates, "Path templates of endpoints, such as GET /users/{name}, comma separated"
    )
    openapi: tuple[str, ...] = setting(
        (), openapi_documents, "OpenAPI documents with path templates: files or URLs, comma separated"
    )
    descriptors: tuple[str, ...] = setting((), descriptor_sources, DESCRIPTORS_DOC)
    endpoint_values: int = setting(
        50, count(0, "values"), "Values of a path segment above which the segment becomes {id}. 0 disables this"
    )
    recheck_per_minute: int = setting(
        0,
        count(0, "pairs"),
        "Pairs per minute that are sent to both versions again, to detect drift of state and to settle rare differences. 0 disables rechecks",
    )
    recheck_delay: float = setting(2.0, seconds, "Seconds to wait before a recheck")
    recheck_old_url: str = setting("", http_url, "URL of old for rechecks. It must not lead through Envoy")
    recheck_new_url: str = setting("", http_url, "URL of new for rechecks. It must not lead through Envoy")
    new_share: float = setting(0.0, share, "Initial share of users that new serves")
    sample_safe: float = setting(0.1, share, "Initial share of safe requests (GET, HEAD, OPTIONS) that are mirrored")
    sample_unsafe: float = setting(0.0, share, "Initial share of unsafe requests that are mirrored")
    baseline_share: float = setting(
        0.1, share, "Initial share of mirrored safe requests that the answering version receives twice, to detect noise"
    )
    adaptive_sampling: bool = setting(
        True,
        flag,
        "true lowers the share of safe requests that are mirrored while Envoy drops copies, because they queue",
    )
    control_key: str = setting(
        "",
        control_key,
        "Secret that signs rollbacks in Redis, the same on all sidecars. Without it, the sidecar reads a key from Postgres when it starts",
        secret=True,
    )
    shutdown_timeout: float = setting(10.0, seconds, "Seconds that work in flight has to finish after SIGTERM")
    webhook_urls: tuple[str, ...] = setting(
        (), webhook_urls, "URLs that receive every traffic change, comma separated", secret=True
    )
    webhook_secret: str = setting(
        "", webhook_secret, "Secret that signs webhooks: whsec_ and 24 to 64 bytes in base64", secret=True
    )
    log_level: str = setting("info", text, "Log level: debug, info, warning or error")

    def __post_init__(self) -> None:
        if self.webhook_urls and not self.webhook_secret:
            raise SettingError("ABREAST_WEBHOOK_SECRET must be set if ABREAST_WEBHOOK_URLS is set")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise SettingError("ABREAST_TLS_CERT_FILE and ABREAST_TLS_KEY_FILE must both be set, or none of them")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise SettingError("ABREAST_TLS_CERT_FILE must be set if ABREAST_TLS_CLIENT_CA_FILE is set")
        if self.proxy_user_header and not (self.proxy_addresses and self.admin_token):
            raise SettingError(
                "ABREAST_PROXY_ADDRESSES and ABREAST_ADMIN_TOKEN must be set if ABREAST_PROXY_USER_HEADER is set"
            )
        if self.open_listeners and not self.insecure:
            missing = [name for name, value in (("TLS", self.tls_cert_file), ("tokens", self.admin_token)) if not value]
            raise SettingError(
                f"{' and '.join(self.open_listeners)} must be on loopback without {' and '.join(missing)}: set "
                "ABREAST_TLS_CERT_FILE, ABREAST_TLS_KEY_FILE and ABREAST_ADMIN_TOKEN, or ABREAST_INSECURE=true inside "
                "a mesh that encrypts and authenticates"
            )

    @property
    def open_listeners(self) -> list[str]:
        """Return the listeners that others can reach without TLS or without a token, as settings with their values."""
        if self.tls_cert_file and self.admin_token:
            return []
        listeners = {
            "ABREAST_GRPC_LISTEN": self.grpc_listen,
            "ABREAST_HTTP_LISTEN": self.http_listen,
            "ABREAST_COLLECTOR_LISTEN": self.collector_listen,
        }
        return [f"{name}={address}" for name, address in listeners.items() if not is_loopback(address)]

    def list_warnings(self) -> list[str]:
        """Return problems that every status shows."""
        if not self.open_listeners:
            return []
        missing = [name for name, value in (("TLS", self.tls_cert_file), ("tokens", self.admin_token)) if not value]
        return [f"the sidecar listens beyond loopback without {' and without '.join(missing)} (ABREAST_INSECURE)"]

    @property
    def direct_url(self) -> str:
        """The Postgres URL for LISTEN/NOTIFY and session-level locks."""
        return self.postgres_direct_url or self.postgres_url


@dataclass(frozen=True, repr=False)
class CollectorSettings(CaptureSettings):
    """The settings of the middleware that also apply to captures of Envoy, and the address of the collector."""

    error_class = SettingError

    service: str = setting(ANY_SERVICE, text, "Unused: Envoy names the service")
    collector_listen: str = setting(DEFAULT_COLLECTOR, listen_address, COLLECTOR_DOC)
    descriptors: tuple[str, ...] = setting((), descriptor_sources, DESCRIPTORS_DOC)
    insecure: bool = setting(False, flag, "true lets the collector listen beyond loopback without a key, as in a mesh")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_open and not self.insecure:
            raise SettingError(
                f"ABREAST_COLLECTOR_LISTEN={self.collector_listen} must be on loopback without a key: set ABREAST_EDGE_KEY"
                " in the collector, in Envoy and in services with the middleware, or ABREAST_INSECURE=true inside a mesh"
                " that authenticates"
            )

    @property
    def is_open(self) -> bool:
        """Return True if others than this machine can send captures without a key."""
        return not self.edge_key and not is_loopback(self.collector_listen)

    def list_warnings(self) -> list[str]:
        """Return problems that every status shows."""
        return (
            ["the collector listens beyond loopback without ABREAST_EDGE_KEY (ABREAST_INSECURE)"]
            if self.is_open
            else []
        )
