"""Measure verdicts on queues: python bench/queues.py [--runs 40] [--pairs 4000] [--seed 1].

Each scenario simulates requests to both versions with queues, and judges them by the functions of the verdict. The same
streams go through two other rules. One is the Mann-Whitney test of Kayenta, with windows of 100 requests, 98% and a
tolerance of 25%. The other is a fixed threshold as in analyses of Argo Rollouts: new's p99 within 1.2 times old's, three
failures. The versions are equal unless `factor` or `tail` says how much longer new takes. A wrong FAIL must stay below 5%,
and so must a wrong PASS.

A process runs requests one at a time and in order. Both versions have one process, and the copy starts with the response.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from abreast_sidecar.stats.latency import Load, Timing, count_times, do_waits_match, percentile, split_cold_pairs
from abreast_sidecar.stats.verdict import Budget, Completeness, EndpointCounts, decide_verdict

MEDIAN_US = 20_000
SIGMA = 0.5  # of the logarithm of service times
BUDGET = Budget()
LOOKS = 8  # verdicts per run, at equal distances
WINDOW = 100  # requests, for Kayenta and Argo
KAYENTA_Z, KAYENTA_TOLERANCE = 2.326, 0.25
ARGO_FACTOR, ARGO_FAILURES = 1.2, 3


@dataclass(frozen=True)
class Scenario:
    """A closed loop of clients if `clients` is set, otherwise an open loop with this utilisation of old."""

    name: str
    clients: int = 0
    think_us: float = 0.0
    utilisation: float = 0.0
    factor: float = 1.0
    tail: str = ""  # "slowest" or "random": this percent of new's requests takes five times as long


SCENARIOS = (
    Scenario("open loop at 30%", utilisation=0.3),
    Scenario("open loop at 70%", utilisation=0.7),
    Scenario("open loop at 90%", utilisation=0.9),
    Scenario("closed loop of 1 client", clients=1),
    Scenario("closed loop of 8 clients at 50%", clients=8, think_us=320_000),
    Scenario("closed loop of 8 clients, saturated", clients=8),
    Scenario("closed loop of 32 clients, saturated", clients=32),
    Scenario("closed loop of 32 clients, saturated, new 3% slower", clients=32, factor=1.03),
    Scenario("open loop at 30%, new 1.2 times as slow", utilisation=0.3, factor=1.2),
    Scenario("open loop at 30%, new 1.5 times as slow", utilisation=0.3, factor=1.5),
    Scenario("open loop at 30%, slowest percent 5 times as slow", utilisation=0.3, tail="slowest"),
    Scenario("open loop at 30%, random percent 5 times as slow", utilisation=0.3, tail="random"),
)


class Process:
    """Runs requests in order, one at a time."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque()

    def run(self, at: float, service_us: float) -> tuple[float, Load]:
        """Return the time of the response, and the load that the request met. Times include the wait in the process."""
        while self._ends and self._ends[0] <= at:
            self._ends.popleft()
        in_flight = len(self._ends)
        end = (self._ends[-1] if self._ends else at) + service_us
        self._ends.append(end)
        return end, Load(in_flight, 0, round(end - at))


def simulate(scenario: Scenario, pairs: int, generator: random.Random) -> list[Timing]:
    mean_us = MEDIAN_US * math.exp(SIGMA**2 / 2)
    slowest_us = MEDIAN_US * math.exp(2.326 * SIGMA)
    old, new = Process(), Process()
    timings: list[Timing] = []
    arrivals = [generator.expovariate(1 / max(scenario.think_us, 1.0)) for _ in range(scenario.clients)] or [0.0]
    heapq.heapify(arrivals)
    copies: list[tuple[float, int, Load, float]] = []  # time, number, load of old, service time

    def run_copies(until: float) -> None:
        while copies and copies[0][0] <= until:
            start, _, load, service_us = heapq.heappop(copies)
            _, copy = new.run(start, service_us)
            timings.append(Timing(load.total_us, copy.total_us, waits_match=do_waits_match(load, copy)))

    for number in range(pairs):
        at = heapq.heappop(arrivals)
        run_copies(at)
        service_us, copy_us = (MEDIAN_US * math.exp(generator.gauss(0, SIGMA)) for _ in range(2))
        is_slow = copy_us > slowest_us if scenario.tail == "slowest" else generator.random() < 0.01
        copy_us *= scenario.factor * (5 if scenario.tail and is_slow else 1)
        end, load = old.run(at, service_us)
        heapq.heappush(copies, (end, number, load, copy_us))
        pause_us = scenario.think_us and generator.expovariate(1 / scenario.think_us)
        is_open = scenario.utilisation
        heapq.heappush(arrivals, at + generator.expovariate(is_open / mean_us) if is_open else end + pause_us)
    run_copies(math.inf)
    return timings


def judge(timings: Sequence[Timing]) -> set[str]:
    """Return the states of the verdict over all looks."""
    states: set[str] = set()
    for look in range(1, LOOKS + 1):
        sample = timings[: len(timings) * look // LOOKS]
        times = count_times(split_cold_pairs(sample)[1], BUDGET.max_slower)
        n = 10**6  # without mismatches: only times decide
        counts = EndpointCounts("GET /", n, n, n, 0, 0, 0, 0, times)
        states.add(decide_verdict([counts], Completeness(n, n), BUDGET).state)
    return states


def fails_kayenta(timings: Sequence[Timing]) -> bool:
    """Compare windows by Mann-Whitney: the confidence interval of the shift must not exceed the tolerance."""
    critical = math.floor(WINDOW**2 / 2 - KAYENTA_Z * math.sqrt(WINDOW**2 * (2 * WINDOW + 1) / 12))
    for start in range(0, len(timings) - WINDOW + 1, WINDOW):
        window = timings[start : start + WINDOW]
        shifts = sorted(new.new_us - old.old_us for new in window for old in window)
        if shifts[critical] > KAYENTA_TOLERANCE * abs(median(shifts)):
            return True
    return False


def fails_argo(timings: Sequence[Timing]) -> bool:
    limit = ARGO_FACTOR * percentile(sorted(timing.old_us for timing in timings), 0.99)
    windows = [timings[start : start + WINDOW] for start in range(0, len(timings) - WINDOW + 1, WINDOW)]
    failures = sum(percentile(sorted(timing.new_us for timing in window), 0.99) > limit for window in windows)
    return failures > ARGO_FAILURES


def measure(runs: int, pairs: int, seed: int) -> None:
    for scenario in SCENARIOS:
        streams = [simulate(scenario, pairs, random.Random(f"{seed} {scenario.name} {run}")) for run in range(runs)]
        states = [judge(stream) for stream in streams]
        is_equal = scenario.factor == 1 and not scenario.tail
        shares = {state: sum(state in each for each in states) / runs for state in ("FAIL", "PASS")}
        others: dict[str, Callable[[Sequence[Timing]], bool]] = {"Kayenta": fails_kayenta, "Argo": fails_argo}
        failing = {name: sum(map(rule, streams)) / runs for name, rule in others.items()}
        matched = sum(timing.waits_match for stream in streams for timing in stream) / (runs * pairs)
        bound = "FAIL at most 5%" if is_equal else "PASS at most 5%" if scenario.factor >= 1.2 else "none"
        print(
            f"{scenario.name:52} matched {matched:4.0%} | ever FAIL {shares['FAIL']:4.0%}, ever PASS {shares['PASS']:4.0%}"
            f" ({bound}) | FAIL by Kayenta {failing['Kayenta']:4.0%}, by Argo {failing['Argo']:4.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    measure(options.runs, options.pairs, options.seed)


if __name__ == "__main__":
    main()
