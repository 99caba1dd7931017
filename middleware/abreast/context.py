"""What a request is to the code that handles it: which version runs, and whether the answer goes to a user.

It lives in a context variable, which tasks, anyio's threads and sub-applications inherit. What runs outside a sampled
request is live.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import Context, ContextVar
from time import perf_counter_ns
from typing import Any, Protocol, get_args

import orjson

from abreast.effect_log import EffectLog, Redact
from abreast.errors import ErrorReporter
from abreast.protocol.capture import Role, SpanRow, Version

MAX_SPANS = 100  # of a request; those beyond are not kept
MAX_SPAN_NAME_CHARS = 100  # characters
HIT, MISS = "hit", "miss"


class Spans:
    """Of one request. `hits` and `misses` of a cache are counted beyond the bound too."""

    __slots__ = ("hits", "misses", "rows")

    def __init__(self) -> None:
        self.rows: list[SpanRow] = []
        self.hits = 0
        self.misses = 0


def add_span(context: RequestContext, kind: str, name: str, started_ns: int, note: str = "") -> None:
    """Note one that began at `since` (perf_counter_ns) and ends now, if the request is recorded."""
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
    """Time what the block asks of something else: `with abreast.hop("search"): ...`"""
    context, started_ns, note = CURRENT_CONTEXT.get(), perf_counter_ns(), ""
    try:
        yield
    except BaseException as error:
        note = type(error).__name__
        raise
    finally:
        add_span(context, kind, name, started_ns, note)


NO_CACHE_KEYS: frozenset[tuple[int, str]] = frozenset()


class EffectSink(Protocol):
    """Counts the effects that come when their capture has left."""

    def count_late_effect(self) -> None: ...


class RequestContext:
    """One request as its code sees it. Not to be changed.

    `role` is `live` for an answer that goes to the user; the answers of `shadow` and `baseline` are thrown away.
    `version` is None and `pair` is empty outside a sampled request.
    """

    # Defaults in the class, since most requests need few of these and setting one takes time.
    response_sent = False  # the answer has been sent
    effect_log: EffectLog | None = None  # what was recorded so far
    spans: Spans | None = None
    # Of a shadow: what is to be done when the app has returned. None where nobody would do it, or it was done.
    cleanups: list[Callable[[], Awaitable[object]]] | None = None
    invalid_reason = ""  # why what comes of a shadow says nothing of its code
    deleted_cache_keys: AbstractSet[tuple[int, str]] = NO_CACHE_KEYS  # what a shadow deleted from a cache: (cache, key)

    def __init__(
        self,
        version: Version | None,
        role: Role,
        pair: str,
        release: str,
        sink: EffectSink | None = None,
        started_ns: int = 0,
    ) -> None:
        self.version = version
        self.role = role
        self.pair = pair
        self.release = release
        self.is_shadow = role != "live"
        self.sink = sink  # None where nothing is captured
        self.started_ns = started_ns  # perf_counter_ns

    def __repr__(self) -> str:
        return f"Current(version={self.version!r}, role={self.role!r}, pair={self.pair!r})"

    @property
    def is_captured(self) -> bool:
        """Whether what is recorded now travels with a capture."""
        return self.sink is not None

    def ensure_effect_log(self) -> EffectLog:
        effect_log = self.effect_log
        if effect_log is None:
            with _lock:  # threads of one request may come at once
                effect_log = self.effect_log = self.effect_log or EffectLog(self.started_ns)
        return effect_log

    def close_effect_log(self, redact: Redact) -> tuple[tuple[dict[str, Any], ...], int]:
        """What was recorded, for the capture, and how many more there were. What comes later is late."""
        with _lock:
            effect_log = self.effect_log = self.effect_log or CLOSED_LOG
        return ((), 0) if effect_log is CLOSED_LOG else (effect_log.close(redact), effect_log.dropped_count)


def make_context_factory(
    version: Version, role: Role, release: str, sink: EffectSink
) -> Callable[[str, int], RequestContext]:
    """What makes a captured request of its pair and its start. What all of them share is in a class of their own."""

    class CapturedRequestContext(RequestContext):
        def __init__(self, pair: str, began: int) -> None:
            self.pair = pair
            self.started_ns = began

    template = RequestContext(version, role, "", release, sink)
    for name, value in vars(template).items():
        setattr(CapturedRequestContext, name, value)
    return CapturedRequestContext


_lock = threading.Lock()
CLOSED_LOG = EffectLog(0)  # of all requests that recorded nothing in time
CLOSED_LOG.is_closed = True
NO_REQUEST = RequestContext(None, "live", "", "")  # what is no sampled request
CURRENT_CONTEXT: ContextVar[RequestContext] = ContextVar("abreast", default=NO_REQUEST)


def current() -> RequestContext:
    """Version, role, pair id and release of the request that is handled."""
    return CURRENT_CONTEXT.get()


def is_shadow() -> bool:
    """Whether the answer is thrown away, so that nothing may happen that lasts."""
    return CURRENT_CONTEXT.get().is_shadow


logger = logging.getLogger("abreast")


def inject() -> str:
    """What to send along, for `adopt`. Empty outside a sampled request."""
    context = CURRENT_CONTEXT.get()
    if context is NO_REQUEST:
        return ""
    return orjson.dumps([context.version, context.role, context.pair, context.release]).decode()


def extract(carrier: str) -> None:
    """Be what the sender was, until the end of this task or thread, or until the next call. Never raises.

    Call it before each piece of work, also where nothing was carried: then the work is live. What is recorded here
    travels with no capture.
    """
    context, current_context = _parse_carrier(carrier) if carrier else NO_REQUEST, CURRENT_CONTEXT.get()
    is_same_request = context.pair and (current_context.pair, current_context.role, current_context.version) == (
        context.pair,
        context.role,
        context.version,
    )
    if not is_same_request:  # in the process of the request it stays the request's own
        CURRENT_CONTEXT.set(context)


def _parse_carrier(carrier: str) -> RequestContext:
    try:
        version, role, pair, release = orjson.loads(carrier)
        if role in get_args(Role) and version in {*get_args(Version), None}:
            return RequestContext(version, role, str(pair), str(release))
    except (ValueError, TypeError):
        pass
    logger.error("work came with a role that can't be read, and counts as a shadow's: %.200s", carrier)
    return RequestContext(None, "shadow", "", "")


report_error = ErrorReporter()
CLEANUP_TASKS: set[asyncio.Task[None]] = set()  # the loop itself would forget them


def run_cleanups(context: RequestContext) -> None:
    """In a task of its own: the request's may be cancelled. What comes after this finds `ends` to be None."""
    cleanups, context.cleanups = context.cleanups, None
    if cleanups:
        task = asyncio.get_running_loop().create_task(_run_all(cleanups), name="abreast end", context=Context())
        CLEANUP_TASKS.add(task)
        task.add_done_callback(CLEANUP_TASKS.discard)


async def _run_all(cleanups: list[Callable[[], Awaitable[object]]]) -> None:
    for cleanup in cleanups:
        try:
            await cleanup()
        except Exception as error:  # noqa: BLE001  # the others are done all the same
            report_error("ending a shadow request", error)
