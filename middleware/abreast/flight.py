"""One load for all who want the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How a load ended. Both are None for one that was given up, which somebody else begins anew."""

    value: Any = None
    error: Exception | None = None
    is_abandoned: bool = False


class SingleFlight:
    """Loads that are under way in this process.

    The first who asks loads, in its own task, so that what it uses (a session, a connection) is its own. The others
    wait. When the first is cancelled, one of the others begins its own load; no cancellation reaches anybody else.
    """

    def __init__(self) -> None:
        self._loads: dict[Hashable, asyncio.Future[LoadResult]] = {}

    async def join(self, key: Hashable) -> LoadResult | None:
        """What the load that is under way ends with; None when there is none, or none any more."""
        load_future = self._loads.get(self._key_in_loop(key))
        return None if load_future is None else await asyncio.shield(load_future)

    async def lead(self, key: Hashable, load: Callable[[], Awaitable[Any]]) -> Any:
        """Load for all. To be called without an `await` since `join` found nothing."""
        key = self._key_in_loop(key)
        load_future = self._loads[key] = asyncio.get_running_loop().create_future()
        result = LoadResult(is_abandoned=True)
        try:
            result = LoadResult(await load())
        except Exception as error:
            result = LoadResult(error=error)
            raise
        finally:
            if self._loads.get(key) is load_future:
                del self._loads[key]
            load_future.set_result(result)
        return result.value

    async def run(self, key: Hashable, load: Callable[[], Awaitable[Any]]) -> Any:
        """The value, or what the load raised, however many ask."""
        while (result := await self.join(key)) is not None:
            if result.error is not None:
                raise result.error
            if not result.is_abandoned:
                return result.value
        return await self.lead(key, load)

    def invalidate(self, key: Hashable) -> None:
        """Who asks from now on doesn't get what is under way."""
        self._loads.pop(self._key_in_loop(key), None)

    def get_version(self, key: Hashable) -> object:
        """What is under way now: another one, or None, once it was forgotten."""
        return self._loads.get(self._key_in_loop(key))

    def _key_in_loop(self, key: Hashable) -> Hashable:
        return id(asyncio.get_running_loop()), key
