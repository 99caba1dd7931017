"""The effects of one request, in order, bounded in number and bytes.

The log encodes a payload as JSON at once, because the code may change the object later. The exporter hashes secrets
before a capture leaves the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from time import perf_counter_ns
from typing import Any

import orjson

from abreast.protocol.capture import digest

MAX_EFFECTS = 200  # per request; more effects are only counted
MAX_PAYLOAD_BYTES = 64 * 1024  # per request; of more payloads only a digest is kept
MAX_EFFECT_NAME_CHARS = 200  # per kind and per key
MAX_PAYLOAD_DEPTH = 50  # for payloads that orjson refuses
ORJSON_OPTIONS = (
    orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS
)  # sorted, because of long payloads only digests are compared

Redact = Callable[[Any], Any]


@dataclass(slots=True)
class EffectRecord:
    kind: str
    key: str
    payload_json: bytes  # empty if it was too long
    length: int
    digest: str
    at_us: int  # µs since the request arrived
    is_compared: bool
    error: str = ""  # class name of the exception

    def to_dict(self, redact: Redact) -> dict[str, Any]:
        """Return the effect as a capture contains it."""
        fields: dict[str, Any] = {"kind": self.kind, "at_us": self.at_us}
        if self.key:
            fields["key"] = self.key
        if self.digest:
            fields |= {"digest": self.digest, "length": self.length}
        else:
            fields["payload"] = redact(orjson.loads(self.payload_json))
        if self.error:
            fields["error"] = self.error
        if not self.is_compared:
            fields["note"] = True
        return fields


class EffectLog:
    """The effects of one request. Thread-safe."""

    def __init__(self, started_ns: int) -> None:
        self.records: list[EffectRecord] = []
        self.payload_bytes = 0
        self.dropped_count = 0
        self.is_closed = False  # the capture is encoded, so further effects are late
        self._started_ns = started_ns
        self._lock = threading.Lock()

    def add(self, kind: str, payload: Any, key: str = "", *, compared: bool = True) -> EffectRecord | None:
        """Add an effect, or return None if it is late or one too many."""
        at_us = (perf_counter_ns() - self._started_ns) // 1000
        payload_json = to_json(payload)
        with self._lock:
            if self.is_closed:
                return None
            if len(self.records) >= MAX_EFFECTS:
                self.dropped_count += 1
                return None
            fits = self.payload_bytes + len(payload_json) <= MAX_PAYLOAD_BYTES
            effect_record = EffectRecord(
                kind[:MAX_EFFECT_NAME_CHARS],
                key[:MAX_EFFECT_NAME_CHARS],
                payload_json if fits else b"",
                len(payload_json),
                "" if fits else digest(payload_json),
                at_us,
                compared,
            )
            self.records.append(effect_record)
            self.payload_bytes += len(effect_record.payload_json)
        return effect_record

    def close(self, redact: Redact) -> tuple[dict[str, Any], ...]:
        """Close the log and return the effects for the capture."""
        with self._lock:
            self.is_closed = True
            return tuple([effect_record.to_dict(redact) for effect_record in self.records])


def to_json(payload: Any) -> bytes:
    """Encode any object as JSON. An object without a JSON form becomes text that is the same in both versions."""
    try:
        return orjson.dumps(payload, default=_to_plain, option=ORJSON_OPTIONS)
    except (TypeError, ValueError, RecursionError):  # integers beyond 64 bits, lone surrogates, cycles
        return orjson.dumps(_to_readable(payload, 0), option=orjson.OPT_SORT_KEYS)


def _to_plain(value: Any) -> Any:
    """Convert types that orjson does not know."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, tuple | list):
        return list(value)
    with contextlib.suppress(Exception):  # code of the service
        dump = getattr(value, "model_dump", None)  # pydantic
        if callable(dump):
            return dump(mode="json")
    return f"<{type(value).__qualname__}>"  # without the address in memory


def _to_readable(value: Any, depth: int) -> Any:
    """Convert a payload that orjson refuses to encode."""
    if depth > MAX_PAYLOAD_DEPTH:
        return "<too deep>"
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if -(2**63) <= value < 2**64 else str(int(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_to_readable(str(name), 0): _to_readable(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_readable(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    try:
        return orjson.loads(orjson.dumps(value))  # dates, UUIDs, enumerations
    except (TypeError, ValueError):
        return _to_readable(_to_plain(value), depth + 1)
