"""Connections that a shadow request keeps until its end, so that it reads what it has written."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from abreast.context import RequestContext

C = TypeVar("C")

SHADOW_POOL_SIZE = 4  # connections of a pool for shadows
SHADOW_CONNECTION_TIMEOUT_S = 5.0  # seconds that a shadow waits for one of them
MAX_WAITERS_PER_CONNECTION = 2  # shadows for each connection that may wait in threads: users need threads too


class PinnedConnections(Generic[C]):
    """Of one pool. Requests' threads may come at once."""

    def __init__(self, on_request_end: Callable[[list[C]], Awaitable[object]]) -> None:
        self._on_request_end = on_request_end  # what is done with those of a request that is over
        self._idle: dict[int, list[C]] = {}
        self._lock = threading.Lock()

    def acquire(self, context: RequestContext) -> C | None:
        """One that this request uses no more; the last one, which has seen most."""
        with self._lock:
            idle = self._idle.get(id(context))
            return idle.pop() if idle else None

    def release(self, context: RequestContext | None, connection: C) -> bool:
        """False where nobody would tell the request's end, or it is over."""
        if context is None:
            return False
        with self._lock:
            cleanups = context.cleanups
            if id(context) not in self._idle:
                if cleanups is None:
                    return False
                self._idle[id(context)] = []
                cleanups.append(lambda: self._finish_request(context))
            self._idle[id(context)].append(connection)
        return True

    async def _finish_request(self, context: RequestContext) -> None:
        with self._lock:
            idle = self._idle.pop(id(context), [])
        await self._on_request_end(idle)
