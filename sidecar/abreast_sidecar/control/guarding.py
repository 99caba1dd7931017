"""Looks at the evidence for every guard, and acts on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from abreast_sidecar.compare.latency import MIN_BASELINE_PAIRS, MIN_SLOWER_US
from abreast_sidecar.control import acts
from abreast_sidecar.control.acts import Guard
from abreast_sidecar.control.control import TrafficController
from abreast_sidecar.control.seat import LeaderLease
from abreast_sidecar.control.traffic import Traffic
from abreast_sidecar.errors import SidecarError
from abreast_sidecar.steer import flow
from abreast_sidecar.steer.flow import CompletenessGap, EnvoyReport
from abreast_sidecar.steer.guard import (
    GUARD_RULE_NAMES,
    WINDOWS_PER_RULE,
    Breach,
    GuardRuleName,
    WindowCounts,
    find_breaches,
    window_starts,
)
from abreast_sidecar.store.database import Database

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
                start
                for rule in rules
                for start in window_starts(guard.policy.rule(rule), current_time, since)
            ],
            "slower": guard.policy.slower.limit,
            "least_copies": MIN_BASELINE_PAIRS,
            "min_slower_us": MIN_SLOWER_US,
            "limit": MAX_GUARD_PAIRS,
        }
        rows = await self._database.fetch_all("guard_counts", params)
        tallies = [WindowCounts(**{name: row[name] for name in TALLY_COLUMNS}) for row in rows]
        return {
            rule: tallies[index * WINDOWS_PER_RULE : (index + 1) * WINDOWS_PER_RULE]
            for index, rule in enumerate(rules)
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
        if silence := flow.describe_stale_counts(
            (EnvoyReport(**row) for row in reports), self._admin_addresses
        ):
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
        cutoff_gap = next(
            (gap for at, gap in reversed(history) if time.monotonic() - at >= ARRIVAL_LAG_S), None
        )
        if cutoff_gap is None or cutoff_gap.sampled is None or oldest_gap.sampled is None:
            return ""
        sampled_count, arrived_count = (
            cutoff_gap.sampled - oldest_gap.sampled,
            current_gap.arrived - oldest_gap.arrived,
        )
        if (
            sampled_count < MIN_SAMPLED_REQUESTS
            or arrived_count >= sampled_count * guard.policy.min_completeness
        ):
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
        values = {
            "service": guard.service,
            "since": guard.since,
            "state": status.state,
            "message": status.message,
        }
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
