"""Is a finding real, or does old differ from itself as often? Pure.

For one place (endpoint and path) there are two counts: new differs from old in k of n comparisons, and old differs from
its baseline copy in b of m. The question is whether both have the same rate. The e-value is a mixture's likelihood of both
counts divided by the greatest likelihood under one common rate (Wasserman, Ramdas and Balakrishnan 2020, "Universal
inference", PNAS 117). Under the null hypothesis it is at most a martingale of mean one, whatever the rate is. It can be
evaluated after every pair: it ever reaches 1/alpha with a probability of at most alpha (Ville).

If no baseline copy differs, counts can't distinguish a path without noise from one with noise rarer than the copies.
`MIN_NOISE_RATE` decides: noise affects at least that share of the requests, or none. Rarer noise is reported as real as
soon as its rate is shown to be below that minimum, until a baseline copy shows it. A defect in one request of 2,000 thus
does not need thousands of copies, and noise in 1% of the requests waits for enough copies.

Chance changes values in both directions, a defect mostly in one: a price that is always lower. Noise that is rarer than
`MIN_DIRECTIONAL_NOISE_RATE` and has one direction is assumed not to exist. A defect in one request of 2,000 is thus
found if baseline copies are a tenth of a percent or more of the endpoint's requests. The null hypothesis is then a union
of two. Against noise above that rate, the counts are the e-value. Against rarer noise without a direction, it is the
product with the direction's e-value: given how many values differ, each direction has a probability of one half. The
smaller of the two is an e-value against the union.

Among many places those are real whose e-values pass e-BH (Wang and Ramdas 2022, "False discovery rate control with
e-values", JRSS B 84), which holds for any dependence between places. If no place is real, as with old against old, the
false discovery rate is the probability of any discovery. Only places that were seen count. The evidence of an unseen
place is below one, so future places have no weight yet.

Without baseline copies (unsafe methods, a share of zero) only the direction remains: if chance alone separates both
sides, either is the greater equally often. A place where new always lacks a value, or always has the smaller one, is
real after about a dozen differences. A place without a direction stays undecided: it is listed, it prevents a PASS
verdict, and its reason says how to settle it. State that drifts between the live request and its copy has a direction
too, so the direction has its full weight only without copies.

A number that always differs can still be ten times its former value. Consider the pairs in which one number is more than
twice the other. If both versions draw from the same distribution, new has the greater number in half of them. This is
true for heavy tails and counters too (Dixon and Mood 1946, "The statistical sign test", JASA 41). These pairs are tested against that half, and against the copies of old that are as far apart. The smaller of both e-values is one
against "new draws as old does, or as old's copies do": copies come later, as does new's copy of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, log, log1p
from typing import Literal

from abreast_sidecar.stats.sequential import JEFFREYS_PRIOR, Prior, evidence_above, find_least, log_ratio

MIN_NOISE_RATE = 0.002  # per request; rarer noise counts as a finding
MIN_DIRECTIONAL_NOISE_RATE = 0.01  # the same for noise in which new is always greater, or always smaller
HALF = 0.5
NOISE_DOUBT_E_VALUE = 5.0  # above it, a path that also differs in old is undecided instead of noise

NoiseState = Literal["real", "noise", "undecided"]

_RATE_PRIOR = Prior(((0.5, 500.0), (0.5, 50.0), (0.5, 0.5)))  # a difference in a thousand, in a hundred, anywhere
_DIRECTION_PRIOR = Prior(((0.05, 0.05),))  # nearly all to one side
_DIRECTION_WEIGHT = 0.75  # weight of a direction; the rest is for none


@dataclass(frozen=True, slots=True)
class DifferenceCounts:
    """Counts of one place over one window."""

    compared: int  # pairs of old and new
    differing: int
    baseline_compared: int  # pairs of old and its copy
    baseline_differing: int
    explained: int = 0  # part of `differing`: the shapes of the values explain them
    new_greater: int = 0  # part of `differing`; order: absent and null, then numbers, then text
    new_smaller: int = 0
    # Values with long tails: this noise may be rarer than MIN_NOISE_RATE.
    is_rare: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class MagnitudeShift:
    """Counts of one place with numbers: the second is more than twice the first (greater), or less than half (smaller)."""

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
    p_value: float  # inverse of the e-value, valid at any time, not corrected for the number of places
    baseline_pairs_needed: int | None  # expected until it is decided; None: decided, or never


def classify_differences(
    all_counts: Sequence[DifferenceCounts | MagnitudeShift], alpha: float, floor: float = MIN_NOISE_RATE
) -> list[NoiseDecision]:
    """Decide about all places of an endpoint or service. `alpha`: the probability of any false finding."""
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
    """Return the log e-value against "new is as often far above as far below, or as often as old's copies are"."""
    new, copies = ((shift.far_greater, shift.far_smaller), (shift.baseline_far_greater, shift.baseline_far_smaller))
    directions = (_directional_evidence(shift, new, copies), _directional_evidence(shift, new[::-1], copies[::-1]))
    return _mean_evidence(*directions)


def _directional_evidence(shift: MagnitudeShift, new: tuple[int, int], copies: tuple[int, int]) -> float:
    """Return the evidence for one direction; `new` and `copies` count this direction first."""
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
    """Return the log e-value against "old differs from itself as often"; -inf if new differs more rarely."""
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
    """Return the log likelihood with separate rates. Half of the weight is for an old that never differs from itself."""
    equal_pairs = counts.compared - counts.differing
    copies, baseline_differing = counts.baseline_compared, counts.baseline_differing
    new = _RATE_PRIOR.log_marginal(counts.differing, equal_pairs)
    old = _RATE_PRIOR.log_marginal(baseline_differing, copies - baseline_differing)
    return new + (log((1 + exp(old)) / 2) if not baseline_differing else old - log(2))


def _common_rate_likelihood(counts: DifferenceCounts, floor: float) -> float:
    """Return the greatest log likelihood of a common rate."""
    differing = counts.differing + counts.baseline_differing
    equal_pairs = counts.compared + counts.baseline_compared - differing
    rate = differing / (differing + equal_pairs)
    if not counts.baseline_differing:
        rate = max(rate, floor)
    return differing * log(rate) + (equal_pairs * log1p(-rate) if equal_pairs else 0.0)


def _mean_evidence(first: float, second: float) -> float:
    """Average two log e-values: an e-value, whatever their dependence."""
    return _log_sum(first, second) - log(2)


def _direction_evidence(counts: DifferenceCounts) -> float:
    directed = counts.new_greater + counts.new_smaller
    return log_ratio(counts.new_greater, directed, 0.5, JEFFREYS_PRIOR) if directed else -inf


def _weighted_direction_evidence(counts: DifferenceCounts) -> float:
    """Return the direction's log e-value, with little loss without a direction: a defect can have both."""
    directed = counts.new_greater + counts.new_smaller
    if not directed:
        return 0.0
    log_likelihood_ratio = log_ratio(counts.new_greater, directed, 0.5, _DIRECTION_PRIOR)
    return _log_sum(log_likelihood_ratio + log(_DIRECTION_WEIGHT), log(1 - _DIRECTION_WEIGHT))


def _log_sum(first: float, second: float) -> float:
    """Return log(exp(first) + exp(second))."""
    largest = max(first, second)
    if largest == -inf:
        return largest
    return largest + log1p(exp(min(first, second) - largest))


def _find_threshold(log_evidences: Sequence[float], alpha: float) -> float:
    """Return the threshold of e-BH: log(places / (alpha k)) for the greatest k places that reach it."""
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
    """Return the number of equal baseline copies that lift the evidence to `threshold`, all else unchanged."""
    return find_least(
        lambda extra: (
            difference_evidence(replace(counts, baseline_compared=counts.baseline_compared + extra), floor) >= threshold
        ),
        maximum=10 * counts.compared + 1000,
    )


def _describe_counts(counts: DifferenceCounts) -> str:
    new = f"new differs in {counts.differing} of {counts.compared}"
    if not counts.baseline_compared:
        return f"{new}, and old was never compared with itself"
    return f"{new}, old from itself in {counts.baseline_differing} of {counts.baseline_compared}"
