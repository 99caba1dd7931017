"""The context of a request: the version that runs, whether the response goes to a user, and the recorded effects and spans.

The context is in a context variable, so tasks, anyio's threads and sub-applications inherit it. Code outside of a
sampled request is live.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Protocol, get_args

import orjson

from abreast.errors import ErrorReporter
from abreast.protocol.capture import Role, SpanRow, Version, digest

logger = logging.getLogger("abreast")
report_error = ErrorReporter()

Redact = Callable[[Any], Any]

MAX_EFFECTS = 200  # per request; more effects are only counted
MAX_PAYLOAD_BYTES = 64 * 1024  # per request; of more payloads only a digest is kept
MAX_EFFECT_NAME_CHARS = 200  # per kind and per key
MAX_SPANS = 100  # per request; more spans are not kept
MAX_SPAN_NAME_CHARS = 100
HIT, MISS = "hit", "miss"
SHADOW_HEADER = "abreast-shadow"  # with the edge key, in requests to Envoy
NO_CACHE_KEYS: frozenset[tuple[int, str]] = frozenset()
CLEANUP_TASKS: set[asyncio.Task[None]] = set()  # a loop keeps only weak references to its tasks
_lock = threading.Lock()


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
    """The effects of one request, in order, bounded in number and bytes. Thread-safe.

    The payloads are JSON, because the code may change the objects later. The exporter hashes secrets before a capture
    leaves the process.
    """

    def __init__(self) -> None:
        self.records: list[EffectRecord] = []
        self.payload_bytes = 0
        self.dropped_count = 0
        self.is_closed = False  # the capture is encoded, so further effects are late
        self._lock = threading.Lock()

    def add(self, kind: str, key: str, payload_json: bytes, at_us: int, *, is_compared: bool) -> EffectRecord | None:
        """Add an effect, or return None if it is late or one too many."""
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
                is_compared,
            )
            self.records.append(effect_record)
            self.payload_bytes += len(effect_record.payload_json)
        return effect_record

    def close(self, redact: Redact) -> tuple[dict[str, Any], ...]:
        """Close the log and return the effects for the capture."""
        with self._lock:
            self.is_closed = True
            return tuple([effect_record.to_dict(redact) for effect_record in self.records])


CLOSED_LOG = EffectLog()  # shared by the requests that recorded no effect in time
CLOSED_LOG.is_closed = True


class Spans:
    """The spans of one request. `hits` and `misses` of a cache are counted beyond MAX_SPANS too."""

    __slots__ = ("hits", "misses", "rows")

    def __init__(self) -> None:
        self.rows: list[SpanRow] = []
        self.hits = 0
        self.misses = 0


def add_span(context: RequestContext, kind: str, name: str, started_ns: int, note: str = "") -> None:
    """Add a span from `started_ns` (perf_counter_ns) until now, if the request is captured."""
    if not context.is_captured or context.response_sent:
        return
    spans = context.spans
    if spans is None:
        spans = context.spans = Spans()
    spans.hits += note == HIT
    spans.misses += note == MISS
    if len(spans.rows) < MAX_SPANS:
        start_us = (started_ns - context.started_ns) // 1000
        duration_us = (perf_counter_ns() - started_ns) // 1000
        spans.rows.append(
            (kind[:MAX_SPAN_NAME_CHARS], name[:MAX_SPAN_NAME_CHARS], start_us, duration_us, note[:MAX_SPAN_NAME_CHARS])
        )


@contextmanager
def span(name: str, kind: str = "call") -> Iterator[None]:
    """Time a block that calls another service: `with abreast.span("search"):`."""
    context, started_ns, note = CURRENT_CONTEXT.get(), perf_counter_ns(), ""
    try:
        yield
    except BaseException as error:
        note = type(error).__name__
        raise
    finally:
        add_span(context, kind, name, started_ns, note)


class EffectSink(Protocol):
    """Counts the effects that are recorded after their capture was encoded."""

    def count_late_effect(self) -> None: ...


@dataclass(eq=False, repr=False)
class RequestContext:
    """The context of one request. Treat it as read-only.

    `role` is `live` if the response goes to the user. The responses to `shadow` and `baseline` are discarded. Outside of a
    sampled request, `version` is None and `pair` is empty.
    """

    version: Version | None
    role: Role
    pair: str
    release: str
    sink: EffectSink | None = None  # None if the request is not captured
    started_ns: int = 0  # perf_counter_ns
    response_sent: bool = False
    effect_log: EffectLog | None = None
    spans: Spans | None = None
    # Functions to await after the app returned. None if the request is no shadow, or they already ran.
    cleanups: list[Callable[[], Awaitable[object]]] | None = None
    invalid_reason: str = ""  # why the capture of a shadow says nothing about its code
    deleted_cache_keys: AbstractSet[tuple[int, str]] = NO_CACHE_KEYS  # (id of the cache, key) of deletions by a shadow
    edge_key: str = field(default="", kw_only=True)  # the proof for calls to other services behind Envoy

    def __post_init__(self) -> None:
        self.is_shadow = self.role != "live"

    def __repr__(self) -> str:
        return f"RequestContext(version={self.version!r}, role={self.role!r}, pair={self.pair!r})"

    @property
    def is_captured(self) -> bool:
        """True if effects and spans become part of a capture."""
        return self.sink is not None

    def ensure_effect_log(self) -> EffectLog:
        effect_log = self.effect_log
        if effect_log is None:
            with _lock:  # a request may use several threads
                effect_log = self.effect_log = self.effect_log or EffectLog()
        return effect_log

    def close_effect_log(self, redact: Redact) -> tuple[tuple[dict[str, Any], ...], int]:
        """Close the log. Return the effects for the capture, and the number of effects that were dropped."""
        with _lock:
            effect_log = self.effect_log = self.effect_log or CLOSED_LOG
        return ((), 0) if effect_log is CLOSED_LOG else (effect_log.close(redact), effect_log.dropped_count)


def make_context_factory(
    version: Version, role: Role, release: str, sink: EffectSink, edge_key: str = ""
) -> Callable[[str, int], RequestContext]:
    """Return a factory of contexts from the pair and the start in ns.

    A class holds the attributes that they share and the defaults of the others, because setting an attribute takes time.
    """

    class CapturedRequestContext(RequestContext):
        def __init__(self, pair: str, started_ns: int) -> None:
            self.pair = pair
            self.started_ns = started_ns

    template = RequestContext(version, role, "", release, sink, edge_key=edge_key)
    for name, value in vars(template).items():
        setattr(CapturedRequestContext, name, value)
    return CapturedRequestContext


NO_REQUEST = RequestContext(None, "live", "", "")
CURRENT_CONTEXT: ContextVar[RequestContext] = ContextVar("abreast", default=NO_REQUEST)


def current() -> RequestContext:
    """Return the context of the current request."""
    return CURRENT_CONTEXT.get()


def is_shadow() -> bool:
    """Return True if the response is discarded, so that the code must not have effects."""
    return CURRENT_CONTEXT.get().is_shadow


def downstream_headers() -> dict[str, str]:
    """Return the headers that mark a call to another service as the call of a shadow. Send them only to Envoy.

    Envoy then treats the call as a shadow too. The result is empty for a user's request, and without an edge key.
    """
    context = CURRENT_CONTEXT.get()
    return {SHADOW_HEADER: context.edge_key} if context.is_shadow and context.edge_key else {}


def inject() -> str:
    """Return the context as text, for `extract` in another process. Empty outside of a sampled request."""
    context = CURRENT_CONTEXT.get()
    if context is NO_REQUEST:
        return ""
    return orjson.dumps([context.version, context.role, context.pair, context.release]).decode()


def extract(carrier: str) -> None:
    """Take over the context of the sender, until the end of this task or thread or the next call. Never raises.

    Call it before each job, also with an empty carrier: then the job is live. The effects of the job become part of no
    capture.
    """
    context, current_context = _parse_carrier(carrier) if carrier else NO_REQUEST, CURRENT_CONTEXT.get()
    is_same_request = context.pair and (current_context.pair, current_context.role, current_context.version) == (
        context.pair,
        context.role,
        context.version,
    )
    if not is_same_request:  # within the process of the request, the context stays as it is
        CURRENT_CONTEXT.set(context)


def _parse_carrier(carrier: str) -> RequestContext:
    try:
        version, role, pair, release = orjson.loads(carrier)
        if role in get_args(Role) and version in {*get_args(Version), None}:
            return RequestContext(version, role, str(pair), str(release))
    except (ValueError, TypeError):
        pass
    logger.error("a carrier can't be read, so the job counts as a shadow: %.200s", carrier)
    return RequestContext(None, "shadow", "", "")


def run_cleanups(context: RequestContext) -> None:
    """Run the clean-ups in a separate task, because the task of the request may be cancelled."""
    cleanups, context.cleanups = context.cleanups, None
    if cleanups:
        task = asyncio.get_running_loop().create_task(_run_all(cleanups), name="abreast cleanup", context=Context())
        CLEANUP_TASKS.add(task)
        task.add_done_callback(CLEANUP_TASKS.discard)


async def _run_all(cleanups: list[Callable[[], Awaitable[object]]]) -> None:
    for cleanup in cleanups:
        try:
            await cleanup()
        except Exception as error:  # noqa: BLE001  # the other clean-ups must run
            report_error("cleaning up a shadow request", error)
