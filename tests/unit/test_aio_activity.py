"""The pace of periodic work."""

from __future__ import annotations

import asyncio

import pytest

from abreast_sidecar.aio import Activity

LONG_S = 600.0


async def test_activity_ends_the_idle_interval() -> None:
    activity, stop = Activity(), asyncio.Event()
    waiting = asyncio.create_task(activity.wait(stop, 0.0, LONG_S))
    await asyncio.sleep(0.02)
    was_waiting = not waiting.done()
    await activity.record()
    async with asyncio.timeout(LONG_S / 10):
        await waiting

    assert was_waiting


async def test_recent_activity_keeps_the_short_interval() -> None:
    activity = Activity()
    await activity.record()
    async with asyncio.timeout(LONG_S / 10):
        await activity.wait(asyncio.Event(), 0.0, LONG_S)

    assert activity.is_recent


async def test_activity_wait_ends_with_stop() -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(Activity().wait(stop, 0.0, LONG_S))
    await asyncio.sleep(0.02)
    stop.set()
    async with asyncio.timeout(LONG_S / 10):
        await waiting


async def test_activity_is_over_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    activity = Activity()
    await activity.record()
    was_recent = activity.is_recent
    monkeypatch.setattr("abreast_sidecar.aio.ACTIVITY_S", 0.0)

    assert (was_recent, activity.is_recent) == (True, False)
