"""Tests and confidence sequences for a rate, valid however often they are evaluated. Pure.

A Bernoulli rate p is bounded by the mixture of Robbins (1970, "Statistical methods related to the law of the iterated
logarithm", Ann. Math. Statist. 41): the likelihood averaged over a Beta prior, divided by the likelihood at p, is a
martingale of mean one at the true p. By Ville's inequality it ever reaches 1/alpha with a probability of at most alpha.
The rates at which it is below 1/alpha are therefore a confidence sequence (Howard, Ramdas, McAuliffe and Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Ann. Statist. 49). For a Bernoulli rate this equals
betting by the rule of Krichevsky and Trofimov (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random
variables by betting", JRSS B 86). It has a closed form that needs only two counts.

The ratio is convex in p with its minimum at successes/n. If it is at least 1/alpha at a budget below successes/n, it is so
at every smaller rate too. The test of "the rate is within the budget" is therefore one-sided and exact, without a
correction. The same holds for the other side. Each side has a separate prior, made for its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, lgamma, log, log1p

MAX_LOGIT = 60.0  # a rate of 1e-26, or as close to one
BISECTION_STEPS = 60  # precision of an edge: 1e-16 logits
MAX_REQUESTS = 10**12  # a greater estimate means never
NEAR_BUDGET_REQUESTS = 200.0  # weight of the prior near the budget, in requests

MIN_BUDGET = 1e-12  # a prior for a lower budget would overflow
BetaParts = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Prior:
    """A mixture of Beta distributions (a, b) of equal weight."""

    parts: BetaParts

    def log_marginal(self, successes: float, failures: float) -> float:
        """Return the log probability of one sequence of these results."""
        logs = [_log_beta(a + successes, b + failures) - _log_beta_of_prior(a, b) for a, b in self.parts]
        largest = max(logs)
        return largest + log(sum(exp(log_term - largest) for log_term in logs) / len(logs))


JEFFREYS_PRIOR = Prior(((0.5, 0.5),))
SIGN_PRIOR = Prior(((5.0, 0.5), (2.0, 2.0), (0.5, 0.5)))  # nearly all of the first kind, about half, anywhere
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairsNeeded:
    """Further requests until PASS or FAIL, if the rate stays the same. 0: now, None: never at this rate."""

    to_pass: int | None
    to_fail: int | None


@lru_cache(maxsize=8192)  # a verdict needs the interval of a rate for its text and for its numbers
def confidence_interval(successes: int, n: int, alpha: float, prior: Prior = JEFFREYS_PRIOR) -> Interval:
    """Return the confidence interval of the rate. `alpha`: error probability over all evaluations together."""
    if n == 0:
        return Interval(0.0, 1.0)
    failures = n - successes
    level = prior.log_marginal(successes, failures) + log(alpha)
    outermost = MAX_LOGIT if successes else -MAX_LOGIT
    middle = log(successes / failures) if successes and failures else outermost
    low = _find_edge(successes, n, level, middle, -MAX_LOGIT) if successes else 0.0
    high = _find_edge(successes, n, level, middle, MAX_LOGIT) if failures else 1.0
    return Interval(low, high)


def evidence_above(successes: float, n: float, budget: float) -> float:
    """Return the log e-value against "the rate is at most `budget`"; -inf if the observed rate is."""
    if n == 0 or successes <= budget * n:
        return -inf
    return log_ratio(successes, n, budget, prior_above(budget))


def evidence_below(successes: float, n: float, budget: float) -> float:
    """Return the log e-value against "the rate is at least `budget`"; -inf if the observed rate is."""
    if n == 0 or successes >= budget * n:
        return -inf
    return log_ratio(successes, n, budget, prior_below(budget))


def sign_evidence(first: float, second: float) -> float:
    """Return the log e-value against "each of two kinds of events is as likely"; -inf unless the first is more frequent."""
    return log_ratio(first, first + second, HALF, SIGN_PRIOR) if first > second else -inf


def log_ratio(successes: float, n: float, rate: float, prior: Prior) -> float:
    """Return the log likelihood ratio of the mixture to `rate`: a martingale if `rate` is the truth."""
    failures = n - successes
    if (rate <= 0 and successes) or (rate >= 1 and failures):
        return inf
    likelihood = (successes * log(rate) if successes else 0.0) + (failures * log1p(-rate) if failures else 0.0)
    return prior.log_marginal(successes, failures) - likelihood


@lru_cache(maxsize=64)  # budgets are few
def prior_above(budget: float) -> Prior:
    """Return a prior with half its weight near five times the budget, and half anywhere for obvious defects."""
    near = (0.5, max(0.1 / max(budget, MIN_BUDGET), 0.5)) if budget > 0 else (0.5, 0.5)
    return Prior((near, (0.5, 0.5), *_parts_near_budget(budget)))


@lru_cache(maxsize=64)
def prior_below(budget: float) -> Prior:
    """Return a prior that is dense at zero: a rate of zero passes 17% later than in a test with one evaluation."""
    return (
        Prior(((0.5, max(2.0 / max(budget, MIN_BUDGET), 0.5)), *_parts_near_budget(budget)))
        if budget > 0
        else JEFFREYS_PRIOR
    )


def _parts_near_budget(budget: float) -> BetaParts:
    """Return the part for rates near a large budget: one of two equal versions is slower in nearly half of the pairs."""
    return ((NEAR_BUDGET_REQUESTS * budget, NEAR_BUDGET_REQUESTS * (1 - budget)),) if 0.1 <= budget <= 0.9 else ()


@lru_cache(maxsize=8192)  # many endpoints have few pairs, and so the same rate
def estimate_requests_above(rate: float, n: int, budget: float, threshold: float) -> int | None:
    """Return the expected number of further requests until the evidence reaches `threshold`, at the same rate."""
    return find_least(lambda extra: evidence_above(rate * (n + extra), n + extra, budget) >= threshold)


@lru_cache(maxsize=8192)
def estimate_requests_below(rate: float, n: int, budget: float, threshold: float) -> int | None:
    return find_least(lambda extra: evidence_below(rate * (n + extra), n + extra, budget) >= threshold)


def find_least(is_enough: Callable[[int], bool], maximum: int = MAX_REQUESTS) -> int | None:
    """Return the least number up to `maximum` that is enough, None for no such number. The predicate is monotonic."""
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
    """Return the rate between two logits at which the log likelihood falls to `level`."""
    for _ in range(BISECTION_STEPS):
        middle = (inside + outside) / 2
        softplus = max(middle, 0.0) + log1p(exp(-abs(middle)))
        if successes * middle - n * softplus > level:
            inside = middle
        else:
            outside = middle
    return 1 / (1 + exp(-outside))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


_log_beta_of_prior = lru_cache(maxsize=64)(_log_beta)
