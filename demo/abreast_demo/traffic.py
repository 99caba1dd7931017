"""What the shop's users do: the same mix in every deck of 100 requests, so that what is rare is there for certain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

import orjson

USERS = 200
PRODUCTS = 120
OUT_OF_STOCK = range(9, PRODUCTS + 1, 9)
CATEGORIES = ("books", "garden", "kitchen", "office", "outdoor", "toys")
WORDS = ("tent", "lamp", "kettle", "sturdy", "atlas", "chair", "kite", "little", "drum", "bicycle")
RARE_WORDS = ("c++", "c++ primer", "notepad++")


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    user: str
    body: bytes = b""

    @property
    def safe(self) -> bool:
        return self.method == "GET"


Dice = random.Random


def product(dice: Dice) -> str:
    return f"/products/{dice.choice([n for n in range(1, PRODUCTS + 1) if n not in OUT_OF_STOCK])}"


def sold_out(dice: Dice) -> str:
    return f"/products/{dice.choice(OUT_OF_STOCK)}"


def unknown(dice: Dice) -> str:
    return f"/products/{dice.randint(PRODUCTS + 1, PRODUCTS + 50)}"


def any_product(dice: Dice) -> str:
    return f"/products/{dice.randint(1, PRODUCTS)}"


# How often in 100 requests, and what. Each endpoint comes often enough that some of its copies go to old twice.
MIX: tuple[tuple[int, Callable[[Dice], str]], ...] = (
    (14, product),
    (4, sold_out),
    (2, unknown),
    (7, lambda _dice: "/catalogue/categories"),
    (12, lambda dice: f"/catalogue/categories/{dice.choice(CATEGORIES)}"),
    (8, lambda dice: f"{any_product(dice)}/price?currency={dice.choice(('EUR', 'USD', 'GBP'))}"),
    (4, lambda dice: f"{any_product(dice)}/price?currency=JPY"),
    (10, lambda dice: f"{any_product(dice)}/reviews"),
    (2, lambda dice: f"{unknown(dice)}/reviews"),
    (10, lambda dice: f"{any_product(dice)}/related"),
    (15, lambda dice: f"/search?q={quote(dice.choice(WORDS))}"),
    (1, lambda dice: f"/search?q={quote(dice.choice(RARE_WORDS))}"),
    (8, lambda _dice: "/stats"),
    (3, lambda _dice: "/orders"),
)
DECK = sum(often for often, _ in MIX)


def requests(seed: int) -> Iterator[Request]:
    """Endless, and always the same for one seed."""
    dice = random.Random(seed)
    while True:
        deck = [path for often, path in MIX for _ in range(often)]
        dice.shuffle(deck)
        for path in deck:
            yield _request(dice, path(dice))


def _request(dice: Dice, path: str) -> Request:
    user = f"user-{dice.randint(1, USERS)}"
    if path == "/orders":
        wish = {"product": dice.randint(1, PRODUCTS), "quantity": dice.randint(1, 5)}
        return Request("POST", path, user, orjson.dumps(wish))
    return Request("GET", path, user)
