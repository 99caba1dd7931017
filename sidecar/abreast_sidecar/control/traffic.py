"""What is set for the traffic of one service, and what Envoy's runtime is told of it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeAlias

from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.settings import Settings

WEIGHTS = 10_000  # the sum of Envoy's weights: new_share in hundredths of a percent
MILLION = 1_000_000  # the unit of the other shares

Moment: TypeAlias = tuple[
    datetime, int
]  # by Postgres's clock, and the version: orders the states of a service


@dataclass(frozen=True, slots=True)
class Shares:
    new_share: int  # of 10,000
    sample_safe: int  # of 1,000,000
    sample_unsafe: int
    baseline_share: int  # of the sampled safe requests
    rolled_back: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    service: str
    version: int
    updated_at: datetime
    shares: Shares
    braked: bool = False  # rolled back by a call that the ledger has not recorded yet

    @property
    def moment(self) -> Moment:
        return self.updated_at, self.version

    @property
    def on_old(self) -> bool:
        """Whether a rollback would change nothing."""
        return self.shares == Change.rollback().apply(self.shares)

    def rolled_back(self) -> Traffic:
        """What the ledger will hold, if nothing else changes, once it has recorded a rollback."""
        shares = Change.rollback().apply(self.shares)
        return replace(self, shares=shares, version=self.version + 1, braked=True)

    def newer_than(self, other: Traffic | None) -> bool:
        return other is None or self.moment > other.moment


@dataclass(frozen=True, slots=True)
class Change:
    """What a call sets; None stays as it is."""

    action: str  # update, rollback or promote
    new_share: int | None = None
    sample_safe: int | None = None
    sample_unsafe: int | None = None
    baseline_share: int | None = None

    @classmethod
    def rollback(cls) -> Change:
        return cls("rollback", new_share=0)

    @classmethod
    def promote(cls) -> Change:
        return cls("promote", new_share=WEIGHTS)

    def apply(self, shares: Shares) -> Shares:
        wanted = {
            name: value
            for name in ("new_share", "sample_safe", "sample_unsafe", "baseline_share")
            if (value := getattr(self, name)) is not None
        }
        if self.new_share is not None:
            wanted["rolled_back"] = self.action == "rollback"
        return replace(shares, **wanted)


@dataclass(frozen=True, slots=True)
class Note:
    """For the record: who, and why."""

    actor: str
    reason: str


def parts(name: str, share: float, unit: int) -> int:
    """A share from 0 to 1 in whole parts of `unit`. Only 0 becomes none and only 1 becomes all."""
    if math.isnan(share) or not 0 <= share <= 1:
        raise ArgumentError(f"{name} must be a share from 0 to 1, got {share:g}")
    if share in {0.0, 1.0}:
        return int(share) * unit
    return min(max(round(share * unit), 1), unit - 1)


def initial(settings: Settings) -> Shares:
    return Shares(
        new_share=parts("new_share", settings.new_share, WEIGHTS),
        sample_safe=parts("sample_safe", settings.sample_safe, MILLION),
        sample_unsafe=parts("sample_unsafe", settings.sample_unsafe, MILLION),
        baseline_share=parts("baseline_share", settings.baseline_share, MILLION),
    )


def runtime_layer(shares: Shares) -> dict[str, Any]:
    """The keys and values of Envoy's runtime.

    The baseline's route matches first and with the same random number as the sampled one, so it gets its part of the
    sampled requests, not of all.
    """
    return {
        "abreast.weight.old": WEIGHTS - shares.new_share,
        "abreast.weight.new_or_old": shares.new_share,
        "abreast.sample.baseline": _fraction(round(shares.sample_safe * shares.baseline_share / MILLION)),
        "abreast.sample.safe": _fraction(shares.sample_safe),
        "abreast.sample.unsafe": _fraction(shares.sample_unsafe),
    }


def _fraction(numerator: int) -> dict[str, Any]:
    return {"numerator": numerator, "denominator": "MILLION"}
