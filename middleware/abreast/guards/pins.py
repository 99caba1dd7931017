"""Connections that a shadow request keeps until its end, so that it reads what it has written."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from abreast.context import Current

C = TypeVar("C")

SHADOWS = 4  # connections of a pool for shadows
TIMEOUT = 5.0  # seconds that a shadow waits for one of them
WAITING = 2  # shadows for each connection that may wait in threads: users need threads too


class Pins(Generic[C]):
    """Of one pool. Requests' threads may come at once."""

    def __init__(self, end: Callable[[list[C]], Awaitable[object]]) -> None:
        self._end = end  # what is done with those of a request that is over
        self._free: dict[int, list[C]] = {}
        self._lock = threading.Lock()

    def take(self, request: Current) -> C | None:
        """One that this request uses no more; the last one, which has seen most."""
        with self._lock:
            free = self._free.get(id(request))
            return free.pop() if free else None

    def keep(self, request: Current | None, connection: C) -> bool:
        """False where nobody would tell the request's end, or it is over."""
        if request is None:
            return False
        with self._lock:
            ends = request.ends
            if id(request) not in self._free:
                if ends is None:
                    return False
                self._free[id(request)] = []
                ends.append(lambda: self._ended(request))
            self._free[id(request)].append(connection)
        return True

    async def _ended(self, request: Current) -> None:
        with self._lock:
            free = self._free.pop(id(request), [])
        await self._end(free)
