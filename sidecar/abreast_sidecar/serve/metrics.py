"""What /metrics shows. Each sidecar has a registry of its own, so that several may live in one process."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abreast_sidecar.rollout.controllers import LeaderTasks
from abreast_sidecar.rollout.guard import GUARD_MODES
from abreast_sidecar.rollout.ramp import Ramp
from abreast_sidecar.rollout.transitions import Guard
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import CaptureAccounting, Drop
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT

RPC_DURATION_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)  # seconds


class Metrics:
    def __init__(self, control: TrafficController, leader_tasks: LeaderTasks) -> None:
        self.registry = CollectorRegistry()
        self.rpc_count = Counter("abreast_rpcs", "gRPC calls that ended", ["method", "code"], registry=self.registry)
        self.rpc_duration = Histogram(
            "abreast_rpc_seconds",
            "time of gRPC calls",
            ["method"],
            buckets=RPC_DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.ready = Gauge("abreast_ready", "whether a part works", ["part"], registry=self.registry)
        self.ledger = LedgerMetrics()
        self.registry.register(self.ledger)
        self.registry.register(TrafficMetrics(control))
        self.rollout = RolloutMetrics(leader_tasks)
        self.registry.register(self.rollout)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        name = method.lstrip("/")
        self.rpc_count.labels(name, code).inc()
        if code != "CANCELLED":  # streams last as long as their callers like
            self.rpc_duration.labels(name).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class LedgerMetrics(Collector):
    """The ledger's own counts, the same at every sidecar: take one of them, don't add."""

    def __init__(self) -> None:
        self.tallies: list[tuple[str, str, int]] = []
        self.accounts: list[CaptureAccounting] = []
        self.drops: list[Drop] = []
        self.clock_ahead_s = 0.0  # seconds

    async def read(self, reader: LedgerReader) -> None:
        """Raise LedgerError; then the last counts stay."""
        self.tallies = await reader.read_tallies()
        self.accounts, self.drops = await reader.read_accounts(), await reader.list_drops()
        self.clock_ahead_s = await reader.measure_clock_ahead()

    def collect(self) -> Iterable[Metric]:
        pairs = CounterMetricFamily(
            "abreast_ledger_pairs", "sampled requests in the ledger, by outcome", labels=["service", "outcome"]
        )
        for service, outcome, count in self.tallies:
            pairs.add_metric([service, outcome], count)
        yield pairs
        yield from self._collect_envoy_counts()
        yield self._collect_captures()
        yield self._collect_drops()
        yield GaugeMetricFamily(
            "abreast_ledger_clock_ahead_seconds",
            "by how much Postgres's clock is ahead of this sidecar's",
            value=self.clock_ahead_s,
        )

    def _collect_envoy_counts(self) -> Iterable[Metric]:
        sampled = CounterMetricFamily(
            "abreast_envoy_sampled", "sampled requests by Envoy's own count", labels=["service"]
        )
        unaccounted = GaugeMetricFamily(
            "abreast_unaccounted", "sampled requests without a row: on their way, or lost", labels=["service"]
        )
        dead_letters = GaugeMetricFamily(
            "abreast_dead_letters", "entries that could not be compared and are kept apart", labels=["service"]
        )
        for account in self.accounts:
            dead_letters.add_metric([account.service], account.dead_letters)
            if account.envoy_sampled is not None and account.unaccounted is not None:
                sampled.add_metric([account.service], account.envoy_sampled)
                unaccounted.add_metric([account.service], account.unaccounted)
        return sampled, unaccounted, dead_letters

    def _collect_captures(self) -> Metric:
        captures = CounterMetricFamily(
            "abreast_captures", "captures that came to Redis, by what became of them", labels=["service", "result"]
        )
        for account in self.accounts:
            for fate, count in (
                ("received", account.received),
                ("duplicate", account.duplicate),
                ("late", account.late),
            ):
                captures.add_metric([account.service, fate], count)
        return captures

    def _collect_drops(self) -> Metric:
        drops = CounterMetricFamily(
            "abreast_dropped_captures",
            "captures that were lost, by where and why",
            labels=["service", "stage", "reason"],
        )
        for drop in self.drops:
            drops.add_metric([drop.service, drop.stage, drop.reason], drop.count)
        return drops


class TrafficMetrics(Collector):
    def __init__(self, control: TrafficController) -> None:
        self.control = control

    def collect(self) -> Iterable[Metric]:
        version = GaugeMetricFamily("abreast_traffic_version", "version of the traffic settings", labels=["service"])
        share = GaugeMetricFamily("abreast_traffic_share", "traffic settings, 0 to 1", labels=["service", "share"])
        for traffic in self.control.list_current():
            version.add_metric([traffic.service], traffic.version)
            shares = traffic.shares
            share.add_metric([traffic.service, "new"], shares.new_share / TOTAL_WEIGHT)
            share.add_metric([traffic.service, "sample_safe"], shares.sample_safe / MILLION)
            share.add_metric([traffic.service, "sample_unsafe"], shares.sample_unsafe / MILLION)
            share.add_metric([traffic.service, "baseline"], shares.baseline_share / MILLION)
        yield version
        yield share
        yield self._collect_envoys()

    def _collect_envoys(self) -> Metric:
        envoys = GaugeMetricFamily("abreast_envoys", "Envoys connected to this sidecar", labels=["service", "state"])
        for traffic in self.control.list_current():
            statuses = self.control.connections.list_all(traffic.service)
            current = sum(envoy.acknowledged_version == traffic.version for envoy in statuses)
            refused = sum(bool(envoy.error) for envoy in statuses)
            for name, count in (("connected", len(statuses)), ("acknowledged", current), ("refused", refused)):
                envoys.add_metric([traffic.service, name], count)
        return envoys


class RolloutMetrics(Collector):
    """From the ledger, and so the same at every sidecar, but for which of them acts."""

    def __init__(self, leader_tasks: LeaderTasks) -> None:
        self.leader_tasks = leader_tasks
        self.guards: list[Guard] = []
        self.ramps: list[Ramp] = []
        self.webhooks: dict[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "abreast_leader",
            "whether this sidecar is the one that acts for guard, ramps and webhooks",
            value=self.leader_tasks.is_leader,
        )
        yield from self._collect_guards()
        yield from self._collect_ramps()
        messages = GaugeMetricFamily("abreast_webhooks_waiting", "webhooks that are still to be delivered")
        messages.add_metric([], self.webhooks.get("waiting", 0))
        yield messages
        results = CounterMetricFamily("abreast_webhooks", "webhooks, and failed attempts", labels=["result"])
        for result in ("delivered", "failed", "dropped"):
            results.add_metric([result], self.webhooks.get(result, 0))
        yield results

    def _collect_guards(self) -> Iterable[Metric]:
        mode = GaugeMetricFamily("abreast_guard_mode", "1 for the guard's mode", labels=["service", "mode"])
        breached = GaugeMetricFamily("abreast_guard_breached", "whether a rule was broken", labels=["service"])
        blind = GaugeMetricFamily("abreast_guard_blind", "whether the guard can't see", labels=["service"])
        for guard in self.guards:
            for name in GUARD_MODES:
                mode.add_metric([guard.service, name], guard.policy.mode == name)
            is_enabled = guard.policy.mode != "off"
            breached.add_metric([guard.service], is_enabled and guard.state == "breached")
            blind.add_metric([guard.service], is_enabled and guard.state == "blind")
        yield from (mode, breached, blind)

    def _collect_ramps(self) -> Iterable[Metric]:
        step = GaugeMetricFamily("abreast_ramp_step", "step of a ramp under way, from 1", labels=["service"])
        paused = GaugeMetricFamily("abreast_ramp_paused", "whether it is paused", labels=["service"])
        for ramp in self.ramps:
            step.add_metric([ramp.service], ramp.step + 1)
            paused.add_metric([ramp.service], ramp.state == "paused")
        yield from (step, paused)
