"""What the port to FastAPI broke, what it changed without harm, and how Abreast is to report it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a finding is: what tells one cause from another."""

    endpoint: str  # "GET /search"
    part: str
    path: str
    kind: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.endpoint, self.part, self.path, self.kind) if part)


@dataclass(frozen=True, slots=True)
class Plant:
    name: str  # marks the line in new.py
    what: str
    place: Place


PRODUCT = "GET /products/{product_id}"

REGRESSIONS = (
    Plant(
        "yen-rounding",
        "prices in yen, and only those, are cut where they were rounded",
        Place(f"{PRODUCT}/price", "body", "$.amount", "changed"),
    ),
    Plant(
        "stock-field",
        "products that are out of stock have no field `stock`, since 0 is its default",
        Place(PRODUCT, "body", "$.stock", "removed"),
    ),
    Plant(
        "empty-reviews",
        "the reviews of a product that doesn't exist were a 404, and are an empty 200",
        Place(f"{PRODUCT}/reviews", "status", "404->200", "changed"),
    ),
    Plant(
        "cache-control",
        "the list of categories lost its `cache-control`",
        Place("GET /catalogue/categories", "header", "cache-control", "removed"),
    ),
    Plant(
        "price-as-text",
        "a category's prices were numbers and are strings: pydantic's way with Decimal",
        Place("GET /catalogue/categories/{slug}", "body", "$.products[*].price", "type"),
    ),
    Plant(
        "search-error",
        "a search for `c++` fails, since the words became a regular expression",
        Place("GET /search", "status", "200->500", "changed"),
    ),
    Plant(
        "slow-search",
        "every search takes 30 ms longer",
        Place("GET /search", "latency", "", "slower"),
    ),
)

ADDITIVE = (
    Plant(
        "median-price",
        "the statistics have one field more",
        Place("GET /stats", "body", "$.median_price", "added"),
    ),
)

NOISE = (
    Plant(
        "request-id-header",
        "every search has an id of its own, in a header",
        Place("GET /search", "header", "x-search-id", "changed"),
    ),
    Plant(
        "request-id-body",
        "every search has an id of its own, in the body",
        Place("GET /search", "body", "$.request_id", "changed"),
    ),
    Plant(
        "timestamp",
        "the statistics say when they were made",
        Place("GET /stats", "body", "$.generated_at", "changed"),
    ),
    Plant(
        "shuffled-set",
        "related products are a set, in any order",
        Place(f"{PRODUCT}/related", "body", "$.related", "order"),
    ),
)

# Not planted, but true of the port: FastAPI takes more of the processor than Starlette does. It shows where the machine has
# none to spare, in any endpoint.
HEAVIER = "new takes more of the processor for each answer, which this machine had little of"
