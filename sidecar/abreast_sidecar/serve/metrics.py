"""The metrics at /metrics. Each sidecar has a separate registry, so that several can run in one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from abreast_sidecar.jobs.runner import JobRunner
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
STATE_COUNTERS = {  # name: description, labels
    "abreast_ledger_pairs": ("sampled requests in the ledger, by outcome", ("service", "outcome")),
    "abreast_envoy_sampled": ("sampled requests, as counted by Envoy", ("service",)),
    "abreast_captures": ("captures that arrived in Redis, by result", ("service", "result")),
    "abreast_dropped_captures": ("lost captures, by stage and reason", ("service", "stage", "reason")),
    "abreast_rejected_rollbacks": ("rollbacks in Redis that no sidecar has stored", ("reason",)),
    "abreast_webhooks": ("webhooks, and failed attempts", ("result",)),
}
STATE_GAUGES = {
    "abreast_unaccounted": ("sampled requests without a row in the ledger: in flight, or lost", ("service",)),
    "abreast_surplus": ("pairs in the ledger beyond Envoy's count: captures came past Envoy", ("service",)),
    "abreast_ignored_services": ("services with data in Redis beyond the limit, which no sidecar reads", ()),
    "abreast_dead_letters": ("entries that could not be compared", ("service",)),
    "abreast_ledger_clock_ahead_seconds": ("difference between the clocks of Postgres and of this sidecar", ()),
    "abreast_traffic_version": ("version of the traffic settings", ("service",)),
    "abreast_traffic_share": ("traffic settings, 0 to 1", ("service", "share")),
    "abreast_envoys": ("Envoys that are connected to this sidecar", ("service", "state")),
    "abreast_leader": ("1 if this sidecar runs guard, ramps and webhooks", ()),
    "abreast_guard_mode": ("1 for the mode of the guard", ("service", "mode")),
    "abreast_guard_breached": ("1 if a rule of the guard is breached", ("service",)),
    "abreast_guard_blind": ("1 if the guard is blind", ("service",)),
    "abreast_ramp_step": ("step of the active ramp, from 1", ("service",)),
    "abreast_ramp_paused": ("1 if the active ramp is paused", ("service",)),
    "abreast_verdict": ("1 for the verdict with the default budget, at most 10 seconds old", ("service", "verdict")),
    "abreast_webhooks_waiting": ("webhooks that are not delivered yet", ()),
}

Samples = Iterable[tuple[Sequence[str], float]]  # values of the labels, and of the metric


class Metrics:
    def __init__(self, control: TrafficController, leader_tasks: LeaderTasks, job_runner: JobRunner) -> None:
        self.registry = registry = CollectorRegistry()
        self.rpc_count = Counter("abreast_rpcs", "finished gRPC calls", ["method", "code"], registry=registry)
        self.rpc_duration = Histogram(
            "abreast_rpc_seconds",
            "duration of gRPC calls",
            ["method"],
            buckets=RPC_DURATION_BUCKETS_S,
            registry=registry,
        )
        self.ready = Gauge("abreast_ready", "1 if the part is ready", ["part"], registry=registry)
        self.state = StateMetrics(control, leader_tasks, job_runner)
        registry.register(self.state)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        name = method.lstrip("/")
        self.rpc_count.labels(name, code).inc()
        if code != "CANCELLED":  # clients cancel streams when they like
            self.rpc_duration.labels(name).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class StateMetrics(Collector):
    """Counts of the ledger, traffic settings, guards, ramps and webhooks.

    All sidecars report the same, except for their Envoys and the leader. Take the metrics of one; don't add them up.
    """

    def __init__(self, control: TrafficController, leader_tasks: LeaderTasks, job_runner: JobRunner) -> None:
        self.control = control
        self.job_runner = job_runner
        self.leader_tasks = leader_tasks
        self.tallies: list[tuple[str, str, int]] = []  # service, outcome, pairs
        self.accounts: list[CaptureAccounting] = []
        self.drops: list[Drop] = []
        self.clock_ahead_s = 0.0
        self.guards: list[Guard] = []
        self.ramps: list[Ramp] = []
        self.webhooks: dict[str, int] = {}
        self.verdicts: dict[str, str] = {}  # by service

    async def read(self, reader: LedgerReader, rollout: RolloutService) -> None:
        """Read the ledger. If this raises LedgerError, the metrics keep the previous state."""
        self.tallies = await reader.read_tallies()
        self.accounts, self.drops = await reader.read_accounts(), await reader.list_drops()
        self.clock_ahead_s = await reader.measure_clock_ahead()
        self.guards = await rollout.list_guards()
        self.ramps = await rollout.list_active_ramps()
        self.webhooks = await reader.count_webhooks()

    def collect(self) -> Iterable[Metric]:
        for name, samples in (
            *self._list_ledger_samples(),
            *self._list_traffic_samples(),
            *self._list_rollout_samples(),
        ):
            metric: CounterMetricFamily | GaugeMetricFamily
            if name in STATE_COUNTERS:
                description, labels = STATE_COUNTERS[name]
                metric = CounterMetricFamily(name, description, labels=labels)
            else:
                description, labels = STATE_GAUGES[name]
                metric = GaugeMetricFamily(name, description, labels=labels)
            for label_values, value in samples:
                metric.add_metric(label_values, value)
            yield metric

    def _list_ledger_samples(self) -> Iterator[tuple[str, Samples]]:
        accounts = self.accounts
        counted = [account for account in accounts if account.envoy_sampled is not None]
        yield "abreast_ledger_pairs", [((service, outcome), pairs) for service, outcome, pairs in self.tallies]
        yield "abreast_envoy_sampled", [((account.service,), account.envoy_sampled or 0) for account in counted]
        yield "abreast_unaccounted", [((account.service,), account.unaccounted or 0) for account in counted]
        yield "abreast_surplus", [((account.service,), account.surplus) for account in counted]
        yield "abreast_dead_letters", [((account.service,), account.dead_letters) for account in accounts]
        captures = [
            ((account.service, result), getattr(account, result))
            for account in accounts
            for result in ("received", "duplicate", "late")
        ]
        yield "abreast_captures", captures
        yield "abreast_dropped_captures", [((drop.service, drop.stage, drop.reason), drop.count) for drop in self.drops]
        yield "abreast_ignored_services", [((), self.job_runner.shards.ignored_services)]
        yield "abreast_ledger_clock_ahead_seconds", [((), self.clock_ahead_s)]
        yield (
            "abreast_verdict",
            [
                ((service, state), state == verdict)
                for service, verdict in self.verdicts.items()
                for state in ("PASS", "FAIL", "INCONCLUSIVE")
            ],
        )

    def _list_traffic_samples(self) -> Iterator[tuple[str, Samples]]:
        versions, shares, envoys = [], [], []
        for traffic in self.control.list_current():
            service = traffic.service
            versions.append(((service,), traffic.version))
            shares += [
                ((service, "new"), traffic.shares.new_share / TOTAL_WEIGHT),
                ((service, "sample_safe"), traffic.shares.sample_safe / MILLION),
                ((service, "sample_unsafe"), traffic.shares.sample_unsafe / MILLION),
                ((service, "baseline"), traffic.shares.baseline_share / MILLION),
            ]
            statuses = self.control.connections.list_all(service)
            envoys += [
                ((service, "connected"), len(statuses)),
                ((service, "acknowledged"), sum(item.acknowledged == traffic.stamp for item in statuses)),
                ((service, "refused"), sum(bool(item.error) for item in statuses)),
            ]
        yield "abreast_traffic_version", versions
        yield "abreast_traffic_share", shares
        yield "abreast_envoys", envoys
        rejected = self.control.pending_rollbacks.rejected_counts
        yield "abreast_rejected_rollbacks", [((reason,), rejected[reason]) for reason in ("forged", "replayed")]

    def _list_rollout_samples(self) -> Iterator[tuple[str, Samples]]:
        yield "abreast_leader", [((), self.leader_tasks.is_leader)]
        modes = [((guard.service, mode), guard.policy.mode == mode) for guard in self.guards for mode in GUARD_MODES]
        yield "abreast_guard_mode", modes
        for state in ("breached", "blind"):
            samples = [((guard.service,), guard.policy.mode != "off" and guard.state == state) for guard in self.guards]
            yield f"abreast_guard_{state}", samples
        yield "abreast_ramp_step", [((ramp.service,), ramp.step + 1) for ramp in self.ramps]
        yield "abreast_ramp_paused", [((ramp.service,), ramp.state == "paused") for ramp in self.ramps]
        yield "abreast_webhooks_waiting", [((), self.webhooks.get("waiting", 0))]
        results = ("delivered", "failed", "dropped")
        yield "abreast_webhooks", [((result,), self.webhooks.get(result, 0)) for result in results]
