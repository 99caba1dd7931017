"""PASS, FAIL or INCONCLUSIVE, decided from counts. Pure.

Three rates are compared with the budget, each as a share of pairs: unexplained mismatches, server errors of new alone, and
responses of new that are slower than old's by more than the allowed share. For the last one half of the pairs may be
slower: the median of new/old is then within the budget (a sign test). `latency` selects the pairs, and tests the slowest
responses too. The tests are sequential (`sequential`), so you can ask for a verdict at any time.

Error probability. A wrong FAIL and a wrong PASS of one rate exclude each other, so each can use all of alpha, which is one
minus the confidence. PASS needs all rates to pass, each at alpha, without a correction: a wrong PASS needs a rate above
its budget to pass (an intersection-union test; Berger 1982, Technometrics 24). FAIL needs one rate, so the rates share
alpha: mismatches get 45%, errors and slower responses a quarter each, users who left 5%. The slowest responses get half of the share of
slower ones, and errors have two tests with half each (`_incident_evidence`). Half of each share is for the service as a
whole, the other half is divided equally among its endpoints.

The service passes on all pairs together: an endpoint with ten requests could never show a rate of one in a thousand. The
evidence of an endpoint decides its own verdict, and fails the service if it is above the budget alone.

Endpoints are counted as they appear. While new ones appear, the shares of earlier evaluations were slightly too large.
`noise` decides which findings are real, with a separate error probability.

A pair with truncated responses can show a mismatch but no match: it counts towards FAIL only. Undecided findings
(`noise`) count as mismatches against PASS, and not at all towards FAIL. Too few pairs, an endpoint that new never
answered, an incomplete ledger and users who left new prevent PASS, and none of them undoes a FAIL. An endpoint's coverage can be waived; the
verdict then says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, log
from typing import Literal

from abreast_sidecar.stats.latency import TAILS, TimeCounts, block_evidence, describe_queues
from abreast_sidecar.stats.noise import NoisyPlace
from abreast_sidecar.stats.sequential import (
    SIGN_PRIOR,
    Interval,
    PairsNeeded,
    confidence_interval,
    estimate_requests_above,
    estimate_requests_below,
    evidence_above,
    evidence_below,
    sign_evidence,
)

VerdictState = Literal["PASS", "FAIL", "INCONCLUSIVE"]
VerdictSubject = Literal["mismatches", "errors", "slower", "coverage", "completeness", "left", "blind"]

ALPHA_SHARES = {"mismatches": 0.45, "errors": 0.25, "slower": 0.25, "left": 0.05}  # parts of alpha for FAIL
HALF = 0.5
MAX_OUTAGE_SHARE = 0.001  # of the requests of an unchanged version, in the long run
MIN_OUTAGE_ERRORS = 20  # the share among fewer says little
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
    max_blind: float = 1.0  # per pair: what noise at one place may hide

    def __post_init__(self) -> None:
        for name in ("max_mismatch", "max_error", "min_completeness", "max_blind"):
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
    times: TimeCounts  # without cold starts
    partial: int = 0  # part of `compared`: truncated responses, whose mismatches count, but not their matches
    waived: str = ""  # the reason and author, if the coverage of this endpoint is waived
    by_rules: int = 0  # part of `compared`: no mismatch because rules explain a difference
    # Periods of ten seconds with more errors of new alone than of old alone, and the reverse: an outage is one event.
    new_error_periods: int = 0
    old_error_periods: int = 0
    excluded: int = 0  # part of `old_requests`: without a copy, because a sampling rule takes only GraphQL queries


@dataclass(frozen=True, slots=True)
class DepartureCounts:
    """Users who left before the live response began. Their requests are not compared.

    Periods count users of equally large groups of both versions, each user and each period once.
    """

    new_departures: int = 0  # requests that new was to answer
    old_departures: int = 0
    new_departure_periods: int = 0
    old_departure_periods: int = 0
    new_share: float = 1.0  # of the live responses in these periods
    alone: float = 1.0  # part of `new_departures` at a time when old answered too few users to compare with


NO_DEPARTURES = DepartureCounts()


@dataclass(frozen=True, slots=True)
class ServiceCounts:
    """Counts of all endpoints together that are no sums over endpoints."""

    times: TimeCounts
    new_error_periods: int = 0  # an outage affects many endpoints in the same period
    old_error_periods: int = 0
    departures: DepartureCounts = NO_DEPARTURES
    noisy_places: tuple[NoisyPlace, ...] = ()  # without those that the shape of the values explains


@dataclass(frozen=True, slots=True)
class Completeness:
    """Requests of one window."""

    sampled: int | None  # by Envoy's count, None if it is not known
    accounted: int  # with an outcome that is evidence
    pending: int = 0  # not compared yet, and not part of `sampled`
    surplus: int = 0  # requests in the ledger beyond Envoy's count, if they are more than timing explains
    late: int = 0  # with a capture that arrived after the deadline
    shed: int = 0  # not part of `sampled`: their copies would have queued, or a rule excludes their body


@dataclass(frozen=True, slots=True)
class Measure:
    """The numbers that a reason states."""

    count: int
    total: int | None  # None: not known
    limit: float | None = None
    bounds: Interval | None = None  # of the rate


@dataclass(frozen=True, slots=True)
class Reason:
    subject: VerdictSubject
    endpoint: str  # empty: the whole service
    state: VerdictState
    text: str
    pairs_needed: PairsNeeded  # pairs of this endpoint, or of the service
    evidence: float = 0.0  # for the order of reasons
    measure: Measure | None = None


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


@dataclass(frozen=True, slots=True)
class _Alpha:
    """Error probabilities. `to_fail` is for the three rates together."""

    to_pass: float
    to_fail: float


def decide_verdict(
    endpoints: Sequence[EndpointCounts],
    completeness: Completeness,
    budget: Budget,
    *,
    service: ServiceCounts | None = None,
    release: str | None = None,
) -> Verdict:
    """Decide about the service as a whole and about each endpoint.

    Without `service`, several endpoints can fail only separately. `release`: the release of new that the counts are for.
    """
    alpha = 1 - budget.confidence
    divisor = 1 if len(endpoints) < 2 else 2  # a single endpoint is the service
    endpoint_alpha = _Alpha(alpha, alpha / divisor / max(len(endpoints), 1))
    endpoint_verdicts = []
    for counts in endpoints:
        reasons = _order_reasons([*_rate_reasons(counts, budget, endpoint_alpha), *_coverage_reasons(counts)])
        endpoint_verdicts.append(EndpointVerdict(counts.endpoint, reasons[0].state, reasons))
    service_reasons = [
        *_rate_reasons(_sum_counts(endpoints, service), budget, _Alpha(alpha, alpha / divisor)),
        replace(
            _completeness_reason(completeness, budget),
            measure=Measure(completeness.accounted, completeness.sampled, budget.min_completeness),
        ),
    ]
    if service and service.departures.new_departures:
        pairs = sum(counts.new_requests for counts in endpoints)
        service_reasons.append(_departure_reason(service.departures, pairs, budget))
    if service and service.noisy_places:
        compared = sum(counts.compared for counts in endpoints)
        service_reasons.append(_blind_reason(service.noisy_places, compared, budget))
    endpoint_reasons = [
        reason
        for endpoint in endpoint_verdicts
        for reason in endpoint.reasons
        if reason.state == "FAIL" or reason.subject == "coverage"
    ]
    endpoint_verdicts.sort(
        key=lambda endpoint: (_STATE_ORDER[endpoint.state], -endpoint.reasons[0].evidence, endpoint.endpoint)
    )
    estimates = [reason.pairs_needed.to_pass for reason in service_reasons]
    finite_estimates = [estimate for estimate in estimates if estimate is not None]
    is_blocked = len(finite_estimates) < len(estimates) or any(reason.state != "PASS" for reason in endpoint_reasons)
    reasons = _order_reasons([*service_reasons, *endpoint_reasons])
    return Verdict(
        state=reasons[0].state,
        reasons=reasons,
        endpoints=tuple(endpoint_verdicts),
        pairs_to_pass=None if is_blocked else max(finite_estimates),
        release=release,
    )


def _rate_reasons(counts: EndpointCounts, budget: Budget, alpha: _Alpha) -> list[Reason]:
    mismatch_notes = (
        (counts.undecided, "more are undecided: noise or not"),
        (counts.by_rules, "explained by rules"),
        (counts.partial, "compared in part"),
    )
    mismatches = _Rate(
        "mismatches",
        counts.mismatches,
        counts.compared,
        budget.max_mismatch,
        "have unexplained mismatches",
        note="".join(f"; {count:,} {text}" for count, text in mismatch_notes if count),
        undecided=counts.undecided,
        partial=counts.partial,
    )
    errors = _Rate(
        "errors",
        counts.new_errors,
        counts.compared,
        budget.max_error,
        "have errors of new where old answered",
        note=f"; {counts.old_errors:,} the other way" if counts.old_errors else "",
        required_evidence=_incident_evidence(counts) - log(2),
        required_note=f"; new failed alone in {counts.new_error_periods:,} periods of ten seconds, old in"
        f" {counts.old_error_periods:,}: more such periods of new to fail",
    )
    excess = f"more than {_format_percent(budget.max_slower)} " if budget.max_slower else ""
    times = counts.times
    slower = _Rate(
        "slower",
        times.slower,
        times.timed,
        HALF,
        f"are {excess}slower in new",
        required_evidence=block_evidence(times.blocks) - log(2),
        required_note="; more blocks of pairs to fail",
    )
    if times.queues:
        slower = replace(slower, pass_blocker=describe_queues(times))
    elif counts.compared and not times.timed:
        note = "no times yet: the versions are cold, or there are too few baseline copies"
        slower = replace(slower, description="", note=note)
    evidence, tail = max(
        ((block_evidence(tail) - log(2 * len(TAILS)), index) for index, tail in enumerate(times.tails)),
        default=(-inf, 0),
    )
    if evidence > -inf:
        blocks = times.tails[tail]
        text = f"; new is above old's {TAILS[tail][0]} where old is not, in {blocks.up} of {sum(blocks)} blocks of such pairs"
        slower = replace(slower, other_evidence=evidence, other_text=text)
    return [_test_rate(rate, counts.endpoint, alpha) for rate in (mismatches, errors, slower)]


def _incident_evidence(counts: EndpointCounts) -> float:
    """Return the log evidence that errors of new alone are not a few incidents, whose pairs depend on each other.

    Either new fails alone in more periods than old does, or in a large share of all pairs. Let outages affect a share
    of MAX_OUTAGE_SHARE in the long run. The pairs until now ever reach a greater share with a probability of at most the
    quotient of both, whatever the dependence between pairs. This is the maximal ergodic theorem (Hopf 1954,
    "The general temporally discrete Markoff process", Journal of Rational Mechanics and Analysis 3).
    """
    evidence = sign_evidence(counts.new_error_periods, counts.old_error_periods)
    excess = counts.new_errors - counts.old_errors
    if excess < MIN_OUTAGE_ERRORS:
        return evidence
    return max(evidence, log(excess / counts.compared / MAX_OUTAGE_SHARE))


def _departure_reason(departures: DepartureCounts, pairs: int, budget: Budget) -> Reason:
    """Bound the requests that users left because of new. They are lost evidence, like gaps, and each is as bad as an error.

    In equally large groups of users, a departure is new's with a probability of one half if the code is the same. If
    users of new leave `ratio` times as often, the probability is ratio / (1 + ratio), and new causes 1 - 1 / ratio of its
    departures.
    """
    alpha = 1 - budget.confidence
    count, limit = departures.new_departures, 1 - budget.min_completeness
    least = _bound_caused_share(departures, alpha * ALPHA_SHARES["left"]).low
    bounds = _bound_caused_share(departures, alpha)
    shares = Interval(*(min(bound * count / max(pairs, 1), 1.0) for bound in (bounds.low, bounds.high)))
    text = (
        f"in {count:,} of {pairs:,} pairs, users left before new answered, {bounds.low * count:,.0f} to"
        f" {bounds.high * count:,.0f} of them because of new ({_format_percent(shares.low)} to"
        f" {_format_percent(shares.high)} of pairs; limit {_format_percent(limit)})"
    )
    if periods := departures.new_departure_periods + departures.old_departure_periods:
        text += f"; of as many users of each version, those of new left in {departures.new_departure_periods:,} of {periods:,} periods"
    if departures.alone:
        text += f"; old answered too few users to compare with in {_format_percent(departures.alone)} of these pairs"
    measure = Measure(count, pairs, limit, shares)
    if least * count > budget.max_error * pairs * departures.new_share:
        text += f"; more than {_format_percent(budget.max_error)} of the live responses of new"
        return Reason("left", "", "FAIL", text, PairsNeeded(None, 0), least * count, measure)
    state: VerdictState = "PASS" if shares.high <= limit else "INCONCLUSIVE"
    return Reason("left", "", state, text, PairsNeeded(0 if state == "PASS" else None, None), measure=measure)


def _blind_reason(places: Sequence[NoisyPlace], pairs: int, budget: Budget) -> Reason:
    """Name the place whose noise may hide a regression in the most pairs."""
    bounds = [place.bound_hidden_pairs(1 - budget.confidence) for place in places]
    hidden, gravest = max(zip(bounds, places, strict=True), key=lambda item: item[0])
    share = min(hidden / pairs, 1.0) if pairs else 1.0
    is_within = share <= budget.max_blind
    text = f"noise at {gravest.location} of {gravest.endpoint} may hide a regression in up to {_format_percent(share)} of pairs"
    if budget.max_blind < 1:
        text += f" (limit {_format_percent(budget.max_blind)})"
    if len(places) > 1:
        text += f", the most of {len(places):,} noisy places"
    if not is_within:
        text += "; more second copies lower the bound, unless the place differs in every response: then make a rule"
    measure = Measure(int(hidden), pairs, budget.max_blind, Interval(0.0, share))
    if is_within:
        return Reason("blind", "", "PASS", text, PairsNeeded(0, None), -inf, measure)  # the last one that passes
    return Reason("blind", "", "INCONCLUSIVE", text, PairsNeeded(None, None), 0.0, measure)


def _bound_caused_share(departures: DepartureCounts, alpha: float) -> Interval:
    """Return the interval of the share of new's departures that new causes."""
    periods = departures.new_departure_periods + departures.old_departure_periods
    rate = confidence_interval(departures.new_departure_periods, periods, alpha, SIGN_PRIOR)
    low, high = (max(0.0, 2 - 1 / bound) if bound else 0.0 for bound in (rate.low, rate.high))
    compared = 1 - departures.alone
    return Interval(low * compared, high * compared + departures.alone)


@dataclass(frozen=True, slots=True)
class _Rate:
    """A share of pairs that has a limit."""

    subject: VerdictSubject
    hits: int
    n: int
    limit: float
    description: str  # the counted property; empty to show only the note
    note: str = ""
    undecided: int = 0  # counts against PASS only, like `partial`
    partial: int = 0
    required_evidence: float = inf  # for FAIL, besides that of the rate
    required_note: str = ""  # if only that is missing
    other_evidence: float = -inf  # for FAIL, in place of that of the rate
    other_text: str = ""
    pass_blocker: str = ""  # why the rate can't prove PASS

    def describe(self, alpha: _Alpha) -> str:
        if not self.description:
            return self.note
        if not self.n:
            return f"no pair shows yet how many {self.description}{self.note}"
        bounds = confidence_interval(self.hits, self.n, alpha.to_pass)
        return (
            f"{self.hits:,} of {self.n:,} pairs {self.description}: {_format_percent(self.hits / self.n)}"
            f" ({_format_percent(bounds.low)} to {_format_percent(bounds.high)}; limit {_format_percent(self.limit)})"
            f"{self.note}"
        )


def _measure_rate(rate: _Rate, alpha: _Alpha) -> Measure:
    bounds = confidence_interval(rate.hits, rate.n, alpha.to_pass) if rate.n else None
    return Measure(rate.hits, rate.n, rate.limit, bounds)


def _test_rate(rate: _Rate, endpoint: str, alpha: _Alpha) -> Reason:
    hits, n, limit = rate.hits, rate.n, rate.limit
    text, measure = rate.describe(alpha), _measure_rate(rate, alpha)
    rate_evidence = evidence_above(hits, n, limit)
    above = min(rate_evidence, rate.required_evidence) if hits else rate_evidence
    complete = max(n - rate.partial, hits + rate.undecided)
    below = evidence_below(hits + rate.undecided, complete, limit)
    to_pass, to_fail = -log(alpha.to_pass), -log(alpha.to_fail * ALPHA_SHARES[rate.subject])
    if above < to_fail <= rate.other_evidence:
        text, above = text + rate.other_text, rate.other_evidence
    if above >= to_fail:
        return Reason(rate.subject, endpoint, "FAIL", text, PairsNeeded(None, 0), above, measure)
    if rate.pass_blocker:
        text = f"{rate.pass_blocker}; {text}"
        return Reason(rate.subject, endpoint, "INCONCLUSIVE", text, PairsNeeded(None, None), max(above, 0.0), measure)
    if below >= to_pass:
        return Reason(rate.subject, endpoint, "PASS", text, PairsNeeded(0, None), below, measure)
    pairs_needed = PairsNeeded(
        estimate_requests_below((hits + rate.undecided) / complete if complete else 0.0, complete, limit, to_pass),
        # 0: only `required_evidence` prevents FAIL.
        estimate_requests_above(hits / n if n else 0.0, n, limit, to_fail) or None,
    )
    if rate_evidence >= to_fail:
        text += rate.required_note
    elif pairs_needed.to_pass is not None:
        text += f"; about {pairs_needed.to_pass:,} more pairs to pass at this rate"
    elif pairs_needed.to_fail is not None:
        text += f"; about {pairs_needed.to_fail:,} more pairs to fail at this rate"
    else:
        text += "; more pairs at this rate would not settle it"
        if rate.undecided:
            text = f"{rate.describe(alpha)}; abreast finding ID says what settles each"
    return Reason(rate.subject, endpoint, "INCONCLUSIVE", text, pairs_needed, max(above, 0.0), measure)


def _coverage_reasons(counts: EndpointCounts) -> list[Reason]:
    """Report an endpoint that new never answered, or without any complete comparison: it may be broken."""
    old_requests = counts.old_requests - counts.excluded
    if old_requests <= 0 or (counts.new_requests and counts.compared > counts.partial):
        return []
    text = f"old answered {old_requests:,} requests, new none"
    if counts.new_requests:
        text = f"none of {old_requests:,} requests could be compared"
        text += f" in full, {counts.partial:,} in part" if counts.partial else ""
        text += "; for the causes: abreast pairs"
    weight, measure = float(old_requests), Measure(counts.compared, old_requests)
    if counts.waived:
        text = f"{text}; {counts.waived}"
        return [Reason("coverage", counts.endpoint, "PASS", text, PairsNeeded(0, None), weight, measure)]
    return [Reason("coverage", counts.endpoint, "INCONCLUSIVE", text, PairsNeeded(None, None), weight, measure)]


def count_surplus(sampled: int, row_count: int, tolerance: int) -> int:
    """Return the requests in the ledger beyond Envoy's count, 0 if they are within the tolerance."""
    surplus = row_count - sampled
    return surplus if surplus > tolerance else 0


def describe_surplus(surplus: int, sampled: int) -> str:
    return (
        f"the ledger has {surplus:,} requests more than the {sampled:,} that Envoy sampled: captures came past Envoy,"
        " or ABREAST_ENVOY_ADMIN lacks an Envoy"
    )


def _completeness_reason(completeness: Completeness, budget: Budget) -> Reason:
    """Compare the ledger with Envoy's count, without a test: both are exact.

    Neither missing requests nor a surplus may exceed the share that the budget allows.
    """
    if completeness.sampled is None:
        text = f"no Envoy's count to compare the {completeness.accounted:,} requests in the ledger with"
        return Reason("completeness", "", "INCONCLUSIVE", text, PairsNeeded(None, None))
    if completeness.surplus > (1 - budget.min_completeness) * completeness.sampled:
        text = describe_surplus(completeness.surplus, completeness.sampled)
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
        if completeness.late:
            text += f", {completeness.late:,} of them because the answer of a copy came late: copies queue"
    if completeness.shed:
        text += f"; Envoy sent no copy of {completeness.shed:,} more, to protect a version or by a sampling rule"
    state: VerdictState = "PASS" if is_complete else "INCONCLUSIVE"
    return Reason("completeness", "", state, text, PairsNeeded(0 if is_complete else None, None))


def _sum_counts(endpoints: Sequence[EndpointCounts], service: ServiceCounts | None) -> EndpointCounts:
    sums = {
        field.name: sum(getattr(counts, field.name) for counts in endpoints)
        for field in fields(EndpointCounts)
        if field.name not in {"endpoint", "waived", "times", "new_error_periods", "old_error_periods"}
    }
    if service is None:
        service = _combine_endpoints(endpoints)
    return EndpointCounts(
        endpoint="",
        times=service.times,
        new_error_periods=service.new_error_periods,
        old_error_periods=service.old_error_periods,
        **sums,
    )


def _combine_endpoints(endpoints: Sequence[EndpointCounts]) -> ServiceCounts:
    """Return what the endpoints show of their service. Several endpoints can't show which periods they have in common."""
    if len(endpoints) == 1:
        (counts,) = endpoints
        return ServiceCounts(counts.times, counts.new_error_periods, counts.old_error_periods)
    times = TimeCounts(
        timed=sum(counts.times.timed for counts in endpoints),
        slower=sum(counts.times.slower for counts in endpoints),
        unmatched=sum(counts.times.unmatched for counts in endpoints),
    )
    return ServiceCounts(times)


def _order_reasons(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """Sort by state (the worst first), incomplete data before rates, then by evidence."""

    def rank(reason: Reason) -> tuple[int, bool, float, str]:
        return _STATE_ORDER[reason.state], reason.subject not in _GATE_SUBJECTS, -reason.evidence, reason.endpoint

    return tuple(sorted(reasons, key=rank))


def _format_percent(share: float) -> str:
    """Format with three digits, and never as 100% for less than all."""
    text = f"{share * 100:.3g}%"
    return text if share >= 1 or text != "100%" else f"{share * 100:.6g}%"
