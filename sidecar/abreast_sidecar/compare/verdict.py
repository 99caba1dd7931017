"""PASS, FAIL or INCONCLUSIVE, from plain counts.

Three rates are held against the budget, each as "pairs with it, of pairs": unexplained mismatches, server errors of new
alone, and answers of new slower than old's by more than is allowed (half of the pairs may be: the median of new/old is
then within the budget, a sign test). All looks are covered (`sequence`), so a verdict may be asked for at any time.

Error probability. A wrong FAIL and a wrong PASS of one rate exclude each other, so each may use all of alpha, which is one
minus the confidence. For PASS all rates have to pass, each at alpha, and no correction is due: to pass wrongly, one that is over
its budget has to (an intersection-union test; Berger 1982, Technometrics 24). For FAIL one is enough, so alpha is shared:
half to mismatches, a quarter to errors and to slower answers; and of each share half to the service's pairs as a whole and
half to its endpoints, equally.

The whole passes on all pairs together: an endpoint with ten requests could never show a rate of one in a thousand. Its
own evidence is in its own verdict, and fails the whole where it is over the budget by itself.

Endpoints are counted as they appear: while new ones still come, the shares of earlier looks were a little too large.
What is a real finding is decided elsewhere, with an error probability of its own.

A pair whose answers were cut shows a mismatch in what came of them and no match: it counts for FAIL only.

What is undecided (`noise`) counts as a mismatch against PASS, and not at all for FAIL. Too little data, an endpoint that
new never answered and a ledger with holes keep a verdict from PASS; none of them undoes a FAIL. An endpoint's coverage may
be waived, and then the verdict says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import inf, log
from typing import Literal

from abreast_sidecar.compare.sequence import (
    Needed,
    evidence_above,
    evidence_below,
    interval,
    more_above,
    more_below,
)

State = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Subject = Literal["mismatches", "errors", "slower", "coverage", "completeness"]

EXIT: dict[State, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}
SHARES: dict[str, float] = {"mismatches": 0.5, "errors": 0.25, "slower": 0.25}  # of alpha, for FAIL
HALF = 0.5
_WEIGHT: dict[State, int] = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}
_GATES = frozenset({"completeness", "coverage"})


@dataclass(frozen=True, slots=True)
class Budget:
    """What is still acceptable. All are fractions."""

    max_mismatch: float = 0.001  # of pairs
    max_error: float = 0.001  # of pairs
    max_slower: float = 0.1  # of old's time, and half a millisecond at least; whoever counts `slower` uses it
    min_completeness: float = 0.99  # of the sampled requests
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("max_mismatch", "max_error", "min_completeness"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a fraction from 0 to 1, got {getattr(self, name)!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be a fraction above 0 and below 1, got {self.confidence!r}")
        if not 0 <= self.max_slower < inf:
            raise ValueError(
                f"max_slower must be a fraction of old's time, 0 or more, got {self.max_slower!r}"
            )


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one endpoint, over one window. All are pairs, but for the first two."""

    endpoint: str
    old_requests: int  # sampled requests that old answered, in any role but baseline
    new_requests: int
    compared: int  # of these nothing kept a difference from being seen
    mismatches: int  # with at least one real finding that is not additive
    undecided: int  # with undecided findings only
    new_errors: int  # new answered 5xx, raised or broke off, and old did not; live and shadow
    old_errors: int  # the other way
    timed: int  # with both times, without cold starts
    slower: int  # of `timed`: new took longer than old by more than max_slower of its time, and than half a millisecond
    # Of `compared`, those of which only the beginnings were: what differs in them counts against new, and that nothing
    # does says nothing for it.
    partial: int = 0
    waived: str = ""  # who says that its coverage is not to be judged, and why
    by_rules: int = 0  # of `compared`, those of which rules explain something, and that are no mismatches


@dataclass(frozen=True, slots=True)
class Ledger:
    sampled: int | None  # requests, by Envoy's count; None where there is none
    accounted: int  # with an outcome that is evidence
    waiting: int = 0  # not compared yet, beside `sampled`


@dataclass(frozen=True, slots=True)
class Reason:
    subject: Subject
    endpoint: str  # empty: the whole service
    state: State
    text: str
    needed: Needed  # further pairs of this endpoint, or of the service
    evidence: float = 0.0  # how plainly, to order by


@dataclass(frozen=True, slots=True)
class EndpointVerdict:
    endpoint: str
    state: State
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    state: State
    reasons: tuple[Reason, ...]  # the weightiest first; of endpoints only those that matter for the whole
    endpoints: tuple[EndpointVerdict, ...]  # the worst first
    more: int | None  # further pairs until PASS, at the current rates; 0: now, None: not at these rates

    @property
    def exit_code(self) -> int:
        return EXIT[self.state]


@dataclass(frozen=True, slots=True)
class _Alpha:
    """Error probabilities; that of FAIL is for the three rates together."""

    to_pass: float
    to_fail: float

    def bars(self, subject: str) -> tuple[float, float]:
        """The evidence it takes for PASS and for FAIL."""
        return -log(self.to_pass), -log(self.to_fail * SHARES[subject])


def decide(endpoints: Sequence[Counts], ledger: Ledger, budget: Budget) -> Verdict:
    alpha = 1 - budget.confidence
    part = 1 if len(endpoints) < 2 else 2  # one endpoint is the whole
    each = _Alpha(alpha, alpha / part / max(len(endpoints), 1))
    single = [_endpoint(counts, budget, each) for counts in endpoints]
    whole = [*_rates(_total(endpoints), budget, _Alpha(alpha, alpha / part)), _completeness(ledger, budget)]
    failed = [reason for one in single for reason in one.reasons if reason.state == "FAIL"]
    uncovered = [reason for one in single for reason in one.reasons if reason.subject == "coverage"]
    unseen = [reason for reason in uncovered if reason.state != "PASS"]
    state = _state([*whole, *failed, *uncovered])
    return Verdict(
        state=state,
        reasons=_ordered([*whole, *failed, *uncovered]),
        endpoints=tuple(sorted(single, key=lambda one: (_WEIGHT[one.state], -_strength(one), one.endpoint))),
        more=_more(whole, blocked=bool(failed or unseen)),
    )


def _endpoint(counts: Counts, budget: Budget, alpha: _Alpha) -> EndpointVerdict:
    reasons = [*_rates(counts, budget, alpha), *_coverage(counts)]
    return EndpointVerdict(counts.endpoint, _state(reasons), _ordered(reasons))


def _rates(counts: Counts, budget: Budget, alpha: _Alpha) -> list[Reason]:
    return [
        _mismatches(counts, budget, alpha),
        _errors(counts, budget, alpha),
        _slower(counts, budget, alpha),
    ]


def _mismatches(counts: Counts, budget: Budget, alpha: _Alpha) -> Reason:
    said = _said(counts.mismatches, counts.compared, "unexplained mismatches", budget.max_mismatch, alpha)
    if counts.undecided:
        said += f"; {_number(counts.undecided)} more not yet told from noise"
    if counts.by_rules:
        said += f"; {_number(counts.by_rules)} explained by rules"
    if counts.partial:
        said += f"; of {_number(counts.partial)} only the beginnings"
    return _rate(
        "mismatches",
        counts,
        counts.mismatches,
        counts.compared,
        budget.max_mismatch,
        alpha,
        said,
        counts.undecided,
        unseen=counts.partial,
    )


def _errors(counts: Counts, budget: Budget, alpha: _Alpha) -> Reason:
    """Above the budget, and more often than old alone errs: two versions that both fail now and then are no regression."""
    said = _said(
        counts.new_errors, counts.compared, "errors of new where old answered", budget.max_error, alpha
    )
    if counts.old_errors:
        said += f"; {_number(counts.old_errors)} the other way"
    lopsided = evidence_above(counts.new_errors, counts.new_errors + counts.old_errors, HALF)
    return _rate(
        "errors",
        counts,
        counts.new_errors,
        counts.compared,
        budget.max_error,
        alpha,
        said,
        least_evidence=lopsided,
    )


def _slower(counts: Counts, budget: Budget, alpha: _Alpha) -> Reason:
    what = "answers slower than old's" + (
        f" by more than {_percent(budget.max_slower)} of its time" if budget.max_slower else ""
    )
    said = _said(counts.slower, counts.timed, what, HALF, alpha)
    if counts.compared and not counts.timed:
        said = "no times yet: versions are cold, or what a copy costs is not known"
    return _rate("slower", counts, counts.slower, counts.timed, HALF, alpha, said)


def _rate(
    subject: Subject,
    counts: Counts,
    hits: int,
    n: int,
    limit: float,
    alpha: _Alpha,
    said: str,
    doubtful: int = 0,
    least_evidence: float | None = None,
    unseen: int = 0,
) -> Reason:
    """`doubtful` count against PASS only, and so do `unseen` of `n`, which could have been hits. `least_evidence` has to
    be enough for FAIL as well, if given.
    """
    above = evidence_above(hits, n, limit)
    if least_evidence is not None and hits:
        above = min(above, least_evidence)
    seen = max(n - unseen, hits + doubtful)
    below = evidence_below(hits + doubtful, seen, limit)
    to_pass, to_fail = alpha.bars(subject)
    if above >= to_fail:
        return Reason(subject, counts.endpoint, "FAIL", said, Needed(None, 0), above)
    if below >= to_pass:
        return Reason(subject, counts.endpoint, "PASS", said, Needed(0, None), below)
    needed = Needed(
        to_pass=more_below((hits + doubtful) / seen if seen else 0.0, seen, limit, to_pass),
        to_fail=more_above(hits / n if n else 0.0, n, limit, to_fail)
        or None,  # 0: something else keeps it from FAIL
    )
    return Reason(subject, counts.endpoint, "INCONCLUSIVE", said + _missing(needed), needed, max(above, 0.0))


def _coverage(counts: Counts) -> list[Reason]:
    """What new never answered, or of which nothing could be compared, may be broken however much passes beside it."""
    if not counts.old_requests or (counts.new_requests and counts.compared > counts.partial):
        return []
    text = f"old answered {_number(counts.old_requests)} requests, new none"
    if counts.new_requests:
        text = f"of {_number(counts.old_requests)} requests none could be compared"
        text += f" as a whole, {_number(counts.partial)} in part" if counts.partial else ""
        text += "; abreast pairs says why"
    weight = float(counts.old_requests)
    if counts.waived:
        return [
            Reason("coverage", counts.endpoint, "PASS", f"{text}; {counts.waived}", Needed(0, None), weight)
        ]
    return [Reason("coverage", counts.endpoint, "INCONCLUSIVE", text, Needed(None, None), weight)]


def _completeness(ledger: Ledger, budget: Budget) -> Reason:
    """Of a count there is nothing to estimate: it is complete or it is not."""
    if ledger.sampled is None:
        text = f"no Envoy's count to hold the {_number(ledger.accounted)} requests in the ledger against"
        return Reason("completeness", "", "INCONCLUSIVE", text, Needed(None, None))
    share = ledger.accounted / ledger.sampled if ledger.sampled else 0.0
    waiting = ledger.waiting if ledger.waiting > (1 - budget.min_completeness) * ledger.sampled else 0
    enough = bool(ledger.sampled) and share >= budget.min_completeness and not waiting
    lost = max(ledger.sampled - ledger.accounted, 0)
    text = f"the ledger has {_number(ledger.accounted)} of {_number(ledger.sampled)} sampled requests ({_percent(share)})"
    if waiting:
        text += f"; {_number(waiting)} more still wait to be compared"
    elif not enough:
        text += f"; {_percent(budget.min_completeness)} are asked for, {_number(lost)} are missing"
    return Reason(
        "completeness", "", "PASS" if enough else "INCONCLUSIVE", text, Needed(0 if enough else None, None)
    )


def _total(endpoints: Iterable[Counts]) -> Counts:
    known = list(endpoints)
    sums = {
        field.name: sum(getattr(one, field.name) for one in known)
        for field in fields(Counts)
        if field.name not in {"endpoint", "waived"}
    }
    return Counts(endpoint="", **sums)


def _state(reasons: Iterable[Reason]) -> State:
    return min((reason.state for reason in reasons), key=_WEIGHT.__getitem__, default="INCONCLUSIVE")


def _ordered(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """The worst state first; of one state the plainest, holes in the data before rates that need more of it."""
    return tuple(
        sorted(
            reasons,
            key=lambda one: (_WEIGHT[one.state], one.subject not in _GATES, -one.evidence, one.endpoint),
        )
    )


def _strength(one: EndpointVerdict) -> float:
    return one.reasons[0].evidence


def _more(whole: Iterable[Reason], *, blocked: bool) -> int | None:
    needed = [reason.needed.to_pass for reason in whole]
    known = [more for more in needed if more is not None]
    return None if blocked or len(known) < len(needed) else max(known)


def _said(hits: int, n: int, what: str, limit: float, alpha: _Alpha) -> str:
    if not n:
        return f"no pair to count {what} in"
    found = interval(hits, n, alpha.to_pass)
    return (
        f"{_number(hits)} of {_number(n)} pairs have {what}: {_percent(hits / n)}"
        f" ({_percent(found.low)} to {_percent(found.high)}), {_percent(limit)} allowed"
    )


def _missing(needed: Needed) -> str:
    if needed.to_pass is not None:
        return f"; about {_number(needed.to_pass)} more pairs to pass at this rate"
    if needed.to_fail is not None:
        return f"; about {_number(needed.to_fail)} more pairs to fail at this rate"
    return "; more pairs at this rate would not settle it"


def _number(value: int) -> str:
    return f"{value:,}"


def _percent(share: float) -> str:
    """To three digits, and never a hundred percent of what is not whole."""
    text = f"{share * 100:.3g}%"
    return text if share >= 1 or text != "100%" else f"{share * 100:.6g}%"
