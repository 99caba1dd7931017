"""One load for all who want the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Landed:
    """How a load ended. Both are None for one that was given up, which somebody else begins anew."""

    value: Any = None
    error: Exception | None = None
    given_up: bool = False


class Flights:
    """Loads that are under way in this process.

    The first who asks loads, in its own task, so that what it uses (a session, a connection) is its own. The others
    wait. When the first is cancelled, one of the others begins its own load; no cancellation reaches anybody else.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, asyncio.Future[Landed]] = {}

    async def join(self, key: Hashable) -> Landed | None:
        """What the load that is under way ends with; None when there is none, or none any more."""
        flight = self._waiting.get(self._of_this_loop(key))
        return None if flight is None else await asyncio.shield(flight)

    async def lead(self, key: Hashable, load: Callable[[], Awaitable[Any]]) -> Any:
        """Load for all. To be called without an `await` since `join` found nothing."""
        key = self._of_this_loop(key)
        flight = self._waiting[key] = asyncio.get_running_loop().create_future()
        landed = Landed(given_up=True)
        try:
            landed = Landed(await load())
        except Exception as error:
            landed = Landed(error=error)
            raise
        finally:
            if self._waiting.get(key) is flight:
                del self._waiting[key]
            flight.set_result(landed)
        return landed.value

    async def run(self, key: Hashable, load: Callable[[], Awaitable[Any]]) -> Any:
        """The value, or what the load raised, however many ask."""
        while (landed := await self.join(key)) is not None:
            if landed.error is not None:
                raise landed.error
            if not landed.given_up:
                return landed.value
        return await self.lead(key, load)

    def forget(self, key: Hashable) -> None:
        """Who asks from now on doesn't get what is under way."""
        self._waiting.pop(self._of_this_loop(key), None)

    def mark(self, key: Hashable) -> object:
        """What is under way now: another one, or None, once it was forgotten."""
        return self._waiting.get(self._of_this_loop(key))

    def _of_this_loop(self, key: Hashable) -> Hashable:
        return id(asyncio.get_running_loop()), key
