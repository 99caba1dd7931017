"""What a request is to the code that handles it: which version runs, and whether the answer goes to a user.

It lives in a context variable, which tasks, anyio's threads and sub-applications inherit. What runs outside a sampled
request is live.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Protocol

from abreast.capture import Role, Version
from abreast.journal import Journal


class Sink(Protocol):
    """Counts the effects that come when their capture has left."""

    def late(self) -> None: ...


class Current:
    """One request as its code sees it. Not to be changed.

    `role` is `live` for an answer that goes to the user; the answers of `shadow` and `baseline` are thrown away.
    `version` is None and `pair` is empty outside a sampled request.
    """

    __slots__ = ("_journal", "answered", "began", "pair", "release", "role", "shadow", "sink", "version")

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
        self.answered = False  # the answer has been sent
        self._journal: Journal | None = None

    def __repr__(self) -> str:
        return f"Current(version={self.version!r}, role={self.role!r}, pair={self.pair!r})"

    @property
    def recorded(self) -> bool:
        """Whether what is recorded now travels with a capture."""
        return self.sink is not None

    @property
    def held(self) -> Journal | None:
        """What was recorded so far; None when it is nothing."""
        return self._journal

    def journal(self) -> Journal:
        if self._journal is None:
            with MAKING:  # threads of one request may come at once
                if self._journal is None:
                    self._journal = Journal(self.began)
        return self._journal


MAKING = threading.Lock()
OUTSIDE = Current(None, "live", "", "")  # what is no sampled request
CURRENT: ContextVar[Current] = ContextVar("abreast", default=OUTSIDE)


def current() -> Current:
    """Version, role, pair id and release of the request that is handled."""
    return CURRENT.get()


def is_shadow() -> bool:
    """Whether the answer is thrown away, so that nothing may happen that lasts."""
    return CURRENT.get().shadow
