"""Looks at the evidence for every guard, and acts on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from abreast_sidecar.compare.latency import LEAST_COPIES, MIN_SLOWER_US
from abreast_sidecar.control import acts
from abreast_sidecar.control.acts import Guard
from abreast_sidecar.control.control import Control
from abreast_sidecar.control.seat import Seat
from abreast_sidecar.control.traffic import Traffic
from abreast_sidecar.errors import SidecarError
from abreast_sidecar.steer import flow
from abreast_sidecar.steer.flow import Gap, Report
from abreast_sidecar.steer.guard import RULES, WINDOWS, Breach, Subject, Tally, breaches, starts
from abreast_sidecar.store.database import Database

MOST = 20_000  # of the newest pairs, in one look
TELL = 2.0  # seconds between two notes of how things stand
RECENT = 60.0  # seconds of which the ledger has to be whole
LAG = 5.0  # seconds that a request may take to the ledger
LEAST = 50  # sampled requests, before anything is said about how whole the ledger is
COUNTS = ("live", "new_errors", "old_errors", "compared", "mismatches", "timed", "slower")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sight:
    state: str  # idle, clear, breached or blind
    said: str


class Guarding:
    def __init__(self, database: Database, seat: Seat, control: Control, envoy_admin: Iterable[str]) -> None:
        self._database = database
        self._seat = seat
        self._control = control
        self._asked = tuple(envoy_admin)
        self._exposed: dict[tuple[str, int], datetime] = {}  # service and version of its traffic
        self._gaps: dict[str, deque[tuple[float, Gap]]] = {}
        self._told: dict[str, tuple[float, Sight]] = {}

    async def look(self) -> None:
        known = {one.traffic.service: one.traffic for one in await self._control.journal.read()}
        for row in await self._database.rows("guard_read", {"service": None}):
            try:
                await self._one(acts.guard(row), known.get(row["service"]))
            except SidecarError:
                raise
            except Exception:  # one service's must not blind the others'
                log.exception("a guard failed", service=row["service"])

    async def _one(self, guard: Guard, traffic: Traffic | None) -> None:
        if guard.policy.mode != "off" and traffic is not None:
            await self._tell(guard, await self._watch(guard, traffic))

    async def _watch(self, guard: Guard, traffic: Traffic) -> Sight | None:
        """None where it has acted, and said so."""
        if not traffic.shares.new_share:
            return Sight("idle", "all users are on old")
        rules = ready(guard)
        tallies = await self._tallies(guard, traffic, rules) if rules else {}
        for breach in breaches(guard.policy, tallies):
            if await self._act(guard, traffic, breach):
                return None
        if len(rules) < len(RULES):
            cooling = ", ".join(rule for rule in RULES if rule not in rules)
            return Sight("breached", f"cooling down after: {cooling}")
        if blind := await self._blind(guard):
            return Sight("blind", blind)
        return Sight("clear", seen(tallies))

    async def _tallies(
        self, guard: Guard, traffic: Traffic, rules: Sequence[Subject]
    ) -> dict[Subject, list[Tally]]:
        assert guard.now is not None
        assert guard.since is not None
        since = max(guard.since, await self._since(traffic))
        now = guard.now + timedelta(seconds=await self._behind(guard))
        asked = {
            "service": guard.service,
            "now": now,
            "starts": [start for rule in rules for start in starts(guard.policy.rule(rule), now, since)],
            "slower": guard.policy.slower.limit,
            "least_copies": LEAST_COPIES,
            "min_slower_us": MIN_SLOWER_US,
            "limit": MOST,
        }
        rows = await self._database.rows("guard_counts", asked)
        tallies = [Tally(**{name: row[name] for name in COUNTS}) for row in rows]
        return {rule: tallies[at * WINDOWS : (at + 1) * WINDOWS] for at, rule in enumerate(rules)}

    async def _behind(self, guard: Guard) -> float:
        """Seconds by which Postgres's clock is behind the pairs', by this machine's clock too: windows would hold what is
        long ago.
        """
        newest = await self._database.one(
            "pair_newest_age", {"service": guard.service, "sidecar_time": datetime.now(UTC)}
        )
        return flow.behind(newest["age"] if newest else None)

    async def _since(self, traffic: Traffic) -> datetime:
        """When users were let onto new."""
        key = (traffic.service, traffic.version)
        if key not in self._exposed:
            row = await self._database.one("guard_exposed_since", {"service": traffic.service})
            exposed = row["exposed"] if row and row["exposed"] else traffic.updated_at
            self._exposed = {one: at for one, at in self._exposed.items() if one[0] != key[0]} | {
                key: exposed
            }
        return self._exposed[key]

    async def _act(self, guard: Guard, traffic: Traffic, breach: Breach) -> bool:
        async with self._seat.transaction() as connection:
            done = await acts.guard_acts(connection, guard, traffic.version, breach.rule, breach.text)
        if done:
            what = "the guard rolls back" if guard.policy.mode == "acting" else "the guard would roll back"
            log.warning(what, service=guard.service, rule=breach.rule, reason=breach.text)
            self._told.pop(guard.service, None)
        return done

    async def _blind(self, guard: Guard) -> str:
        reports = await self._database.rows("envoy_reports", {"service": guard.service})
        if silent := flow.silent((Report(**row) for row in reports), self._asked):
            return silent
        (row,) = await self._database.rows("ledger_gap", {"service": guard.service})
        return self._holes(guard, Gap(row["sampled"], row["written"]))

    def _holes(self, guard: Guard, now: Gap) -> str:
        """Of the requests that Envoy sampled within the last minute, and had time to arrive."""
        known = self._gaps.setdefault(guard.service, deque())
        known.append((time.monotonic(), now))
        while time.monotonic() - known[0][0] > RECENT:
            known.popleft()
        first = known[0][1]
        late = next((one for at, one in reversed(known) if time.monotonic() - at >= LAG), None)
        if late is None or late.sampled is None or first.sampled is None:
            return ""
        sampled, arrived = late.sampled - first.sampled, now.arrived - first.arrived
        if sampled < LEAST or arrived >= sampled * guard.policy.min_completeness:
            return ""
        return f"of the last {sampled:,} requests that Envoy sampled the ledger has {max(arrived, 0):,}"

    async def _tell(self, guard: Guard, sight: Sight | None) -> None:
        if sight is None:
            return
        last, told = self._told.get(guard.service, (0.0, None))
        changed = told is None or told.state != sight.state
        if not changed and time.monotonic() - last < TELL:
            return
        if changed and sight.state == "blind":
            log.warning("the guard is blind", service=guard.service, reason=sight.said)
        values = {"service": guard.service, "since": guard.since, "state": sight.state, "message": sight.said}
        await self._database.execute("guard_status_set", values)
        self._told[guard.service] = (time.monotonic(), sight)


def ready(guard: Guard) -> list[Subject]:
    """The rules that are not cooling down."""
    found = []
    for rule in RULES:
        fired = guard.fired.get(rule)
        cooldown = timedelta(seconds=guard.policy.rule(rule).cooldown)
        if fired is None or (guard.now is not None and fired + cooldown <= guard.now):
            found.append(rule)
    return found


def seen(tallies: dict[Subject, list[Tally]]) -> str:
    errors, mismatches, slower = (tallies[rule][0] for rule in RULES)
    return (
        f"new failed {errors.new_errors:,} of {errors.live:,} users' requests that old answered;"
        f" {mismatches.mismatches:,} of {mismatches.compared:,} pairs have unexplained mismatches;"
        f" {slower.slower:,} of {slower.timed:,} are slower"
    )
