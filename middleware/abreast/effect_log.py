"""What one request did beside its answer, in order, bounded in number and bytes.

A payload is written down as JSON when it comes, since the code may change the object later. Secrets are hashed in
the background, before anything leaves the process.
"""

from __future__ import annotations

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

MAX_EFFECTS = 200  # of a request; those beyond are counted
MAX_PAYLOAD_BYTES = 64 * 1024  # of a request's payloads; of those beyond a digest is kept
MAX_EFFECT_NAME_CHARS = 200  # characters of a kind and of a key
MAX_PAYLOAD_DEPTH = 50  # of a payload that orjson does not take
ORJSON_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS  # sorted: of long payloads only a digest is compared

Redact = Callable[[Any], Any]


@dataclass(slots=True)
class EffectRecord:
    kind: str
    key: str
    payload_json: bytes  # the payload as JSON; empty when it was too long
    length: int
    digest: str
    at_us: int  # µs since the request arrived
    is_compared: bool
    error: str = ""  # class name of what it raised

    def to_dict(self, redact: Redact) -> dict[str, Any]:
        """As it travels in a capture."""
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
    """Entries may come from several threads."""

    def __init__(self, started_ns: int) -> None:
        self.records: list[EffectRecord] = []
        self.payload_bytes = 0
        self.dropped_count = 0
        self.is_closed = False  # the capture has been written; what comes now is late
        self._started_ns = started_ns
        self._lock = threading.Lock()

    def add(self, kind: str, payload: Any, key: str = "", *, compared: bool = True) -> EffectRecord | None:
        """None for what is late, or one too many."""
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
        """The records, for the capture."""
        with self._lock:
            self.is_closed = True
            return tuple([effect_record.to_dict(redact) for effect_record in self.records])


def to_json(payload: Any) -> bytes:
    """JSON of anything: what has no form in JSON becomes text that is the same in both versions."""
    try:
        return orjson.dumps(payload, default=_to_plain, option=ORJSON_OPTIONS)
    except (TypeError, ValueError, RecursionError):  # integers beyond 64 bits, lone surrogates, circles
        return orjson.dumps(_to_readable(payload, 0), option=orjson.OPT_SORT_KEYS)


def _to_plain(value: Any) -> Any:
    """For orjson, of what it does not know."""
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
    return _dump_model(value)


def _dump_model(value: Any) -> Any:
    """A pydantic model's own form; of all else the type, never an address in memory."""
    try:
        dump = getattr(value, "model_dump", None)
        if callable(dump):
            return dump(mode="json")
    except Exception:  # noqa: BLE001, S110  # users' code; the effect is recorded all the same
        pass
    return f"<{type(value).__qualname__}>"


def _to_readable(value: Any, depth: int) -> Any:
    """The same for what orjson refuses to write."""
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
    return _convert_with_orjson(value, depth)


def _convert_with_orjson(value: Any, depth: int) -> Any:
    try:
        return orjson.loads(orjson.dumps(value))  # dates, UUIDs, enumerations
    except (TypeError, ValueError):
        return _to_readable(_to_plain(value), depth + 1)
