"""What the shop's users do: the same mix in every deck of 100 requests, so that what is rare is there for certain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

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
