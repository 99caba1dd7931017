from __future__ import annotations

import asyncio
from typing import Any

CANCEL_RETRY_S = 5.0  # seconds; longer than any of them takes to clean up


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and return once they are over, whatever they raised.

    Before Python 3.12 `asyncio.wait_for`, by which drivers wait for Redis and Postgres, swallows a cancellation that comes
    together with the answer. A loop would then go on for ever, so it is told again.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=CANCEL_RETRY_S)
    await asyncio.gather(*tasks, return_exceptions=True)
