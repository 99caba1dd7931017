"""Sends the users' requests through Envoy: as many a second as asked, never more at once than a small machine bears."""

from __future__ import annotations

import asyncio
import itertools
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
CATEGORY_SLUGS = ("books", "garden", "kitchen", "office", "outdoor", "toys")
SEARCH_WORDS = ("tent", "lamp", "kettle", "sturdy", "atlas", "chair", "kite", "little", "drum", "bicycle")
RARE_SEARCH_WORDS = ("c++", "c++ primer", "notepad++")


@dataclass(frozen=True, slots=True)
class UserRequest:
    method: str
    path: str
    user: str
    body: bytes = b""

    @property
    def is_safe(self) -> bool:
        return self.method == "GET"


Dice = random.Random


def pick_in_stock_path(dice: Dice) -> str:
    return f"/products/{dice.choice([n for n in range(1, PRODUCT_COUNT + 1) if n not in OUT_OF_STOCK_IDS])}"


def pick_sold_out_path(dice: Dice) -> str:
    return f"/products/{dice.choice(OUT_OF_STOCK_IDS)}"


def pick_unknown_path(dice: Dice) -> str:
    return f"/products/{dice.randint(PRODUCT_COUNT + 1, PRODUCT_COUNT + 50)}"


def pick_product_path(dice: Dice) -> str:
    return f"/products/{dice.randint(1, PRODUCT_COUNT)}"


# How often in 100 requests, and what. Each endpoint comes often enough that some of its copies go to old twice.
REQUEST_MIX: tuple[tuple[int, Callable[[Dice], str]], ...] = (
    (14, pick_in_stock_path),
    (4, pick_sold_out_path),
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
DECK_SIZE = sum(often for often, _ in REQUEST_MIX)


def generate_requests(seed: int) -> Iterator[UserRequest]:
    """Endless, and always the same for one seed."""
    dice = random.Random(seed)
    while True:
        deck = [pick_path for frequency, pick_path in REQUEST_MIX for _ in range(frequency)]
        dice.shuffle(deck)
        for pick_path in deck:
            yield _build_user_request(dice, pick_path(dice))


def _build_user_request(dice: Dice, path: str) -> UserRequest:
    user = f"user-{dice.randint(1, USER_COUNT)}"
    if path == "/orders":
        wish = {"product": dice.randint(1, PRODUCT_COUNT), "quantity": dice.randint(1, 5)}
        return UserRequest("POST", path, user, orjson.dumps(wish))
    return UserRequest("GET", path, user)


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
        error_responses = sum(count for status, count in self.statuses.items() if status >= MIN_SERVER_ERROR_STATUS)
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
        headers = {USER_HEADER: request.user, **({"content-type": "application/json"} if request.body else {})}
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
