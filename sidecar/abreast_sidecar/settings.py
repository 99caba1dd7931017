"""Settings of the sidecar. The engine is in abreast.settings."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from urllib.parse import urlsplit

from abreast.settings import (
    ENV_PREFIX,
    DeclaredSettings,
    comma_list,
    count,
    header_names,
    mask_passwords,
    matching,
    redis_url,
    seconds,
    setting,
    share,
    text,
)
from abreast_sidecar.errors import SettingError

__all__ = ["ENV_PREFIX", "Settings", "database_url", "mask_passwords", "redis_url", "seconds", "share", "text"]

SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
MAX_PORT = 65535


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


def listen_address(value: str) -> str:
    """Parse host:port. An empty host, as in `:8080`, means all addresses."""
    host, colon, port = value.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) > MAX_PORT:
        raise ValueError("an address such as 127.0.0.1:8080")
    return f"{host or '0.0.0.0'}:{port}"


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
    recheck_per_minute: int = setting(
        0,
        count(0, "pairs"),
        "Pairs per minute that are sent to both versions again to detect state drift. 0 disables rechecks",
    )
    recheck_delay: float = setting(2.0, seconds, "Seconds to wait before a recheck")
    recheck_old_url: str = setting("", http_url, "URL of old for rechecks. It must not lead through Envoy")
    recheck_new_url: str = setting("", http_url, "URL of new for rechecks. It must not lead through Envoy")
    new_share: float = setting(0.0, share, "Initial share of users that new serves")
    sample_safe: float = setting(0.1, share, "Initial share of safe requests (GET, HEAD, OPTIONS) that are mirrored")
    sample_unsafe: float = setting(0.0, share, "Initial share of unsafe requests that are mirrored")
    baseline_share: float = setting(
        0.1, share, "Initial share of mirrored safe requests that old receives twice, to detect noise"
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

    @property
    def direct_url(self) -> str:
        """The Postgres URL for LISTEN/NOTIFY and session-level locks."""
        return self.postgres_direct_url or self.postgres_url
