"""What a ramp does next, from what is known. Pure.

It climbs on PASS, of all that was seen since it began. It goes back on FAIL, of that or of the present step alone: a
defect that only shows at 50% must not drown in a week of 1%. Half of alpha is for the one, half for the steps together,
so that a ramp goes back wrongly with a probability of at most alpha. Everything else waits.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

from abreast_sidecar.compare import verdict as judging
from abreast_sidecar.compare.verdict import Budget, Counts, Ledger, Verdict
from abreast_sidecar.steer.flow import QUIET, behind

State = Literal["progressing", "paused", "succeeded", "failed", "aborted", "superseded"]
ActionName = Literal["wait", "step", "succeed", "roll back"]

ACTIVE: tuple[State, ...] = ("progressing", "paused")
WHOLE = 10_000  # all users, in hundredths of a percent
MOST_STEPS = 100
LONGEST = 30 * 86_400.0  # seconds of a hold
MOST_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    steps: tuple[int, ...]  # shares of users, in hundredths of a percent
    hold: float = 600.0  # seconds that each step lasts at least
    min_pairs: int = 100  # compared in a step before the next
    budget: Budget = Budget()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        """Raise ValueError."""
        if not 1 <= len(self.steps) <= MOST_STEPS:
            raise ValueError(f"steps must be 1 to {MOST_STEPS} shares of users, got {len(self.steps)}")
        rising = all(low < high for low, high in zip(self.steps, self.steps[1:], strict=False))
        if not rising or not 0 < self.steps[0] <= self.steps[-1] <= WHOLE:
            shown = ", ".join(percent(step) for step in self.steps)
            raise ValueError(f"steps must rise, above 0% and up to 100%, got {shown}")
        if not (isfinite(self.hold) and 0 <= self.hold <= LONGEST):
            raise ValueError(f"hold must be 0 to {LONGEST:g} seconds, got {self.hold:g}")
        if not 1 <= self.min_pairs <= MOST_PAIRS:
            raise ValueError(f"min_pairs must be 1 to {MOST_PAIRS}, got {self.min_pairs}")


@dataclass(frozen=True, slots=True)
class Ramp:
    id: int
    service: str
    state: State
    plan: Plan
    step: int
    actor: str
    reason: str
    started_at: dt.datetime
    step_at: dt.datetime  # when the step was set, or the ramp resumed
    ended_at: dt.datetime | None
    version: int  # of the traffic settings that it made
    started_gap: int | None  # what Envoy had sampled and the ledger did not have; None: unknown
    step_gap: int | None
    verdict: str  # of the last look; empty before the first
    message: str
    checked_at: dt.datetime | None

    @property
    def share(self) -> int:
        return self.plan.steps[self.step]

    @property
    def last(self) -> bool:
        return self.step == len(self.plan.steps) - 1

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen since a moment."""

    endpoints: tuple[Counts, ...]
    ledger: Ledger

    @property
    def compared(self) -> int:
        return sum(one.compared for one in self.endpoints)


@dataclass(frozen=True, slots=True)
class Look:
    now: dt.datetime
    whole: Seen  # since the ramp began
    step: Seen  # since the step was set
    silent: str  # why Envoy's count can't be relied on
    newest: float | None  # seconds since the last pair was compared


@dataclass(frozen=True, slots=True)
class Move:
    action: ActionName
    reason: str
    verdict: str  # PASS, FAIL or INCONCLUSIVE


def decide(ramp: Ramp, look: Look) -> Move:
    """A paused ramp goes back as well: pausing is no wish that users be hurt."""
    if failed := _failed(ramp, look):
        return Move("roll back", failed, "FAIL")
    verdict = judging.decide(look.whole.endpoints, look.whole.ledger, ramp.plan.budget)
    state = "INCONCLUSIVE" if verdict.state == "FAIL" else verdict.state  # not at the alpha of going back
    wait = _why_not(ramp, look) or ("" if state == "PASS" else _doubt(verdict))
    if wait:
        return Move("wait", wait, state)
    passed = f"the verdict is PASS after {_number(look.whole.compared)} pairs, {_number(look.step.compared)} in this step"
    return Move("succeed" if ramp.last else "step", passed, state)


def _failed(ramp: Ramp, look: Look) -> str:
    alpha = 1 - ramp.plan.budget.confidence
    shares = {
        "since the ramp began": (look.whole, alpha / 2),
        f"since {percent(ramp.share)}": (look.step, alpha / 2 / len(ramp.plan.steps)),
    }
    for when, (seen, part) in shares.items():
        strict = replace(ramp.plan.budget, confidence=1 - part)
        verdict = judging.decide(seen.endpoints, seen.ledger, strict)
        if verdict.state == "FAIL":
            return f"the verdict {when} is FAIL: {_text(verdict)}"
    return ""


def _why_not(ramp: Ramp, look: Look) -> str:
    """What keeps it from climbing, whatever the verdict is."""
    if ramp.state == "paused":
        return "paused"
    if look.silent:
        return look.silent
    if look.newest is None or look.newest > QUIET:
        return f"no pair was compared within the last {QUIET:g} s"
    if late := behind(look.newest):
        return f"Postgres's clock is {_span(late)} behind that of the pairs"
    if hole := _hole(look.step.ledger, ramp.plan.budget):
        return hole
    left = ramp.plan.hold - (look.now - ramp.step_at).total_seconds()
    if left > 0:
        return f"holds {percent(ramp.share)} for another {_span(left)}"
    if look.step.compared < ramp.plan.min_pairs:
        return f"{_number(look.step.compared)} of {_number(ramp.plan.min_pairs)} pairs were compared in this step"
    return ""


def _hole(ledger: Ledger, budget: Budget) -> str:
    """Of the step alone: a ledger that was whole for a week hides an hour without captures."""
    if ledger.sampled is None:
        return "no Envoy's count to hold this step's requests against"
    if ledger.accounted >= ledger.sampled * budget.min_completeness:
        return ""
    return (
        f"the ledger has {_number(ledger.accounted)} of {_number(ledger.sampled)} requests sampled in this step,"
        f" {budget.min_completeness * 100:.4g}% are asked for"
    )


def _doubt(verdict: Verdict) -> str:
    return f"the verdict is INCONCLUSIVE: {_text(verdict)}"


def _text(verdict: Verdict) -> str:
    reason = verdict.reasons[0]
    return f"{reason.endpoint}: {reason.text}" if reason.endpoint else reason.text


def budget_of(document: Mapping[str, Any]) -> Budget:
    known = Budget.__dataclass_fields__
    return Budget(**{name: value for name, value in document.items() if name in known})


def listed(steps: Sequence[int]) -> str:
    return ", ".join(percent(step) for step in steps)


def percent(share: int) -> str:
    return f"{share / 100:g}%"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _number(value: int) -> str:
    return f"{value:,}"
