"""What the port to FastAPI broke, what it changed without harm, and how Abreast is to report it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FindingLocation:
    """Where a finding is: what tells one cause from another."""

    endpoint: str  # "GET /search"
    part: str
    path: str
    kind: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.endpoint, self.part, self.path, self.kind) if part)


@dataclass(frozen=True, slots=True)
class PlantedChange:
    name: str  # marks the line in new.py
    description: str
    location: FindingLocation


PRODUCT_ENDPOINT = "GET /products/{product_id}"

PLANTED_REGRESSIONS = (
    PlantedChange(
        "yen-rounding",
        "prices in yen, and only those, are cut where they were rounded",
        FindingLocation(f"{PRODUCT_ENDPOINT}/price", "body", "$.amount", "changed"),
    ),
    PlantedChange(
        "stock-field",
        "products that are out of stock have no field `stock`, since 0 is its default",
        FindingLocation(PRODUCT_ENDPOINT, "body", "$.stock", "removed"),
    ),
    PlantedChange(
        "empty-reviews",
        "the reviews of a product that doesn't exist were a 404, and are an empty 200",
        FindingLocation(f"{PRODUCT_ENDPOINT}/reviews", "status", "404->200", "changed"),
    ),
    PlantedChange(
        "cache-control",
        "the list of categories lost its `cache-control`",
        FindingLocation("GET /catalogue/categories", "header", "cache-control", "removed"),
    ),
    PlantedChange(
        "price-as-text",
        "a category's prices were numbers and are strings: pydantic's way with Decimal",
        FindingLocation("GET /catalogue/categories/{slug}", "body", "$.products[*].price", "type"),
    ),
    PlantedChange(
        "search-error",
        "a search for `c++` fails, since the words became a regular expression",
        FindingLocation("GET /search", "status", "200->500", "changed"),
    ),
    PlantedChange(
        "slow-search",
        "every search takes 30 ms longer",
        FindingLocation("GET /search", "latency", "", "slower"),
    ),
)

PLANTED_ADDITIONS = (
    PlantedChange(
        "median-price",
        "the statistics have one field more",
        FindingLocation("GET /stats", "body", "$.median_price", "added"),
    ),
)

PLANTED_NOISE = (
    PlantedChange(
        "request-id-header",
        "every search has an id of its own, in a header",
        FindingLocation("GET /search", "header", "x-search-id", "changed"),
    ),
    PlantedChange(
        "request-id-body",
        "every search has an id of its own, in the body",
        FindingLocation("GET /search", "body", "$.request_id", "changed"),
    ),
    PlantedChange(
        "timestamp",
        "the statistics say when they were made",
        FindingLocation("GET /stats", "body", "$.generated_at", "changed"),
    ),
    PlantedChange(
        "shuffled-set",
        "related products are a set, in any order",
        FindingLocation(f"{PRODUCT_ENDPOINT}/related", "body", "$.related", "order"),
    ),
)

# Not planted, but true of the port: FastAPI takes more of the processor than Starlette does. It shows where the machine has
# none to spare, in any endpoint.
CPU_COST_NOTE = "new takes more of the processor for each answer, which this machine had little of"
