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

from abreast_sidecar.stats.sequential import (
    PairsNeeded,
    confidence_interval,
    estimate_requests_above,
    estimate_requests_below,
    evidence_above,
    evidence_below,
)

VerdictState = Literal["PASS", "FAIL", "INCONCLUSIVE"]
VerdictSubject = Literal["mismatches", "errors", "slower", "coverage", "completeness"]

EXIT_CODES: dict[VerdictState, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}
ALPHA_SHARES: dict[str, float] = {"mismatches": 0.5, "errors": 0.25, "slower": 0.25}  # of alpha, for FAIL
HALF = 0.5
_STATE_ORDER: dict[VerdictState, int] = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}
_GATE_SUBJECTS = frozenset({"completeness", "coverage"})


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
            raise ValueError(f"max_slower must be a fraction of old's time, 0 or more, got {self.max_slower!r}")


@dataclass(frozen=True, slots=True)
class EndpointCounts:
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
class Completeness:
    sampled: int | None  # requests, by Envoy's count; None where there is none
    accounted: int  # with an outcome that is evidence
    pending: int = 0  # not compared yet, beside `sampled`


@dataclass(frozen=True, slots=True)
class Reason:
    subject: VerdictSubject
    endpoint: str  # empty: the whole service
    state: VerdictState
    text: str
    pairs_needed: PairsNeeded  # further pairs of this endpoint, or of the service
    evidence: float = 0.0  # how plainly, to order by


@dataclass(frozen=True, slots=True)
class EndpointVerdict:
    endpoint: str
    state: VerdictState
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    state: VerdictState
    reasons: tuple[Reason, ...]  # the weightiest first; of endpoints only those that matter for the whole
    endpoints: tuple[EndpointVerdict, ...]  # the worst first
    pairs_to_pass: int | None  # further pairs until PASS, at the current rates; 0: now, None: not at these rates

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


@dataclass(frozen=True, slots=True)
class _Alpha:
    """Error probabilities; that of FAIL is for the three rates together."""

    to_pass: float
    to_fail: float

    def thresholds(self, subject: str) -> tuple[float, float]:
        """The evidence it takes for PASS and for FAIL."""
        return -log(self.to_pass), -log(self.to_fail * ALPHA_SHARES[subject])


def decide_verdict(endpoints: Sequence[EndpointCounts], completeness: Completeness, budget: Budget) -> Verdict:
    alpha = 1 - budget.confidence
    divisor = 1 if len(endpoints) < 2 else 2  # one endpoint is the whole
    endpoint_alpha = _Alpha(alpha, alpha / divisor / max(len(endpoints), 1))
    endpoint_verdicts = [_decide_endpoint(counts, budget, endpoint_alpha) for counts in endpoints]
    service_reasons = [
        *_rate_reasons(_sum_counts(endpoints), budget, _Alpha(alpha, alpha / divisor)),
        _completeness_reason(completeness, budget),
    ]
    failed_reasons = [
        reason
        for endpoint_verdict in endpoint_verdicts
        for reason in endpoint_verdict.reasons
        if reason.state == "FAIL"
    ]
    coverage_reasons = [
        reason
        for endpoint_verdict in endpoint_verdicts
        for reason in endpoint_verdict.reasons
        if reason.subject == "coverage"
    ]
    open_coverage_reasons = [reason for reason in coverage_reasons if reason.state != "PASS"]
    state = _find_worst_state([*service_reasons, *failed_reasons, *coverage_reasons])
    return Verdict(
        state=state,
        reasons=_order_reasons([*service_reasons, *failed_reasons, *coverage_reasons]),
        endpoints=tuple(
            sorted(
                endpoint_verdicts,
                key=lambda endpoint_verdict: (
                    _STATE_ORDER[endpoint_verdict.state],
                    -_get_leading_evidence(endpoint_verdict),
                    endpoint_verdict.endpoint,
                ),
            )
        ),
        pairs_to_pass=_estimate_pairs_to_pass(service_reasons, blocked=bool(failed_reasons or open_coverage_reasons)),
    )


def _decide_endpoint(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> EndpointVerdict:
    reasons = [*_rate_reasons(counts, budget, alpha), *_coverage_reasons(counts)]
    return EndpointVerdict(counts.endpoint, _find_worst_state(reasons), _order_reasons(reasons))


def _rate_reasons(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> list[Reason]:
    return [
        _mismatch_reason(counts, budget, alpha),
        _error_reason(counts, budget, alpha),
        _slower_reason(counts, budget, alpha),
    ]


def _mismatch_reason(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> Reason:
    text = _describe_rate(counts.mismatches, counts.compared, "unexplained mismatches", budget.max_mismatch, alpha)
    if counts.undecided:
        text += f"; {_format_number(counts.undecided)} more not yet told from noise"
    if counts.by_rules:
        text += f"; {_format_number(counts.by_rules)} explained by rules"
    if counts.partial:
        text += f"; of {_format_number(counts.partial)} only the beginnings"
    return _make_rate_reason(
        "mismatches",
        counts,
        counts.mismatches,
        counts.compared,
        budget.max_mismatch,
        alpha,
        text,
        counts.undecided,
        partial=counts.partial,
    )


def _error_reason(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> Reason:
    """Above the budget, and more often than old alone errs: two versions that both fail now and then are no regression."""
    text = _describe_rate(
        counts.new_errors, counts.compared, "errors of new where old answered", budget.max_error, alpha
    )
    if counts.old_errors:
        text += f"; {_format_number(counts.old_errors)} the other way"
    imbalance = evidence_above(counts.new_errors, counts.new_errors + counts.old_errors, HALF)
    return _make_rate_reason(
        "errors", counts, counts.new_errors, counts.compared, budget.max_error, alpha, text, required_evidence=imbalance
    )


def _slower_reason(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> Reason:
    description = "answers slower than old's" + (
        f" by more than {_format_percent(budget.max_slower)} of its time" if budget.max_slower else ""
    )
    text = _describe_rate(counts.slower, counts.timed, description, HALF, alpha)
    if counts.compared and not counts.timed:
        text = "no times yet: versions are cold, or what a copy costs is not known"
    return _make_rate_reason("slower", counts, counts.slower, counts.timed, HALF, alpha, text)


def _make_rate_reason(
    subject: VerdictSubject,
    counts: EndpointCounts,
    hits: int,
    n: int,
    limit: float,
    alpha: _Alpha,
    text: str,
    undecided: int = 0,
    required_evidence: float | None = None,
    partial: int = 0,
) -> Reason:
    """`doubtful` count against PASS only, and so do `unseen` of `n`, which could have been hits. `least_evidence` has to
    be enough for FAIL as well, if given.
    """
    above = evidence_above(hits, n, limit)
    if required_evidence is not None and hits:
        above = min(above, required_evidence)
    complete = max(n - partial, hits + undecided)
    below = evidence_below(hits + undecided, complete, limit)
    to_pass, to_fail = alpha.thresholds(subject)
    if above >= to_fail:
        return Reason(subject, counts.endpoint, "FAIL", text, PairsNeeded(None, 0), above)
    if below >= to_pass:
        return Reason(subject, counts.endpoint, "PASS", text, PairsNeeded(0, None), below)
    pairs_needed = PairsNeeded(
        to_pass=estimate_requests_below((hits + undecided) / complete if complete else 0.0, complete, limit, to_pass),
        to_fail=estimate_requests_above(hits / n if n else 0.0, n, limit, to_fail)
        or None,  # 0: something else keeps it from FAIL
    )
    return Reason(
        subject,
        counts.endpoint,
        "INCONCLUSIVE",
        text + _describe_pairs_needed(pairs_needed),
        pairs_needed,
        max(above, 0.0),
    )


def _coverage_reasons(counts: EndpointCounts) -> list[Reason]:
    """What new never answered, or of which nothing could be compared, may be broken however much passes beside it."""
    if not counts.old_requests or (counts.new_requests and counts.compared > counts.partial):
        return []
    text = f"old answered {_format_number(counts.old_requests)} requests, new none"
    if counts.new_requests:
        text = f"of {_format_number(counts.old_requests)} requests none could be compared"
        text += f" as a whole, {_format_number(counts.partial)} in part" if counts.partial else ""
        text += "; abreast pairs says why"
    weight = float(counts.old_requests)
    if counts.waived:
        return [Reason("coverage", counts.endpoint, "PASS", f"{text}; {counts.waived}", PairsNeeded(0, None), weight)]
    return [Reason("coverage", counts.endpoint, "INCONCLUSIVE", text, PairsNeeded(None, None), weight)]


def _completeness_reason(completeness: Completeness, budget: Budget) -> Reason:
    """Of a count there is nothing to estimate: it is complete or it is not."""
    if completeness.sampled is None:
        text = f"no Envoy's count to hold the {_format_number(completeness.accounted)} requests in the ledger against"
        return Reason("completeness", "", "INCONCLUSIVE", text, PairsNeeded(None, None))
    share = completeness.accounted / completeness.sampled if completeness.sampled else 0.0
    pending = completeness.pending if completeness.pending > (1 - budget.min_completeness) * completeness.sampled else 0
    is_complete = bool(completeness.sampled) and share >= budget.min_completeness and not pending
    missing = max(completeness.sampled - completeness.accounted, 0)
    text = f"the ledger has {_format_number(completeness.accounted)} of {_format_number(completeness.sampled)} sampled requests ({_format_percent(share)})"
    if pending:
        text += f"; {_format_number(pending)} more still wait to be compared"
    elif not is_complete:
        text += f"; {_format_percent(budget.min_completeness)} are asked for, {_format_number(missing)} are missing"
    return Reason(
        "completeness",
        "",
        "PASS" if is_complete else "INCONCLUSIVE",
        text,
        PairsNeeded(0 if is_complete else None, None),
    )


def _sum_counts(endpoints: Iterable[EndpointCounts]) -> EndpointCounts:
    all_counts = list(endpoints)
    sums = {
        field.name: sum(getattr(counts, field.name) for counts in all_counts)
        for field in fields(EndpointCounts)
        if field.name not in {"endpoint", "waived"}
    }
    return EndpointCounts(endpoint="", **sums)


def _find_worst_state(reasons: Iterable[Reason]) -> VerdictState:
    return min((reason.state for reason in reasons), key=_STATE_ORDER.__getitem__, default="INCONCLUSIVE")


def _order_reasons(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """The worst state first; of one state the plainest, holes in the data before rates that need more of it."""
    return tuple(
        sorted(
            reasons,
            key=lambda reason: (
                _STATE_ORDER[reason.state],
                reason.subject not in _GATE_SUBJECTS,
                -reason.evidence,
                reason.endpoint,
            ),
        )
    )


def _get_leading_evidence(endpoint_verdict: EndpointVerdict) -> float:
    return endpoint_verdict.reasons[0].evidence


def _estimate_pairs_to_pass(reasons: Iterable[Reason], *, blocked: bool) -> int | None:
    estimates = [reason.pairs_needed.to_pass for reason in reasons]
    finite_estimates = [estimate for estimate in estimates if estimate is not None]
    return None if blocked or len(finite_estimates) < len(estimates) else max(finite_estimates)


def _describe_rate(hits: int, n: int, description: str, limit: float, alpha: _Alpha) -> str:
    if not n:
        return f"no pair to count {description} in"
    bounds = confidence_interval(hits, n, alpha.to_pass)
    return (
        f"{_format_number(hits)} of {_format_number(n)} pairs have {description}: {_format_percent(hits / n)}"
        f" ({_format_percent(bounds.low)} to {_format_percent(bounds.high)}), {_format_percent(limit)} allowed"
    )


def _describe_pairs_needed(pairs_needed: PairsNeeded) -> str:
    if pairs_needed.to_pass is not None:
        return f"; about {_format_number(pairs_needed.to_pass)} more pairs to pass at this rate"
    if pairs_needed.to_fail is not None:
        return f"; about {_format_number(pairs_needed.to_fail)} more pairs to fail at this rate"
    return "; more pairs at this rate would not settle it"


def _format_number(value: int) -> str:
    return f"{value:,}"


def _format_percent(share: float) -> str:
    """To three digits, and never a hundred percent of what is not whole."""
    text = f"{share * 100:.3g}%"
    return text if share >= 1 or text != "100%" else f"{share * 100:.6g}%"
