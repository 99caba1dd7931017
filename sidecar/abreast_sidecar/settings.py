"""Settings of the sidecar: one class, read from ABREAST_* once, by whoever starts the process."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from abreast_sidecar.errors import SettingError

ENV_PREFIX = "ABREAST_"
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
SECRET_PATTERN = re.compile(r"(?<=://).*@|(?<=password=)('[^']*'|[^&\s]*)")  # in URLs and connection strings


def setting(default: Any, parse: Callable[[str], Any], doc: str, *, secret: bool = False) -> Any:
    """A dataclass field that is also the variable ABREAST_<NAME>. What is secret is never shown, and no option."""
    return field(default=default, repr=not secret, metadata={"parse": parse, "doc": doc, "secret": secret})


def text(value: str) -> str:
    if not value.strip():
        raise ValueError("some text")
    return value.strip()


def comma_list(value: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in value.split(",")) if word)


def redis_url(value: str) -> str:
    from abreast.protocol.redis_client import parse_address

    parse_address(value)
    return value.strip()


def database_url(value: str) -> str:
    """A URL, or libpq's own form: host=… dbname=…"""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        parameters = conninfo_to_dict(text(value))
        for port in str(parameters.get("port") or "5432").split(","):
            address(f":{port or 5432}")
    except (psycopg.Error, ValueError):
        raise ValueError("a URL such as postgresql://127.0.0.1:5432/abreast") from None
    return value.strip()


def mask_secrets(value: str) -> str:
    """A setting's value without the passwords in it."""
    return SECRET_PATTERN.sub(lambda match: "…@" if match[0].endswith("@") else "…", value)


def http_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", value.strip()):
        raise ValueError("a URL such as http://127.0.0.1:8001")
    return value.strip()


def webhook_urls(value: str) -> tuple[str, ...]:
    from urllib.parse import urlsplit

    urls = comma_list(value)
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("URLs such as https://hooks.example.com/abreast, comma separated")
    return urls


def webhook_secret(value: str) -> str:
    """Return a Standard Webhooks secret. The error never contains it."""
    requirement = f"{SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64"
    secret = value.strip()
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        raise ValueError(requirement) from None
    if not secret.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
        raise ValueError(requirement)
    return secret


def seconds(value: str) -> float:
    return _number(value, "a number of seconds above 0", low=0.0, exclusive=True)


def share(value: str) -> float:
    """A share from 0 to 1, written 0.25 or 25%."""
    expected = "a share such as 25% or 0.25, from 0% to 100%"
    if value.strip().endswith("%"):
        return _number(value.strip()[:-1], expected, low=0.0, high=100.0) / 100
    return _number(value, expected, low=0.0, high=1.0)


def count(value: str) -> int:
    number = _number(value, "a whole number, 0 or more", low=0.0)
    if number != int(number):
        raise ValueError("a whole number, 0 or more")
    return int(number)


def flag(value: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return values[value.strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def address(value: str) -> str:
    """host:port; `:8080` means all addresses and is only taken when it is written out."""
    host, colon, port = value.strip().rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError("an address such as 127.0.0.1:8080")
    return f"{host or '0.0.0.0'}:{port}"


def _number(value: str, expected: str, *, low: float, high: float = float("inf"), exclusive: bool = False) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(expected) from None
    if not math.isfinite(number) or not low <= number <= high or (exclusive and number == low):
        raise ValueError(expected)
    return number


class EnvironmentSettings:
    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Raise SettingError, naming the variable, what is wanted and what was there."""
        values = {}
        for setting_field in dataclasses.fields(cls):  # type: ignore[arg-type]  # a mixin for dataclasses
            name = ENV_PREFIX + setting_field.name.upper()
            if environment.get(name, "") == "":
                continue
            try:
                values[setting_field.name] = setting_field.metadata["parse"](environment[name])
            except ValueError as error:
                if setting_field.metadata.get("secret"):
                    raise SettingError(f"{name} must be {error}; what it is now is not shown") from None
                raise SettingError(f"{name} must be {error}, got {mask_secrets(environment[name])!r}") from error
        return cls(**values)


@dataclass(frozen=True)
class Settings(EnvironmentSettings):
    redis_url: str = setting("redis://127.0.0.1:6379/0", redis_url, "Redis or Valkey that services send captures to")
    postgres_url: str = setting("postgresql://127.0.0.1:5432/abreast", database_url, "Postgres that holds the ledger")
    postgres_direct_url: str = setting(
        "",
        database_url,
        "Direct Postgres URL for LISTEN/NOTIFY and leader election. Required if ABREAST_POSTGRES_URL goes through a transaction-mode pooler",
    )
    grpc_listen: str = setting("127.0.0.1:50051", address, "Address of the gRPC API and of Envoy's control plane")
    http_listen: str = setting("127.0.0.1:8090", address, "Address of health, metrics and the web page")
    envoy_admin: tuple[str, ...] = setting(
        (),
        comma_list,
        "Admin addresses of the Envoys, comma separated. The sidecar compares their counts with the ledger",
    )
    workers: int = setting(0, count, "Worker processes. 0 runs the worker inside the main process")
    batch_size: int = setting(500, count, "Pairs that a worker reads, compares and commits per batch")
    claim_idle: float = setting(
        30.0, seconds, "Seconds after which another worker takes over the entries of a dead worker"
    )
    batch_bytes: int = setting(
        64 * 1024 * 1024, count, "Target size of a batch in bytes of captures. A worker holds two batches at a time"
    )
    examples_per_finding: int = setting(5, count, "Pairs per finding whose bodies are kept as examples")
    examples_bytes: int = setting(
        1024 * 1024 * 1024,
        count,
        "Total size of all examples in bytes, compressed. The largest are deleted first, but each open finding keeps one",
    )
    retention_days: int = setting(14, count, "Days that pairs are kept")
    retention_bytes: int = setting(
        0,
        count,
        "Total size of the pairs in Postgres in bytes. Above it, the oldest day is deleted, but never today. 0 sets no limit",
    )
    volatile_headers: tuple[str, ...] = setting(
        (), comma_list, "Response headers to ignore in addition to the built-in list, comma separated"
    )
    recheck_per_minute: int = setting(
        0, count, "Pairs per minute that are sent to both versions again to detect state drift. 0 disables rechecks"
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
            raise SettingError("ABREAST_WEBHOOK_SECRET must be set where ABREAST_WEBHOOK_URLS is")

    @property
    def direct_url(self) -> str:
        """Postgres for what needs a session of its own: to listen, and to hold a lock."""
        return self.postgres_direct_url or self.postgres_url
