"""When evidence is enough to send all users back to old.

Each rule is a test that stays valid however often one looks (`compare.sequence`): an e-value, which reaches 1/alpha at
any time at all with a probability of at most alpha while the rule is kept. Such a test is about one beginning, and a
guard that watches for months must forget. So each rule is tested over two windows at a time, the one that began at the
last half of its length, and the one that began a half before; each gets half of the rule's alpha. An untroubled service
is then rolled back with a probability of at most alpha in each half window, and what went wrong within the last half
window is seen whole.

Errors are those of requests whose user new answered (or should have: where it failed and old stepped in), held against
what old did with the same request. New must err alone in more of them than the limit, and more often than old errs
alone (McNemar 1947, "Note on the sampling error of the difference between correlated proportions", as an e-value). Mismatches are those
of real findings: what is undecided, or noise, does not count. Slower means that more than half of the pairs are beyond
the limit, as in a verdict.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, log
from typing import Any, Literal, get_args

from abreast_sidecar.compare.sequence import evidence_above
from abreast_sidecar.compare.verdict import HALF, SHARES

Mode = Literal["off", "watching", "acting"]
Subject = Literal["errors", "mismatches", "slower"]

MODES: tuple[Mode, ...] = get_args(Mode)
RULES: tuple[Subject, ...] = get_args(Subject)
WINDOWS = 2  # at a time, for each rule
SHORTEST, LONGEST = 10.0, 86_400.0  # seconds of a window
MOST_PAIRS = 1_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    limit: float  # a share of pairs; of `slower` the part of old's time
    min_pairs: int  # before anything is said
    window: float = 600.0  # seconds
    cooldown: float = 300.0  # seconds after it acted, or would have

    def check(self, name: str) -> None:
        """Raise ValueError."""
        highest = inf if name == "slower" else 1.0
        if not (0 <= self.limit <= highest and isfinite(self.limit)):
            raise ValueError(
                f"{name}.limit must be a share from 0 to 1 (of slower: 0 or more), got {self.limit!r}"
            )
        if not 1 <= self.min_pairs <= MOST_PAIRS:
            raise ValueError(f"{name}.min_pairs must be 1 to {MOST_PAIRS}, got {self.min_pairs!r}")
        if not SHORTEST <= self.window <= LONGEST:
            raise ValueError(
                f"{name}.window must be {SHORTEST:g} to {LONGEST:g} seconds, got {self.window:g}"
            )
        if not 0 <= self.cooldown <= LONGEST:
            raise ValueError(f"{name}.cooldown must be 0 to {LONGEST:g} seconds, got {self.cooldown:g}")


@dataclass(frozen=True, slots=True)
class Policy:
    mode: Mode = "off"
    errors: Rule = field(default_factory=lambda: Rule(limit=0.001, min_pairs=10))
    mismatches: Rule = field(default_factory=lambda: Rule(limit=0.01, min_pairs=50))
    slower: Rule = field(default_factory=lambda: Rule(limit=1.0, min_pairs=100))
    min_completeness: float = 0.9  # below it the guard says that it is blind
    confidence: float = 0.99

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.min_completeness <= 1:
            raise ValueError(f"min_completeness must be a share from 0 to 1, got {self.min_completeness!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be above 0 and below 1, got {self.confidence!r}")
        for name in RULES:
            self.rule(name).check(name)

    def rule(self, name: Subject) -> Rule:
        rule: Rule = getattr(self, name)
        return rule

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Policy:
        """From what `asdict` made of one; what is unknown is left out."""
        values: dict[str, Any] = {
            name: document[name] for name in ("mode", "min_completeness", "confidence") if name in document
        }
        values |= {name: Rule(**document[name]) for name in RULES if name in document}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Tally:
    """Pairs of one window."""

    live: int = 0  # users' requests that new answered, or should have
    new_errors: int = 0  # of `live`: new failed, and old did not
    old_errors: int = 0  # the other way
    compared: int = 0
    mismatches: int = 0  # with a real finding that is no addition
    timed: int = 0
    slower: int = 0


@dataclass(frozen=True, slots=True)
class Breach:
    rule: Subject
    text: str
    evidence: float  # beyond what it takes


def starts(rule: Rule, now: dt.datetime, since: dt.datetime) -> tuple[dt.datetime, ...]:
    """Of the windows, the longest first. They do not slide: each begins once and grows. None begins before `since`."""
    half = rule.window / WINDOWS
    last = dt.datetime.fromtimestamp(now.timestamp() // half * half, dt.UTC)
    return tuple(max(last - dt.timedelta(seconds=half * back), since) for back in reversed(range(WINDOWS)))


def breaches(policy: Policy, tallies: Mapping[Subject, Sequence[Tally]]) -> list[Breach]:
    """The plainest first."""
    found = []
    for name, windows in tallies.items():
        bar = -log((1 - policy.confidence) * SHARES[name] / WINDOWS)
        worst = max((_tested(policy, name, tally) for tally in windows), key=lambda one: one.evidence)
        if worst.evidence >= bar:
            found.append(Breach(name, worst.text, worst.evidence - bar))
    return sorted(found, key=lambda one: -one.evidence)


def _tested(policy: Policy, name: Subject, tally: Tally) -> Breach:
    rule = policy.rule(name)
    n, hits, limit = _counts(name, rule, tally)
    evidence = evidence_above(hits, n, limit) if n >= rule.min_pairs else -inf
    if name == "errors" and hits:
        evidence = min(evidence, evidence_above(hits, hits + tally.old_errors, HALF))
    return Breach(name, _said(name, rule, tally), evidence)


def _counts(name: Subject, rule: Rule, tally: Tally) -> tuple[int, int, float]:
    if name == "errors":
        return tally.live, tally.new_errors, rule.limit
    if name == "mismatches":
        return tally.compared, tally.mismatches, rule.limit
    return tally.timed, tally.slower, HALF


def _said(name: Subject, rule: Rule, tally: Tally) -> str:
    if name == "errors":
        return (
            f"new failed {tally.new_errors:,} of {tally.live:,} users' requests that old answered"
            f" ({_share(tally.new_errors, tally.live)}, {rule.limit * 100:.3g}% allowed); {tally.old_errors:,} the other way"
        )
    if name == "mismatches":
        return (
            f"{tally.mismatches:,} of {tally.compared:,} pairs have unexplained mismatches"
            f" ({_share(tally.mismatches, tally.compared)}, {rule.limit * 100:.3g}% allowed)"
        )
    return (
        f"{tally.slower:,} of {tally.timed:,} answers are slower than old's by more than {rule.limit * 100:.3g}%"
        f" ({_share(tally.slower, tally.timed)}, half allowed)"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole * 100:.3g}%" if whole else "none"
