"""What a shadow request leaves to be done when the app has returned, such as rolling back what it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context

from abreast.context import RequestContext
from abreast.rescue import ErrorReporter

report_error = ErrorReporter()
CLEANUP_TASKS: set[asyncio.Task[None]] = set()  # the loop itself would forget them


def run_cleanups(context: RequestContext) -> None:
    """In a task of its own: the request's may be cancelled. What comes after this finds `ends` to be None."""
    cleanups, context.cleanups = context.cleanups, None
    if cleanups:
        task = asyncio.get_running_loop().create_task(
            _run_all(cleanups), name="abreast end", context=Context()
        )
        CLEANUP_TASKS.add(task)
        task.add_done_callback(CLEANUP_TASKS.discard)


async def _run_all(cleanups: list[Callable[[], Awaitable[object]]]) -> None:
    for cleanup in cleanups:
        try:
            await cleanup()
        except Exception as error:  # noqa: BLE001  # the others are done all the same
            report_error("ending a shadow request", error)
