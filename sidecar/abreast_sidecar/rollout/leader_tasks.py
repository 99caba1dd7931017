"""Runs guard, ramps and webhooks on the elected leader."""

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
from abreast_sidecar.rollout import transitions
from abreast_sidecar.rollout.completeness import (
    CompletenessGap,
    EnvoyReport,
    count_lost_requests,
    describe_stale_counts,
    measure_clock_lag,
)
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
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import Window
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import AuditNote, Traffic, TrafficChange

MAX_GUARD_PAIRS = 20_000  # the newest pairs, per evaluation
GUARD_STATUS_INTERVAL_S = 2.0
GAP_WINDOW_S = 60.0
ARRIVAL_LAG_S = 5.0  # time for a sampled request to reach the ledger
MIN_SAMPLED_REQUESTS = 50  # in the gap window, before completeness is judged
TALLY_COLUMNS = ("live", "new_errors", "old_errors", "compared", "mismatches", "timed", "slower")
RECONCILE_INTERVAL_S = 0.5
DELIVERY_INTERVAL_S = 0.5
# After each evaluation a controller pauses for this multiple of its duration, so that Postgres can do other work.
GUARD_REST_FACTOR = 4.0
RAMP_REST_FACTOR = 10.0  # a ramp reads everything since it began

log = structlog.get_logger(__name__)

PendingCounter: TypeAlias = Callable[[str], Awaitable[int | None]]  # requests of a service that are still in Redis


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
        self._exposed_since: dict[str, tuple[int, datetime]] = {}  # service → version of its traffic, and the time
        self._gap_history: dict[str, deque[tuple[float, CompletenessGap]]] = {}
        self._last_status: dict[str, tuple[float, GuardStatus]] = {}

    async def reconcile(self) -> None:
        traffic_by_service = {
            snapshot.traffic.service: snapshot.traffic for snapshot in await self._control.repository.read()
        }
        for row in await self._database.fetch_all("guard_read", {"service": None}):
            try:
                guard, traffic = transitions.to_guard(row), traffic_by_service.get(row["service"])
                if guard.policy.mode == "off" or traffic is None:
                    continue
                if status := await self._evaluate(guard, traffic):
                    await self._write_status(guard, status)
            except SidecarError:
                raise
            except Exception:  # an error in one service must not stop the guards of the others
                log.exception("guard evaluation failed", service=row["service"])

    async def _evaluate(self, guard: Guard, traffic: Traffic) -> GuardStatus | None:
        """Return the status, None if the guard fired and wrote it."""
        if not traffic.shares.new_share:
            return GuardStatus("idle", "all users are on old")
        rules = _list_ready_rules(guard)
        tallies = await self._read_tallies(guard, traffic, rules) if rules else {}
        for breach in find_breaches(guard.policy, tallies):
            if await self._fire(guard, traffic, breach):
                return None
        if len(rules) < len(GUARD_RULE_NAMES):
            cooling_rules = ", ".join(rule for rule in GUARD_RULE_NAMES if rule not in rules)
            return GuardStatus("breached", f"cooling down after: {cooling_rules}")
        if blind_reason := await self._explain_blindness(guard):
            return GuardStatus("blind", blind_reason)
        return GuardStatus("clear", _summarise_tallies(tallies))

    async def _read_tallies(
        self, guard: Guard, traffic: Traffic, rules: Sequence[GuardRuleName]
    ) -> dict[GuardRuleName, list[WindowCounts]]:
        assert guard.now is not None
        assert guard.since is not None
        since = max(guard.since, await self._read_exposed_since(traffic))
        # With Postgres's clock behind that of the pairs, windows would hold old pairs.
        clock_lag = measure_clock_lag(await _read_newest_pair_age(self._database, guard.service))
        current_time = guard.now + timedelta(seconds=clock_lag)
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

    async def _read_exposed_since(self, traffic: Traffic) -> datetime:
        """Return when the first users got new."""
        version, exposed_at = self._exposed_since.get(traffic.service, (None, traffic.updated_at))
        if version != traffic.version:
            row = await self._database.fetch_one("guard_exposed_since", {"service": traffic.service})
            exposed_at = row["exposed"] if row and row["exposed"] else traffic.updated_at
            self._exposed_since[traffic.service] = traffic.version, exposed_at
        return exposed_at

    async def _fire(self, guard: Guard, traffic: Traffic, breach: Breach) -> bool:
        async with self._lease.transaction() as connection:
            has_fired = await transitions.fire_guard(connection, guard, traffic.version, breach.rule, breach.text)
        if has_fired:
            event = "the guard rolled back" if guard.policy.mode == "acting" else "the guard would roll back"
            log.warning(event, service=guard.service, rule=breach.rule, reason=breach.text)
            self._last_status.pop(guard.service, None)
        return has_fired

    async def _explain_blindness(self, guard: Guard) -> str:
        """Return why the guard can't rely on its evidence, empty if it can."""
        reports = await self._database.fetch_all("envoy_reports", {"service": guard.service})
        if reason := describe_stale_counts((EnvoyReport(**row) for row in reports), self._admin_addresses):
            return reason
        (row,) = await self._database.fetch_all("ledger_gap", {"service": guard.service})
        return self._check_completeness(guard, CompletenessGap(row["sampled"], row["written"]))

    def _check_completeness(self, guard: Guard, current_gap: CompletenessGap) -> str:
        """Check the requests that Envoy sampled within GAP_WINDOW_S and that had time to arrive."""
        history = self._gap_history.setdefault(guard.service, deque())
        history.append((time.monotonic(), current_gap))
        while time.monotonic() - history[0][0] > GAP_WINDOW_S:
            history.popleft()
        oldest_gap = history[0][1]
        cutoff_gap = next((gap for at, gap in reversed(history) if time.monotonic() - at >= ARRIVAL_LAG_S), None)
        if cutoff_gap is None or cutoff_gap.sampled is None or oldest_gap.sampled is None:
            return ""
        sampled = cutoff_gap.sampled - oldest_gap.sampled
        arrived = current_gap.arrived - oldest_gap.arrived
        if sampled < MIN_SAMPLED_REQUESTS or arrived >= sampled * guard.policy.min_completeness:
            return ""
        return f"the ledger has {max(arrived, 0):,} of the last {sampled:,} requests that Envoy sampled"

    async def _write_status(self, guard: Guard, status: GuardStatus) -> None:
        last_monotonic, last_status = self._last_status.get(guard.service, (0.0, None))
        is_changed = last_status is None or last_status.state != status.state
        if not is_changed and time.monotonic() - last_monotonic < GUARD_STATUS_INTERVAL_S:
            return
        if is_changed and status.state == "blind":
            log.warning("the guard is blind", service=guard.service, reason=status.message)
        values = {"service": guard.service, "since": guard.since, "state": status.state, "message": status.message}
        await self._database.execute("guard_status_set", values)
        self._last_status[guard.service] = (time.monotonic(), status)


def _list_ready_rules(guard: Guard) -> list[GuardRuleName]:
    """Return the rules whose cool-down period is over."""

    def is_ready(rule: GuardRuleName) -> bool:
        fired_at = guard.fired_at.get(rule)
        cooldown = timedelta(seconds=guard.policy.rule(rule).cooldown)
        return fired_at is None or (guard.now is not None and fired_at + cooldown <= guard.now)

    return [rule for rule in GUARD_RULE_NAMES if is_ready(rule)]


def _summarise_tallies(tallies: dict[GuardRuleName, list[WindowCounts]]) -> str:
    errors, mismatches, slower = (tallies[rule][0] for rule in GUARD_RULE_NAMES)
    return (
        f"new failed {errors.new_errors:,} of {errors.live:,} users' requests that old answered;"
        f" {mismatches.mismatches:,} of {mismatches.compared:,} pairs have unexplained mismatches;"
        f" {slower.slower:,} of {slower.timed:,} are slower"
    )


async def _read_newest_pair_age(database: Database, service: str) -> float | None:
    """Return the seconds since the newest pair, None for no pair."""
    row = await database.fetch_one("pair_newest_age", {"service": service, "sidecar_time": datetime.now(UTC)})
    return row["age"] if row else None


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
        ramps = [self._reconcile_ramp(transitions.to_ramp(row), row["now"]) for row in rows]
        for error in await asyncio.gather(*ramps, return_exceptions=True):
            if error is not None:  # raised after all ramps had their turn
                raise error

    async def _reconcile_ramp(self, ramp: Ramp, current_time: datetime) -> None:
        (snapshot,) = await self._control.repository.read(ramp.service)
        if transitions.is_superseded(ramp, snapshot.traffic):
            await self._end_superseded(ramp)
            return
        try:
            decision = decide_ramp(ramp, await self._observe(ramp, current_time))
        except LedgerError as error:  # for example a timeout
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
        pending = await self._count_pending(ramp.service) or 0
        since_start = await self._read_evidence(ramp, ramp.started_at, ramp.started_gap, pending)
        since_step = await self._read_evidence(ramp, ramp.step_at, ramp.step_gap, pending)
        reports = await self._database.fetch_all("envoy_reports", {"service": ramp.service})
        return Observation(
            observed_at=current_time,
            since_start=since_start,
            since_step=since_step,
            stale_counts_reason=describe_stale_counts((EnvoyReport(**row) for row in reports), self._admin_addresses),
            newest_pair_age_s=await _read_newest_pair_age(self._database, ramp.service),
        )

    async def _read_evidence(self, ramp: Ramp, since: datetime, gap: int | None, pending: int) -> RampEvidence:
        """Read the evidence from `since` until now. `gap`: requests that were missing before."""
        evidence = await self._reader.read_evidence(ramp.service, Window(since), ramp.plan.budget.max_slower)
        lost = count_lost_requests(gap, CompletenessGap(evidence.envoy_sampled, evidence.written + pending))
        return RampEvidence(evidence.endpoints, evidence.completeness_without(lost))

    async def _apply_decision(self, observed_ramp: Ramp, traffic: Traffic, decision: RampDecision) -> None:
        """Apply the decision, unless anything changed since the observation or a rollback is pending."""
        service = observed_ramp.service
        async with self._lease.transaction() as connection:
            before = await transitions.lock_traffic(connection, service)
            ramp = await transitions.lock_ramp(connection, service)
            if ramp is None or not _is_unchanged(ramp, observed_ramp):
                return
            if before.version != traffic.version or self._control.pending_rollbacks.get(service):
                return
            transition = replace(_plan_transition(ramp, before, decision), verdict=decision.verdict)
            note = AuditNote(RAMP_ACTOR, decision.reason)
            await transitions.apply_transition(connection, before, ramp, transition, note)
        log.info("the ramp changed", service=service, action=transition.action, change=transition.message)

    async def _end_superseded(self, observed_ramp: Ramp) -> None:
        service = observed_ramp.service
        async with self._lease.transaction() as connection:
            before = await transitions.lock_traffic(connection, service)
            ramp = await transitions.lock_ramp(connection, service)
            if ramp is None or not _is_unchanged(ramp, observed_ramp) or not transitions.is_superseded(ramp, before):
                return
            reason = await self._describe_superseding_change(service)
            message = f"ended at {format_percent(ramp.share)}: {reason}"
            transition = RampTransition("ramp_end", message, state="superseded")
            await transitions.apply_transition(connection, before, ramp, transition, AuditNote(RAMP_ACTOR, reason))
        log.info("the ramp was superseded", service=service, reason=reason)

    async def _describe_superseding_change(self, service: str) -> str:
        for event in await self._control.repository.list_events(service, before_id=None, limit=20):
            if event.before is None or event.before.shares.new_share != event.after.shares.new_share:
                return f"{event.action} by {event.actor}" + (f": {event.reason}" if event.reason else "")
        return "someone else changed the traffic"


def _plan_transition(ramp: Ramp, before: Traffic, decision: RampDecision) -> RampTransition:
    if decision.action == "roll back":
        message = f"rolled back from {format_percent(ramp.share)}: {decision.reason}"
        shares = TrafficChange.rollback().apply(before.shares)
        return RampTransition("rollback", message, state="failed", shares=shares)
    step_count = len(ramp.plan.steps)
    if decision.action == "succeed":
        return RampTransition("ramp_succeed", f"all {step_count} steps are done", state="succeeded")
    step = ramp.step + 1
    share = ramp.plan.steps[step]
    return RampTransition(
        "ramp_step",
        f"step {step + 1} of {step_count}: {format_percent(share)}",
        step=step,
        shares=replace(before.shares, new_share=share, rolled_back=False),
        restarts_step=True,
    )


def _is_unchanged(ramp: Ramp, observed_ramp: Ramp) -> bool:
    """Compare all but the status."""
    return all(getattr(ramp, name) == getattr(observed_ramp, name) for name in ("id", "state", "step", "step_at"))


class LeaderTasks:
    def __init__(
        self, settings: Settings, database: Database, control: TrafficController, count_pending: PendingCounter
    ) -> None:
        self.lease = LeaderLease(settings.direct_url)
        self._database = database
        self._guard_controller = GuardController(database, self.lease, control, settings.envoy_admin)
        self._ramp_controller = RampController(database, self.lease, control, count_pending, settings.envoy_admin)
        self._settings = settings
        self._outage = Outage("postgres", by="leader election")

    @property
    def is_leader(self) -> bool:
        return self.lease.is_held

    async def run(self, stop: asyncio.Event) -> None:
        """Lead while this sidecar holds the lease, until `stop` is set."""
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

    async def _lead(self, stop: asyncio.Event) -> None:
        """Run the leader's tasks until leadership is lost."""
        log.info("this sidecar leads: it runs guard, ramps and webhooks")
        webhook_sender = WebhookSender(self._database, self._settings.webhook_urls, self._settings.webhook_secret)
        jobs = (
            ("guard", self._guard_controller.reconcile, RECONCILE_INTERVAL_S, GUARD_REST_FACTOR),
            ("ramp", self._ramp_controller.reconcile, RECONCILE_INTERVAL_S, RAMP_REST_FACTOR),
            ("webhooks", webhook_sender.deliver, DELIVERY_INTERVAL_S, 0.0),
        )
        tasks = [asyncio.create_task(_run_periodically(*job, stop)) for job in jobs]
        tasks.append(asyncio.create_task(self._send_heartbeats(stop)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except LeadershipLostError as error:
            log.warning("lost leadership", error=str(error))
        finally:
            await cancel_and_wait(*tasks)

    async def _send_heartbeats(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.lease.heartbeat()
            await wait_or_stop(stop, LEADER_HEARTBEAT_S)


async def _run_periodically(
    name: str, job: Callable[[], Awaitable[None]], interval_s: float, rest_factor: float, stop: asyncio.Event
) -> None:
    """Run the job every `interval_s` until `stop` is set. Raise LeadershipLostError, log all other errors."""
    outage = Outage("postgres", by=name)
    while not stop.is_set():
        started = time.monotonic()
        try:
            await job()
        except LeadershipLostError:
            raise
        except LedgerError as error:
            outage.record_failure(error)
            await outage.back_off(stop)
        except Exception:
            log.exception("a task of the leader failed", task=name)
            await wait_or_stop(stop, interval_s)
        else:
            outage.record_success()
            await wait_or_stop(stop, max(interval_s, rest_factor * (time.monotonic() - started)))
