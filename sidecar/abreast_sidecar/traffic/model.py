"""Traffic settings of one service, and the layer of Envoy's runtime that follows from them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from abreast_sidecar.envoy.sampling import SampleRule
from abreast_sidecar.envoy.settings import EnvoySettings, rule_scope
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.settings import Settings

TOTAL_WEIGHT = 10_000  # sum of Envoy's weights, the unit of new_share
MILLION = 1_000_000  # the unit of the other shares
SAMPLING_ACTOR = "sampling"  # in the record of a change: copies queued
OTHER_RULES = "*"
MAX_DRILL_S, MAX_DRILL_DELAY_S = 600.0, 60.0

STAMP = re.compile(
    r"(\d{1,18})/(\d{1,5})/(\d{1,7})/(\d{1,7})/(\d{1,7})/([0-9a-f-]{36})(?:/\d{1,5}/\d{1,7}/[01])?((?:;[a-z0-9_*-]+=\d{1,7})*)"
)
EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Shares:
    """`new_share` in parts of TOTAL_WEIGHT, the others in parts of MILLION."""

    new_share: int
    sample_safe: int
    sample_unsafe: int
    baseline_share: int  # part of the sampled safe requests
    rolled_back: bool = False
    conflict: str = ""  # why the users' share must be confirmed: the ledger had lost settings; empty if it need not
    # A drill, which ends after its seconds and with any other change of the settings.
    drill_share: int = 0  # part of new_share whose requests get the fault
    drill_delay_ms: int = 0  # 0: the fault is an error
    drill_s: int = 0
    drill_by_header: bool = False  # only requests with the header abreast-drill get the fault
    # Shares of sampling rules by name, in parts of MILLION. Other rules have that of OTHER_RULES, or that of Envoy's file.
    rule_shares: Mapping[str, int] = field(default_factory=dict)

    def without_drill(self) -> Shares:
        return replace(self, drill_share=0, drill_delay_ms=0, drill_s=0, drill_by_header=False)

    def merge(self, lost: Shares, conflict: str) -> Shares:
        """Return the least of each share, which is safest for users."""
        return Shares(
            new_share=min(self.new_share, lost.new_share),
            sample_safe=min(self.sample_safe, lost.sample_safe),
            sample_unsafe=min(self.sample_unsafe, lost.sample_unsafe),
            baseline_share=min(self.baseline_share, lost.baseline_share),
            rule_shares={
                name: min(
                    shares.get(name, shares.get(OTHER_RULES, MILLION))
                    for shares in (self.rule_shares, lost.rule_shares)
                )
                for name in self.rule_shares.keys() | lost.rule_shares.keys()
            },
            rolled_back=self.rolled_back or lost.rolled_back,
            conflict=conflict,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """`revision` identifies the settings: the ledger's history contains it, and no two histories have the same."""

    service: str
    version: int
    updated_at: datetime
    shares: Shares
    revision: str = ""
    is_lost: bool = False  # the ledger lacks these settings, and can't be changed

    @property
    def stamp(self) -> str:
        """Return the version, the values and the revision, as Envoy receives and acknowledges them."""
        shares = self.shares
        values = (shares.new_share, shares.sample_safe, shares.sample_unsafe, shares.baseline_share)
        drill = (shares.drill_share, shares.drill_delay_ms, int(shares.drill_by_header)) if shares.drill_share else ()
        rules = "".join(f";{name}={share}" for name, share in sorted(shares.rule_shares.items()))
        return "/".join(map(str, (self.version, *values, self.revision, *drill))) + rules

    @classmethod
    def from_stamp(cls, service: str, stamp: str) -> Traffic | None:
        """Return the settings that an Envoy has, None if it has none."""
        match = STAMP.fullmatch(stamp)
        if match is None:
            return None
        version, new_share, sample_safe, sample_unsafe, baseline_share = map(int, match.groups()[:5])
        if new_share > TOTAL_WEIGHT or max(sample_safe, sample_unsafe, baseline_share) > MILLION:
            return None
        rule_shares = {name: int(share) for name, _, share in (part.partition("=") for part in match[7].split(";")[1:])}
        if any(share > MILLION for share in rule_shares.values()):
            return None
        shares = Shares(new_share, sample_safe, sample_unsafe, baseline_share, rule_shares=rule_shares)
        return cls(service, version, EPOCH, shares, revision=match[6])

    def end_drill(self) -> Traffic:
        """Return the settings after the time of their drill."""
        return replace(self, shares=self.shares.without_drill())

    def apply_rollback(self, call_id: str) -> Traffic:
        """Return the settings that Postgres will hold once it has recorded a rollback and no other change."""
        shares = TrafficChange.rollback().apply(self.shares)
        return replace(self, shares=shares, version=self.version + 1, revision=call_id, is_lost=False)


@dataclass(frozen=True, slots=True)
class TrafficChange:
    """New values of a call; None keeps the value."""

    action: str  # update, rollback or promote
    new_share: int | None = None
    sample_safe: int | None = None
    sample_unsafe: int | None = None
    baseline_share: int | None = None
    rule_shares: Mapping[str, int] = field(default_factory=dict)  # only rules that change
    expected_version: int | None = None  # the change fails if the settings have another one

    @classmethod
    def rollback(cls) -> TrafficChange:
        return cls("rollback", new_share=0)

    @classmethod
    def promote(cls) -> TrafficChange:
        return cls("promote", new_share=TOTAL_WEIGHT)

    def apply(self, shares: Shares) -> Shares:
        overrides: dict[str, Any] = {
            name: value
            for name in ("new_share", "sample_safe", "sample_unsafe", "baseline_share")
            if (value := getattr(self, name)) is not None
        }
        if self.new_share is not None:
            overrides |= {"rolled_back": self.action == "rollback", "conflict": ""}
        overrides["rule_shares"] = {**shares.rule_shares, **self.rule_shares}
        return replace(shares.without_drill(), **overrides)


@dataclass(frozen=True, slots=True)
class Drill:
    """A fault for a part of the users' requests to new, for a limited time."""

    part: int  # share of the requests to new, in parts of MILLION
    delay_s: float  # 0: the fault is an error
    duration_s: float
    by_header: bool = False  # only requests with the header abreast-drill get the fault

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        if not 0 < self.part <= MILLION:
            raise ValueError(f"share must be above 0 and up to 1, got {self.part / MILLION:g}")
        if not 0 <= self.delay_s <= MAX_DRILL_DELAY_S:
            raise ValueError(f"delay must be 0 to {MAX_DRILL_DELAY_S:g} s, got {self.delay_s:g} s")
        if not 1 <= self.duration_s <= MAX_DRILL_S:
            raise ValueError(f"duration must be 1 to {MAX_DRILL_S:g} s, got {self.duration_s:g} s")

    def apply(self, shares: Shares) -> Shares:
        """Return the shares with the drill. No more requests get the fault than asked for, so its share may be 0."""
        return replace(
            shares,
            drill_share=shares.new_share * self.part // MILLION,
            drill_delay_ms=round(self.delay_s * 1000),
            drill_s=int(self.duration_s),
            drill_by_header=self.by_header,
        )


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


def find_rule_share(shares: Shares, rule: SampleRule) -> int:
    """Return the share in force, in parts of MILLION."""
    default = shares.rule_shares.get(OTHER_RULES, to_fixed_point(rule.name, rule.share, MILLION))
    return shares.rule_shares.get(rule.name, default)


class InitialShares(dict[str, Shares]):
    """The first shares of each service: those of the configuration file, else the default."""

    def __init__(self, settings: Settings, services: Iterable[EnvoySettings] = ()) -> None:
        self.default = default_shares(settings)
        super().__init__(
            (
                service.service,
                default_shares(
                    replace(
                        settings,
                        sample_safe=service.sample_safe,
                        sample_unsafe=service.sample_unsafe,
                        baseline_share=service.baseline_share,
                    )
                ),
            )
            for service in services
        )

    def __missing__(self, service: str) -> Shares:
        return self.default


def build_runtime_layer(shares: Shares, rules: Sequence[SampleRule] = (), scope: str = "") -> dict[str, Any]:
    """Return the keys and values of Envoy's runtime layer. `rules`: those of this Envoy. `scope` is part of the keys of one of several services.

    The baseline route matches first, with the same random number as the sampled route. Its fraction is therefore a part
    of the sampled requests, not of all.
    """

    def fraction(numerator: int) -> dict[str, Any]:
        return {"numerator": numerator, "denominator": "MILLION"}

    layer = {
        "abreast.weight.old": TOTAL_WEIGHT - shares.new_share,
        "abreast.weight.new_or_old": shares.new_share - shares.drill_share,
        "abreast.weight.drilled_or_old": shares.drill_share,
        "abreast.drill.abort": 100 if shares.drill_share and not shares.drill_delay_ms else 0,
        "abreast.drill.delay": 100 if shares.drill_delay_ms else 0,
        "abreast.drill.delay_ms": shares.drill_delay_ms,
        "abreast.drill.by_header": 100 if shares.drill_by_header else 0,
        "abreast.sample.baseline": fraction(round(shares.sample_safe * shares.baseline_share / MILLION)),
        "abreast.sample.safe": fraction(shares.sample_safe),
        "abreast.sample.unsafe": fraction(shares.sample_unsafe),
    }
    layer = {re.sub(r"^(abreast\.\w+\.)", rf"\g<1>{scope}", key): value for key, value in layer.items()}
    for rule in rules:
        share, key = find_rule_share(shares, rule), f"abreast.rule.{rule_scope(scope)}{rule.name}"
        layer[f"{key}.sampled"] = fraction(share)
        layer[f"{key}.baseline"] = fraction(round(share * shares.baseline_share / MILLION))
    return layer
