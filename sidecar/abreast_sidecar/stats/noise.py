"""Is a finding real, or does old differ from itself as much?

Of one place (endpoint and path) there are two counts: new differs from old in k of n comparisons, old from its own
baseline copy in b of m. The question is whether both have one rate. The e-value is a mixture's likelihood of both
counts over the greatest likelihood that one common rate can give them (Wasserman, Ramdas and Balakrishnan 2020,
"Universal inference", PNAS 117). Under the null it is at most a martingale of mean one, whatever the rate is, so it may
be looked at after every pair: it ever reaches 1/alpha with a probability of at most alpha (Ville).

With no difference among the baseline copies, counts can't tell a path that never differs by itself from one that does
so more rarely than there are copies. `FLOOR` decides: noise comes in at least so large a part of the requests, or not
at all. What is rarer is reported as real as soon as its rate is shown to be below the floor, until a baseline copy
shows it too. So a defect in one request of 2,000 needs no thousands of copies, and noise in 1% of the requests waits
for enough of them.

Chance sets two answers apart in both directions, a defect mostly in one: a price that is always the lower. Noise that is
rarer than `LEANING_FLOOR` and leans all the same is taken not to exist, so a defect in one request of 2,000 is found
where these are a tenth of a percent or more of their endpoint's. The null is then the union of two: noise above that
floor, for which the counts are the e-value, and rarer noise without a lean, for which it is the counts' times the lean's
(given how many differ, each lies either way with a half); the smaller of both is an e-value against the union.

Of many places those are real whose e-values pass e-BH (Wang and Ramdas 2022, "False discovery rate control with
e-values", JRSS B 84), which holds for any dependence between places. Where nothing is real, as in old against old, the
rate of false discovery is the probability of any. Places are counted as they are seen; the evidence of an unseen one is
below one, so that those to come weigh nothing yet.

Without any baseline copy (unsafe methods, a share of zero) one thing is left: if only chance sets both sides apart, the
one is as often the greater as the other. A place where new always lacks a value, or is always the smaller, is real
after about a dozen differences. One without such a lean stays undecided: it is listed, it keeps a verdict from PASS,
and the reason says what would settle it. State that drifts between the live request and its copy leans as well, which
is why it weighs in full only where there are no copies.

A number that always differs may still be ten times what it was. Where both versions draw alike, of the pairs in which the one
number is more than twice the other new's is the greater in one half, whatever they draw from, heavy tails and counters among
it (a sign test of these pairs; Dixon and Mood 1946, "The statistical sign test", JASA 41). They are held against that half,
and against the copies of old that are as far away: the smaller of both e-values is one against "new draws as old does, or as
its copies do", which come later, as new's copy of a request does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, log, log1p
from typing import Literal

from abreast_sidecar.stats.sequential import JEFFREYS_PRIOR, Prior, evidence_above, find_least, log_ratio

MIN_NOISE_RATE = 0.002  # of the requests: rarer noise is taken for a finding
MIN_DIRECTIONAL_NOISE_RATE = 0.01  # the same for noise in which new is always the greater, or always the smaller
HALF = 0.5
NOISE_DOUBT_E_VALUE = 5.0  # an e-value above which a path that old shows too is not called noise any more

NoiseState = Literal["real", "noise", "undecided"]

_RATE_PRIOR = Prior(((0.5, 500.0), (0.5, 50.0), (0.5, 0.5)))  # a difference in a thousand, in a hundred, anywhere
_DIRECTION_PRIOR = Prior(((0.05, 0.05),))  # nearly all to one side, either
_DIRECTION_WEIGHT = 0.75  # of the weight is on the lean, the rest on there being none


@dataclass(frozen=True, slots=True)
class DifferenceCounts:
    """Of one place, over one window; where it was seen at all, in either stream."""

    compared: int  # pairs of old and new
    differing: int
    baseline_compared: int  # pairs of old and its copy
    baseline_differing: int
    explained: int = 0  # of `differs`, those whose values' shapes explain them
    new_greater: int = 0  # of `differs`: the lean. Absent and null are the least, then numbers, then text
    new_smaller: int = 0
    # Noise of this kind may come in fewer than FLOOR of the requests: values with long tails.
    is_rare: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class MagnitudeShift:
    """Of one place with numbers: pairs of which the second is more than twice the first, and less than half of it."""

    compared: int
    far_greater: int
    far_smaller: int
    baseline_compared: int
    baseline_far_greater: int
    baseline_far_smaller: int


@dataclass(frozen=True, slots=True)
class NoiseDecision:
    state: NoiseState
    reason: str
    p_value: float  # valid at any look: the inverse of the e-value, not yet corrected for the number of places
    baseline_pairs_needed: (
        int | None
    )  # further baseline copies until it is expected to be decided; None: decided, or no number


def classify_differences(
    all_counts: Sequence[DifferenceCounts | MagnitudeShift], alpha: float, floor: float = MIN_NOISE_RATE
) -> list[NoiseDecision]:
    """Decide about all places of one endpoint together, or of a service; any false finding at most at `alpha`."""
    log_evidences = [
        magnitude_evidence(counts) if isinstance(counts, MagnitudeShift) else difference_evidence(counts, floor)
        for counts in all_counts
    ]
    threshold = _find_threshold(log_evidences, alpha)
    return [
        _make_magnitude_decision(counts, log_evidence, threshold)
        if isinstance(counts, MagnitudeShift)
        else _make_decision(counts, log_evidence, threshold, floor)
        for counts, log_evidence in zip(all_counts, log_evidences, strict=True)
    ]


def magnitude_evidence(shift: MagnitudeShift) -> float:
    """The logarithm of the e-value against "new is no more often far above than far below, or its copies are as often"."""
    new, copies = ((shift.far_greater, shift.far_smaller), (shift.baseline_far_greater, shift.baseline_far_smaller))
    directions = (_directional_evidence(shift, new, copies), _directional_evidence(shift, new[::-1], copies[::-1]))
    return _mean_evidence(*directions)


def _directional_evidence(shift: MagnitudeShift, new: tuple[int, int], copies: tuple[int, int]) -> float:
    """Both counts begin with those of this side."""
    imbalance = evidence_above(new[0], sum(new), HALF)
    if not shift.baseline_compared:
        return imbalance
    pair_counts = DifferenceCounts(shift.compared, new[0], shift.baseline_compared, copies[0])
    direction_counts = DifferenceCounts(sum(new), new[0], sum(copies), copies[0])
    return min(imbalance, _mean_evidence(_frequency_evidence(pair_counts), _frequency_evidence(direction_counts)))


def _frequency_evidence(counts: DifferenceCounts) -> float:
    if counts.differing * counts.baseline_compared <= counts.baseline_differing * counts.compared:
        return -inf
    return _separate_rates_likelihood(counts) - _common_rate_likelihood(counts, 0.0)


def difference_evidence(counts: DifferenceCounts, floor: float = MIN_NOISE_RATE) -> float:
    """The logarithm of the e-value against "old differs from itself as often"; -inf where new does so more rarely."""
    if not counts.differing:
        return -inf
    if counts.is_rare:
        floor = 0.0
    if not counts.baseline_compared:
        return (
            -inf
            if counts.explained
            else _mean_evidence(
                _direction_evidence(counts), _separate_rates_likelihood(counts) - _common_rate_likelihood(counts, floor)
            )
        )
    if counts.differing * counts.baseline_compared <= counts.baseline_differing * counts.compared:
        return -inf
    count_evidence = _separate_rates_likelihood(counts) - _common_rate_likelihood(counts, floor)
    if counts.baseline_differing or counts.explained:
        return count_evidence
    return min(
        _separate_rates_likelihood(counts) - _common_rate_likelihood(counts, max(floor, MIN_DIRECTIONAL_NOISE_RATE)),
        count_evidence + _weighted_direction_evidence(counts),
    )


def _separate_rates_likelihood(counts: DifferenceCounts) -> float:
    """Each stream with a rate of its own; half of the weight is on an old that never differs from itself."""
    equal_pairs = counts.compared - counts.differing
    copies, baseline_differing = counts.baseline_compared, counts.baseline_differing
    new = _RATE_PRIOR.log_marginal(counts.differing, equal_pairs)
    old = _RATE_PRIOR.log_marginal(baseline_differing, copies - baseline_differing)
    return new + (log((1 + exp(old)) / 2) if not baseline_differing else old - log(2))


def _common_rate_likelihood(counts: DifferenceCounts, floor: float) -> float:
    """The greatest likelihood of one rate for both."""
    differing = counts.differing + counts.baseline_differing
    equal_pairs = counts.compared + counts.baseline_compared - differing
    rate = differing / (differing + equal_pairs)
    if not counts.baseline_differing:
        rate = max(rate, floor)
    return differing * log(rate) + (equal_pairs * log1p(-rate) if equal_pairs else 0.0)


def _mean_evidence(first: float, second: float) -> float:
    """Of two e-values, as logarithms: an e-value whatever their dependence."""
    return _log_sum(first, second) - log(2)


def _direction_evidence(counts: DifferenceCounts) -> float:
    directed = counts.new_greater + counts.new_smaller
    return log_ratio(counts.new_greater, directed, 0.5, JEFFREYS_PRIOR) if directed else -inf


def _weighted_direction_evidence(counts: DifferenceCounts) -> float:
    """As `_lean`, and little lost where there is none: a defect may be as often the one as the other."""
    directed = counts.new_greater + counts.new_smaller
    if not directed:
        return 0.0
    log_likelihood_ratio = log_ratio(counts.new_greater, directed, 0.5, _DIRECTION_PRIOR)
    return _log_sum(log_likelihood_ratio + log(_DIRECTION_WEIGHT), log(1 - _DIRECTION_WEIGHT))


def _log_sum(first: float, second: float) -> float:
    """The logarithm of the sum."""
    largest = max(first, second)
    if largest == -inf:
        return largest
    return largest + log1p(exp(min(first, second) - largest))


def _find_threshold(log_evidences: Sequence[float], alpha: float) -> float:
    """e-BH: the evidence that the most places share of which each has places/alpha, divided by how many they are."""
    ordered = sorted(log_evidences, reverse=True)
    for count in range(len(ordered), 0, -1):
        threshold = log(len(ordered) / (alpha * count))
        if ordered[count - 1] >= threshold:
            return threshold
    return log(len(ordered) / alpha) if ordered else inf


def _make_decision(counts: DifferenceCounts, log_evidence: float, threshold: float, floor: float) -> NoiseDecision:
    p_value = exp(-log_evidence) if log_evidence > 0 else 1.0
    if log_evidence >= threshold:
        return NoiseDecision("real", f"{_describe_counts(counts)}: more than chance", p_value, None)
    if counts.baseline_differing and log_evidence < log(NOISE_DOUBT_E_VALUE):
        return NoiseDecision("noise", _describe_counts(counts), p_value, None)
    if counts.differing and counts.explained == counts.differing:
        return NoiseDecision("noise", f"{_describe_counts(counts)}; the shape of all values explains it", p_value, None)
    if not counts.differing:
        return NoiseDecision("noise", _describe_counts(counts), p_value, None)
    return _make_undecided(counts, threshold, p_value, floor)


def _make_magnitude_decision(shift: MagnitudeShift, log_evidence: float, threshold: float) -> NoiseDecision:
    summary = (
        f"new is more than twice old in {shift.far_greater} of {shift.compared}, less than half in {shift.far_smaller}"
    )
    p_value = exp(-log_evidence) if log_evidence > 0 else 1.0
    if log_evidence >= threshold:
        return NoiseDecision("real", f"{summary}: more than chance", p_value, None)
    return NoiseDecision("noise", summary, p_value, None)


def _make_undecided(counts: DifferenceCounts, threshold: float, p_value: float, floor: float) -> NoiseDecision:
    if not counts.baseline_compared:
        advice = "send a share of the requests to old twice, or make a rule"
        return NoiseDecision("undecided", f"{_describe_counts(counts)}; to settle it, {advice}", p_value, None)
    pairs_needed = estimate_baseline_pairs_needed(counts, threshold, floor)
    hint = (
        ""
        if pairs_needed is None
        else f"; about {pairs_needed} more baseline copies without a difference would settle it"
    )
    return NoiseDecision("undecided", f"{_describe_counts(counts)}: too few to tell{hint}", p_value, pairs_needed)


def estimate_baseline_pairs_needed(
    counts: DifferenceCounts, threshold: float, floor: float = MIN_NOISE_RATE
) -> int | None:
    """Further baseline copies, none of which differs, that lift the evidence to `bar` if all else stays."""
    return find_least(
        lambda extra: difference_evidence(_add_baseline_pairs(counts, extra), floor) >= threshold,
        maximum=10 * counts.compared + 1000,
    )


def _add_baseline_pairs(counts: DifferenceCounts, extra: int) -> DifferenceCounts:
    return replace(counts, baseline_compared=counts.baseline_compared + extra)


def _describe_counts(counts: DifferenceCounts) -> str:
    new = f"new differs in {counts.differing} of {counts.compared}"
    if not counts.baseline_compared:
        return f"{new}, and old was never compared with itself"
    return f"{new}, old from itself in {counts.baseline_differing} of {counts.baseline_compared}"
