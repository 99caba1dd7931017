"""Is a finding real, or does the version that answered differ from itself as often? Pure.

Some requests have three responses: the live one, a copy from the other version, and a copy from the version that
answered. If the code is the same, both copies are exchangeable: a swap of their labels changes no probability, whatever
the live response does and whatever changes over time. A triple is discordant if exactly one copy shows the finding
against the live response. Given that, each copy is the one with a probability of one half (McNemar 1947, "Note on the
sampling error of the difference between correlated proportions or percentages", Psychometrika 12). The e-value is a
mixture's likelihood of both counts divided by the likelihood under one half. It can be evaluated after every triple: it
ever reaches 1/alpha with a probability of at most alpha (Ville).

Triples of one client at one time are not independent: a session or an outage shows one cause many times. So a client
counts once per finding and period, or per pool of small endpoints, and all clients of server errors count as one
(`store.samples.list_bets`). The counts here are of such bets.

Among many places those are real whose e-values pass e-BH (Wang and Ramdas 2022, "False discovery rate control with
e-values", JRSS B 84), which holds for any dependence between places. If no place is real, as with old against old, the
false discovery rate is the probability of any discovery. Places are counted as they appear. While new ones appear, the
shares of earlier evaluations were slightly too large.

Without second copies (unsafe methods, a share of zero), version and role are one variable as long as one version answers
all users. Copies are always later, so an id or a time is always greater. The direction of the differences then proves
nothing. If both versions answer users, consider whether the copy has the greater value. The same code gives this one
rate in both roles. A value that is always smaller in new is never greater in new's copies, and always greater in old's.
The e-value is the likelihood of two separate rates divided by the greatest likelihood of a common rate (Wasserman, Ramdas
and Balakrishnan 2020, "Universal inference", PNAS 117).

A value that always differs can still lean: a score is 1% higher, a flag is always false, a time is an hour later. Triples
in which one copy has the greater value are tested like others. Triples in which both copies are on one side of the live
response don't count: values such as a counter or a time-ordered id grow while a request waits, and one copy may wait longer.
A place that only grows, or only shrinks, does not lean at all, because each process may have a separate counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, inf, log
from typing import Literal

from abreast_sidecar.stats.sequential import (
    HALF,
    JEFFREYS_PRIOR,
    SIGN_PRIOR,
    confidence_interval,
    find_least,
    sign_evidence,
)

NOISE_DOUBT_E_VALUE = 5.0  # above it, a path that also differs in a second copy is undecided instead of noise
MAX_SAME_PER_OTHER = 20  # bets of the same version's copies for each of the other version's, if new leans to one side
MIN_CHANGES, MIN_REVERSE_SHARE = 5, 0.1  # bets on the direction of changes, and the part of them against the trend
LATER_ALPHA = 0.001  # probability that a finding of constant rate seems to have begun later
LEAST_RATE = 0.1  # assumed of pairs without a finding that nearly all later pairs show
MAX_BETS_NEEDED = 1000  # a greater estimate means never

NoiseState = Literal["real", "noise", "undecided"]


@dataclass(frozen=True, slots=True)
class DifferenceCounts:
    """Counts of one place over one window."""

    compared: int  # pairs of old and new
    differing: int
    baseline_compared: int  # pairs of a live response and a copy of the same version
    baseline_differing: int
    explained: int = 0  # part of `differing`: the shapes of the values explain them
    # Bets: discordant triples, of which a client counts one per period.
    other_only: int = 0  # only the copy of the other version differs from the live response
    same_only: int = 0  # only the copy of the same version does
    # Directions, of which a client counts one per period; order: absent and null, then numbers, then text.
    copy_greater_of_new: int = 0  # old answered the user, and new's copy has the greater value
    copy_smaller_of_new: int = 0
    copy_greater_of_old: int = 0  # new answered the user, and old's copy has the greater value
    copy_smaller_of_old: int = 0


@dataclass(frozen=True, slots=True)
class OrderCounts:
    """Bets of one place: one copy has the greater value, and the live response is not outside of both."""

    # The response of new, or the one in its place, has the greater value (above) or the smaller one (below).
    other_above: int  # the other version's copy differs from the live response
    same_above: int  # only the same version's copy does
    other_below: int
    same_below: int
    # The same version's copy, which is later, has a greater or smaller value than the live response.
    same_rises: int = 0
    same_falls: int = 0

    @property
    def new_greater(self) -> int:
        return self.other_above + self.same_below

    @property
    def new_smaller(self) -> int:
        return self.other_below + self.same_above

    @property
    def is_counter(self) -> bool:
        """Whether values change in one direction only. Each process may count for itself."""
        changes = self.same_rises + self.same_falls
        return changes >= MIN_CHANGES and min(self.same_rises, self.same_falls) < MIN_REVERSE_SHARE * changes

    @property
    def is_of_new(self) -> bool:
        """Whether the other version's copies differ too, in the direction in which new leans."""
        if self.new_greater > self.new_smaller:
            return self.other_above * MAX_SAME_PER_OTHER >= self.same_below
        return self.other_below * MAX_SAME_PER_OTHER >= self.same_above


@dataclass(frozen=True, slots=True)
class NoisyPlace:
    """A place that is noise, in an endpoint or in several similar ones."""

    endpoint: str
    location: str  # part and path
    compared: int
    differing: int
    baseline_compared: int
    baseline_differing: int
    other_only: int  # bets
    same_only: int

    def bound_hidden_pairs(self, alpha: float) -> float:
        """Bound the pairs in which new may be wrong here without a real finding.

        If the other version's copy differs alone `ratio` times as often as the same version's, new causes at most
        1 - 1 / ratio of its differences. Where noise differs anyway, a wrong value shows no further difference.
        """
        highest = confidence_interval(self.other_only, self.other_only + self.same_only, alpha, SIGN_PRIOR).high
        visible = 1 - self.baseline_differing / self.baseline_compared if self.baseline_compared else 0.0
        caused = self.differing * (2 - 1 / highest) if highest > HALF else 0.0
        return min(caused / visible, self.compared) if visible > 0 else float(self.compared)


@dataclass(frozen=True, slots=True)
class NoiseDecision:
    state: NoiseState
    reason: str
    p_value: float  # inverse of the e-value, valid at any time, not corrected for the number of places
    baseline_pairs_needed: int | None  # expected until it is decided; None: decided, or never


def classify_differences(
    all_counts: Sequence[DifferenceCounts | OrderCounts], alpha: float, places: int = 0
) -> list[NoiseDecision]:
    """Decide about these places. `alpha`: the probability of any false finding among all `places` of the service."""
    log_evidences = [
        order_evidence(counts) if isinstance(counts, OrderCounts) else difference_evidence(counts)
        for counts in all_counts
    ]
    threshold = _find_threshold(log_evidences, alpha, max(places, len(all_counts)))
    return [
        _make_decision(counts, log_evidence, threshold)
        for counts, log_evidence in zip(all_counts, log_evidences, strict=True)
    ]


def order_evidence(counts: OrderCounts) -> float:
    """Return the log e-value against "each copy has the greater value as often"; -inf for equal counts."""
    smaller, greater = sorted((counts.new_smaller, counts.new_greater))
    if counts.is_counter or not counts.is_of_new:
        return -inf
    return sign_evidence(greater, smaller) - log(2)  # a mean of the e-values of both directions


def difference_evidence(counts: DifferenceCounts) -> float:
    """Return the log e-value against "both copies differ as often"; -inf if the other version's differs more rarely."""
    if counts.baseline_compared or counts.other_only or counts.same_only:
        return sign_evidence(counts.other_only, counts.same_only)
    return -inf if counts.explained else role_evidence(counts)


def role_evidence(counts: DifferenceCounts) -> float:
    """Return the log e-value against "the copy is greater as often in both roles"; -inf while one role has no pairs."""
    strata = (
        (counts.copy_greater_of_new, counts.copy_smaller_of_new),
        (counts.copy_greater_of_old, counts.copy_smaller_of_old),
    )
    if not all(greater + smaller for greater, smaller in strata):
        return -inf
    separate_rates = sum(JEFFREYS_PRIOR.log_marginal(greater, smaller) for greater, smaller in strata)
    greater, smaller = map(sum, zip(*strata, strict=True))
    total = greater + smaller
    return separate_rates - sum(count * log(count / total) for count in (greater, smaller) if count)


def _find_threshold(log_evidences: Sequence[float], alpha: float, places: int) -> float:
    """Return the threshold of e-BH: log(places / (alpha k)) for the greatest k places that reach it."""
    ordered = sorted(log_evidences, reverse=True)
    for count in range(len(ordered), 0, -1):
        threshold = log(places / (alpha * count))
        if ordered[count - 1] >= threshold:
            return threshold
    return log(places / alpha) if ordered else inf


def _make_decision(counts: DifferenceCounts | OrderCounts, log_evidence: float, threshold: float) -> NoiseDecision:
    p_value = exp(-log_evidence) if log_evidence > 0 else 1.0
    summary = _describe_counts(counts)
    if log_evidence >= threshold:
        return NoiseDecision("real", f"{summary}: more than chance", p_value, None)
    if isinstance(counts, OrderCounts) or not counts.differing:
        return NoiseDecision("noise", summary, p_value, None)
    if (counts.baseline_differing or counts.same_only) and log_evidence < log(NOISE_DOUBT_E_VALUE):
        return NoiseDecision("noise", summary, p_value, None)
    if counts.explained == counts.differing:
        return NoiseDecision("noise", f"{summary}; the shape of all values explains it", p_value, None)
    if not counts.baseline_compared:
        advice = "send second copies of safe requests, turn on rechecks, let both versions answer users, or make a rule"
        return NoiseDecision("undecided", f"{summary}; to settle it, {advice}", p_value, None)
    pairs_needed = estimate_baseline_pairs_needed(counts, threshold)
    hint = (
        ""
        if pairs_needed is None
        else f"; about {pairs_needed} more second copies would settle it if it is a regression"
    )
    return NoiseDecision("undecided", f"{summary}: too few to tell{hint}", p_value, pairs_needed)


def estimate_baseline_pairs_needed(counts: DifferenceCounts, threshold: float) -> int | None:
    """Return the second copies until the evidence reaches `threshold`, if only the other version shows the finding."""
    bets = find_least(
        lambda extra: difference_evidence(replace(counts, other_only=counts.other_only + extra)) >= threshold,
        maximum=MAX_BETS_NEEDED,
    )
    return None if bets is None else ceil(bets * counts.compared / counts.differing)


def has_begun_later(earlier: int, later: int, showing: int) -> bool:
    """Check whether a finding began during a release, and not by chance after so many earlier pairs without it.

    `showing`: those of the `later` pairs, which begin with the first that shows it, that show the finding.
    """
    rate = (showing - 1) / later  # without the first pair, which is always one of them
    return earlier * log(max(1 - rate, LEAST_RATE)) < log(LATER_ALPHA)


def _describe_counts(counts: DifferenceCounts | OrderCounts) -> str:
    if isinstance(counts, OrderCounts):
        return f"new has the greater value in {counts.new_greater} of two copies, and the smaller one in {counts.new_smaller}"
    new = f"new differs in {counts.differing} of {counts.compared}"
    if counts.other_only or counts.same_only:
        return f"{new}; of two copies, only the other version's differs in {counts.other_only}, only the same version's in {counts.same_only}"
    if not counts.baseline_compared:
        return f"{new}, and no version was compared with itself"
    return f"{new}, a version from itself in {counts.baseline_differing} of {counts.baseline_compared}"
