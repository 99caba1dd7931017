from __future__ import annotations

import asyncio


class Bell:
    """Wakes everyone who waits for it. Look at the state, and wait only then: nothing is remembered."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()
