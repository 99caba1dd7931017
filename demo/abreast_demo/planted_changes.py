"""The changes planted in the new version, and the check that Abreast reports each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from abreast_demo.load import UserTally


@dataclass(frozen=True, slots=True)
class FindingLocation:
    """The key by which a finding matches a planted change."""

    endpoint: str  # method and route
    part: str
    path: str
    kind: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.endpoint, self.part, self.path, self.kind) if part)


@dataclass(frozen=True, slots=True)
class PlantedChange:
    name: str  # marks the line in new.py, as a comment
    description: str
    location: FindingLocation


PRODUCT_ENDPOINT = "GET /products/{product_id}"

# fmt: off
PLANTED_REGRESSIONS = (
    PlantedChange("yen-rounding", "prices in yen are truncated instead of rounded",
                  FindingLocation(f"{PRODUCT_ENDPOINT}/price", "body", "$.amount", "changed")),
    PlantedChange("stock-field", "products that are out of stock lack `stock`, because 0 is its default",
                  FindingLocation(PRODUCT_ENDPOINT, "body", "$.stock", "removed")),
    PlantedChange("empty-reviews", "reviews of an unknown product return an empty 200 instead of a 404",
                  FindingLocation(f"{PRODUCT_ENDPOINT}/reviews", "status", "404->200", "changed")),
    PlantedChange("cache-control", "the list of categories lacks `cache-control`",
                  FindingLocation("GET /catalogue/categories", "header", "cache-control", "removed")),
    PlantedChange("price-as-text", "prices in a category are strings, because pydantic serialises Decimal so",
                  FindingLocation("GET /catalogue/categories/{slug}", "body", "$.products[*].price", "type")),
    PlantedChange("search-error", "a search for `c++` fails, because the words became a regular expression",
                  FindingLocation("GET /search", "status", "200->500", "changed")),
    PlantedChange("slow-search", "every search takes 100 ms longer",
                  FindingLocation("GET /search", "latency", "", "slower")),
)
PLANTED_ADDITIONS = (
    PlantedChange("median-price", "the statistics have an additional field",
                  FindingLocation("GET /stats", "body", "$.median_price", "added")),
)
PLANTED_NOISE = (
    PlantedChange("request-id-header", "every search has a unique id in a header",
                  FindingLocation("GET /search", "header", "x-search-id", "changed")),
    PlantedChange("request-id-body", "every search has a unique id in the body",
                  FindingLocation("GET /search", "body", "$.request_id", "changed")),
    PlantedChange("timestamp", "the statistics contain the current time",
                  FindingLocation("GET /stats", "body", "$.generated_at", "changed")),
    PlantedChange("shuffled-set", "related products are a set in random order",
                  FindingLocation(f"{PRODUCT_ENDPOINT}/related", "body", "$.related", "order")),
)
# fmt: on

# FastAPI uses more CPU than Starlette, so on a busy machine any endpoint of new may be slower.
CPU_COST_NOTE = "new uses more CPU per answer, and this machine has little to spare"


@dataclass(frozen=True, slots=True)
class ReportedFinding:
    id: int
    location: FindingLocation
    impact: str
    noise: bool
    count: int
    summary: str

    def to_json_object(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self.location), "count": self.count, "summary": self.summary}


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Sampled requests in the ledger, by outcome, and Envoy's count of them."""

    outcomes: Mapping[str, int]
    envoy_sampled: int | None
    unaccounted: int | None
    pending: int | None  # None if unknown
    drops: Mapping[str, int]
    explained_pairs: int = 0  # mismatches that contain only noise and additions
    unsampled: int | None = (
        0  # since live requests failed or queued; None: copies queued, and Abreast lowered the sampling
    )

    @property
    def total_pairs(self) -> int:
        return sum(self.outcomes.values())

    def is_settled(self, sent_requests: int) -> bool:
        """Return whether Envoy counted every sent request, and the ledger holds each sampled one."""
        if self.envoy_sampled is None:
            return False
        has_old_count = self.unsampled is not None and self.envoy_sampled + self.unsampled < sent_requests
        is_complete = self.total_pairs == self.envoy_sampled and not has_old_count
        return is_complete and self.pending == 0 and self.unaccounted == 0

    def is_complete_since(self, before: LedgerCounts) -> bool:
        """Return whether the ledger holds every request that Envoy sampled since, and those pending before."""
        if self.envoy_sampled is None or before.envoy_sampled is None or self.pending:
            return False
        new_samples = self.envoy_sampled - before.envoy_sampled
        return new_samples > 0 and new_samples == self.total_pairs - before.total_pairs - (before.pending or 0)


@dataclass(frozen=True, slots=True)
class DemoResult:
    tally: UserTally
    ledger: LedgerCounts
    findings: tuple[ReportedFinding, ...]

    @property
    def regression_findings(self) -> list[ReportedFinding]:
        return select_regressions(self.findings)

    @property
    def additive_findings(self) -> list[ReportedFinding]:
        return [finding for finding in self.findings if not finding.noise and finding.impact == "additive"]

    @property
    def noise_findings(self) -> list[ReportedFinding]:
        return [finding for finding in self.findings if finding.noise]

    @property
    def detected_changes(self) -> list[PlantedChange]:
        return [change for change in PLANTED_REGRESSIONS if is_reported(change, self.regression_findings)]

    @property
    def missed_changes(self) -> list[PlantedChange]:
        return find_missed_changes(self.findings)

    @property
    def unplanted_slowdowns(self) -> list[ReportedFinding]:
        """Endpoints that are slower without a planted change: see `CPU_COST_NOTE`."""
        unplanted_regressions = _exclude_planted(self.regression_findings, PLANTED_REGRESSIONS)
        return [finding for finding in unplanted_regressions if finding.location.part == "latency"]

    @property
    def unexpected_findings(self) -> list[ReportedFinding]:
        """Regressions and additions without a planted change, except slowdowns."""
        unplanted_regressions = _exclude_planted(self.regression_findings, PLANTED_REGRESSIONS)
        return [
            *(finding for finding in unplanted_regressions if finding.location.part != "latency"),
            *_exclude_planted(self.additive_findings, PLANTED_ADDITIONS),
        ]

    @property
    def is_as_planted(self) -> bool:
        has_failed = self.missed_changes or self.unexpected_findings or self.tally.user_errors
        return not has_failed and self.ledger.is_settled(self.tally.safe_requests)

    def to_json_object(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "requests": self.tally.requests,
            "user_errors": self.tally.user_errors,
            "sampled": ledger.envoy_sampled,
            "outcomes": dict(ledger.outcomes),
            "findings": [finding.to_json_object() for finding in self.regression_findings],
            "additive": [finding.to_json_object() for finding in self.additive_findings],
            "noise": [finding.to_json_object() for finding in self.noise_findings],
            "planted": {
                "expected": [change.name for change in PLANTED_REGRESSIONS],
                "found": [change.name for change in self.detected_changes],
                "missed": [change.name for change in self.missed_changes],
                "unexpected": [str(finding.location) for finding in self.unexpected_findings],
            },
            "heavier": [finding.location.endpoint for finding in self.unplanted_slowdowns],
            "harmless": {
                **{change.name: is_reported(change, self.noise_findings) for change in PLANTED_NOISE},
                **{change.name: is_reported(change, self.additive_findings) for change in PLANTED_ADDITIONS},
            },
            "ledger": {
                "rows": ledger.total_pairs,
                "explained": ledger.explained_pairs,
                "envoy": ledger.envoy_sampled,
                "unaccounted": ledger.unaccounted,
                "pending": ledger.pending,
                "drops": dict(ledger.drops),
                "unsampled": ledger.unsampled,
            },
            "statuses": {str(status): count for status, count in sorted(self.tally.statuses.items())},
            "as_planted": self.is_as_planted,
        }


def select_regressions(findings: Iterable[ReportedFinding]) -> list[ReportedFinding]:
    return [finding for finding in findings if not finding.noise and finding.impact != "additive"]


def find_missed_changes(findings: Iterable[ReportedFinding]) -> list[PlantedChange]:
    reported_regressions = select_regressions(findings)
    return [change for change in PLANTED_REGRESSIONS if not is_reported(change, reported_regressions)]


def is_reported(change: PlantedChange, findings: Iterable[ReportedFinding]) -> bool:
    return any(finding.location == change.location for finding in findings)


def _exclude_planted(findings: Iterable[ReportedFinding], changes: Iterable[PlantedChange]) -> list[ReportedFinding]:
    planted_locations = {change.location for change in changes}
    return [finding for finding in findings if finding.location not in planted_locations]
