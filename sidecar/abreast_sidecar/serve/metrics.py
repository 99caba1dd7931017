"""The metrics at /metrics. Each sidecar has a separate registry, so that several can run in one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abreast_sidecar.rollout.guard import GUARD_MODES
from abreast_sidecar.rollout.leader_tasks import LeaderTasks
from abreast_sidecar.rollout.ramp import Ramp
from abreast_sidecar.rollout.service import RolloutService
from abreast_sidecar.rollout.transitions import Guard
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import CaptureAccounting, Drop
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import MILLION, TOTAL_WEIGHT

RPC_DURATION_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)

Sample = tuple[Sequence[str], float]  # values of the labels, and of the metric


class Metrics:
    def __init__(self, control: TrafficController, leader_tasks: LeaderTasks) -> None:
        self.registry = CollectorRegistry()
        self.rpc_count = Counter("abreast_rpcs", "finished gRPC calls", ["method", "code"], registry=self.registry)
        self.rpc_duration = Histogram(
            "abreast_rpc_seconds",
            "duration of gRPC calls",
            ["method"],
            buckets=RPC_DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.ready = Gauge("abreast_ready", "1 if the part is ready", ["part"], registry=self.registry)
        self.ledger = LedgerMetrics()
        self.rollout = RolloutMetrics(leader_tasks)
        for collector in (self.ledger, TrafficMetrics(control), self.rollout):
            self.registry.register(collector)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        name = method.lstrip("/")
        self.rpc_count.labels(name, code).inc()
        if code != "CANCELLED":  # clients cancel streams when they like
            self.rpc_duration.labels(name).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class LedgerMetrics(Collector):
    """Counts of the ledger. All sidecars report the same, so take the metrics of one; don't add them up."""

    def __init__(self) -> None:
        self.tallies: list[tuple[str, str, int]] = []  # service, outcome, pairs
        self.accounts: list[CaptureAccounting] = []
        self.drops: list[Drop] = []
        self.clock_ahead_s = 0.0

    async def read(self, reader: LedgerReader) -> None:
        """Read the counts. If this raises LedgerError, the metrics keep the previous counts."""
        self.tallies = await reader.read_tallies()
        self.accounts, self.drops = await reader.read_accounts(), await reader.list_drops()
        self.clock_ahead_s = await reader.measure_clock_ahead()

    def collect(self) -> Iterable[Metric]:
        yield _counter(
            "abreast_ledger_pairs",
            "sampled requests in the ledger, by outcome",
            ["service", "outcome"],
            [((service, outcome), count) for service, outcome, count in self.tallies],
        )
        counted = [account for account in self.accounts if account.envoy_sampled is not None]
        yield _counter(
            "abreast_envoy_sampled",
            "sampled requests, as counted by Envoy",
            ["service"],
            [([account.service], account.envoy_sampled or 0) for account in counted],
        )
        yield _gauge(
            "abreast_unaccounted",
            "sampled requests without a row in the ledger: in flight, or lost",
            ["service"],
            [([account.service], account.unaccounted or 0) for account in counted],
        )
        yield _gauge(
            "abreast_dead_letters",
            "entries that could not be compared",
            ["service"],
            [([account.service], account.dead_letters) for account in self.accounts],
        )
        yield _counter(
            "abreast_captures",
            "captures that arrived in Redis, by result",
            ["service", "result"],
            [
                ((account.service, result), getattr(account, result))
                for account in self.accounts
                for result in ("received", "duplicate", "late")
            ],
        )
        yield _counter(
            "abreast_dropped_captures",
            "lost captures, by stage and reason",
            ["service", "stage", "reason"],
            [((drop.service, drop.stage, drop.reason), drop.count) for drop in self.drops],
        )
        yield _gauge(
            "abreast_ledger_clock_ahead_seconds",
            "difference between the clocks of Postgres and of this sidecar",
            [],
            [([], self.clock_ahead_s)],
        )


class TrafficMetrics(Collector):
    def __init__(self, control: TrafficController) -> None:
        self.control = control

    def collect(self) -> Iterable[Metric]:
        versions: list[Sample] = []
        shares: list[Sample] = []
        envoys: list[Sample] = []
        for traffic in self.control.list_current():
            service = traffic.service
            versions.append(([service], traffic.version))
            for name, part, total in (
                ("new", traffic.shares.new_share, TOTAL_WEIGHT),
                ("sample_safe", traffic.shares.sample_safe, MILLION),
                ("sample_unsafe", traffic.shares.sample_unsafe, MILLION),
                ("baseline", traffic.shares.baseline_share, MILLION),
            ):
                shares.append(((service, name), part / total))
            statuses = self.control.connections.list_all(service)
            envoys.append(((service, "connected"), len(statuses)))
            acknowledged = sum(envoy.acknowledged_version == traffic.version for envoy in statuses)
            envoys.append(((service, "acknowledged"), acknowledged))
            envoys.append(((service, "refused"), sum(bool(envoy.error) for envoy in statuses)))
        yield _gauge("abreast_traffic_version", "version of the traffic settings", ["service"], versions)
        yield _gauge("abreast_traffic_share", "traffic settings, 0 to 1", ["service", "share"], shares)
        yield _gauge("abreast_envoys", "Envoys that are connected to this sidecar", ["service", "state"], envoys)


class RolloutMetrics(Collector):
    """State of guards, ramps and webhooks. All sidecars report the same, except for which of them is the leader."""

    def __init__(self, leader_tasks: LeaderTasks) -> None:
        self.leader_tasks = leader_tasks
        self.guards: list[Guard] = []
        self.ramps: list[Ramp] = []
        self.webhooks: dict[str, int] = {}

    async def read(self, reader: LedgerReader, rollout: RolloutService) -> None:
        """Read the states. If this raises LedgerError, the metrics keep the previous states."""
        self.guards = await rollout.list_guards()
        self.ramps = await rollout.list_active_ramps()
        self.webhooks = await reader.count_webhooks()

    def collect(self) -> Iterable[Metric]:
        yield _gauge(
            "abreast_leader",
            "1 if this sidecar runs guard, ramps and webhooks",
            [],
            [([], self.leader_tasks.is_leader)],
        )
        yield _gauge(
            "abreast_guard_mode",
            "1 for the mode of the guard",
            ["service", "mode"],
            [((guard.service, mode), guard.policy.mode == mode) for guard in self.guards for mode in GUARD_MODES],
        )
        for state, text in (("breached", "1 if a rule of the guard is breached"), ("blind", "1 if the guard is blind")):
            samples = [([guard.service], guard.policy.mode != "off" and guard.state == state) for guard in self.guards]
            yield _gauge(f"abreast_guard_{state}", text, ["service"], samples)
        yield _gauge(
            "abreast_ramp_step",
            "step of the active ramp, from 1",
            ["service"],
            [([ramp.service], ramp.step + 1) for ramp in self.ramps],
        )
        yield _gauge(
            "abreast_ramp_paused",
            "1 if the active ramp is paused",
            ["service"],
            [([ramp.service], ramp.state == "paused") for ramp in self.ramps],
        )
        waiting = self.webhooks.get("waiting", 0)
        yield _gauge("abreast_webhooks_waiting", "webhooks that are not delivered yet", [], [([], waiting)])
        results = ("delivered", "failed", "dropped")
        yield _counter(
            "abreast_webhooks",
            "webhooks, and failed attempts",
            ["result"],
            [([result], self.webhooks.get(result, 0)) for result in results],
        )


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _fill(CounterMetricFamily(name, text, labels=labels), samples)


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _fill(GaugeMetricFamily(name, text, labels=labels), samples)


def _fill(family: CounterMetricFamily | GaugeMetricFamily, samples: Iterable[Sample]) -> Metric:
    for labels, value in samples:
        family.add_metric(list(labels), value)
    return family
