"""How sure a rate is, however often one looks.

A Bernoulli rate p is bounded by the mixture of Robbins (1970, "Statistical methods related to the law of the iterated
logarithm", Ann. Math. Statist. 41): the likelihood averaged over a Beta prior, divided by the likelihood at p, is a
martingale of mean one where p is the truth. By Ville's inequality it reaches 1/alpha at any time at all with a
probability of at most alpha, so that the rates at which it is below 1/alpha are a confidence sequence (Howard, Ramdas,
McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist. 49). For a
Bernoulli rate this is also what betting by the rule of Krichevsky and Trofimov earns (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", JRSS B 86), in closed form and from two counts.

The ratio is convex in p with its least value at successes/n. So where it is at least 1/alpha at a budget below
successes/n, it is at every rate up to the budget too: the test of "the rate is within the budget" is one-sided and
exact, without a correction. The same holds for the other side. Each side has a prior of its own, made for its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, lgamma, log, log1p

MAX_LOGIT = 60.0  # logits: a rate of 1e-26, or as near to one
BISECTION_STEPS = 60  # halvings of an edge: to 1e-16 logits
MAX_REQUESTS = 10**12  # requests: more is never
NEAR_BUDGET_REQUESTS = 200.0  # as sure of a rate beside the budget as by so many requests

BetaParts = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Prior:
    """A mixture of Beta distributions of equal weight, as (a, b)."""

    parts: BetaParts

    def log_marginal(self, successes: float, failures: float) -> float:
        """The logarithm of the probability of one order of these results."""
        logs = [_log_beta(a + successes, b + failures) - _log_beta(a, b) for a, b in self.parts]
        largest = max(logs)
        return (
            largest if len(logs) == 1 else largest + log(sum(exp(log_term - largest) for log_term in logs) / len(logs))
        )


JEFFREYS_PRIOR = Prior(((0.5, 0.5),))


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairsNeeded:
    """Further requests until something can be said, if the rate stays as it is; 0: now, None: never at this rate."""

    to_pass: int | None
    to_fail: int | None


def confidence_interval(successes: int, n: int, alpha: float, prior: Prior = JEFFREYS_PRIOR) -> Interval:
    """Where the rate is, at an error probability of `alpha` for all looks together."""
    if n == 0:
        return Interval(0.0, 1.0)
    failures = n - successes
    level = prior.log_marginal(successes, failures) + log(alpha)
    middle = _logit(successes, failures)
    low = _to_rate(_find_edge(successes, n, level, middle, -MAX_LOGIT)) if successes else 0.0
    high = _to_rate(_find_edge(successes, n, level, middle, MAX_LOGIT)) if failures else 1.0
    return Interval(low, high)


def evidence_above(successes: float, n: float, budget: float) -> float:
    """The logarithm of an e-value against "the rate is at most `budget`"; -inf where the counts don't even lean so."""
    if n == 0 or successes <= budget * n:
        return -inf
    return log_ratio(successes, n, budget, prior_above(budget))


def evidence_below(successes: float, n: float, budget: float) -> float:
    """The logarithm of an e-value against "the rate is at least `budget`"; -inf where the counts don't even lean so."""
    if n == 0 or successes >= budget * n:
        return -inf
    return log_ratio(successes, n, budget, prior_below(budget))


def log_ratio(successes: float, n: float, rate: float, prior: Prior) -> float:
    """The logarithm of the mixture's likelihood over that of `rate`: a martingale where `rate` is the truth."""
    failures = n - successes
    if (rate <= 0 and successes) or (rate >= 1 and failures):
        return inf
    likelihood = (successes * log(rate) if successes else 0.0) + (failures * log1p(-rate) if failures else 0.0)
    return prior.log_marginal(successes, failures) - likelihood


def prior_above(budget: float) -> Prior:
    """Half near five times the budget, where a miss is dear, and half anywhere, for what is plainly broken."""
    near = (0.5, max(0.1 / budget, 0.5)) if budget > 0 else (0.5, 0.5)
    return Prior((near, (0.5, 0.5), *_parts_near_budget(budget)))


def prior_below(budget: float) -> Prior:
    """Mostly below the budget and dense at zero: no mismatch at all is said 17% later than by one look alone."""
    return Prior(((0.5, max(2.0 / budget, 0.5)), *_parts_near_budget(budget))) if budget > 0 else JEFFREYS_PRIOR


def _parts_near_budget(budget: float) -> BetaParts:
    """Rates a few percent beside a budget that is no small one: of two equal versions the one is slower in nearly half."""
    return ((NEAR_BUDGET_REQUESTS * budget, NEAR_BUDGET_REQUESTS * (1 - budget)),) if 0.1 <= budget <= 0.9 else ()


def estimate_requests_above(rate: float, n: int, budget: float, threshold: float) -> int | None:
    """How many more requests it takes until the evidence is `bar`, if the rate stays; what is expected, not a promise."""
    return find_least(lambda extra: evidence_above(rate * (n + extra), n + extra, budget) >= threshold)


def estimate_requests_below(rate: float, n: int, budget: float, threshold: float) -> int | None:
    return find_least(lambda extra: evidence_below(rate * (n + extra), n + extra, budget) >= threshold)


def find_least(is_enough: Callable[[int], bool], maximum: int = MAX_REQUESTS) -> int | None:
    """The least number up to `most` that is enough, where all above it are."""
    if is_enough(0):
        return 0
    high = 1
    while not is_enough(high):
        high *= 2
        if high > maximum:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _find_edge(successes: int, n: int, level: float, inside: float, outside: float) -> float:
    """The logit between `inside` and `outside` at which the logarithm of the likelihood falls to `level`."""
    for _ in range(BISECTION_STEPS):
        middle = (inside + outside) / 2
        if successes * middle - n * _softplus(middle) > level:
            inside = middle
        else:
            outside = middle
    return outside


def _logit(successes: int, failures: int) -> float:
    if not successes:
        return -MAX_LOGIT
    return MAX_LOGIT if not failures else log(successes / failures)


def _softplus(logit: float) -> float:
    return logit + log1p(exp(-logit)) if logit > 0 else log1p(exp(logit))


def _to_rate(logit: float) -> float:
    return 1 / (1 + exp(-logit))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
