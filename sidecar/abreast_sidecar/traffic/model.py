"""Traffic settings of one service, and the layer of Envoy's runtime that follows from them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeAlias

from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.settings import Settings

TOTAL_WEIGHT = 10_000  # sum of Envoy's weights, the unit of new_share
MILLION = 1_000_000  # the unit of the other shares

VersionStamp: TypeAlias = tuple[datetime, int]  # time by Postgres's clock, and version: orders settings of a service


@dataclass(frozen=True, slots=True)
class Shares:
    """`new_share` in parts of TOTAL_WEIGHT, the others in parts of MILLION."""

    new_share: int
    sample_safe: int
    sample_unsafe: int
    baseline_share: int  # part of the sampled safe requests
    rolled_back: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    service: str
    version: int
    updated_at: datetime
    shares: Shares
    has_pending_rollback: bool = False  # rolled back by a call that Postgres has not recorded yet

    @property
    def version_stamp(self) -> VersionStamp:
        return self.updated_at, self.version

    @property
    def is_on_old(self) -> bool:
        """True if a rollback would change nothing."""
        return self.shares == TrafficChange.rollback().apply(self.shares)

    def apply_rollback(self) -> Traffic:
        """Return the settings that Postgres will hold once it has recorded a rollback and no other change."""
        shares = TrafficChange.rollback().apply(self.shares)
        return replace(self, shares=shares, version=self.version + 1, has_pending_rollback=True)

    def is_newer_than(self, other: Traffic | None) -> bool:
        return other is None or self.version_stamp > other.version_stamp


@dataclass(frozen=True, slots=True)
class TrafficChange:
    """New values of a call; None keeps the value."""

    action: str  # update, rollback or promote
    new_share: int | None = None
    sample_safe: int | None = None
    sample_unsafe: int | None = None
    baseline_share: int | None = None

    @classmethod
    def rollback(cls) -> TrafficChange:
        return cls("rollback", new_share=0)

    @classmethod
    def promote(cls) -> TrafficChange:
        return cls("promote", new_share=TOTAL_WEIGHT)

    def apply(self, shares: Shares) -> Shares:
        overrides = {
            name: value
            for name in ("new_share", "sample_safe", "sample_unsafe", "baseline_share")
            if (value := getattr(self, name)) is not None
        }
        if self.new_share is not None:
            overrides["rolled_back"] = self.action == "rollback"
        return replace(shares, **overrides)


@dataclass(frozen=True, slots=True)
class AuditNote:
    """The author of a change, and the reason."""

    actor: str
    reason: str


def to_fixed_point(name: str, share: float, scale: int) -> int:
    """Convert a share from 0 to 1 to an integer from 0 to `scale`. Only 0 becomes 0, only 1 becomes `scale`.

    Raise ArgumentError for other shares.
    """
    if math.isnan(share) or not 0 <= share <= 1:
        raise ArgumentError(f"{name} must be a share from 0 to 1, got {share:g}")
    if share in {0.0, 1.0}:
        return int(share) * scale
    return min(max(round(share * scale), 1), scale - 1)


def default_shares(settings: Settings) -> Shares:
    return Shares(
        new_share=to_fixed_point("new_share", settings.new_share, TOTAL_WEIGHT),
        sample_safe=to_fixed_point("sample_safe", settings.sample_safe, MILLION),
        sample_unsafe=to_fixed_point("sample_unsafe", settings.sample_unsafe, MILLION),
        baseline_share=to_fixed_point("baseline_share", settings.baseline_share, MILLION),
    )


def build_runtime_layer(shares: Shares) -> dict[str, Any]:
    """Return the keys and values of Envoy's runtime layer.

    The baseline route matches first, with the same random number as the sampled route. Its fraction is therefore a part
    of the sampled requests, not of all.
    """

    def fraction(numerator: int) -> dict[str, Any]:
        return {"numerator": numerator, "denominator": "MILLION"}

    return {
        "abreast.weight.old": TOTAL_WEIGHT - shares.new_share,
        "abreast.weight.new_or_old": shares.new_share,
        "abreast.sample.baseline": fraction(round(shares.sample_safe * shares.baseline_share / MILLION)),
        "abreast.sample.safe": fraction(shares.sample_safe),
        "abreast.sample.unsafe": fraction(shares.sample_unsafe),
    }
