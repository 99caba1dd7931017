from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Notifier:
    """Wakes everyone who waits for it. Look at the state, and wait only then: nothing is remembered."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify_all(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait(self) -> Coroutine[Any, Any, Any]:
        """For the next ring after this call, also where a task waits that starts later."""
        return self._event.wait()
