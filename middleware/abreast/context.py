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
from abreast.journal import Journal, Redact

if TYPE_CHECKING:
    from abreast.hops import Hops

NOTHING: frozenset[tuple[int, str]] = frozenset()


class Sink(Protocol):
    """Counts the effects that come when their capture has left."""

    def late(self) -> None: ...


class Current:
    """One request as its code sees it. Not to be changed.

    `role` is `live` for an answer that goes to the user; the answers of `shadow` and `baseline` are thrown away.
    `version` is None and `pair` is empty outside a sampled request.
    """

    # Defaults in the class, since most requests need few of these and setting one takes time.
    answered = False  # the answer has been sent
    held: Journal | None = None  # what was recorded so far
    hops: Hops | None = None
    # Of a shadow: what is to be done when the app has returned. None where nobody would do it, or it was done.
    ends: list[Callable[[], Awaitable[object]]] | None = None
    disturbed = ""  # why what comes of a shadow says nothing of its code
    forgotten: AbstractSet[tuple[int, str]] = NOTHING  # what a shadow deleted from a cache: (cache, key)

    def __init__(
        self,
        version: Version | None,
        role: Role,
        pair: str,
        release: str,
        sink: Sink | None = None,
        began: int = 0,
    ) -> None:
        self.version = version
        self.role = role
        self.pair = pair
        self.release = release
        self.shadow = role != "live"
        self.sink = sink  # None where nothing is captured
        self.began = began  # perf_counter_ns

    def __repr__(self) -> str:
        return f"Current(version={self.version!r}, role={self.role!r}, pair={self.pair!r})"

    @property
    def recorded(self) -> bool:
        """Whether what is recorded now travels with a capture."""
        return self.sink is not None

    def journal(self) -> Journal:
        held = self.held
        if held is None:
            with MAKING:  # threads of one request may come at once
                held = self.held = self.held or Journal(self.began)
        return held

    def close(self, redact: Redact) -> tuple[tuple[dict[str, Any], ...], int]:
        """What was recorded, for the capture, and how many more there were. What comes later is late."""
        with MAKING:
            held = self.held = self.held or LATE
        return ((), 0) if held is LATE else (held.close(redact), held.dropped)


def maker(version: Version, role: Role, release: str, sink: Sink) -> Callable[[str, int], Current]:
    """What makes a captured request of its pair and its start. What all of them share is in a class of their own."""

    class Marked(Current):
        def __init__(self, pair: str, began: int) -> None:
            self.pair = pair
            self.began = began

    shared = Current(version, role, "", release, sink)
    for name, value in vars(shared).items():
        setattr(Marked, name, value)
    return Marked


MAKING = threading.Lock()
LATE = Journal(0)  # of all requests that recorded nothing in time
LATE.closed = True
OUTSIDE = Current(None, "live", "", "")  # what is no sampled request
CURRENT: ContextVar[Current] = ContextVar("abreast", default=OUTSIDE)


def current() -> Current:
    """Version, role, pair id and release of the request that is handled."""
    return CURRENT.get()


def is_shadow() -> bool:
    """Whether the answer is thrown away, so that nothing may happen that lasts."""
    return CURRENT.get().shadow
