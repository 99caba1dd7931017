"""Settings of the middleware: keyword arguments over ABREAST_*, checked once, while the service starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypedDict

from abreast.errors import SettingError
from abreast.protocol.join import Keys, Limits
from abreast.protocol.redis_client import URL_FORMATS, parse_address

ENV_PREFIX = "ABREAST_"
FLAG_VALUES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
REQUEST_HEADERS = (
    "accept",
    "accept-encoding",
    "accept-language",
    "authorization",
    "content-type",
    "cookie",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "range",
    "user-agent",
    "x-request-id",
)


class SettingsKwargs(TypedDict, total=False):
    """The keyword arguments of ParallelRunMiddleware; see Settings."""

    service: str
    redis_url: str
    release: str
    enabled: bool
    body_limit: int
    request_headers: tuple[str, ...] | list[str]
    secret_headers: tuple[str, ...] | list[str]
    redact_key: str
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


def setting(default: Any, parse: Callable[[Any], Any], doc: str, *, secret: bool = False) -> Any:
    """A dataclass field that is also the variable ABREAST_<NAME>; `parse` raises ValueError saying what is wanted."""
    return field(default=default, metadata={"parse": parse, "doc": doc, "secret": secret}, repr=not secret)


def name(value: object) -> str:
    expected = "a name such as shop: printable, without spaces, at most 100 characters, none of { } / in it"
    if not isinstance(value, str) or not value.isprintable() or " " in value or len(value) > 100:
        raise ValueError(expected)
    try:
        return Keys(value, 0).service
    except ValueError as error:
        raise ValueError(expected) from error


def url(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(URL_FORMATS)  # noqa: TRY004  # becomes a SettingError
    parse_address(value)
    return value.strip()


def header_text(value: object) -> str:
    """Fit to be sent in a header."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or len(value) > 200:
        raise ValueError("a label of at most 200 printable ASCII characters")
    return value.strip()


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("some text")  # noqa: TRY004  # becomes a SettingError
    return value


def flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return FLAG_VALUES[str(value).strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def headers(value: object) -> tuple[str, ...]:
    """Header names: a sequence, or text with commas."""
    expected = "header names, comma separated"
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(expected)
    names = tuple(part.strip().lower() for part in parts if part.strip())
    if not all(part.isascii() and part.isprintable() and " " not in part for part in names):
        raise ValueError(expected)
    return names


def count(low: int, unit: str) -> Callable[[object], int]:
    def parse(value: object) -> int:
        expected = f"a whole number of {unit}, {low} or more"
        try:
            number = int(str(value))
        except ValueError:
            raise ValueError(expected) from None
        if number < low:
            raise ValueError(expected)
        return number

    return parse


def seconds(value: object) -> float:
    expected = "a number of seconds above 0, at most 86400"
    try:
        number = float(str(value))
    except ValueError:
        raise ValueError(expected) from None
    if not 0 < number <= 86_400:
        raise ValueError(expected)
    return number


@dataclass(frozen=True)
class Settings:
    service: str = setting("", name, "Name of the service, the same for both versions")
    redis_url: str = setting("redis://127.0.0.1:6379/0", url, "Redis or Valkey that captures are sent to", secret=True)
    release: str = setting("", header_text, "Label of the running code, such as a git SHA or an image tag")
    enabled: bool = setting(True, flag, "false passes every request through without a capture")
    body_limit: int = setting(
        256 * 1024,
        count(0, "bytes"),
        "Bytes of each body that are captured. Longer bodies also get their length and digest. 0 captures only length and digest",
    )
    request_headers: tuple[str, ...] = setting(REQUEST_HEADERS, headers, "Request headers that are captured")
    secret_headers: tuple[str, ...] = setting(
        (), headers, "Headers that are captured as keyed hashes, in addition to the built-in list"
    )
    redact_key: str = setting(
        "",
        text,
        "Key of these hashes, the same for both versions. By default, the versions generate a key and share it through Redis",
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
    def join_limits(self) -> Limits:
        return Limits(
            wait_ms=max(1, round(self.pair_timeout * 1000)), max_pairs=self.redis_pairs, max_bytes=self.redis_bytes
        )

    @classmethod
    def read(cls, environment: Mapping[str, str], arguments: Mapping[str, Any]) -> Self:
        """Raise SettingError, naming the argument or variable, what is wanted and what was there."""
        fields = {part.name: part for part in dataclasses.fields(cls)}
        for argument in arguments:
            if argument not in fields:
                raise SettingError(f"there is no setting {argument!r}; there are: {', '.join(fields)}")
        values = {}
        for part in fields.values():
            variable = ENV_PREFIX + part.name.upper()
            if part.name in arguments:
                values[part.name] = _parse_value(part, part.name, arguments[part.name])
            elif environment.get(variable, ""):
                values[part.name] = _parse_value(part, variable, environment[variable])
        return cls(**values)


def _parse_value(part: dataclasses.Field[Any], source: str, value: object) -> Any:
    try:
        return part.metadata["parse"](value)
    except ValueError as error:
        shown_value = "something else" if part.metadata["secret"] else repr(value)
        raise SettingError(f"{source} must be {error}, got {shown_value}") from error
