"""Whether evidence can be believed to be whole. No evidence is never good evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_REPORT_AGE_S = 15.0  # seconds; an Envoy's count is brought once a second
ENVOY_GONE_AFTER_S = 600.0  # seconds after which an Envoy that nobody asks any more is taken to be no more
MAX_PAIR_AGE_S = 30.0  # seconds without a pair
MAX_CLOCK_LAG_S = 60.0  # seconds: pairs are of Redis's clock, all else of Postgres's


@dataclass(frozen=True, slots=True)
class EnvoyReport:
    """When (seconds ago) an Envoy's count was brought; `node` ends in @ and its admin address."""

    node: str
    age: float


@dataclass(frozen=True, slots=True)
class CompletenessGap:
    """Requests by Envoy's count, and those that the ledger ever got or that are on their way to it."""

    sampled: int | None
    arrived: int

    @property
    def missing(self) -> int | None:
        return None if self.sampled is None else self.sampled - self.arrived


def describe_stale_counts(reports: Iterable[EnvoyReport], admin_addresses: Iterable[str]) -> str:
    """Why Envoy's count can't be relied on; empty where it can. `asked` are admin addresses that ought to answer."""
    all_reports = list(reports)
    if not all_reports:
        return "no Envoy's count is known (ABREAST_ENVOY_ADMIN)"
    addresses = {_normalise_address(address) for address in admin_addresses}
    late_reports = [
        report
        for report in all_reports
        if report.age > MAX_REPORT_AGE_S and (report.age < ENVOY_GONE_AFTER_S or _admin_address(report) in addresses)
    ]
    if late_reports:
        oldest = max(late_reports, key=lambda report: report.age)
        return f"the Envoy {oldest.node} has not told its count for {oldest.age:.0f} s"
    if all(report.age > MAX_REPORT_AGE_S for report in all_reports):
        return "no Envoy tells its count any more (ABREAST_ENVOY_ADMIN)"
    return ""


def measure_clock_lag(newest_pair_age_s: float | None) -> float:
    """Seconds by which Postgres's clock is behind the pairs'. `newest`: seconds since the last one, by that clock."""
    return -newest_pair_age_s if newest_pair_age_s is not None and newest_pair_age_s < -MAX_CLOCK_LAG_S else 0.0


def count_lost_requests(missing_before: int | None, gap: CompletenessGap) -> int | None:
    """Requests that went missing since; None where that can't be known."""
    if missing_before is None or gap.missing is None:
        return None
    return max(0, gap.missing - missing_before)


def _admin_address(report: EnvoyReport) -> str:
    return report.node.rpartition("@")[2]


def _normalise_address(address: str) -> str:
    return address.removeprefix("http://").rstrip("/")
