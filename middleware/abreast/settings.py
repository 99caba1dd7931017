"""Settings, declared once each: the engine for the middleware, the sidecar and Envoy, and the middleware's settings.

A field made by `setting` is also the variable ABREAST_<NAME>, an option of the command line and a row in the docs.
Parsers raise ValueError with the requirement, such as "true or false". The engine adds the name and the value to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypedDict

from msgspec import Meta, ValidationError, convert

from abreast.errors import SettingError
from abreast.protocol.join import Limits

ENV_PREFIX = "ABREAST_"
MIN_REDACTION_KEY_CHARS = 22  # 128 bits in base64
FLAG_VALUES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
PASSWORD_PATTERN = re.compile(r"(?<=://).*@|(?<=password=)('[^']*'|[^&\s]*)")  # in URLs and connection strings
# fmt: off
REQUEST_HEADERS = (
    "accept", "accept-charset", "accept-encoding", "accept-language",
    "access-control-request-headers", "access-control-request-method", "authorization", "content-encoding",
    "content-language", "content-type", "cookie", "host", "if-match", "if-modified-since", "if-none-match", "if-range",
    "if-unmodified-since", "last-event-id", "origin", "prefer", "range", "sec-fetch-mode", "sec-fetch-site", "user-agent",
    "x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix", "x-forwarded-proto", "x-http-method-override",
    "x-request-id", "x-requested-with",
)
# fmt: on

Parser = Callable[[Any], Any]


def setting(default: Any, parse: Parser, doc: str, *, secret: bool = False, repeatable: str = "") -> Any:
    """Declare a setting. A secret is never shown: not in errors, not in the representation, and not in `ps`.

    The option of a repeatable setting can be used several times. `repeatable` separates their values in the variable.
    """
    metadata = {"parse": parse, "doc": doc, "secret": secret, "repeatable": repeatable}
    return field(default=default, metadata=metadata)


class Setting(NamedTuple):
    """The declaration of a setting."""

    name: str
    default: Any
    parse: Parser
    doc: str
    secret: bool
    repeatable: str

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default_text(self) -> str:
        return format_value(self.default)


class DeclaredSettings:
    """Base class of frozen dataclasses whose fields are settings."""

    error_class: ClassVar[type[Exception]] = SettingError

    @classmethod
    def declared(cls) -> tuple[Setting, ...]:
        parts = dataclasses.fields(cls)  # type: ignore[arg-type]  # the subclasses are dataclasses
        return tuple(Setting(part.name, part.default, **part.metadata) for part in parts)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Self:
        """Read the settings. An override has the name of its setting; empty text counts as not set.

        Raises `error_class`, which names the override or variable, the requirement and the value.
        """
        overrides = overrides or {}
        direct_secrets = set()
        names = [declared.name for declared in cls.declared()]
        for name in overrides:
            if name not in names:
                raise cls.error_class(f"there is no setting {name!r}; the settings are {', '.join(names)}")
        values = {}
        for declared in cls.declared():
            source, value = declared.name, overrides.get(declared.name, "")
            if value == "":
                source, value = declared.variable, environment.get(declared.variable, "")
            if value == "" and declared.secret:
                file = str(overrides.get(f"{declared.name}_file", ""))
                source = f"{declared.name}_file" if file else f"{declared.variable}_FILE"
                value = cls._read_secret(source, file or environment.get(source, ""))
            elif value != "" and declared.secret:
                direct_secrets.add(f"{declared.name}_file")  # and no file has it
            if value == "" or declared.name in direct_secrets:
                continue
            try:
                values[declared.name] = declared.parse(value)
            except ValueError as error:
                value_text = "a value that is not shown" if declared.secret else mask_passwords(repr(value))
                raise cls.error_class(f"{source} must be {error}, got {value_text}") from None
        return cls(**values)

    @classmethod
    def _read_secret(cls, source: str, path: str) -> str:
        """Return the content of the file that ABREAST_<NAME>_FILE names, or empty text."""
        if not path:
            return ""
        try:
            value = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise cls.error_class(f"{source} must name a readable file, got {path!r}: {error}") from None
        if not value:
            raise cls.error_class(f"{source} must name a file with a value, and {path!r} is empty")
        return value

    def __repr__(self) -> str:
        values = [
            f"{declared.name}={'…' if declared.secret else mask_passwords(repr(getattr(self, declared.name)))}"
            for declared in self.declared()
        ]
        return f"{type(self).__name__}({', '.join(values)})"


def format_value(value: object) -> str:
    """Return the value of a setting as it would stand in its variable."""
    if type(value) is tuple:
        return ",".join(map(format_value, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def mask_passwords(value: str) -> str:
    """Return a URL or connection string without its passwords."""
    return PASSWORD_PATTERN.sub(lambda match: "…@" if match[0].endswith("@") else "…", value)


def number(kind: type[float], requirement: str, **bounds: Any) -> Parser:
    """Return a parser of numbers. The bounds are those of msgspec.Meta: ge, gt, le and lt."""
    bounded: Any = Annotated[kind, Meta(**bounds)]

    def parse(value: object) -> Any:
        try:
            return convert(value.strip() if isinstance(value, str) else value, bounded, strict=False)
        except ValidationError:
            raise ValueError(requirement) from None

    return parse


def count(low: int, unit: str) -> Parser:
    return number(int, f"a whole number of {unit}, {low} or more", ge=low)


seconds = number(float, "a number of seconds above 0, at most 86400", gt=0, le=86_400)


def share(value: object) -> float:
    """Parse a share from 0 to 1, such as 0.25 or 25%."""
    requirement = "a share such as 25% or 0.25, from 0% to 100%"
    if isinstance(value, str) and value.strip().endswith("%"):
        percent: float = number(float, requirement, ge=0, le=100)(value.strip()[:-1])
        return percent / 100
    ratio: float = number(float, requirement, ge=0, le=1)(value)
    return ratio


def flag(value: object) -> bool:
    try:
        return FLAG_VALUES[str(value).strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def matching(pattern: str, requirement: str) -> Parser:
    """Return a parser of text that matches the whole pattern. It strips the text."""
    compiled = re.compile(pattern)

    def parse(value: object) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value.strip()):
            raise ValueError(requirement)
        return value.strip()

    return parse


label = matching("[ -~]{0,200}", "a label of at most 200 printable ASCII characters")  # it is sent in a header


def text(value: object) -> str:
    """Parse text on one line, which may become part of a configuration."""
    if not isinstance(value, str) or not value.strip() or not value.strip().isprintable():
        raise ValueError("some text on one line")
    return value.strip()


secret_key = matching(
    "[0-9A-Za-z._~+/=-]{16,200}",
    "16 to 200 letters, digits or any of ._~+/=- without spaces, such as `openssl rand -hex 16` prints",
)


def edge_keys(value: object) -> tuple[str, ...]:
    """Parse one key, or two during a rotation: a list or tuple, or text with commas."""
    keys = comma_list(value) if isinstance(value, str) else value
    if not isinstance(keys, list | tuple) or len(keys) not in {1, 2}:
        raise ValueError("one key, or two with a comma between them during a rotation")
    return tuple(secret_key(key) for key in keys)


class RedactionKeys(NamedTuple):
    """The key of the hashes that replace secrets, and during a rotation the next one. Empty keys are random ones."""

    key: str = ""
    next_key: str = ""
    next_from: float = math.inf  # Unix time; requests that begin later are hashed with the next key

    @classmethod
    def parse(cls, value: object) -> RedactionKeys:
        """Parse `KEY`, or `KEY,NEXT@TIME` during a rotation."""
        if isinstance(value, str) and (match := _REDACTION_KEYS.fullmatch(value.strip())):
            key, next_key, start = match.groups()
            with contextlib.suppress(ValueError):
                return cls(key, next_key, datetime.fromisoformat(start).timestamp()) if start else cls(key)
        raise ValueError(
            f"{MIN_REDACTION_KEY_CHARS} to 200 letters, digits or any of ._~+/=- with 128 random bits, such as "
            "`openssl rand -hex 16` prints; during a rotation KEY,NEXT@TIME, as `abreast key rotate` writes it"
        )


_KEY = f"([0-9A-Za-z._~+/=-]{{{MIN_REDACTION_KEY_CHARS},200}})"
_REDACTION_KEYS = re.compile(rf"{_KEY}(?:,{_KEY}@(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ))?", re.ASCII)


def redaction_key(value: object) -> str:
    RedactionKeys.parse(value)
    return str(value).strip()


def allow_list(value: object) -> tuple[tuple[str, str], ...]:
    """Parse pairs of endpoint and name: a list or tuple, or text with commas."""
    entries = comma_list(value) if isinstance(value, str) else value
    matches = [
        re.fullmatch(r"([A-Z]+ /\S*) (\S+)", entry) if isinstance(entry, str) else None
        for entry in (entries if isinstance(entries, list | tuple) else [None])
    ]
    if not all(matches):
        raise ValueError("method, route and name, such as `GET /login csrf_token`, comma separated")
    return tuple((match[1], match[2]) for match in matches if match)


def service_name(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch("[^{}/ ]{1,100}", value):
        raise ValueError("a name such as shop: printable, without spaces, at most 100 characters, none of { } / in it")
    return value


def comma_list(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def header_names(value: object) -> tuple[str, ...]:
    """Parse header names: a list or tuple, or text with commas."""
    names = comma_list(value) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) and name.isascii() and name.isprintable() and " " not in name for name in names
    ):
        raise ValueError("header names, comma separated")
    return tuple(name.lower() for name in names if name)


def redis_url(value: object) -> str:
    from abreast.protocol.redis_client import parse_address  # late: the command line starts faster without Redis

    parse_address(str(value))
    return str(value).strip()


class SettingsKwargs(TypedDict, total=False):
    """The keyword arguments of ParallelRunMiddleware: the fields of Settings, for type checkers."""

    service: str
    redis_url: str
    release: str
    enabled: bool
    body_limit: int
    request_headers: tuple[str, ...] | list[str]
    secret_headers: tuple[str, ...] | list[str]
    redact_key: str
    redact_key_file: str
    redact_allow: tuple[str, ...] | list[str]
    edge_key: str | tuple[str, ...] | list[str]
    queue_count: int
    queue_bytes: int
    export_batch: int
    export_interval: float
    pair_timeout: float
    redis_pairs: int
    redis_bytes: int
    shards: int
    flush_timeout: float
    effect_wait: float


@dataclass(frozen=True, repr=False)
class Settings(DeclaredSettings):
    service: str = setting("", service_name, "Name of the service, the same for both versions")
    redis_url: str = setting(
        "redis://127.0.0.1:6379/0", redis_url, "Redis or Valkey that captures are sent to", secret=True
    )
    release: str = setting("", label, "Label of the running code, such as a git SHA or an image tag")
    enabled: bool = setting(True, flag, "false passes every request through without a capture")
    body_limit: int = setting(
        256 * 1024,
        count(0, "bytes"),
        "Bytes of each body that are captured. Longer bodies also get their length and digest. 0 captures only length and digest",
    )
    request_headers: tuple[str, ...] = setting(
        REQUEST_HEADERS, header_names, "Request headers that are captured; of all others, only the names are"
    )
    secret_headers: tuple[str, ...] = setting((), header_names, "Secret headers in addition to the built-in list")
    redact_key: str = setting(
        "",
        redaction_key,
        "Key of the hashes that replace secrets, the same for both versions. By default, it is derived from `edge_key`",
        secret=True,
    )
    redact_key_file: str = setting(
        "", text, "File with `redact_key`. It is read again every five seconds, so that a rotation needs no restart"
    )
    redact_allow: tuple[tuple[str, str], ...] = setting(
        (),
        allow_list,
        "Names that stay readable at an endpoint, such as `GET /login csrf_token`. The name `body` allows bodies that can't be read",
    )
    edge_key: tuple[str, ...] = setting(
        (),
        edge_keys,
        "Key that Envoy proves itself with, the same as in Envoy's settings. Two keys, comma separated, during a rotation",
        secret=True,
    )
    queue_count: int = setting(10_000, count(1, "captures"), "Maximum number of captures in the queue of a process")
    queue_bytes: int = setting(64 * 1024 * 1024, count(1, "bytes"), "Maximum size of the queue of a process in bytes")
    export_batch: int = setting(200, count(1, "captures"), "Captures per batch that is sent to Redis")
    export_interval: float = setting(0.05, seconds, "Seconds that a capture waits for others before its batch is sent")
    pair_timeout: float = setting(10.0, seconds, "Seconds that a pair waits in Redis for its missing captures")
    redis_pairs: int = setting(
        100_000, count(1, "pairs"), "Maximum number of pairs per shard that wait in Redis for a copy or a worker"
    )
    redis_bytes: int = setting(
        256 * 1024 * 1024, count(1, "bytes"), "Maximum size of the captures in Redis per shard in bytes"
    )
    shards: int = setting(1, count(1, "shards"), "Streams per service, the same for both versions")
    flush_timeout: float = setting(2.0, seconds, "Seconds that a shutdown waits until the remaining captures are sent")
    effect_wait: float = setting(
        2.0, seconds, "Seconds that a capture waits for background tasks after the response, and for their effects"
    )

    def __post_init__(self) -> None:
        if self.enabled and not self.service:
            raise SettingError(f"the middleware needs a service name; pass service='shop' or set {ENV_PREFIX}SERVICE")

    @property
    def redaction_keys(self) -> RedactionKeys:
        """The keys of the hashes that replace secrets; empty if the services share no key."""
        if self.redact_key:
            return RedactionKeys.parse(self.redact_key)
        edge_key = self.edge_key[0] if self.edge_key else ""
        return RedactionKeys(edge_key if len(edge_key) >= MIN_REDACTION_KEY_CHARS else "")

    @property
    def join_limits(self) -> Limits:
        wait_ms = max(1, round(self.pair_timeout * 1000))
        return Limits(wait_ms=wait_ms, max_pairs=self.redis_pairs, max_bytes=self.redis_bytes)
