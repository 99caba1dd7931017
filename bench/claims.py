"""Simulate the claims of docs/verdict.md: python bench/claims.py [--quick] [--runs N] [--pairs N] [--only TEXT].

Streams of pairs with second copies run through the functions that decide findings and verdicts. The first table contains
streams of unchanged services, with the share of runs that ever have a false `real` finding or a false FAIL. The second
contains regressions, with the number of pairs until the finding is real, and the share of runs that ever pass wrongly.
Intervals are Clopper-Pearson's, at 95%. All runs are seeded.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, lgamma, log
from typing import Any, NamedTuple

from abreast_sidecar.jobs.noise import COUNT_COLUMNS, classify_rows
from abreast_sidecar.stats.latency import TimeCounts
from abreast_sidecar.stats.noise import NoisyPlace
from abreast_sidecar.stats.verdict import (
    Budget,
    Completeness,
    DepartureCounts,
    EndpointCounts,
    ServiceCounts,
    decide_verdict,
)
from abreast_sidecar.store.counters import MARKS
from abreast_sidecar.store.samples import BET_PERIOD_MS, list_bets

MAX_FALSE_REAL, MAX_FALSE_VERDICT = 0.02, 0.05  # claims
PAIRS_PER_S = 10
COMPLETE = Completeness(100, 100)
RATES_ONLY = Budget(max_slower=0.0)
Dice = random.Random


class Pair(NamedTuple):
    """The differences of a pair at one place."""

    other: bool  # the other version's copy differs from the live response
    same: bool | None = None  # the copy of the same version does; None without that copy
    is_new_live: bool = False
    copy_is_greater: bool | None = None
    client: int = -1  # -1: a client with one request
    new_fails: bool = False
    old_fails: bool = False
    leaves: bool = False  # the user left before the live response, and there is no comparison


Stream = Callable[[Dice, int], Iterator[Pair]]  # by number of pairs


def chance(
    event: Callable[[float], float], *, visible: float = 1.0, share: Callable[[float], float] | float = 0.1
) -> Stream:
    """Yield pairs with events whose rate depends on the time from 0 to 1. Each copy shows an event independently."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for number in range(pairs):
            moment = number / pairs
            has_event = dice.random() < event(moment) / visible
            has_copy = dice.random() < (share if isinstance(share, float) else share(moment))
            other, same = (has_event and dice.random() < visible for _ in range(2))
            yield Pair(other, same if has_copy else None)

    return generate


def independent(rate: float, share: float = 0.1) -> Stream:
    """Yield pairs whose copies differ independently of each other."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            yield Pair(dice.random() < rate, dice.random() < rate if dice.random() < share else None)

    return generate


def regression(rate: float, noise: float = 0.0, share: float = 0.1) -> Stream:
    """Yield pairs of a new version that is wrong in a share of its responses, while old answers."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            other = dice.random() < rate or dice.random() < noise
            yield Pair(other, dice.random() < noise if dice.random() < share else None)

    return generate


def time_ordered(weight: float) -> Stream:
    """Yield pairs of unsafe requests with time-ordered ids: the copy always has the greater one."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            yield Pair(True, None, dice.random() < weight, True)

    return generate


def leaning(share_greater: float) -> Stream:
    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            yield Pair(True, None, False, dice.random() < share_greater)

    return generate


def sessions(rate: float, length: int = 30) -> Stream:
    """Yield sessions of one client after another. In some, exactly one of two versions or copies differs throughout."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for client in range(pairs // length):
            kind = dice.choice(("other", "same")) if dice.random() < rate else ""
            for _ in range(length):
                has_copy = dice.random() < 0.1
                yield Pair(kind == "other", (kind == "same") if has_copy else None, client=client)

    return generate


def outages(rate: float, length: int = 30) -> Stream:
    """Yield pairs of two versions that have outages at different times, with the same law."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        left = {"new": 0, "old": 0}
        for _ in range(pairs):
            for version, rest in left.items():
                starts = dice.random() < rate / length
                left[version] = dice.randint(1, 2 * length - 1) if starts else max(0, rest - 1)
            new, old = left["new"] > 0, left["old"] > 0
            same = False if dice.random() < 0.1 else None  # both copies of a version fail, or none
            yield Pair(new != old, same, new_fails=new and not old, old_fails=old and not new)

    return generate


def failures(rate: float) -> Stream:
    """Yield pairs of a new version that fails in a share of its responses."""

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            fails = dice.random() < rate
            yield Pair(fails, False if dice.random() < 0.1 else None, new_fails=fails)

    return generate


def departures(weight: Callable[[float], float], rate: float, new_rate: float | None = None, outage: int = 0) -> Stream:
    """Yield pairs of users who stay on one version. One user in fifty leaves half of the responses.

    `rate`, `new_rate`: shares of responses that the others leave. `outage`: length of outages of either version in which
    all users leave, for 0.1% of the time.
    """

    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        left = {True: 0, False: 0}
        keys = [dice.random() for _ in range(1000)]  # one for each user
        for number in range(pairs):
            user = int(len(keys) * dice.random() ** 2)  # some have many requests
            is_new = keys[user] < weight(number / pairs)
            for version, rest in left.items():
                starts = outage and dice.random() < 0.001 / outage
                left[version] = outage if starts else max(0, rest - 1)
            rates = 0.5 if user % 50 == 0 else rate if new_rate is None or not is_new else new_rate
            yield Pair(False, None, is_new, client=user, leaves=left[is_new] > 0 or dice.random() < rates)

    return generate


def late_shadow(other: float, same: float) -> Stream:
    def generate(dice: Dice, pairs: int) -> Iterator[Pair]:
        for _ in range(pairs):
            yield Pair(dice.random() < other, dice.random() < same if dice.random() < 0.1 else None)

    return generate


def step(before: float, after: float) -> Callable[[float], float]:
    return lambda moment: before if moment < 0.5 else after


@dataclass(frozen=True)
class Scenario:
    name: str
    stream: Stream
    is_changed: bool = False
    is_inseparable: bool = False  # no test can separate it from a regression
    rate: float = 0.0  # of the regression, if noise may hide it
    has_errors: bool = False  # FAIL comes from server errors, before the finding is real


UNCHANGED = (
    *(
        Scenario(f"independent, both ways, {rate:.2%}", independent(rate))
        for rate in (0.0003, 0.001, 0.003, 0.01, 0.1, 1.0)
    ),
    *(Scenario(f"the same with 1% of copies, {rate:.2%}", independent(rate, 0.01)) for rate in (0.003, 0.1)),
    *(Scenario(f"one-way noise, {rate:.2%}", chance(step(rate, rate), visible=0.9)) for rate in (0.001, 0.003, 0.1)),
    *(
        Scenario(f"no copies, time-ordered ids, weight {weight:.0%}", time_ordered(weight))
        for weight in (0.0, 0.3, 1.0)
    ),
    Scenario("no copies, direction 60/40", leaning(0.6)),
    Scenario("sessions of 30 that differ whole, 5%", sessions(0.05)),
    Scenario("noise that begins half way, 5%", chance(step(0.0, 0.05), visible=0.5)),
    Scenario("noise 1 to 10% while copies get fewer", chance(step(0.01, 0.1), visible=0.5, share=step(0.5, 0.05))),
    Scenario("errors in outages of 3 s, 0.5%", outages(0.005)),
    Scenario("errors in outages of 3 s, 0.1%", outages(0.001)),
    Scenario("errors in outages of 60 s, 0.1%", outages(0.001, 600)),
    Scenario("half of the users on new, 3% leave", departures(lambda _: 0.5, 0.03)),
    Scenario("10% of the users on new, 3% leave", departures(lambda _: 0.1, 0.03)),
    Scenario("90% of the users on new, 3% leave", departures(lambda _: 0.9, 0.03)),
    Scenario("ramp from 5% to 60%, 3% leave", departures(step(0.05, 0.6), 0.03)),
    Scenario("outages of 30 s in which all users leave", departures(lambda _: 0.5, 0.01, outage=300)),
    Scenario("new's copy waits longer, 10% to 5%", late_shadow(0.1, 0.05), is_inseparable=True),
)
CHANGED = (
    *(Scenario(f"regression in {rate:.1%}", regression(rate), True) for rate in (0.01, 0.1, 1.0)),
    *(
        Scenario(f"regression in {rate:.1%}, second copy of all", regression(rate, share=1.0), True)
        for rate in (0.001, 0.01, 0.1, 1.0)
    ),
    Scenario("regression in 10%, noise 1%", regression(0.1, 0.01), True, rate=0.1),
    Scenario("regression in 10%, noise 10%", regression(0.1, 0.1), True, rate=0.1),
    Scenario("regression in 2%, noise 10%", regression(0.02, 0.1), True, rate=0.02),
    *(
        Scenario(f"server errors in {rate:.0%}, until FAIL", failures(rate), True, has_errors=True)
        for rate in (0.02, 0.1, 0.5, 1.0)
    ),
    *(
        Scenario(
            f"{rate:.0%} leave new, 1% old, weight {weight:.0%}",
            departures(lambda _, weight=weight: weight, 0.01, rate),  # type: ignore[misc]
            True,
            has_errors=True,
        )
        for weight, rate in ((0.5, 0.03), (0.5, 0.1), (0.1, 0.3), (0.9, 0.1), (0.9, 1.0))
    ),
)


@dataclass
class Run:
    """The ledger's counters of one place, fed with pairs."""

    row: dict[str, Any] = field(
        default_factory=lambda: {
            "id": 1, "part": "body", "path": "$.x", "kind": "changed", "newest_count": None, "places": 1,
            "release_number": 1, **dict.fromkeys(COUNT_COLUMNS, 0),
        }
    )  # fmt: skip
    bet_keys: set[int] = field(default_factory=set)
    errors: dict[int, int] = field(default_factory=dict)  # period → balance
    new_errors: int = 0
    old_errors: int = 0
    dice: Dice = field(default_factory=lambda: random.Random(1))
    pairs: int = 0
    live: deque[bool] = field(default_factory=lambda: deque(maxlen=200))  # whether new was live
    departed: Counter[bool] = field(default_factory=Counter)
    departed_clients: set[int] = field(default_factory=set)
    departure_periods: dict[int, bool] = field(default_factory=dict)
    real_at: int | None = None
    failed_at: int | None = None
    has_passed: bool = False
    least_bound: float = 1.0  # of what noise may hide, in a PASS

    def add(self, pair: Pair) -> None:
        row, number = self.row, self.pairs
        self.pairs += 1
        self.live.append(pair.is_new_live)
        if pair.leaves:
            self._add_departure(pair, number * 1000 // PAIRS_PER_S // BET_PERIOD_MS)
            return
        row["compared"] += 1
        row["count"] += pair.other
        row["baseline_compared"] += pair.same is not None
        row["baseline_count"] += bool(pair.same)
        self.new_errors += pair.new_fails
        self.old_errors += pair.old_fails
        marks = self._mark(pair)
        time_ms = number * 1000 // PAIRS_PER_S
        if pair.new_fails or pair.old_fails:
            period = time_ms // BET_PERIOD_MS
            self.errors[period] = self.errors.get(period, 0) + pair.new_fails - pair.old_fails
        if marks:
            client = number if pair.client < 0 else -1 - pair.client
            is_failure = pair.new_fails or pair.old_fails
            for group, key in list_bets("1", marks, b"" if is_failure else b"%d" % client, time_ms).items():
                if key in self.bet_keys:
                    marks &= ~group
                self.bet_keys.add(key)
            for name, mark in MARKS.items():
                row[name] += bool(marks & mark)

    def _add_departure(self, pair: Pair, period: int) -> None:
        """Count the user once, in equally large groups of both versions, as `verdict_service_counts` does."""
        is_new = pair.is_new_live
        self.departed[is_new] += 1
        if pair.client in self.departed_clients:
            return
        self.departed_clients.add(pair.client)
        share = sum(self.live) / len(self.live)
        others, own = (1 - share, share) if is_new else (share, 1 - share)
        if own > 0 and self.dice.random() < others / own:
            self.departure_periods.setdefault(period, is_new)

    def _mark(self, pair: Pair) -> int:
        marks = 0
        if pair.copy_is_greater is not None:
            version = "old" if pair.is_new_live else "new"
            marks = MARKS[f"copy_{'greater' if pair.copy_is_greater else 'smaller'}_of_{version}"]
        if pair.same is not None and pair.other != pair.same:
            marks |= MARKS["other_only" if pair.other else "same_only"]
        return marks

    def look(self) -> None:
        (decision,) = classify_rows([self.row])
        if decision.state == "real" and self.real_at is None:
            self.real_at = self.row["compared"]
        count, compared = self.row["count"], self.row["compared"]
        new_requests = compared + self.departed[True]
        times = TimeCounts(timed=compared, slower=0)
        counts = EndpointCounts(
            endpoint="GET /",
            old_requests=compared,
            new_requests=new_requests,
            compared=compared,
            mismatches=count if decision.state == "real" else 0,
            undecided=count if decision.state == "undecided" else 0,
            new_errors=self.new_errors,
            old_errors=self.old_errors,
            times=times,
            new_error_periods=sum(balance > 0 for balance in self.errors.values()),
            old_error_periods=sum(balance < 0 for balance in self.errors.values()),
        )
        departure_counts = DepartureCounts(
            new_departures=self.departed[True],
            old_departures=self.departed[False],
            new_departure_periods=sum(self.departure_periods.values()),
            old_departure_periods=sum(not is_new for is_new in self.departure_periods.values()),
            new_share=sum(self.live) / len(self.live),
            alone=0.0,
        )
        service = ServiceCounts(times, counts.new_error_periods, counts.old_error_periods, departure_counts)
        state = decide_verdict([counts], COMPLETE, RATES_ONLY, service=service).state
        if state == "FAIL" and self.failed_at is None:
            self.failed_at = self.pairs
        self.has_passed |= state == "PASS"
        if state == "PASS" and decision.state == "noise":
            names = ("compared", "count", "baseline_compared", "baseline_count", "other_only", "same_only")
            place = NoisyPlace("", "", *(self.row[name] for name in names))
            self.least_bound = min(self.least_bound, place.bound_hidden_pairs(1 - RATES_ONLY.confidence) / compared)


def simulate(scenario: Scenario, seed: int, pairs: int, looks: float) -> Run:
    """Feed one stream, and look each time that the pairs have grown by the factor `looks`."""
    run, next_look = Run(), 10
    for number, pair in enumerate(scenario.stream(random.Random(f"{scenario.name} {seed}"), pairs), 1):
        run.add(pair)
        if number in {next_look, pairs}:
            run.look()
            next_look = max(next_look + 5, int(next_look * looks))
            if scenario.is_changed and (run.failed_at if scenario.has_errors else run.real_at):
                break
    return run


def binomial_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson (1934)."""

    def tail(rate: float, counts: range) -> float:
        if rate <= 0 or rate >= 1:
            return float((0 if rate <= 0 else n) in counts)
        return sum(
            exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(rate) + (n - k) * log(1 - rate))
            for k in counts
        )

    def solve(is_below: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if is_below(middle) else (low, middle)
        return low

    error = (1 - confidence) / 2
    lowest = 0.0 if hits == 0 else solve(lambda rate: tail(rate, range(hits, n + 1)) < error)
    highest = 1.0 if hits == n else solve(lambda rate: tail(rate, range(hits + 1)) > error)
    return lowest, highest


def format_share(hits: int, n: int) -> str:
    low, high = binomial_interval(hits, n)
    return f"{hits / n:.1%} ({low:.1%} to {high:.1%})"


def quantiles(values: Sequence[int | None], limit: int) -> str:
    """Return the median and the 90th percentile."""
    ordered = sorted(limit + 1 if value is None else value for value in values)
    picks = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.9))
    return " / ".join(f"> {limit:,}" if pick > limit else f"{pick:,}" for pick in picks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, below a minute")
    parser.add_argument("--runs", type=int, default=200, help="runs of each scenario")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs of each run")
    parser.add_argument("--only", default="", help="scenarios with this text in their names")
    arguments = parser.parse_args()
    runs, pairs, looks = (10, 3000, 1.3) if arguments.quick else (arguments.runs, arguments.pairs, 1.2)
    began, is_exceeded = time.monotonic(), False
    print(
        f"unchanged services, {runs} runs of {pairs:,} pairs; claims: real at most {MAX_FALSE_REAL:.0%}, FAIL {MAX_FALSE_VERDICT:.0%}"
    )
    for scenario in (scenario for scenario in UNCHANGED if arguments.only in scenario.name):
        results = [simulate(scenario, seed, pairs, looks) for seed in range(runs)]
        real, failed = (
            sum(map(bool, hits)) for hits in zip(*((run.real_at, run.failed_at) for run in results), strict=True)
        )
        note = "  (can't be told apart)" if scenario.is_inseparable else ""
        is_exceeded |= not scenario.is_inseparable and (
            binomial_interval(real, runs)[0] > MAX_FALSE_REAL or binomial_interval(failed, runs)[0] > MAX_FALSE_VERDICT
        )
        print(
            f"{scenario.name:48} ever real {format_share(real, runs):26} ever FAIL {format_share(failed, runs)}{note}",
            flush=True,
        )
    print(
        f"regressions: pairs ({PAIRS_PER_S} a second) until the finding is real, median / 90th percentile; claim: false PASS at most {MAX_FALSE_VERDICT:.0%}"
    )
    for scenario in (scenario for scenario in CHANGED if arguments.only in scenario.name):
        results = [simulate(scenario, seed, pairs, looks) for seed in range(runs)]
        passed = sum(run.has_passed for run in results)
        note = ""
        if scenario.rate:
            too_low = sum(run.least_bound < scenario.rate for run in results)
            note = f", with a bound below {scenario.rate:.0%} {format_share(too_low, runs)}"
        found_at = [run.failed_at if scenario.has_errors else run.real_at for run in results]
        print(
            f"{scenario.name:48} after {quantiles(found_at, pairs):20} ever PASS {format_share(passed, runs)}{note}",
            flush=True,
        )
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return int(is_exceeded)


if __name__ == "__main__":
    sys.exit(main())
