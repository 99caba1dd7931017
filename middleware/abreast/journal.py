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

from abreast.capture import digest

MOST_ENTRIES = 200  # of a request; those beyond are counted
MOST_BYTES = 64 * 1024  # of a request's payloads; of those beyond a digest is kept
MOST_NAME = 200  # characters of a kind and of a key
MOST_DEPTH = 50  # of a payload that orjson does not take
OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS  # sorted: of long payloads only a digest is compared

Redact = Callable[[Any], Any]


@dataclass(slots=True)
class Entry:
    kind: str
    key: str
    raw: bytes  # the payload as JSON; empty when it was too long
    length: int
    digest: str
    at_us: int  # µs since the request arrived
    compared: bool
    error: str = ""  # class name of what it raised

    def record(self, redact: Redact) -> dict[str, Any]:
        """As it travels in a capture."""
        record: dict[str, Any] = {"kind": self.kind, "at_us": self.at_us}
        if self.key:
            record["key"] = self.key
        if self.digest:
            record |= {"digest": self.digest, "length": self.length}
        else:
            record["payload"] = redact(orjson.loads(self.raw))
        if self.error:
            record["error"] = self.error
        if not self.compared:
            record["note"] = True
        return record


class Journal:
    """Entries may come from several threads."""

    def __init__(self, began: int) -> None:
        self.entries: list[Entry] = []
        self.bytes = 0
        self.dropped = 0
        self.closed = False  # the capture has been written; what comes now is late
        self._began = began
        self._lock = threading.Lock()

    def add(self, kind: str, payload: Any, key: str = "", *, compared: bool = True) -> Entry | None:
        """None for what is late, or one too many."""
        at_us = (perf_counter_ns() - self._began) // 1000
        raw = written(payload)
        with self._lock:
            if self.closed:
                return None
            if len(self.entries) >= MOST_ENTRIES:
                self.dropped += 1
                return None
            fits = self.bytes + len(raw) <= MOST_BYTES
            entry = Entry(
                kind[:MOST_NAME],
                key[:MOST_NAME],
                raw if fits else b"",
                len(raw),
                "" if fits else digest(raw),
                at_us,
                compared,
            )
            self.entries.append(entry)
            self.bytes += len(entry.raw)
        return entry

    def close(self, redact: Redact) -> tuple[dict[str, Any], ...]:
        """The records, for the capture."""
        with self._lock:
            self.closed = True
            return tuple([entry.record(redact) for entry in self.entries])


def written(payload: Any) -> bytes:
    """JSON of anything: what has no form in JSON becomes text that is the same in both versions."""
    try:
        return orjson.dumps(payload, default=_plain, option=OPTIONS)
    except (TypeError, ValueError, RecursionError):  # integers beyond 64 bits, lone surrogates, circles
        return orjson.dumps(_readable(payload, 0), option=orjson.OPT_SORT_KEYS)


def _plain(value: Any) -> Any:
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
    return _dumped(value)


def _dumped(value: Any) -> Any:
    """A pydantic model's own form; of all else the type, never an address in memory."""
    try:
        dump = getattr(value, "model_dump", None)
        if callable(dump):
            return dump(mode="json")
    except Exception:  # noqa: BLE001, S110  # users' code; the effect is recorded all the same
        pass
    return f"<{type(value).__qualname__}>"


def _readable(value: Any, depth: int) -> Any:
    """The same for what orjson refuses to write."""
    if depth > MOST_DEPTH:
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
        return {_readable(str(name), 0): _readable(held, depth + 1) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(held, depth + 1) for held in value]
    if value is None or isinstance(value, bool):
        return value
    return _known(value, depth)


def _known(value: Any, depth: int) -> Any:
    try:
        return orjson.loads(orjson.dumps(value))  # dates, UUIDs, enumerations
    except (TypeError, ValueError):
        return _readable(_plain(value), depth + 1)
