"""Looks at the evidence for every guard, and acts on it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import structlog

from abreast_sidecar.aio import Outage, cancel_and_wait, wait_or_stop
from abreast_sidecar.errors import LedgerError, SidecarError
from abreast_sidecar.rollout import completeness as flow
from abreast_sidecar.rollout import transitions as acts
from abreast_sidecar.rollout.completeness import CompletenessGap, EnvoyReport
from abreast_sidecar.rollout.guard import (
    GUARD_RULE_NAMES,
    WINDOWS_PER_RULE,
    Breach,
    GuardRuleName,
    WindowCounts,
    find_breaches,
    window_starts,
)
from abreast_sidecar.rollout.leader import LEADER_HEARTBEAT_S, LeaderLease, LeadershipLostError
from abreast_sidecar.rollout.ramp import Observation, Ramp, RampDecision, RampEvidence, decide_ramp, format_percent
from abreast_sidecar.rollout.transitions import RAMP_ACTOR, Guard, RampTransition
from abreast_sidecar.rollout.webhooks import WebhookSender
from abreast_sidecar.settings import Settings
from abreast_sidecar.stats.latency import MIN_BASELINE_PAIRS, MIN_SLOWER_US
from abreast_sidecar.stats.verdict import Completeness
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import VerdictEvidence, Window
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote, Traffic

MAX_GUARD_PAIRS = 20_000  # of the newest pairs, in one look
GUARD_STATUS_INTERVAL_S = 2.0  # seconds between two notes of how things stand
GAP_WINDOW_S = 60.0  # seconds of which the ledger has to be whole
ARRIVAL_LAG_S = 5.0  # seconds that a request may take to the ledger
MIN_SAMPLED_REQUESTS = 50  # sampled requests, before anything is said about how whole the ledger is
TALLY_COLUMNS = ("live", "new_errors", "old_errors", "compared", "mismatches", "timed", "slower")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GuardStatus:
    state: str  # idle, clear, breached or blind
    message: str


class GuardController:
    def __init__(
        self, database: Database, lease: LeaderLease, control: TrafficController, envoy_admin: Iterable[str]
    ) -> None:
        self._database = database
        self._lease = lease
        self._control = control
        self._admin_addresses = tuple(envoy_admin)
        self._exposed_since: dict[tuple[str, int], datetime] = {}  # service and version of its traffic
        self._gap_history: dict[str, deque[tuple[float, CompletenessGap]]] = {}
        self._last_status: dict[str, tuple[float, GuardStatus]] = {}

    async def reconcile(self) -> None:
        traffic_by_service = {
            snapshot.traffic.service: snapshot.traffic for snapshot in await self._control.repository.read()
        }
        for row in await self._database.fetch_all("guard_read", {"service": None}):
            try:
                await self._reconcile_guard(acts.to_guard(row), traffic_by_service.get(row["service"]))
            except SidecarError:
                raise
            except Exception:  # one service's must not blind the others'
                log.exception("a guard failed", service=row["service"])

    async def _reconcile_guard(self, guard: Guard, traffic: Traffic | None) -> None:
        if guard.policy.mode != "off" and traffic is not None:
            await self._write_status(guard, await self._evaluate(guard, traffic))

    async def _evaluate(self, guard: Guard, traffic: Traffic) -> GuardStatus | None:
        """None where it has acted, and said so."""
        if not traffic.shares.new_share:
            return GuardStatus("idle", "all users are on old")
        rules = list_ready_rules(guard)
        tallies = await self._read_tallies(guard, traffic, rules) if rules else {}
        for breach in find_breaches(guard.policy, tallies):
            if await self._fire(guard, traffic, breach):
                return None
        if len(rules) < len(GUARD_RULE_NAMES):
            cooling_rules = ", ".join(rule for rule in GUARD_RULE_NAMES if rule not in rules)
            return GuardStatus("breached", f"cooling down after: {cooling_rules}")
        if blind_reason := await self._explain_blindness(guard):
            return GuardStatus("blind", blind_reason)
        return GuardStatus("clear", summarise_tallies(tallies))

    async def _read_tallies(
        self, guard: Guard, traffic: Traffic, rules: Sequence[GuardRuleName]
    ) -> dict[GuardRuleName, list[WindowCounts]]:
        assert guard.now is not None
        assert guard.since is not None
        since = max(guard.since, await self._read_exposed_since(traffic))
        current_time = guard.now + timedelta(seconds=await self._read_clock_lag(guard))
        params = {
            "service": guard.service,
            "now": current_time,
            "starts": [
                start for rule in rules for start in window_starts(guard.policy.rule(rule), current_time, since)
            ],
            "slower": guard.policy.slower.limit,
            "least_copies": MIN_BASELINE_PAIRS,
            "min_slower_us": MIN_SLOWER_US,
            "limit": MAX_GUARD_PAIRS,
        }
        rows = await self._database.fetch_all("guard_counts", params)
        tallies = [WindowCounts(**{name: row[name] for name in TALLY_COLUMNS}) for row in rows]
        return {
            rule: tallies[index * WINDOWS_PER_RULE : (index + 1) * WINDOWS_PER_RULE] for index, rule in enumerate(rules)
        }

    async def _read_clock_lag(self, guard: Guard) -> float:
        """Seconds by which Postgres's clock is behind the pairs', by this machine's clock too: windows would hold what is
        long ago.
        """
        newest = await self._database.fetch_one(
            "pair_newest_age", {"service": guard.service, "sidecar_time": datetime.now(UTC)}
        )
        return flow.measure_clock_lag(newest["age"] if newest else None)

    async def _read_exposed_since(self, traffic: Traffic) -> datetime:
        """When users were let onto new."""
        key = (traffic.service, traffic.version)
        if key not in self._exposed_since:
            row = await self._database.fetch_one("guard_exposed_since", {"service": traffic.service})
            exposed_at = row["exposed"] if row and row["exposed"] else traffic.updated_at
            self._exposed_since = {
                entry_key: at for entry_key, at in self._exposed_since.items() if entry_key[0] != key[0]
            } | {key: exposed_at}
        return self._exposed_since[key]

    async def _fire(self, guard: Guard, traffic: Traffic, breach: Breach) -> bool:
        async with self._lease.transaction() as connection:
            has_fired = await acts.fire_guard(connection, guard, traffic.version, breach.rule, breach.text)
        if has_fired:
            message = "the guard rolls back" if guard.policy.mode == "acting" else "the guard would roll back"
            log.warning(message, service=guard.service, rule=breach.rule, reason=breach.text)
            self._last_status.pop(guard.service, None)
        return has_fired

    async def _explain_blindness(self, guard: Guard) -> str:
        reports = await self._database.fetch_all("envoy_reports", {"service": guard.service})
        if silence := flow.describe_stale_counts((EnvoyReport(**row) for row in reports), self._admin_addresses):
            return silence
        (row,) = await self._database.fetch_all("ledger_gap", {"service": guard.service})
        return self._check_completeness(guard, CompletenessGap(row["sampled"], row["written"]))

    def _check_completeness(self, guard: Guard, current_gap: CompletenessGap) -> str:
        """Of the requests that Envoy sampled within the last minute, and had time to arrive."""
        history = self._gap_history.setdefault(guard.service, deque())
        history.append((time.monotonic(), current_gap))
        while time.monotonic() - history[0][0] > GAP_WINDOW_S:
            history.popleft()
        oldest_gap = history[0][1]
        cutoff_gap = next((gap for at, gap in reversed(history) if time.monotonic() - at >= ARRIVAL_LAG_S), None)
        if cutoff_gap is None or cutoff_gap.sampled is None or oldest_gap.sampled is None:
            return ""
        sampled_count, arrived_count = (
            cutoff_gap.sampled - oldest_gap.sampled,
            current_gap.arrived - oldest_gap.arrived,
        )
        if sampled_count < MIN_SAMPLED_REQUESTS or arrived_count >= sampled_count * guard.policy.min_completeness:
            return ""
        return f"of the last {sampled_count:,} requests that Envoy sampled the ledger has {max(arrived_count, 0):,}"

    async def _write_status(self, guard: Guard, status: GuardStatus | None) -> None:
        if status is None:
            return
        last_monotonic, last_status = self._last_status.get(guard.service, (0.0, None))
        is_changed = last_status is None or last_status.state != status.state
        if not is_changed and time.monotonic() - last_monotonic < GUARD_STATUS_INTERVAL_S:
            return
        if is_changed and status.state == "blind":
            log.warning("the guard is blind", service=guard.service, reason=status.message)
        values = {"service": guard.service, "since": guard.since, "state": status.state, "message": status.message}
        await self._database.execute("guard_status_set", values)
        self._last_status[guard.service] = (time.monotonic(), status)


def list_ready_rules(guard: Guard) -> list[GuardRuleName]:
    """The rules that are not cooling down."""
    ready_rules = []
    for rule in GUARD_RULE_NAMES:
        fired_at = guard.fired_at.get(rule)
        cooldown = timedelta(seconds=guard.policy.rule(rule).cooldown)
        if fired_at is None or (guard.now is not None and fired_at + cooldown <= guard.now):
            ready_rules.append(rule)
    return ready_rules


def summarise_tallies(tallies: dict[GuardRuleName, list[WindowCounts]]) -> str:
    errors, mismatches, slower = (tallies[rule][0] for rule in GUARD_RULE_NAMES)
    return (
        f"new failed {errors.new_errors:,} of {errors.live:,} users' requests that old answered;"
        f" {mismatches.mismatches:,} of {mismatches.compared:,} pairs have unexplained mismatches;"
        f" {slower.slower:,} of {slower.timed:,} are slower"
    )


PendingCounter: TypeAlias = Callable[[str], Awaitable[int | None]]  # requests on their way to a service's ledger


class RampController:
    def __init__(
        self,
        database: Database,
        lease: LeaderLease,
        control: TrafficController,
        count_pending: PendingCounter,
        envoy_admin: Iterable[str],
    ) -> None:
        self._database = database
        self._reader = LedgerReader(database)
        self._lease = lease
        self._control = control
        self._count_pending = count_pending
        self._admin_addresses = tuple(envoy_admin)

    async def reconcile(self) -> None:
        rows = await self._database.fetch_all("ramps_active")
        for error in await asyncio.gather(
            *(self._reconcile_ramp(acts.to_ramp(row), row["now"]) for row in rows), return_exceptions=True
        ):
            if error is not None:  # only now that the others had their turn
                raise error

    async def _reconcile_ramp(self, ramp: Ramp, current_time: datetime) -> None:
        (snapshot,) = await self._control.repository.read(ramp.service)
        if acts.is_superseded(ramp, snapshot.traffic):
            await self._end_superseded(ramp)
            return
        try:
            decision = decide_ramp(ramp, await self._observe(ramp, current_time))
        except LedgerError as error:  # such as more rows than can be read in time
            await self._write_status(ramp, RampDecision("wait", f"the evidence can't be read: {error}", "INCONCLUSIVE"))
            raise
        if decision.action != "wait":
            await self._apply_decision(ramp, snapshot.traffic, decision)
            return
        await self._write_status(ramp, decision)
        if ramp.started_gap is None or ramp.step_gap is None:
            await self._database.execute("ramp_gap_set", {"id": ramp.id, "service": ramp.service})

    async def _write_status(self, ramp: Ramp, decision: RampDecision) -> None:
        values = {"id": ramp.id, "verdict": decision.verdict, "message": decision.reason}
        await self._database.execute("ramp_status_set", values)

    async def _observe(self, ramp: Ramp, current_time: datetime) -> Observation:
        """Both windows end now: a look is about one moment."""
        pending = await self._count_pending(ramp.service)
        slower = ramp.plan.budget.max_slower
        total = await self._reader.read_evidence(ramp.service, Window(ramp.started_at), slower)
        step = await self._reader.read_evidence(ramp.service, Window(ramp.step_at), slower)
        reports = await self._database.fetch_all("envoy_reports", {"service": ramp.service})
        newest_pair = await self._database.fetch_one(
            "pair_newest_age", {"service": ramp.service, "sidecar_time": datetime.now(UTC)}
        )
        return Observation(
            observed_at=current_time,
            since_start=_to_ramp_evidence(total, ramp.started_gap, pending),
            since_step=_to_ramp_evidence(step, ramp.step_gap, pending),
            stale_counts_reason=flow.describe_stale_counts(
                (EnvoyReport(**row) for row in reports), self._admin_addresses
            ),
            newest_pair_age_s=newest_pair["age"] if newest_pair else None,
        )

    async def _apply_decision(self, observed_ramp: Ramp, traffic: Traffic, decision: RampDecision) -> None:
        """Only where nothing has changed since the look, and no rollback waits to be recorded."""
        async with self._lease.transaction() as connection:
            before = await acts.lock_traffic(connection, observed_ramp.service)
            ramp = await acts.lock_ramp(connection, observed_ramp.service)
            has_pending_rollback = self._control.pending_rollbacks.get(observed_ramp.service) is not None
            if (
                has_pending_rollback
                or before.version != traffic.version
                or ramp is None
                or not _is_unchanged(ramp, observed_ramp)
            ):
                return
            transition = replace(plan_transition(ramp, before, decision), verdict=decision.verdict)
            await acts.apply_transition(connection, before, ramp, transition, AuditNote(RAMP_ACTOR, decision.reason))
        log.info(
            "the ramp moves",
            service=observed_ramp.service,
            action=transition.action,
            said=transition.message,
            reason=decision.reason,
        )

    async def _end_superseded(self, observed_ramp: Ramp) -> None:
        """Somebody else decided about the users: that stands."""
        async with self._lease.transaction() as connection:
            before = await acts.lock_traffic(connection, observed_ramp.service)
            ramp = await acts.lock_ramp(connection, observed_ramp.service)
            if ramp is None or not _is_unchanged(ramp, observed_ramp) or not acts.is_superseded(ramp, before):
                return
            reason = await self._describe_superseding_change(observed_ramp.service)
            transition = RampTransition(
                "ramp_end", f"ended at {format_percent(ramp.share)}: {reason}", state="superseded"
            )
            await acts.apply_transition(connection, before, ramp, transition, AuditNote(RAMP_ACTOR, reason))
        log.info("the ramp has ended", service=observed_ramp.service, reason=reason)

    async def _describe_superseding_change(self, service: str) -> str:
        events = await self._control.repository.list_events(service, before_id=None, limit=20)
        for event in events:
            if event.before is None or event.before.shares.new_share != event.after.shares.new_share:
                return f"{event.action} by {event.actor}" + (f": {event.reason}" if event.reason else "")
        return "somebody else set the traffic"


def plan_transition(ramp: Ramp, before: Traffic, decision: RampDecision) -> RampTransition:
    if decision.action == "roll back":
        message = f"rolled back from {format_percent(ramp.share)}: {decision.reason}"
        return RampTransition("rollback", message, state="failed", shares=acts.roll_back_shares(before.shares))
    if decision.action == "succeed":
        return RampTransition("ramp_succeed", f"all {len(ramp.plan.steps)} steps are done", state="succeeded")
    step = ramp.step + 1
    share = ramp.plan.steps[step]
    return RampTransition(
        "ramp_step",
        f"step {step + 1} of {len(ramp.plan.steps)}: {format_percent(share)}",
        step=step,
        shares=replace(before.shares, new_share=share, rolled_back=False),
        restarts_step=True,
    )


def _is_unchanged(ramp: Ramp, observed_ramp: Ramp) -> bool:
    """Whether it is where it was looked at; what it said last does not matter."""
    return (ramp.id, ramp.state, ramp.step, ramp.step_at) == (
        observed_ramp.id,
        observed_ramp.state,
        observed_ramp.step,
        observed_ramp.step_at,
    )


def _to_ramp_evidence(evidence: VerdictEvidence, gap_before: int | None, pending: int | None) -> RampEvidence:
    arrived_count = evidence.written + (pending or 0)
    missing_count = flow.count_lost_requests(gap_before, CompletenessGap(evidence.envoy_sampled, arrived_count))
    sampled_count = None if missing_count is None else evidence.rows + missing_count
    return RampEvidence(evidence.endpoints, Completeness(sampled_count, evidence.accounted))


RECONCILE_INTERVAL_S = 0.5  # seconds between two looks at the evidence
DELIVERY_INTERVAL_S = 0.5  # seconds between two looks at what is to be told
GUARD_REST_FACTOR = 4.0  # a look is followed by so many times its own length of rest: the database has other work
RAMP_REST_FACTOR = 10.0  # a ramp looks at all since it began


class LeaderTasks:
    def __init__(self, settings: Settings, control: TrafficController, count_pending: PendingCounter) -> None:
        self.lease = LeaderLease(settings.direct_url)
        self._database = Database(settings.postgres_url)
        self._guard_controller = GuardController(self._database, self.lease, control, settings.envoy_admin)
        self._ramp_controller = RampController(self._database, self.lease, control, count_pending, settings.envoy_admin)
        self._settings = settings
        self._outage = Outage("postgres", by="steering")

    @property
    def is_leader(self) -> bool:
        return self.lease.is_held

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set. Whoever has the seat acts, the others are ready to."""
        await self._database.open()
        try:
            while not stop.is_set():
                try:
                    if await self.lease.acquire():
                        await self._lead(stop)
                    self._outage.record_success()
                    await wait_or_stop(stop, LEADER_HEARTBEAT_S)
                except LedgerError as error:
                    self._outage.record_failure(error)
                    await self._outage.back_off(stop)
        finally:
            await self.lease.release()
            await self._database.close()

    async def _lead(self, stop: asyncio.Event) -> None:
        """Until the seat is lost."""
        log.info("this sidecar acts for guard, ramps and webhooks")
        webhook_sender = WebhookSender(self._database, self._settings.webhook_urls, self._settings.webhook_secret)
        tasks = [
            asyncio.create_task(part)
            for part in (
                self._send_heartbeats(stop),
                self._run_periodically(
                    "guard", self._guard_controller.reconcile, RECONCILE_INTERVAL_S, GUARD_REST_FACTOR, stop
                ),
                self._run_periodically(
                    "ramp", self._ramp_controller.reconcile, RECONCILE_INTERVAL_S, RAMP_REST_FACTOR, stop
                ),
                self._run_periodically("webhooks", webhook_sender.deliver, DELIVERY_INTERVAL_S, 0.0, stop),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        except LeadershipLostError as error:
            log.warning("this sidecar does not act any more", error=str(error))
        finally:
            await cancel_and_wait(*tasks)

    async def _send_heartbeats(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.lease.heartbeat()
            await wait_or_stop(stop, LEADER_HEARTBEAT_S)

    async def _run_periodically(
        self, name: str, job: Callable[[], Awaitable[None]], period_s: float, rest_factor: float, stop: asyncio.Event
    ) -> None:
        outage = Outage("postgres", by=name)
        clock = asyncio.get_running_loop().time
        while not stop.is_set():
            started = clock()
            try:
                await job()
            except LeadershipLostError:
                raise
            except LedgerError as error:
                outage.record_failure(error)
                await outage.back_off(stop)
            except Exception:
                log.exception("steering failed", part=name)
                await wait_or_stop(stop, period_s)
            else:
                outage.record_success()
                await wait_or_stop(stop, max(period_s, rest_factor * (clock() - started)))
