"""The users' requests, and a load generator that sends them to Envoy at a steady rate."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

import httpx
import orjson

USER_COUNT = 200
PRODUCT_COUNT = 120
OUT_OF_STOCK_IDS = range(9, PRODUCT_COUNT + 1, 9)
IN_STOCK_IDS = [number for number in range(1, PRODUCT_COUNT + 1) if number not in OUT_OF_STOCK_IDS]
CATEGORY_SLUGS = ("books", "garden", "kitchen", "office", "outdoor", "toys")
SEARCH_WORDS = ("tent", "lamp", "kettle", "sturdy", "atlas", "chair", "kite", "little", "drum", "bicycle")
RARE_SEARCH_WORDS = ("c++", "c++ primer", "notepad++")
USER_HEADER = "x-user"
VERSION_HEADER = "x-abreast-version"
MAX_CONCURRENT_REQUESTS = 6  # more only queue on a small machine, which hides slow endpoints
REQUEST_TIMEOUT_S = 10.0
MIN_SERVER_ERROR_STATUS = 500

Dice = random.Random


@dataclass(frozen=True, slots=True)
class UserRequest:
    method: str
    path: str
    user: str
    body: bytes = b""

    @property
    def is_safe(self) -> bool:
        return self.method == "GET"


def pick_unknown_path(dice: Dice) -> str:
    return f"/products/{dice.randint(PRODUCT_COUNT + 1, PRODUCT_COUNT + 50)}"


def pick_product_path(dice: Dice) -> str:
    return f"/products/{dice.randint(1, PRODUCT_COUNT)}"


# Requests of each kind in 100. Each endpoint is frequent enough that old gets some of its requests twice.
REQUEST_MIX: tuple[tuple[int, Callable[[Dice], str]], ...] = (
    (14, lambda dice: f"/products/{dice.choice(IN_STOCK_IDS)}"),
    (4, lambda dice: f"/products/{dice.choice(OUT_OF_STOCK_IDS)}"),
    (2, pick_unknown_path),
    (7, lambda _dice: "/catalogue/categories"),
    (12, lambda dice: f"/catalogue/categories/{dice.choice(CATEGORY_SLUGS)}"),
    (8, lambda dice: f"{pick_product_path(dice)}/price?currency={dice.choice(('EUR', 'USD', 'GBP'))}"),
    (4, lambda dice: f"{pick_product_path(dice)}/price?currency=JPY"),
    (10, lambda dice: f"{pick_product_path(dice)}/reviews"),
    (2, lambda dice: f"{pick_unknown_path(dice)}/reviews"),
    (10, lambda dice: f"{pick_product_path(dice)}/related"),
    (15, lambda dice: f"/search?q={quote(dice.choice(SEARCH_WORDS))}"),
    (1, lambda dice: f"/search?q={quote(dice.choice(RARE_SEARCH_WORDS))}"),
    (8, lambda _dice: "/stats"),
    (3, lambda _dice: "/orders"),
)
DECK_SIZE = sum(frequency for frequency, _ in REQUEST_MIX)


def generate_requests(seed: int) -> Iterator[UserRequest]:
    """Yield requests without end. The same seed yields the same requests."""
    dice = random.Random(seed)
    while True:
        deck = [pick_path for frequency, pick_path in REQUEST_MIX for _ in range(frequency)]
        dice.shuffle(deck)
        for pick_path in deck:
            path, user = pick_path(dice), f"user-{dice.randint(1, USER_COUNT)}"
            if path == "/orders":
                order = {"product": dice.randint(1, PRODUCT_COUNT), "quantity": dice.randint(1, 5)}
                yield UserRequest("POST", path, user, orjson.dumps(order))
            else:
                yield UserRequest("GET", path, user)


@dataclass
class UserTally:
    """Responses by status. A status of 500 or above, or no response, is a user error."""

    requests: int = 0
    safe_requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # class of the error → count

    @property
    def user_errors(self) -> int:
        error_responses = sum(count for status, count in self.statuses.items() if status >= MIN_SERVER_ERROR_STATUS)
        return error_responses + self.failures.total()


@dataclass(frozen=True, slots=True)
class UserResponse:
    """A response, or its absence, with monotonic times in seconds."""

    sent_at: float
    answered_at: float
    version: str  # empty if no version answered
    is_safe: bool
    is_error: bool


class LoadGenerator:
    """An async context manager that calls `on_response` after each response."""

    def __init__(self, url: str, on_response: Callable[[UserResponse], None] = lambda _response: None) -> None:
        self.tally = UserTally()
        self._on_response = on_response
        self._request_slots = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)
        limits = httpx.Limits(
            max_connections=MAX_CONCURRENT_REQUESTS, max_keepalive_connections=MAX_CONCURRENT_REQUESTS
        )
        # Envoy listens on loopback, so a proxy from the environment must not apply.
        self._client = httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._client.aclose()

    async def send(
        self, requests: Iterator[UserRequest], *, requests_per_s: float, timeout_s: float = math.inf
    ) -> None:
        """Send until the requests or the time run out, then wait for the responses in flight."""
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                await asyncio.sleep(max(0.0, started_at + number / requests_per_s - time.monotonic()))
                await self._request_slots.acquire()
                if time.monotonic() - started_at >= timeout_s or (request := next(requests, None)) is None:
                    self._request_slots.release()
                    return
                group.create_task(self._send_request(request))

    async def _send_request(self, request: UserRequest) -> None:
        headers = {USER_HEADER: request.user, "cookie": f"session={request.user}"}  # middleware captures the cookie
        if request.body:
            headers["content-type"] = "application/json"
        sent_at, version, is_error = time.monotonic(), "", True
        try:
            response = await self._client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            version = response.headers.get(VERSION_HEADER, "")
            is_error = response.status_code >= MIN_SERVER_ERROR_STATUS
            self.tally.statuses[response.status_code] += 1
        except httpx.HTTPError as error:
            self.tally.failures[type(error).__name__] += 1
        finally:
            self._request_slots.release()
        self.tally.requests += 1
        self.tally.safe_requests += request.is_safe
        self._on_response(UserResponse(sent_at, time.monotonic(), version, request.is_safe, is_error))
