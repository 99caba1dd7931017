"""PASS, FAIL or INCONCLUSIVE, decided from counts. Pure.

Three rates are compared with the budget, each as a share of pairs: unexplained mismatches, server errors of new alone, and
responses of new that are slower than old's by more than the allowed share. For the last one half of the pairs may be
slower: the median of new/old is then within the budget (a sign test). The tests are sequential (`sequential`), so you can
ask for a verdict at any time.

Error probability. A wrong FAIL and a wrong PASS of one rate exclude each other, so each can use all of alpha, which is one
minus the confidence. PASS needs all rates to pass, each at alpha, without a correction: a wrong PASS needs a rate above
its budget to pass (an intersection-union test; Berger 1982, Technometrics 24). FAIL needs one rate, so the rates share
alpha: mismatches get half, errors and slower responses a quarter each. Half of each share is for the service as a
whole, the other half is divided equally among its endpoints.

The service passes on all pairs together: an endpoint with ten requests could never show a rate of one in a thousand. The
evidence of an endpoint decides its own verdict, and fails the service if it is above the budget alone.

Endpoints are counted as they appear. While new ones appear, the shares of earlier evaluations were slightly too large.
`noise` decides which findings are real, with a separate error probability.

A pair with truncated responses can show a mismatch but no match: it counts towards FAIL only. Undecided findings
(`noise`) count as mismatches against PASS, and not at all towards FAIL. Too few pairs, an endpoint that new never
answered and an incomplete ledger prevent PASS, and none of them undoes a FAIL. An endpoint's coverage can be waived; the
verdict then says so.
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
ALPHA_SHARES: dict[str, float] = {"mismatches": 0.5, "errors": 0.25, "slower": 0.25}  # parts of alpha for FAIL
HALF = 0.5
_STATE_ORDER: dict[VerdictState, int] = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}
_GATE_SUBJECTS = frozenset({"completeness", "coverage"})


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of an acceptable new version, as fractions."""

    max_mismatch: float = 0.001  # per pair
    max_error: float = 0.001  # per pair
    max_slower: float = 0.1  # per old's time, and 0.5 ms at least; applied when `slower` is counted
    min_completeness: float = 0.99  # per sampled request
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
    """Counts of pairs of one endpoint over one window; the first two are requests."""

    endpoint: str
    old_requests: int  # sampled requests that old answered, without baseline copies
    new_requests: int
    compared: int
    mismatches: int  # with at least one real finding that is not additive
    undecided: int  # with undecided findings only
    new_errors: int  # new answered 5xx, raised or broke off, and old did not; live and shadow
    old_errors: int  # the same with old and new exchanged
    timed: int  # with both times, without cold starts
    slower: int  # part of `timed`: new was slower by more than max_slower of old's time, and by 0.5 ms
    partial: int = 0  # part of `compared`: truncated responses, whose mismatches count, but not their matches
    waived: str = ""  # the reason and author, if the coverage of this endpoint is waived
    by_rules: int = 0  # part of `compared`: no mismatch because rules explain a difference


@dataclass(frozen=True, slots=True)
class Completeness:
    """Requests of one window."""

    sampled: int | None  # by Envoy's count, None if it is not known
    accounted: int  # with an outcome that is evidence
    pending: int = 0  # not compared yet, and not part of `sampled`


@dataclass(frozen=True, slots=True)
class Reason:
    subject: VerdictSubject
    endpoint: str  # empty: the whole service
    state: VerdictState
    text: str
    pairs_needed: PairsNeeded  # pairs of this endpoint, or of the service
    evidence: float = 0.0  # for the order of reasons


@dataclass(frozen=True, slots=True)
class EndpointVerdict:
    endpoint: str
    state: VerdictState
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    state: VerdictState
    reasons: tuple[Reason, ...]  # the most important first; those of endpoints only if they decide the verdict
    endpoints: tuple[EndpointVerdict, ...]  # the worst first
    pairs_to_pass: int | None  # further pairs until PASS, at the current rates; 0: now, None: not at these rates
    release: str | None = None  # release of new, None for all releases

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


@dataclass(frozen=True, slots=True)
class _Alpha:
    """Error probabilities. `to_fail` is for the three rates together."""

    to_pass: float
    to_fail: float

    def thresholds(self, subject: str) -> tuple[float, float]:
        """Return the log e-values that PASS and FAIL need."""
        return -log(self.to_pass), -log(self.to_fail * ALPHA_SHARES[subject])


def decide_verdict(
    endpoints: Sequence[EndpointCounts], completeness: Completeness, budget: Budget, *, release: str | None = None
) -> Verdict:
    """Decide about the service as a whole and about each endpoint. `release`: the release of new that the counts are for."""
    alpha = 1 - budget.confidence
    divisor = 1 if len(endpoints) < 2 else 2  # a single endpoint is the service
    endpoint_alpha = _Alpha(alpha, alpha / divisor / max(len(endpoints), 1))
    endpoint_verdicts = [_decide_endpoint(counts, budget, endpoint_alpha) for counts in endpoints]
    service_reasons = [
        *_rate_reasons(_sum_counts(endpoints), budget, _Alpha(alpha, alpha / divisor)),
        _completeness_reason(completeness, budget),
    ]
    endpoint_reasons = [
        reason
        for endpoint in endpoint_verdicts
        for reason in endpoint.reasons
        if reason.state == "FAIL" or reason.subject == "coverage"
    ]
    endpoint_verdicts.sort(
        key=lambda endpoint: (_STATE_ORDER[endpoint.state], -endpoint.reasons[0].evidence, endpoint.endpoint)
    )
    return Verdict(
        state=_find_worst_state([*service_reasons, *endpoint_reasons]),
        reasons=_order_reasons([*service_reasons, *endpoint_reasons]),
        endpoints=tuple(endpoint_verdicts),
        pairs_to_pass=_estimate_pairs_to_pass(
            service_reasons, blocked=any(reason.state != "PASS" for reason in endpoint_reasons)
        ),
        release=release,
    )


def _decide_endpoint(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> EndpointVerdict:
    reasons = [*_rate_reasons(counts, budget, alpha), *_coverage_reasons(counts)]
    return EndpointVerdict(counts.endpoint, _find_worst_state(reasons), _order_reasons(reasons))


def _rate_reasons(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> list[Reason]:
    return [reason(counts, budget, alpha) for reason in (_mismatch_reason, _error_reason, _slower_reason)]


def _mismatch_reason(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> Reason:
    text = _describe_rate(counts.mismatches, counts.compared, "unexplained mismatches", budget.max_mismatch, alpha)
    if counts.undecided:
        text += f"; {counts.undecided:,} more are undecided: noise or not"
    if counts.by_rules:
        text += f"; {counts.by_rules:,} explained by rules"
    if counts.partial:
        text += f"; {counts.partial:,} compared in part"
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
    """Require that new fails alone more often than old does: versions that both fail sometimes are no regression."""
    text = _describe_rate(
        counts.new_errors, counts.compared, "errors of new where old answered", budget.max_error, alpha
    )
    if counts.old_errors:
        text += f"; {counts.old_errors:,} the other way"
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
        text = "no times yet: the versions are cold, or there are too few baseline copies"
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
    """Test one rate. `undecided` and `partial` count against PASS only. FAIL also needs `required_evidence`, if given."""
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
        or None,  # 0: only `required_evidence` prevents FAIL
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
    """Report an endpoint that new never answered, or without any complete comparison: it may be broken."""
    if not counts.old_requests or (counts.new_requests and counts.compared > counts.partial):
        return []
    text = f"old answered {counts.old_requests:,} requests, new none"
    if counts.new_requests:
        text = f"none of {counts.old_requests:,} requests could be compared"
        text += f" in full, {counts.partial:,} in part" if counts.partial else ""
        text += "; for the causes: abreast pairs"
    weight = float(counts.old_requests)
    if counts.waived:
        return [Reason("coverage", counts.endpoint, "PASS", f"{text}; {counts.waived}", PairsNeeded(0, None), weight)]
    return [Reason("coverage", counts.endpoint, "INCONCLUSIVE", text, PairsNeeded(None, None), weight)]


def _completeness_reason(completeness: Completeness, budget: Budget) -> Reason:
    """Compare the ledger with Envoy's count, without a test: both are exact."""
    if completeness.sampled is None:
        text = f"no Envoy's count to compare the {completeness.accounted:,} requests in the ledger with"
        return Reason("completeness", "", "INCONCLUSIVE", text, PairsNeeded(None, None))
    share = completeness.accounted / completeness.sampled if completeness.sampled else 0.0
    pending = completeness.pending if completeness.pending > (1 - budget.min_completeness) * completeness.sampled else 0
    is_complete = bool(completeness.sampled) and share >= budget.min_completeness and not pending
    missing = max(completeness.sampled - completeness.accounted, 0)
    text = f"the ledger has {completeness.accounted:,} of {completeness.sampled:,} sampled requests ({_format_percent(share)})"
    if pending:
        text += f"; {pending:,} more still wait to be compared"
    elif not is_complete:
        text += f"; {_format_percent(budget.min_completeness)} are required, {missing:,} are missing"
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
    """Sort by state (the worst first), incomplete data before rates, then by evidence."""
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


def _estimate_pairs_to_pass(reasons: Iterable[Reason], *, blocked: bool) -> int | None:
    estimates = [reason.pairs_needed.to_pass for reason in reasons]
    finite_estimates = [estimate for estimate in estimates if estimate is not None]
    return None if blocked or len(finite_estimates) < len(estimates) else max(finite_estimates)


def _describe_rate(hits: int, n: int, description: str, limit: float, alpha: _Alpha) -> str:
    if not n:
        return f"no pair to count {description} in"
    bounds = confidence_interval(hits, n, alpha.to_pass)
    return (
        f"{hits:,} of {n:,} pairs have {description}: {_format_percent(hits / n)}"
        f" ({_format_percent(bounds.low)} to {_format_percent(bounds.high)}), {_format_percent(limit)} allowed"
    )


def _describe_pairs_needed(pairs_needed: PairsNeeded) -> str:
    if pairs_needed.to_pass is not None:
        return f"; about {pairs_needed.to_pass:,} more pairs to pass at this rate"
    if pairs_needed.to_fail is not None:
        return f"; about {pairs_needed.to_fail:,} more pairs to fail at this rate"
    return "; more pairs at this rate would not settle it"


def _format_percent(share: float) -> str:
    """Format with three digits, and never as 100% for less than all."""
    text = f"{share * 100:.3g}%"
    return text if share >= 1 or text != "100%" else f"{share * 100:.6g}%"
