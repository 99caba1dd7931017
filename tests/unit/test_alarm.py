from __future__ import annotations

import asyncio
import time

from abreast.export.exporter import WakeEvent

LONG = 60.0  # seconds


async def test_it_wakes_who_waits() -> None:
    loop = asyncio.get_running_loop()
    alarm = WakeEvent(loop)
    loop.call_soon(alarm.set)

    assert await asyncio.wait_for(alarm.wait(LONG), 5) is True


async def test_what_rang_before_is_heard_once() -> None:
    alarm = WakeEvent(asyncio.get_running_loop())
    alarm.set()

    assert await alarm.wait(LONG) is True
    assert await alarm.wait(0.001) is False


async def test_it_can_be_told_to_forget() -> None:
    alarm = WakeEvent(asyncio.get_running_loop())
    alarm.set()
    alarm.clear()

    assert await alarm.wait(0.001) is False


async def test_the_time_is_waited_for() -> None:
    alarm, began = WakeEvent(asyncio.get_running_loop()), time.monotonic()

    assert await alarm.wait(0.02) is False
    assert time.monotonic() - began >= 0.019


async def test_one_that_was_cancelled_leaves_nothing_behind() -> None:
    loop = asyncio.get_running_loop()
    alarm = WakeEvent(loop)
    task = asyncio.create_task(alarm.wait(LONG))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    alarm.set()

    assert await alarm.wait(LONG) is True
