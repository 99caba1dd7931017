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

from abreast_demo.traffic import UserRequest

MAX_CONCURRENT_REQUESTS = 12
REQUEST_TIMEOUT_S = 10.0  # seconds
MIN_SERVER_ERROR_STATUS = 500
USER_HEADER = "x-user"


@dataclass
class UserTally:
    """What users saw. An answer below 500 is what the shop has to say; anything else is an error to a user."""

    requests: int = 0
    safe_requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # class of the error → how often

    @property
    def user_errors(self) -> int:
        error_responses = sum(
            count for status, count in self.statuses.items() if status >= MIN_SERVER_ERROR_STATUS
        )
        return error_responses + self.failures.total()


class LoadGenerator:
    """Use as an async context manager. `done` is called after each answer."""

    def __init__(self, url: str, on_response: Callable[[UserTally], None] = lambda _tally: None) -> None:
        self.tally = UserTally()
        self.client = httpx.AsyncClient(
            base_url=url,
            timeout=REQUEST_TIMEOUT_S,
            limits=httpx.Limits(
                max_connections=MAX_CONCURRENT_REQUESTS, max_keepalive_connections=MAX_CONCURRENT_REQUESTS
            ),
            trust_env=False,  # a proxy of the environment must not see loopback
        )
        self._on_response = on_response
        self._request_slots = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.client.aclose()

    async def send(self, requests: Iterator[UserRequest], *, seconds: float, rate: float) -> None:
        """Send for so long, or until there are no more; then wait for the answers under way."""
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                await asyncio.sleep(max(0.0, started_at + number / rate - time.monotonic()))
                await self._request_slots.acquire()
                if time.monotonic() - started_at >= seconds or (request := next(requests, None)) is None:
                    self._request_slots.release()
                    return
                group.create_task(self._send_request(request))

    async def _send_request(self, request: UserRequest) -> None:
        headers = {
            USER_HEADER: request.user,
            **({"content-type": "application/json"} if request.body else {}),
        }
        try:
            response = await self.client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            self.tally.statuses[response.status_code] += 1
        except httpx.HTTPError as error:
            self.tally.failures[type(error).__name__] += 1
        finally:
            self._request_slots.release()
        self.tally.requests += 1
        self.tally.safe_requests += request.is_safe
        self._on_response(self.tally)
