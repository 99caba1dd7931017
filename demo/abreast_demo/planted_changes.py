"""Holds what Abreast reports against what was planted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from abreast_demo.load import UserTally


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
        "slow-search", "every search takes 30 ms longer", FindingLocation("GET /search", "latency", "", "slower")
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


@dataclass(frozen=True, slots=True)
class ReportedFinding:
    """A finding, as the API gave it."""

    id: int
    location: FindingLocation
    impact: str
    noise: bool
    count: int
    baseline_count: int
    summary: str


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """How the sampled requests ended, beside Envoy's count of them."""

    outcomes: Mapping[str, int]
    envoy_sampled: int | None
    unaccounted: int | None
    pending: int | None  # None: not known now
    drops: Mapping[str, int]
    explained_pairs: int = 0  # of the mismatches: all that differs is noise or was added

    @property
    def total_pairs(self) -> int:
        return sum(self.outcomes.values())

    def is_settled(self, sent_requests: int) -> bool:
        """Whether all that Envoy counted is in the ledger, and Envoy has counted all that was sent."""
        is_complete = self.envoy_sampled is not None and self.total_pairs == self.envoy_sampled >= sent_requests
        return is_complete and self.pending == 0 and self.unaccounted == 0

    def is_complete_since(self, before: LedgerCounts) -> bool:
        """Whether what Envoy counted since is in the ledger too, beside what was still on its way then."""
        if (
            self.envoy_sampled is None
            or before.envoy_sampled is None
            or self.pending
            or self.envoy_sampled == before.envoy_sampled
        ):
            return False
        return self.envoy_sampled - before.envoy_sampled == self.total_pairs - before.total_pairs - (
            before.pending or 0
        )


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
    def unexpected_findings(self) -> list[ReportedFinding]:
        """Reported, and nobody planted it; among them what is harmless and was not recognised as such."""
        slowdowns = self.unplanted_slowdowns
        return [
            *(
                finding
                for finding in self.regression_findings
                if finding not in slowdowns and not _is_planted(finding, PLANTED_REGRESSIONS)
            ),
            *(finding for finding in self.additive_findings if not _is_planted(finding, PLANTED_ADDITIONS)),
        ]

    @property
    def unplanted_slowdowns(self) -> list[ReportedFinding]:
        """Slower without having been made so: see `plants.HEAVIER`."""
        return [
            finding
            for finding in self.regression_findings
            if finding.location.part == "latency" and not _is_planted(finding, PLANTED_REGRESSIONS)
        ]

    @property
    def is_as_planted(self) -> bool:
        return not (
            self.missed_changes or self.unexpected_findings or self.tally.user_errors
        ) and self.ledger.is_settled(self.tally.safe_requests)

    def to_json_object(self) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "requests": self.tally.requests,
            "user_errors": self.tally.user_errors,
            "sampled": ledger.envoy_sampled,
            "outcomes": dict(ledger.outcomes),
            "findings": [_to_finding_record(finding) for finding in self.regression_findings],
            "additive": [_to_finding_record(finding) for finding in self.additive_findings],
            "noise": [_to_finding_record(finding) for finding in self.noise_findings],
            "planted": {
                "expected": [change.name for change in PLANTED_REGRESSIONS],
                "found": [change.name for change in self.detected_changes],
                "missed": [change.name for change in self.missed_changes],
                "unexpected": [str(finding.location) for finding in self.unexpected_findings],
            },
            "heavier": [finding.location.endpoint for finding in self.unplanted_slowdowns],
            "harmless": {
                change.name: is_reported(change, self._findings_for(change))
                for change in (*PLANTED_NOISE, *PLANTED_ADDITIONS)
            },
            "ledger": {
                "rows": ledger.total_pairs,
                "explained": ledger.explained_pairs,
                "envoy": ledger.envoy_sampled,
                "unaccounted": ledger.unaccounted,
                "pending": ledger.pending,
                "drops": dict(ledger.drops),
            },
            "statuses": {str(status): count for status, count in sorted(self.tally.statuses.items())},
            "as_planted": self.is_as_planted,
        }

    def _findings_for(self, change: PlantedChange) -> list[ReportedFinding]:
        return self.noise_findings if change in PLANTED_NOISE else self.additive_findings


def select_regressions(findings: Iterable[ReportedFinding]) -> list[ReportedFinding]:
    return [finding for finding in findings if not finding.noise and finding.impact != "additive"]


def find_missed_changes(findings: Iterable[ReportedFinding]) -> list[PlantedChange]:
    reported_regressions = select_regressions(findings)
    return [change for change in PLANTED_REGRESSIONS if not is_reported(change, reported_regressions)]


def is_reported(change: PlantedChange, findings: Iterable[ReportedFinding]) -> bool:
    return any(finding.location == change.location for finding in findings)


def _is_planted(finding: ReportedFinding, changes: Iterable[PlantedChange]) -> bool:
    return any(finding.location == change.location for change in changes)


def _to_finding_record(finding: ReportedFinding) -> dict[str, Any]:
    location = finding.location
    return {
        "id": finding.id,
        "endpoint": location.endpoint,
        "part": location.part,
        "path": location.path,
        "kind": location.kind,
        "count": finding.count,
        "summary": finding.summary,
    }
