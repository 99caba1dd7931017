from __future__ import annotations

import asyncio
import time

from abreast.export.exporter import WakeEvent

LONG = 60.0  # seconds


async def test_wake_event_wakes_the_waiter() -> None:
    loop = asyncio.get_running_loop()
    alarm = WakeEvent(loop)
    loop.call_soon(alarm.set)

    assert await asyncio.wait_for(alarm.wait(LONG), 5) is True


async def test_wake_event_set_before_the_wait_returns_once() -> None:
    alarm = WakeEvent(asyncio.get_running_loop())
    alarm.set()

    assert await alarm.wait(LONG) is True
    assert await alarm.wait(0.001) is False


async def test_wake_event_can_be_cleared() -> None:
    alarm = WakeEvent(asyncio.get_running_loop())
    alarm.set()
    alarm.clear()

    assert await alarm.wait(0.001) is False


async def test_wake_event_waits_until_the_timeout() -> None:
    alarm, began = WakeEvent(asyncio.get_running_loop()), time.monotonic()

    assert await alarm.wait(0.02) is False
    assert time.monotonic() - began >= 0.019


async def test_wake_event_works_after_a_cancelled_wait() -> None:
    loop = asyncio.get_running_loop()
    alarm = WakeEvent(loop)
    task = asyncio.create_task(alarm.wait(LONG))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    alarm.set()

    assert await alarm.wait(LONG) is True
