"""What /metrics shows. Each sidecar has a registry of its own, so that several may live in one process."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abreast_sidecar.control import MILLION, WEIGHTS, Control
from abreast_sidecar.store.queries import Queries
from abreast_sidecar.store.results import Accounts, Drop

BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)  # seconds


class Metrics:
    def __init__(self, control: Control) -> None:
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

    async def read(self, queries: Queries) -> None:
        """Raise LedgerError; then the last counts stay."""
        self.tallies = await queries.tallies()
        self.accounts, self.drops = await queries.accounts(), await queries.drops()

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
            poison.add_metric([one.service], one.poison)
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
            states = self.control.states(traffic)
            current = sum(state.acknowledged_version == traffic.version for state in states)
            refused = sum(bool(state.error) for state in states)
            for name, count in (("connected", len(states)), ("acknowledged", current), ("refused", refused)):
                envoys.add_metric([traffic.service, name], count)
        return envoys
