"""Is the evidence complete? Missing evidence never counts as good evidence. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_REPORT_AGE_S = 15.0  # a sidecar reads each Envoy's counters once per second
ENVOY_GONE_AFTER_S = 600.0  # an Envoy that no setting names and no sidecar reads is gone after this time
MAX_PAIR_AGE_S = 30.0
MAX_CLOCK_LAG_S = 60.0  # pairs have the time of Redis's clock, all else that of Postgres's


@dataclass(frozen=True, slots=True)
class EnvoyReport:
    """`age`: seconds since an Envoy's counters were read. `node` ends in @ and the admin address.

    `is_overridden`: its admin interface sets runtime values over those of the sidecar.
    """

    node: str
    age: float
    is_overridden: bool = False


@dataclass(frozen=True, slots=True)
class CompletenessGap:
    """`sampled`: requests by Envoy's counters. `arrived`: requests that the ledger received or that are in Redis."""

    sampled: int | None
    arrived: int

    @property
    def missing(self) -> int | None:
        return None if self.sampled is None else self.sampled - self.arrived


def describe_envoy_trouble(reports: Iterable[EnvoyReport], admin_addresses: Iterable[str]) -> str:
    """Return why Envoy's counters or its confirmations can't be relied on, empty if they can.

    `admin_addresses`: the Envoys that the settings name.
    """
    all_reports = list(reports)
    if not all_reports:
        return "no Envoy's count is known; set ABREAST_ENVOY_ADMIN"
    addresses = {address.removeprefix("http://").rstrip("/") for address in admin_addresses}
    late_reports = [
        report
        for report in all_reports
        if report.age > MAX_REPORT_AGE_S
        and (report.age < ENVOY_GONE_AFTER_S or report.node.rpartition("@")[2] in addresses)
    ]
    if late_reports:
        oldest = max(late_reports, key=lambda report: report.age)
        return f"the count of the Envoy {oldest.node} is {oldest.age:.0f} s old"
    if all(report.age > MAX_REPORT_AGE_S for report in all_reports):
        return "no Envoy reports its count any more; check ABREAST_ENVOY_ADMIN"
    return describe_override(all_reports)


def describe_override(reports: Iterable[EnvoyReport]) -> str:
    """Name an Envoy whose admin interface sets its own values; empty without one."""
    for report in reports:
        if report.is_overridden and report.age <= MAX_REPORT_AGE_S:
            return f"the admin interface of the Envoy {report.node} overrides the sidecar, so a rollback has no effect there"
    return ""


def measure_clock_lag(newest_pair_age_s: float | None) -> float:
    """Return the seconds by which Postgres's clock is behind that of the pairs; 0 for a small or unknown lag.

    `newest_pair_age_s`: seconds since the newest pair by Postgres's clock.
    """
    return -newest_pair_age_s if newest_pair_age_s is not None and newest_pair_age_s < -MAX_CLOCK_LAG_S else 0.0


def count_lost_requests(missing_before: int | None, gap: CompletenessGap) -> int | None:
    """Return how many requests went missing since `missing_before`, None if that is not known."""
    if missing_before is None or gap.missing is None:
        return None
    return max(0, gap.missing - missing_before)
