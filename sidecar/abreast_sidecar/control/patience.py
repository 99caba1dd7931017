"""How long a caller waits for Postgres where it can do without."""

from __future__ import annotations

import asyncio
from typing import Any

OPTIONAL_CALL_TIMEOUT_S = 1.0  # seconds


async def error_within(task: asyncio.Task[Any]) -> str:
    """What is amiss with the task after so long; empty for nothing. Never cancelled: a driver that waits for a frozen
    Postgres would not let go, and goes on once it thaws.
    """
    task.add_done_callback(
        lambda future: future.cancelled() or future.exception()
    )  # whoever left, it is no news
    await asyncio.wait({task}, timeout=OPTIONAL_CALL_TIMEOUT_S)
    if not task.done():
        return f"postgres has not answered for {OPTIONAL_CALL_TIMEOUT_S:g} s"
    error = task.exception()
    return str(error) if error else ""
