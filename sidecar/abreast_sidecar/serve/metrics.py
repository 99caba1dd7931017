"""What /metrics shows. Each sidecar has a registry of its own, so that several may live in one process."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abreast_sidecar.control import MILLION, WEIGHTS, Control
from abreast_sidecar.control.acts import Guard
from abreast_sidecar.control.steering import Steering
from abreast_sidecar.steer.guard import MODES
from abreast_sidecar.steer.ramp import Ramp
from abreast_sidecar.store.queries import Queries
from abreast_sidecar.store.results import Accounts, Drop

BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)  # seconds


class Metrics:
    def __init__(self, control: Control, steering: Steering) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "abreast_rpcs", "gRPC calls that ended", ["method", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "abreast_rpc_seconds", "time of gRPC calls", ["method"], buckets=BUCKETS, registry=self.registry
        )
        self.ready = Gauge("abreast_ready", "whether a part works", ["part"], registry=self.registry)
        self.ledger = LedgerCounts()
        self.registry.register(self.ledger)
        self.registry.register(TrafficValues(control))
        self.steering = SteeringValues(steering)
        self.registry.register(self.steering)

    def call(self, method: str, code: str, seconds: float) -> None:
        name = method.lstrip("/")
        self.calls.labels(name, code).inc()
        if code != "CANCELLED":  # streams last as long as their callers like
            self.seconds.labels(name).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class LedgerCounts(Collector):
    """The ledger's own counts, the same at every sidecar: take one of them, don't add."""

    def __init__(self) -> None:
        self.tallies: list[tuple[str, str, int]] = []
        self.accounts: list[Accounts] = []
        self.drops: list[Drop] = []
        self.clock_ahead = 0.0  # seconds

    async def read(self, queries: Queries) -> None:
        """Raise LedgerError; then the last counts stay."""
        self.tallies = await queries.tallies()
        self.accounts, self.drops = await queries.accounts(), await queries.drops()
        self.clock_ahead = await queries.clock_ahead()

    def collect(self) -> Iterable[Metric]:
        pairs = CounterMetricFamily(
            "abreast_ledger_pairs",
            "sampled requests in the ledger, by outcome",
            labels=["service", "outcome"],
        )
        for service, outcome, count in self.tallies:
            pairs.add_metric([service, outcome], count)
        yield pairs
        yield from self._held_against_envoy()
        yield self._captures()
        yield self._dropped()
        yield GaugeMetricFamily(
            "abreast_ledger_clock_ahead_seconds",
            "by how much Postgres's clock is ahead of this sidecar's",
            value=self.clock_ahead,
        )

    def _held_against_envoy(self) -> Iterable[Metric]:
        sampled = CounterMetricFamily(
            "abreast_envoy_sampled", "sampled requests by Envoy's own count", labels=["service"]
        )
        unaccounted = GaugeMetricFamily(
            "abreast_unaccounted", "sampled requests without a row: on their way, or lost", labels=["service"]
        )
        poison = GaugeMetricFamily(
            "abreast_poison", "entries that could not be compared and are kept apart", labels=["service"]
        )
        for one in self.accounts:
            poison.add_metric([one.service], one.dead_letters)
            if one.envoy_sampled is not None and one.unaccounted is not None:
                sampled.add_metric([one.service], one.envoy_sampled)
                unaccounted.add_metric([one.service], one.unaccounted)
        return sampled, unaccounted, poison

    def _captures(self) -> Metric:
        captures = CounterMetricFamily(
            "abreast_captures",
            "captures that came to Redis, by what became of them",
            labels=["service", "fate"],
        )
        for one in self.accounts:
            for fate, count in (("received", one.received), ("duplicate", one.duplicate), ("late", one.late)):
                captures.add_metric([one.service, fate], count)
        return captures

    def _dropped(self) -> Metric:
        dropped = CounterMetricFamily(
            "abreast_dropped_captures",
            "captures that were lost, by where and why",
            labels=["service", "place", "reason"],
        )
        for one in self.drops:
            dropped.add_metric([one.service, one.place, one.reason], one.count)
        return dropped


class TrafficValues(Collector):
    def __init__(self, control: Control) -> None:
        self.control = control

    def collect(self) -> Iterable[Metric]:
        version = GaugeMetricFamily(
            "abreast_traffic_version", "version of the traffic settings", labels=["service"]
        )
        share = GaugeMetricFamily(
            "abreast_traffic_share", "traffic settings, 0 to 1", labels=["service", "share"]
        )
        for traffic in self.control.all_held():
            version.add_metric([traffic.service], traffic.version)
            shares = traffic.shares
            share.add_metric([traffic.service, "new"], shares.new_share / WEIGHTS)
            share.add_metric([traffic.service, "sample_safe"], shares.sample_safe / MILLION)
            share.add_metric([traffic.service, "sample_unsafe"], shares.sample_unsafe / MILLION)
            share.add_metric([traffic.service, "baseline"], shares.baseline_share / MILLION)
        yield version
        yield share
        yield self._envoys()

    def _envoys(self) -> Metric:
        envoys = GaugeMetricFamily(
            "abreast_envoys", "Envoys connected to this sidecar", labels=["service", "state"]
        )
        for traffic in self.control.all_held():
            states = self.control.envoys.states(traffic)
            current = sum(state.acknowledged_version == traffic.version for state in states)
            refused = sum(bool(state.error) for state in states)
            for name, count in (("connected", len(states)), ("acknowledged", current), ("refused", refused)):
                envoys.add_metric([traffic.service, name], count)
        return envoys


class SteeringValues(Collector):
    """From the ledger, and so the same at every sidecar, but for which of them acts."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self.guards: list[Guard] = []
        self.ramps: list[Ramp] = []
        self.webhooks: dict[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "abreast_acting",
            "whether this sidecar is the one that acts for guard, ramps and webhooks",
            value=self.steering.acting,
        )
        yield from self._guards()
        yield from self._ramps()
        messages = GaugeMetricFamily("abreast_webhooks_waiting", "webhooks that are still to be delivered")
        messages.add_metric([], self.webhooks.get("waiting", 0))
        yield messages
        ended = CounterMetricFamily("abreast_webhooks", "webhooks, and failed attempts", labels=["result"])
        for result in ("delivered", "failed", "dropped"):
            ended.add_metric([result], self.webhooks.get(result, 0))
        yield ended

    def _guards(self) -> Iterable[Metric]:
        mode = GaugeMetricFamily("abreast_guard_mode", "1 for the guard's mode", labels=["service", "mode"])
        breached = GaugeMetricFamily(
            "abreast_guard_breached", "whether a rule was broken", labels=["service"]
        )
        blind = GaugeMetricFamily("abreast_guard_blind", "whether the guard can't see", labels=["service"])
        for guard in self.guards:
            for name in MODES:
                mode.add_metric([guard.service, name], guard.policy.mode == name)
            looks = guard.policy.mode != "off"
            breached.add_metric([guard.service], looks and guard.state == "breached")
            blind.add_metric([guard.service], looks and guard.state == "blind")
        yield from (mode, breached, blind)

    def _ramps(self) -> Iterable[Metric]:
        step = GaugeMetricFamily("abreast_ramp_step", "step of a ramp under way, from 1", labels=["service"])
        paused = GaugeMetricFamily("abreast_ramp_paused", "whether it is paused", labels=["service"])
        for ramp in self.ramps:
            step.add_metric([ramp.service], ramp.step + 1)
            paused.add_metric([ramp.service], ramp.state == "paused")
        yield from (step, paused)
