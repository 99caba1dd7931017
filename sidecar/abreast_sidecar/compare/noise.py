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

from abreast_sidecar.compare.sequence import ANYWHERE, Prior, evidence_above, least, log_ratio

FLOOR = 0.002  # of the requests: rarer noise is taken for a finding
LEANING_FLOOR = 0.01  # the same for noise in which new is always the greater, or always the smaller
HALF = 0.5
DOUBT = 5.0  # an e-value above which a path that old shows too is not called noise any more

State = Literal["real", "noise", "undecided"]

_RATES = Prior(((0.5, 500.0), (0.5, 50.0), (0.5, 0.5)))  # a difference in a thousand, in a hundred, anywhere
_ONE_WAY = Prior(((0.05, 0.05),))  # nearly all to one side, either
_TRUST = 0.75  # of the weight is on the lean, the rest on there being none


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one place, over one window; where it was seen at all, in either stream."""

    compared: int  # pairs of old and new
    differs: int
    baseline_compared: int  # pairs of old and its copy
    baseline_differs: int
    explained: int = 0  # of `differs`, those whose values' shapes explain them
    new_greater: int = 0  # of `differs`: the lean. Absent and null are the least, then numbers, then text
    new_smaller: int = 0
    # Noise of this kind may come in fewer than FLOOR of the requests: values with long tails.
    rare: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Far:
    """Of one place with numbers: pairs of which the second is more than twice the first, and less than half of it."""

    compared: int
    more: int
    less: int
    baseline_compared: int
    baseline_more: int
    baseline_less: int


@dataclass(frozen=True, slots=True)
class Decision:
    state: State
    reason: str
    p_value: (
        float  # valid at any look: the inverse of the e-value, not yet corrected for the number of places
    )
    copies_needed: (
        int | None
    )  # further baseline copies until it is expected to be decided; None: decided, or no number


def decide(places: Sequence[Counts | Far], alpha: float, floor: float = FLOOR) -> list[Decision]:
    """Decide about all places of one endpoint together, or of a service; any false finding at most at `alpha`."""
    logs = [evidence_far(place) if isinstance(place, Far) else evidence(place, floor) for place in places]
    bar = _bar(logs, alpha)
    return [
        _decision_far(place, one, bar) if isinstance(place, Far) else _decision(place, one, bar, floor)
        for place, one in zip(places, logs, strict=True)
    ]


def evidence_far(place: Far) -> float:
    """The logarithm of the e-value against "new is no more often far above than far below, or its copies are as often"."""
    new, copies = (place.more, place.less), (place.baseline_more, place.baseline_less)
    sides = _one_way(place, new, copies), _one_way(place, new[::-1], copies[::-1])
    return _mean(*sides)


def _one_way(place: Far, new: tuple[int, int], copies: tuple[int, int]) -> float:
    """Both counts begin with those of this side."""
    lopsided = evidence_above(new[0], sum(new), HALF)
    if not place.baseline_compared:
        return lopsided
    often = Counts(place.compared, new[0], place.baseline_compared, copies[0])
    mostly = Counts(sum(new), new[0], sum(copies), copies[0])
    return min(lopsided, _mean(_more_often(often), _more_often(mostly)))


def _more_often(place: Counts) -> float:
    if place.differs * place.baseline_compared <= place.baseline_differs * place.compared:
        return -inf
    return _apart(place) - _together(place, 0.0)


def evidence(place: Counts, floor: float = FLOOR) -> float:
    """The logarithm of the e-value against "old differs from itself as often"; -inf where new does so more rarely."""
    if not place.differs:
        return -inf
    if place.rare:
        floor = 0.0
    if not place.baseline_compared:
        return -inf if place.explained else _mean(_lean(place), _apart(place) - _together(place, floor))
    if place.differs * place.baseline_compared <= place.baseline_differs * place.compared:
        return -inf
    counted = _apart(place) - _together(place, floor)
    if place.baseline_differs or place.explained:
        return counted
    return min(_apart(place) - _together(place, max(floor, LEANING_FLOOR)), counted + _leaning(place))


def _apart(place: Counts) -> float:
    """Each stream with a rate of its own; half of the weight is on an old that never differs from itself."""
    quiet = place.compared - place.differs
    copies, seen = place.baseline_compared, place.baseline_differs
    new = _RATES.log_marginal(place.differs, quiet)
    old = _RATES.log_marginal(seen, copies - seen)
    return new + (log((1 + exp(old)) / 2) if not seen else old - log(2))


def _together(place: Counts, floor: float) -> float:
    """The greatest likelihood of one rate for both."""
    differ = place.differs + place.baseline_differs
    quiet = place.compared + place.baseline_compared - differ
    rate = differ / (differ + quiet)
    if not place.baseline_differs:
        rate = max(rate, floor)
    return differ * log(rate) + (quiet * log1p(-rate) if quiet else 0.0)


def _mean(one: float, other: float) -> float:
    """Of two e-values, as logarithms: an e-value whatever their dependence."""
    return _weighed(one, other) - log(2)


def _lean(place: Counts) -> float:
    leaning = place.new_greater + place.new_smaller
    return log_ratio(place.new_greater, leaning, 0.5, ANYWHERE) if leaning else -inf


def _leaning(place: Counts) -> float:
    """As `_lean`, and little lost where there is none: a defect may be as often the one as the other."""
    leaning = place.new_greater + place.new_smaller
    if not leaning:
        return 0.0
    told = log_ratio(place.new_greater, leaning, 0.5, _ONE_WAY)
    return _weighed(told + log(_TRUST), log(1 - _TRUST))


def _weighed(one: float, other: float) -> float:
    """The logarithm of the sum."""
    top = max(one, other)
    if top == -inf:
        return top
    return top + log1p(exp(min(one, other) - top))


def _bar(logs: Sequence[float], alpha: float) -> float:
    """e-BH: the evidence that the most places share of which each has places/alpha, divided by how many they are."""
    ordered = sorted(logs, reverse=True)
    for many in range(len(ordered), 0, -1):
        bar = log(len(ordered) / (alpha * many))
        if ordered[many - 1] >= bar:
            return bar
    return log(len(ordered) / alpha) if ordered else inf


def _decision(place: Counts, one: float, bar: float, floor: float) -> Decision:
    p_value = exp(-one) if one > 0 else 1.0
    if one >= bar:
        return Decision("real", f"{_said(place)}: more than chance", p_value, None)
    if place.baseline_differs and one < log(DOUBT):
        return Decision("noise", _said(place), p_value, None)
    if place.differs and place.explained == place.differs:
        return Decision("noise", f"{_said(place)}; the shape of all values explains it", p_value, None)
    if not place.differs:
        return Decision("noise", _said(place), p_value, None)
    return _undecided(place, bar, p_value, floor)


def _decision_far(place: Far, one: float, bar: float) -> Decision:
    said = f"new is more than twice old in {place.more} of {place.compared}, less than half in {place.less}"
    p_value = exp(-one) if one > 0 else 1.0
    if one >= bar:
        return Decision("real", f"{said}: more than chance", p_value, None)
    return Decision("noise", said, p_value, None)


def _undecided(place: Counts, bar: float, p_value: float, floor: float) -> Decision:
    if not place.baseline_compared:
        advice = "send a share of the requests to old twice, or make a rule"
        return Decision("undecided", f"{_said(place)}; to settle it, {advice}", p_value, None)
    needed = copies_needed(place, bar, floor)
    more = (
        ""
        if needed is None
        else f"; about {needed} more baseline copies without a difference would settle it"
    )
    return Decision("undecided", f"{_said(place)}: too few to tell{more}", p_value, needed)


def copies_needed(place: Counts, bar: float, floor: float = FLOOR) -> int | None:
    """Further baseline copies, none of which differs, that lift the evidence to `bar` if all else stays."""
    return least(
        lambda more: evidence(_with_copies(place, more), floor) >= bar, most=10 * place.compared + 1000
    )


def _with_copies(place: Counts, more: int) -> Counts:
    return replace(place, baseline_compared=place.baseline_compared + more)


def _said(place: Counts) -> str:
    new = f"new differs in {place.differs} of {place.compared}"
    if not place.baseline_compared:
        return f"{new}, and old was never compared with itself"
    return f"{new}, old from itself in {place.baseline_differs} of {place.baseline_compared}"
