"""Decide the next action of a ramp. Pure.

A ramp steps up if the verdict on everything since its start is PASS. It rolls back if that verdict, or the verdict on the
present step alone, is FAIL: a week at 1% must not hide a defect that only shows at 50%. The first verdict gets half of
alpha, the steps share the other half, so a ramp rolls back wrongly with a probability of at most alpha. In all other
cases it waits.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, replace
from math import isfinite, nextafter
from typing import Literal

from abreast_sidecar.rollout.completeness import MAX_PAIR_AGE_S, measure_clock_lag
from abreast_sidecar.stats.verdict import (
    Budget,
    Completeness,
    EndpointCounts,
    ServiceCounts,
    Verdict,
    decide_verdict,
    describe_surplus,
)

RampState = Literal["progressing", "paused", "succeeded", "failed", "aborted", "superseded"]
ActionName = Literal["wait", "step", "succeed", "roll back"]

ACTIVE_STATES: tuple[RampState, ...] = ("progressing", "paused")
ALL_USERS = 10_000  # in hundredths of a percent
MAX_CONFIDENCE = nextafter(1, 0)
MAX_STEPS = 100
MAX_HOLD_S = 30 * 86_400.0
MAX_MIN_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class RampPlan:
    steps: tuple[int, ...]  # shares of users, in hundredths of a percent
    hold: float = 600.0  # least seconds of a step
    min_pairs: int = 100  # least pairs compared in a step
    budget: Budget = Budget()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise ValueError(f"steps must be 1 to {MAX_STEPS} shares of users, got {len(self.steps)}")
        is_rising = all(low < high for low, high in zip(self.steps, self.steps[1:], strict=False))
        if not is_rising or not 0 < self.steps[0] <= self.steps[-1] <= ALL_USERS:
            shares = ", ".join(format_percent(step) for step in self.steps)
            raise ValueError(f"steps must rise, above 0% and up to 100%, got {shares}")
        if not (isfinite(self.hold) and 0 <= self.hold <= MAX_HOLD_S):
            raise ValueError(f"hold must be 0 to {MAX_HOLD_S:g} seconds, got {self.hold:g}")
        if not 1 <= self.min_pairs <= MAX_MIN_PAIRS:
            raise ValueError(f"min_pairs must be 1 to {MAX_MIN_PAIRS}, got {self.min_pairs}")


@dataclass(frozen=True, slots=True)
class Ramp:
    id: int
    service: str
    state: RampState
    plan: RampPlan
    step: int
    actor: str
    reason: str
    started_at: dt.datetime
    step_at: dt.datetime  # when the step began, or the ramp was resumed
    ended_at: dt.datetime | None
    version: int  # version of the traffic settings that the ramp made
    started_gap: int | None  # requests that were missing in the ledger at the start; None: unknown
    step_gap: int | None  # the same at the begin of the step
    verdict: str  # last verdict, empty before the first
    message: str
    checked_at: dt.datetime | None

    @property
    def share(self) -> int:
        return self.plan.steps[self.step]

    @property
    def is_last_step(self) -> bool:
        return self.step == len(self.plan.steps) - 1

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE_STATES


@dataclass(frozen=True, slots=True)
class RampEvidence:
    """Everything since a moment."""

    endpoints: tuple[EndpointCounts, ...]
    completeness: Completeness
    service: ServiceCounts | None = None

    @property
    def compared(self) -> int:
        return sum(counts.compared for counts in self.endpoints)


@dataclass(frozen=True, slots=True)
class Observation:
    observed_at: dt.datetime
    since_start: RampEvidence
    since_step: RampEvidence
    stale_counts_reason: str  # why Envoy's counters can't be relied on; empty if they can
    newest_pair_age_s: float | None  # seconds since the last pair was compared


@dataclass(frozen=True, slots=True)
class RampDecision:
    action: ActionName
    reason: str
    verdict: str  # PASS, FAIL or INCONCLUSIVE


def decide_ramp(ramp: Ramp, observation: Observation) -> RampDecision:
    """Decide what a ramp does now. A paused ramp rolls back too: pausing does not accept harm to users."""
    if failure := _find_failure(ramp, observation):
        return RampDecision("roll back", failure, "FAIL")
    total, step = observation.since_start, observation.since_step
    verdict = decide_verdict(total.endpoints, total.completeness, ramp.plan.budget, service=total.service)
    state = "INCONCLUSIVE" if verdict.state == "FAIL" else verdict.state  # a rollback has a smaller alpha
    wait_reason = _find_wait_reason(ramp, observation)
    if not wait_reason and state != "PASS":
        wait_reason = f"the verdict is INCONCLUSIVE: {_describe_reason(verdict)}"
    if wait_reason:
        return RampDecision("wait", wait_reason, state)
    reason = f"the verdict is PASS after {total.compared:,} pairs, {step.compared:,} in this step"
    return RampDecision("succeed" if ramp.is_last_step else "step", reason, state)


def _find_failure(ramp: Ramp, observation: Observation) -> str:
    alpha = 1 - ramp.plan.budget.confidence
    checks = {
        "since the ramp began": (observation.since_start, alpha / 2),
        f"since {format_percent(ramp.share)}": (observation.since_step, alpha / 2 / len(ramp.plan.steps)),
    }
    for period, (evidence, alpha_share) in checks.items():
        budget = replace(ramp.plan.budget, confidence=min(1 - alpha_share, MAX_CONFIDENCE))
        verdict = decide_verdict(evidence.endpoints, evidence.completeness, budget, service=evidence.service)
        if verdict.state == "FAIL":
            return f"the verdict {period} is FAIL: {_describe_reason(verdict)}"
    return ""


def _find_wait_reason(ramp: Ramp, observation: Observation) -> str:
    """Return why the ramp must wait whatever the verdict is, empty if it need not."""
    if ramp.state == "paused":
        return "paused"
    if observation.stale_counts_reason:
        return observation.stale_counts_reason
    if observation.newest_pair_age_s is None or observation.newest_pair_age_s > MAX_PAIR_AGE_S:
        return f"no pair was compared within the last {MAX_PAIR_AGE_S:g} s"
    if clock_lag := measure_clock_lag(observation.newest_pair_age_s):
        return f"Postgres's clock is {_format_duration(clock_lag)} behind that of the pairs"
    if gap := _describe_gap(observation.since_step.completeness, ramp.plan.budget):
        return gap
    remaining_s = ramp.plan.hold - (observation.observed_at - ramp.step_at).total_seconds()
    if remaining_s > 0:
        return f"holds {format_percent(ramp.share)} for another {_format_duration(remaining_s)}"
    if observation.since_step.compared < ramp.plan.min_pairs:
        return f"{observation.since_step.compared:,} of {ramp.plan.min_pairs:,} pairs were compared in this step"
    return ""


def _describe_gap(completeness: Completeness, budget: Budget) -> str:
    """Check the step alone: a complete week would hide an hour without captures."""
    if completeness.sampled is None:
        return "no Envoy's count to compare this step's requests with"
    if completeness.surplus > (1 - budget.min_completeness) * completeness.sampled:
        return describe_surplus(completeness.surplus, completeness.sampled)
    if completeness.accounted >= completeness.sampled * budget.min_completeness:
        return ""
    return (
        f"the ledger has {completeness.accounted:,} of {completeness.sampled:,} requests sampled in this step,"
        f" {budget.min_completeness * 100:.4g}% are required"
    )


def _describe_reason(verdict: Verdict) -> str:
    reason = verdict.reasons[0]
    return f"{reason.endpoint}: {reason.text}" if reason.endpoint else reason.text


def format_percent(share: int) -> str:
    return f"{share / 100:g}%"


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
