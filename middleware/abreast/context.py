"""What a request is to the code that handles it: which version runs, and whether the answer goes to a user.

It lives in a context variable, which tasks, anyio's threads and sub-applications inherit. What runs outside a sampled
request is live.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from abreast.capture import Role, Version
from abreast.journal import EffectLog, Redact

if TYPE_CHECKING:
    from abreast.hops import Spans

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
    deleted_cache_keys: AbstractSet[tuple[int, str]] = (
        NO_CACHE_KEYS  # what a shadow deleted from a cache: (cache, key)
    )

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
