"""Is the evidence sufficient to send all users back to old? Pure.

Each rule is a test with an e-value (`stats.sequential`): while the rule is kept, the e-value ever reaches 1/alpha with a
probability of at most alpha, however often it is evaluated. The test has one beginning, and a guard that watches for
months must forget. Each rule is therefore tested over two windows at a time. One began at the last multiple of half the
window's length, the other half a length before, and each gets half of the rule's alpha. The guard then rolls back a
healthy service with a probability of at most alpha per half window, and it sees a defect of the last half window in
full.

Errors count requests whose user new answered, or should have: new failed and old stepped in. They are compared with old's
response to the same request. New must fail alone in more of them than the limit, and more often than old fails alone
(McNemar 1947, "Note on the sampling error of the difference between correlated proportions", as an e-value). Mismatches
count pairs with real findings, not with undecided ones or noise. The rule `slower` means that more than half of the
pairs are beyond the limit, as in a verdict.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import Any, Literal, get_args

from abreast_sidecar.stats.sequential import evidence_above
from abreast_sidecar.stats.verdict import ALPHA_SHARES, HALF

GuardMode = Literal["off", "watching", "acting"]
GuardRuleName = Literal["errors", "mismatches", "slower"]

GUARD_MODES: tuple[GuardMode, ...] = get_args(GuardMode)
GUARD_RULE_NAMES: tuple[GuardRuleName, ...] = get_args(GuardRuleName)
WINDOWS_PER_RULE = 2
MIN_WINDOW_S, MAX_WINDOW_S = 10.0, 86_400.0
MAX_MIN_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class GuardRule:
    limit: float  # share of pairs; for `slower` a share of old's time
    min_pairs: int  # fewer pairs never breach
    window: float = 600.0  # seconds
    cooldown: float = 300.0  # seconds after the rule fired

    def validate(self, name: str) -> None:
        """Raise ValueError if a value is out of range."""
        highest = inf if name == "slower" else 1.0
        if not (0 <= self.limit <= highest and isfinite(self.limit)):
            raise ValueError(f"{name}.limit must be a share from 0 to 1 (slower: 0 or more), got {self.limit!r}")
        if not 1 <= self.min_pairs <= MAX_MIN_PAIRS:
            raise ValueError(f"{name}.min_pairs must be 1 to {MAX_MIN_PAIRS}, got {self.min_pairs!r}")
        if not MIN_WINDOW_S <= self.window <= MAX_WINDOW_S:
            raise ValueError(f"{name}.window must be {MIN_WINDOW_S:g} to {MAX_WINDOW_S:g} seconds, got {self.window:g}")
        if not 0 <= self.cooldown <= MAX_WINDOW_S:
            raise ValueError(f"{name}.cooldown must be 0 to {MAX_WINDOW_S:g} seconds, got {self.cooldown:g}")


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    mode: GuardMode = "off"
    errors: GuardRule = field(default_factory=lambda: GuardRule(limit=0.001, min_pairs=10))
    mismatches: GuardRule = field(default_factory=lambda: GuardRule(limit=0.01, min_pairs=50))
    slower: GuardRule = field(default_factory=lambda: GuardRule(limit=1.0, min_pairs=100))
    min_completeness: float = 0.9  # below it the guard is blind
    confidence: float = 0.99

    def __post_init__(self) -> None:
        if self.mode not in GUARD_MODES:
            raise ValueError(f"mode must be one of {', '.join(GUARD_MODES)}, got {self.mode!r}")
        if not 0 <= self.min_completeness <= 1:
            raise ValueError(f"min_completeness must be a share from 0 to 1, got {self.min_completeness!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be above 0 and below 1, got {self.confidence!r}")
        for name in GUARD_RULE_NAMES:
            self.rule(name).validate(name)

    def rule(self, name: GuardRuleName) -> GuardRule:
        rule: GuardRule = getattr(self, name)
        return rule

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> GuardPolicy:
        """Convert the result of `asdict`. Unknown fields are ignored."""
        values: dict[str, Any] = {
            name: document[name] for name in ("mode", "min_completeness", "confidence") if name in document
        }
        values |= {name: GuardRule(**document[name]) for name in GUARD_RULE_NAMES if name in document}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """Counts of pairs in one window."""

    live: int = 0  # users' requests that new answered, or should have
    new_errors: int = 0  # part of `live`: new failed, and old did not
    old_errors: int = 0  # part of `live`: old failed, and new did not
    compared: int = 0
    mismatches: int = 0  # with a real finding that is not an addition
    timed: int = 0
    slower: int = 0


@dataclass(frozen=True, slots=True)
class Breach:
    rule: GuardRuleName
    text: str
    excess_evidence: float  # logarithm, beyond the threshold


def window_starts(rule: GuardRule, now: dt.datetime, since: dt.datetime) -> tuple[dt.datetime, ...]:
    """Return the start of each window, the longest first, none before `since`. Windows don't slide: they begin and grow."""
    half_window_s = rule.window / WINDOWS_PER_RULE
    latest_start = dt.datetime.fromtimestamp(now.timestamp() // half_window_s * half_window_s, dt.UTC)
    return tuple(
        max(latest_start - dt.timedelta(seconds=half_window_s * windows_back), since)
        for windows_back in reversed(range(WINDOWS_PER_RULE))
    )


def find_breaches(policy: GuardPolicy, window_counts: Mapping[GuardRuleName, Sequence[WindowCounts]]) -> list[Breach]:
    """Return the rules that are breached, the one with the most excess evidence first."""
    breaches = []
    for name, windows in window_counts.items():
        threshold = -log((1 - policy.confidence) * ALPHA_SHARES[name] / WINDOWS_PER_RULE)
        worst = max((_test_rule(policy, name, counts) for counts in windows), key=lambda breach: breach.excess_evidence)
        if worst.excess_evidence >= threshold:
            breaches.append(Breach(name, worst.text, worst.excess_evidence - threshold))
    return sorted(breaches, key=lambda breach: -breach.excess_evidence)


def _test_rule(policy: GuardPolicy, name: GuardRuleName, counts: WindowCounts) -> Breach:
    rule = policy.rule(name)
    n, hits, limit = {
        "errors": (counts.live, counts.new_errors, rule.limit),
        "mismatches": (counts.compared, counts.mismatches, rule.limit),
        "slower": (counts.timed, counts.slower, HALF),
    }[name]
    evidence = evidence_above(hits, n, limit) if n >= rule.min_pairs else -inf
    if name == "errors" and hits:
        evidence = min(evidence, evidence_above(hits, hits + counts.old_errors, HALF))
    return Breach(name, _describe_breach(name, rule, counts), evidence)


def _describe_breach(name: GuardRuleName, rule: GuardRule, counts: WindowCounts) -> str:
    if name == "errors":
        return (
            f"new failed {counts.new_errors:,} of {counts.live:,} users' requests that old answered"
            f" ({_format_share(counts.new_errors, counts.live)}, {rule.limit * 100:.3g}% allowed); old failed {counts.old_errors:,} that new answered"
        )
    if name == "mismatches":
        return (
            f"{counts.mismatches:,} of {counts.compared:,} pairs have unexplained mismatches"
            f" ({_format_share(counts.mismatches, counts.compared)}, {rule.limit * 100:.3g}% allowed)"
        )
    return (
        f"{counts.slower:,} of {counts.timed:,} answers are slower than old's by more than {rule.limit * 100:.3g}%"
        f" ({_format_share(counts.slower, counts.timed)}, half allowed)"
    )


def _format_share(part: int, total: int) -> str:
    return f"{part / total * 100:.3g}%" if total else "none"
