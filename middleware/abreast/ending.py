"""What a shadow request leaves to be done when the app has returned, such as rolling back what it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context

from abreast.context import Current
from abreast.rescue import Rescue

RESCUE = Rescue()
UNDER_WAY: set[asyncio.Task[None]] = set()  # the loop itself would forget them


def end(request: Current) -> None:
    """In a task of its own: the request's may be cancelled. What comes after this finds `ends` to be None."""
    ends, request.ends = request.ends, None
    if ends:
        task = asyncio.get_running_loop().create_task(_all(ends), name="abreast end", context=Context())
        UNDER_WAY.add(task)
        task.add_done_callback(UNDER_WAY.discard)


async def _all(ends: list[Callable[[], Awaitable[object]]]) -> None:
    for each in ends:
        try:
            await each()
        except Exception as error:  # noqa: BLE001  # the others are done all the same
            RESCUE("ending a shadow request", error)
