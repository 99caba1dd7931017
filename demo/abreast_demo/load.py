"""Sends the users' requests through Envoy: as many a second as asked, never more at once than a small machine bears."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self

import httpx

from abreast_demo.traffic import Request

AT_ONCE = 12
TIMEOUT = 10.0  # seconds
SERVER_ERROR = 500
USER_HEADER = "x-user"


@dataclass
class Tally:
    """What users saw. An answer below 500 is what the shop has to say; anything else is an error to a user."""

    requests: int = 0
    safe: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # class of the error → how often

    @property
    def user_errors(self) -> int:
        refused = sum(count for status, count in self.statuses.items() if status >= SERVER_ERROR)
        return refused + self.failures.total()


class Load:
    """Use as an async context manager. `done` is called after each answer."""

    def __init__(self, url: str, done: Callable[[Tally], None] = lambda _tally: None) -> None:
        self.tally = Tally()
        self.client = httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE),
            trust_env=False,  # a proxy of the environment must not see loopback
        )
        self._done = done
        self._places = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.client.aclose()

    async def send(self, requests: Iterator[Request], *, seconds: float, rate: float) -> None:
        """Send for so long, or until there are no more; then wait for the answers under way."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
                await self._places.acquire()
                if time.monotonic() - started >= seconds or (request := next(requests, None)) is None:
                    self._places.release()
                    return
                group.create_task(self._one(request))

    async def _one(self, request: Request) -> None:
        headers = {
            USER_HEADER: request.user,
            **({"content-type": "application/json"} if request.body else {}),
        }
        try:
            answer = await self.client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            self.tally.statuses[answer.status_code] += 1
        except httpx.HTTPError as error:
            self.tally.failures[type(error).__name__] += 1
        finally:
            self._places.release()
        self.tally.requests += 1
        self.tally.safe += request.safe
        self._done(self.tally)
