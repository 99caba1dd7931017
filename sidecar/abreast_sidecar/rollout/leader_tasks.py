"""Runs guard, ramps and webhooks on the elected leader."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from math import inf
from typing import TypeAlias

import structlog

from abreast_sidecar.aio import Activity, Outage, cancel_and_wait, wait_or_stop
from abreast_sidecar.errors import LedgerError, SidecarError
from abreast_sidecar.rollout import transitions
from abreast_sidecar.rollout.completeness import (
    CompletenessGap,
    EnvoyReport,
    count_lost_requests,
    describe_envoy_trouble,
    describe_override,
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
from abreast_sidecar.rollout.leader import ELECTION_INTERVAL_S, LEADER_HEARTBEAT_S, LeaderLease, LeadershipLostError
from abreast_sidecar.rollout.ramp import Observation, Ramp, RampDecision, RampEvidence, decide_ramp, format_percent
from abreast_sidecar.rollout.transitions import RAMP_ACTOR, Guard, RampTransition
from abreast_sidecar.rollout.webhooks import WebhookSender
from abreast_sidecar.settings import Settings
from abreast_sidecar.stats.latency import MIN_BASELINE_PAIRS, MIN_SLOWER_US
from abreast_sidecar.stats.verdict import count_surplus, describe_surplus
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import Window
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.model import MILLION, SAMPLING_ACTOR, AuditNote, Traffic, TrafficChange, find_rule_share
from abreast_sidecar.traffic.repository import insert_event, update_shares

MAX_GUARD_PAIRS = 20_000  # the newest pairs, per evaluation
GUARD_STATUS_INTERVAL_S = 2.0
TRUST_CHECK_INTERVAL_S = 5.0  # counts the pairs of a whole window
GAP_WINDOW_S = 60.0
ARRIVAL_LAG_S = 5.0  # time for a sampled request to reach the ledger
MIN_SAMPLED_REQUESTS = 50  # in the gap window, before completeness is judged
TALLY_COLUMNS = ("live", "new_errors", "old_errors", "compared", "mismatches", "timed", "slower")
# Intervals of the leader's tasks, and while nothing happens; docs/scaling.md has the reasons.
GUARD_INTERVALS_S = 0.5, 15.0
RAMP_INTERVALS_S = 1.0, 15.0
DELIVERY_INTERVALS_S = 0.5, 2.0
SAMPLING_INTERVALS_S = 2.0, 30.0
SHED_WINDOW_S = 30.0
MAX_SHED_SHARE = 0.1  # a share of the copies in the window
MIN_SHED_REQUESTS = 100  # sampled requests in the window, before the sampling changes
SAMPLING_MARGIN = 0.9  # part of the copies that did not queue
MIN_SAMPLE_SHARE = MILLION // 1000  # the sampling never falls lower
# After each evaluation a controller pauses for this multiple of its duration, so that Postgres can do other work.
GUARD_REST_FACTOR = 4.0
RAMP_REST_FACTOR = 10.0  # a ramp reads everything since it began

log = structlog.get_logger(__name__)

PendingCounter: TypeAlias = Callable[[str], Awaitable[int | None]]  # requests of a service that are still in Redis
LeaderJob: TypeAlias = Callable[[], Awaitable[bool | None]]
DelayDescriber: TypeAlias = Callable[[str], Awaitable[str]]  # why the ledger of a service lags behind Redis, or ""


@dataclass(frozen=True, slots=True)
class GuardStatus:
    state: str  # idle, clear, breached or blind
    message: str


class GuardController:
    def __init__(
        self,
        database: Database,
        lease: LeaderLease,
        control: TrafficController,
        envoy_admin: Iterable[str],
        describe_delay: DelayDescriber,
    ) -> None:
        self._database = database
        self._lease = lease
        self._control = control
        self._admin_addresses = tuple(envoy_admin)
        self._describe_delay = describe_delay
        self._exposed_since: dict[str, tuple[str, datetime]] = {}  # service → stamp of its traffic, and the time
        self._gap_history: dict[str, deque[tuple[float, CompletenessGap]]] = {}
        self._last_status: dict[str, tuple[float, GuardStatus]] = {}
        self._last_distrust: dict[str, tuple[float, str]] = {}  # service → time (monotonic), and the reason

    async def reconcile(self) -> bool:
        """Check each service. Return whether a guard watches users on new."""
        rows = await self._database.fetch_all("guard_read", {"service": None})
        if all(row["policy"].get("mode") == "off" for row in rows):
            return False
        is_watching = False
        snapshots = await self._control.repository.read(None, {})
        traffic_by_service = {snapshot.traffic.service: snapshot.traffic for snapshot in snapshots}
        for row in rows:
            try:
                guard, traffic = transitions.to_guard(row), traffic_by_service.get(row["service"])
                if guard.policy.mode == "off" or traffic is None:
                    continue
                is_watching = is_watching or traffic.shares.new_share > 0
                if status := await self._evaluate(guard, traffic):
                    await self._write_status(guard, status)
            except SidecarError:
                raise
            except Exception:  # an error in one service must not stop the guards of the others
                log.exception("guard evaluation failed", service=row["service"])
        return is_watching

    async def _evaluate(self, guard: Guard, traffic: Traffic) -> GuardStatus | None:
        """Return the status, None if the guard fired and wrote it."""
        if not traffic.shares.new_share:
            override = describe_override(await self._list_envoy_reports(guard.service))
            return GuardStatus("blind", override) if override else GuardStatus("idle", "all users are on old")
        rules = _list_ready_rules(guard)
        tallies = await self._read_tallies(guard, traffic, rules) if rules else {}
        breaches = find_breaches(guard.policy, tallies)
        if distrust_reason := await self._explain_distrust(guard, traffic, is_breached=bool(breaches)):
            return GuardStatus("blind", distrust_reason)
        for breach in breaches:
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
        stamp, exposed_at = self._exposed_since.get(traffic.service, (None, traffic.updated_at))
        if stamp != traffic.stamp:
            row = await self._database.fetch_one("guard_exposed_since", {"service": traffic.service})
            exposed_at = row["exposed"] if row and row["exposed"] else traffic.updated_at
            self._exposed_since[traffic.service] = traffic.stamp, exposed_at
        return exposed_at

    async def _fire(self, guard: Guard, traffic: Traffic, breach: Breach) -> bool:
        async with self._lease.transaction() as connection:
            has_fired = await transitions.fire_guard(connection, guard, traffic, breach.rule, breach.text)
        if has_fired:
            event = "the guard rolled back" if guard.policy.mode == "acting" else "the guard would roll back"
            log.warning(event, service=guard.service, rule=breach.rule, reason=breach.text)
            self._last_status.pop(guard.service, None)
        return has_fired

    async def _explain_distrust(self, guard: Guard, traffic: Traffic, *, is_breached: bool) -> str:
        """Return why the guard must not act on its evidence, empty if it may.

        Without a breach, the result may be TRUST_CHECK_INTERVAL_S old.
        """
        checked_at, reason = self._last_distrust.get(guard.service, (-inf, ""))
        if is_breached or time.monotonic() - checked_at >= TRUST_CHECK_INTERVAL_S:
            reason = await self._describe_delay(guard.service) or await self._describe_surplus(guard, traffic)
            self._last_distrust[guard.service] = time.monotonic(), reason
        return reason

    async def _describe_surplus(self, guard: Guard, traffic: Traffic) -> str:
        """Compare the pairs of the longest window with Envoy's count. Forged pairs could cause a rollback, or hide a defect."""
        assert guard.now is not None
        assert guard.since is not None
        longest_s = max(guard.policy.rule(rule).window for rule in GUARD_RULE_NAMES)
        start = max(guard.now - timedelta(seconds=longest_s), guard.since, await self._read_exposed_since(traffic))
        if await self._explain_envoy_trouble(guard):
            return ""  # without counts, users still need the guard
        row = await self._database.fetch_row("evidence_surplus", {"service": guard.service, "start": start})
        surplus = count_surplus(row["sampled"], row["rows"], row["tolerance"])
        is_suspicious = surplus > (1 - guard.policy.min_completeness) * row["sampled"]
        return describe_surplus(surplus, row["sampled"]) if is_suspicious else ""

    async def _explain_blindness(self, guard: Guard) -> str:
        """Return why the guard can't rely on its evidence, empty if it can."""
        if reason := await self._explain_envoy_trouble(guard):
            return reason
        (row,) = await self._database.fetch_all("ledger_gap", {"service": guard.service})
        return self._check_completeness(guard, CompletenessGap(row["sampled"], row["written"]))

    async def _explain_envoy_trouble(self, guard: Guard) -> str:
        return describe_envoy_trouble(await self._list_envoy_reports(guard.service), self._admin_addresses)

    async def _list_envoy_reports(self, service: str) -> list[EnvoyReport]:
        return [EnvoyReport(**row) for row in await self._database.fetch_all("envoy_reports", {"service": service})]

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

    async def reconcile(self) -> bool:
        """Check each active ramp. Return whether there is any."""
        rows = await self._database.fetch_all("ramps_active")
        ramps = [self._reconcile_ramp(transitions.to_ramp(row), row["now"]) for row in rows]
        for error in await asyncio.gather(*ramps, return_exceptions=True):
            if error is not None:  # raised after all ramps had their turn
                raise error
        return bool(rows)

    async def _reconcile_ramp(self, ramp: Ramp, current_time: datetime) -> None:
        (snapshot,) = await self._control.repository.read(ramp.service, {})
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
            stale_counts_reason=describe_envoy_trouble((EnvoyReport(**row) for row in reports), self._admin_addresses),
            newest_pair_age_s=await _read_newest_pair_age(self._database, ramp.service),
        )

    async def _read_evidence(self, ramp: Ramp, since: datetime, gap: int | None, pending: int) -> RampEvidence:
        """Read the evidence from `since` until now. `gap`: requests that were missing before."""
        evidence = await self._reader.read_evidence(ramp.service, Window(since), ramp.plan.budget.max_slower)
        lost = count_lost_requests(gap, CompletenessGap(evidence.envoy_sampled, evidence.written + pending))
        return RampEvidence(evidence.endpoints, evidence.completeness_without(lost), evidence.service)

    async def _apply_decision(self, observed_ramp: Ramp, traffic: Traffic, decision: RampDecision) -> None:
        """Apply the decision, unless anything changed since the observation or a rollback is pending."""
        service = observed_ramp.service
        async with self._lease.transaction() as connection:
            before = await transitions.lock_traffic(connection, service)
            ramp = await transitions.lock_ramp(connection, service)
            if ramp is None or not _is_unchanged(ramp, observed_ramp):
                return
            if before != traffic or self._control.pending_rollbacks.get(service):
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


class SamplingController:
    """Lowers the share of safe requests that are mirrored, and those of all rules, while copies queue.

    It does so once, until someone else changes the traffic: if copies still queue, fewer requests don't help. It never
    raises a share.
    """

    def __init__(self, database: Database, lease: LeaderLease, control: TrafficController) -> None:
        self._database = database
        self._lease = lease
        self._control = control

    async def reconcile(self) -> None:
        for snapshot in await self._control.repository.read(None, {}):
            traffic = snapshot.traffic
            if not traffic.shares.drill_share:
                parameters = {"service": traffic.service, "changed": traffic.updated_at, "seconds": SHED_WINDOW_S}
                counts = await self._database.fetch_row("shed_copies", parameters)
                if counts["sampled"] >= MIN_SHED_REQUESTS and counts["shed"] > MAX_SHED_SHARE * counts["sampled"]:
                    await self._lower(traffic, counts["shed"], counts["sampled"])

    async def _lower(self, observed: Traffic, shed: int, sampled: int) -> None:
        latest = await self._control.repository.list_events(observed.service, before_id=None, limit=1)
        if latest and latest[0].actor == SAMPLING_ACTOR:
            return
        part = SAMPLING_MARGIN * max(sampled - shed, 0) / sampled
        rules = (await self._control.registry.list_all(observed.service)).rules
        before_shares = {"safe requests": observed.shares.sample_safe}
        before_shares |= {rule.name: find_rule_share(observed.shares, rule) for rule in rules}
        lowered = {
            name: max(round(share * part), MIN_SAMPLE_SHARE)
            for name, share in before_shares.items()
            if share > MIN_SAMPLE_SHARE
        }
        if not lowered:
            return
        texts = [
            f"{name} {before_shares[name] / MILLION:.4g} → {share / MILLION:.4g}" for name, share in lowered.items()
        ]
        note = AuditNote(
            SAMPLING_ACTOR,
            f"copies queue: Envoy dropped {shed:,} of {sampled:,} in the last {SHED_WINDOW_S:g} s, so fewer requests are"
            f" mirrored: {', '.join(texts)}. Give the busier version more processes, then raise the shares again:"
            " abreast traffic set --sample-safe SHARE --sample RULE=SHARE",
        )
        change = TrafficChange(
            "update", sample_safe=lowered.pop("safe requests", observed.shares.sample_safe), rule_shares=lowered
        )
        async with self._lease.transaction() as connection:
            before = await transitions.lock_traffic(connection, observed.service)
            if before.version != observed.version:
                return
            after = await update_shares(connection, observed.service, change.apply(before.shares))
            await insert_event(connection, "update", note, before, after, at=after.updated_at)
        log.warning("lowered the sampling, because copies queue", service=observed.service, shed=shed, sampled=sampled)


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
        shares=TrafficChange("ramp_step", new_share=share).apply(before.shares),
        restarts_step=True,
    )


def _is_unchanged(ramp: Ramp, observed_ramp: Ramp) -> bool:
    """Compare all but the status."""
    return all(getattr(ramp, name) == getattr(observed_ramp, name) for name in ("id", "state", "step", "step_at"))


class LeaderTasks:
    def __init__(
        self,
        settings: Settings,
        database: Database,
        control: TrafficController,
        count_pending: PendingCounter,
        describe_delay: DelayDescriber,
    ) -> None:
        self.lease = LeaderLease(settings.direct_url)
        self._activity = control.activity
        self._database = database
        self._guard_controller = GuardController(database, self.lease, control, settings.envoy_admin, describe_delay)
        self._ramp_controller = RampController(database, self.lease, control, count_pending, settings.envoy_admin)
        self._sampling_controller = SamplingController(database, self.lease, control)
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
                    await wait_or_stop(stop, ELECTION_INTERVAL_S)
                except LedgerError as error:
                    self._outage.record_failure(error)
                    await self._outage.back_off(stop)
        finally:
            await self.lease.release()

    async def _lead(self, stop: asyncio.Event) -> None:
        """Run the leader's tasks until leadership is lost."""
        log.info("this sidecar leads: it runs guard, ramps and webhooks")
        webhook_sender = WebhookSender(self._database, self._settings.webhook_urls, self._settings.webhook_secret)
        jobs: list[tuple[str, LeaderJob, tuple[float, float], float]] = [
            ("guard", self._guard_controller.reconcile, GUARD_INTERVALS_S, GUARD_REST_FACTOR),
            ("ramp", self._ramp_controller.reconcile, RAMP_INTERVALS_S, RAMP_REST_FACTOR),
            ("webhooks", webhook_sender.deliver, DELIVERY_INTERVALS_S, 0.0),
        ]
        if self._settings.adaptive_sampling:
            jobs.append(("sampling", self._sampling_controller.reconcile, SAMPLING_INTERVALS_S, GUARD_REST_FACTOR))
        tasks = [asyncio.create_task(_run_periodically(*job, self._activity, stop)) for job in jobs]
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
    name: str,
    job: LeaderJob,
    intervals_s: tuple[float, float],
    rest_factor: float,
    activity: Activity,
    stop: asyncio.Event,
) -> None:
    """Run the job in its intervals until `stop` is set. Raise LeadershipLostError, log all other errors.

    A job is never idle after a run that returned True.
    """
    interval_s, idle_interval_s = intervals_s
    outage = Outage("postgres", by=name)
    while not stop.is_set():
        started = time.monotonic()
        try:
            is_busy = await job()
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
            pause_s = max(interval_s, rest_factor * (time.monotonic() - started))
            await activity.wait(stop, pause_s, pause_s if is_busy else max(pause_s, idle_interval_s))
