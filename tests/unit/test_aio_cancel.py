from __future__ import annotations

import asyncio

import pytest

from abreast_sidecar import aio
from abreast_sidecar.aio import cancel_and_wait


async def swallowing(times: int) -> None:
    """Swallow cancellations, as some drivers do."""
    while times >= 0:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            times -= 1


async def failing() -> None:
    raise ValueError("on its way")


async def test_cancel_and_wait_repeats_swallowed_cancellations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "CANCEL_RETRY_S", 0.01)
    tasks = [asyncio.create_task(swallowing(times)) for times in (0, 2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_and_wait(*tasks)

    assert all(task.done() for task in tasks)


async def test_cancel_and_wait_accepts_finished_tasks() -> None:
    tasks = [asyncio.create_task(failing()), asyncio.create_task(asyncio.sleep(0))]
    await asyncio.wait(tasks)

    await cancel_and_wait(*tasks)
    await cancel_and_wait()
