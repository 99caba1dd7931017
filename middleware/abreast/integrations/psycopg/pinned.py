"""Idle connections of shadow requests, and the limits of the pools that serve them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

from abreast.context import RequestContext

C = TypeVar("C")

SHADOW_POOL_SIZE = 4  # connections for shadows per pool
SHADOW_CONNECTION_TIMEOUT_S = 5.0  # longest wait of a shadow for one of them
MAX_WAITERS_PER_CONNECTION = 2  # shadows that wait in threads, which users need too
ASYNC_MAX_WAITERS_PER_CONNECTION = 1000  # shadows that wait in tasks, which cost users nothing


class PinnedConnections(Generic[C]):
    """The connections of one pool that shadow requests returned and may take again. Thread-safe.

    `on_request_end` receives the idle connections of a request that is over. A plain function runs in a thread.
    """

    def __init__(self, on_request_end: Callable[[list[C]], object]) -> None:
        self._on_request_end = on_request_end
        self._idle: dict[int, list[C]] = {}
        self._lock = threading.Lock()

    def acquire(self, context: RequestContext) -> C | None:
        """Return the connection that this request released last, if any."""
        with self._lock:
            idle = self._idle.get(id(context))
            return idle.pop() if idle else None

    def release(self, context: RequestContext | None, connection: C) -> bool:
        """Keep the connection for its request. Return False if the request is over or its end would go unnoticed."""
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
        if inspect.iscoroutinefunction(self._on_request_end):
            await self._on_request_end(idle)
        else:
            await asyncio.to_thread(self._on_request_end, idle)


async def run_in_empty_context_async(func: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    """Open a pool outside of the request: its tasks outlive the request, and must not count as a shadow's."""
    await asyncio.get_running_loop().create_task(func(*args), context=Context())


def run_in_empty_context(func: Callable[..., None], *args: Any) -> None:
    """Open a pool outside of the request, as `run_in_empty_context_async` does."""
    Context().run(func, *args)
