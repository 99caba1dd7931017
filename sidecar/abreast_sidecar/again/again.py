"""Pairs that differ wait here for a moment, are asked again on both versions, and may turn out to be drift.

It runs beside a worker and never makes it wait: what finds no room, and what a lost server or a slow version spoils,
stays the finding that it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog
from msgspec.structs import replace

from abreast.capture import Capture
from abreast.redact import HASH_PREFIX
from abreast_sidecar.again.ask import Replayer, ReplayError
from abreast_sidecar.compare import CompareOptions, ComparisonResult, compare_pair
from abreast_sidecar.compare.drift import DifferenceKey, find_state_drift
from abreast_sidecar.compare.evidence import is_explained_by_shape
from abreast_sidecar.compare.judge import CONDITIONAL_HEADERS, INTERNAL_SERVER_ERROR, get_status
from abreast_sidecar.ending import cancel_and_wait
from abreast_sidecar.errors import LedgerError, SettingError
from abreast_sidecar.outage import wait_or_stop
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import PairRecord
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.drifts import needs_recheck, record_drift

MINUTE_S = 60.0  # seconds
MAX_CONCURRENT_RECHECKS = 4  # pairs
MAX_RECHECK_DELAY_S = 30.0  # seconds after which what waits is not asked any more: too much may have changed
RECHECKED_METHODS = frozenset({"GET", "HEAD"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RecheckSettings:
    """`per_minute` is for this process."""

    per_minute: int
    delay_s: float
    old_url: str
    new_url: str

    @classmethod
    def from_settings(cls, settings: Settings) -> RecheckSettings | None:
        """None where it is off. Raise SettingError."""
        if not settings.ask_again:
            return None
        missing = [name for name in ("old", "new") if not getattr(settings, f"ask_again_{name}")]
        if missing:
            names = " and ".join(f"ABREAST_ASK_AGAIN_{name.upper()}" for name in missing)
            raise SettingError(f"ABREAST_ASK_AGAIN needs the address of each version, set {names} too")
        per_process = max(1, settings.ask_again // max(1, settings.workers))
        return cls(per_process, settings.ask_again_after, settings.ask_again_old, settings.ask_again_new)


@dataclass(frozen=True, slots=True)
class PendingRecheck:
    record: PairRecord
    old: Capture
    new: Capture
    queued_at: float = field(default_factory=time.monotonic)


class Rechecker:
    """Offer what was committed; `run` does the rest."""

    def __init__(self, settings: RecheckSettings, rules: CompareOptions, postgres_url: str) -> None:
        self._settings = settings
        self._rules = rules
        self._database = Database(postgres_url)
        self._replayer = Replayer()
        self._queue: deque[PendingRecheck] = deque()
        self._replay_times: deque[float] = deque()  # when, of the last minute
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_RECHECKS)
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, records: Iterable[PairRecord]) -> None:
        """Take what can be asked again and finds room."""
        for record in records:
            if len(self._queue) >= self._settings.per_minute:
                return
            if pending := plan_recheck(record):
                self._queue.append(pending)

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set; what is under way is given up."""
        try:
            await self._database.open()
            while not stop.is_set():
                self._start_due()
                await wait_or_stop(stop, min(0.2, self._settings.delay_s / 4))
        finally:
            await cancel_and_wait(*self._tasks)
            await self._replayer.aclose()
            await self._database.close()

    def _start_due(self) -> None:
        now = time.monotonic()
        while self._replay_times and self._replay_times[0] < now - MINUTE_S:
            self._replay_times.popleft()
        while self._queue and now - self._queue[0].queued_at >= self._settings.delay_s:
            if (
                len(self._replay_times) >= self._settings.per_minute
                or len(self._tasks) >= 2 * MAX_CONCURRENT_RECHECKS
            ):
                break
            pending = self._queue.popleft()
            if now - pending.queued_at > MAX_RECHECK_DELAY_S + self._settings.delay_s:
                continue
            self._replay_times.append(now)
            task = asyncio.create_task(self._recheck(pending))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _recheck(self, pending: PendingRecheck) -> None:
        try:
            async with self._slots:
                await self._replay_and_compare(pending)
        except (ReplayError, LedgerError) as error:
            log.info("a pair could not be asked again", pair=pending.record.pair_id, error=str(error))
        except Exception:
            log.exception("asking a pair again failed", pair=pending.record.pair_id)

    async def _replay_and_compare(self, pending: PendingRecheck) -> None:
        if not await needs_recheck(self._database, pending.record):
            return
        old = await self._replayer.replay(pending.old, self._settings.old_url)
        new = await self._replayer.replay(pending.new, self._settings.new_url)
        keys = await asyncio.to_thread(self._find_drift, pending, old, new)
        if keys and await record_drift(self._database, pending.record, keys):
            log.info("a difference was drift of state", pair=pending.record.pair_id, places=len(keys))

    def _find_drift(self, pending: PendingRecheck, old: Capture, new: Capture) -> list[DifferenceKey]:
        old_change = compare_pair([_as_version(pending.old, "old"), _as_version(old, "new")], self._rules)
        return find_state_drift(
            pending.record.result,
            old_change,
            compare_pair([_as_version(old, "old"), _as_version(new, "new")], self._rules),
        )


def _as_version(capture: Capture, version: str) -> Capture:
    if version == "old":
        return replace(capture, version="old", role="live", attempt=1)
    return replace(capture, version="new", role="shadow", attempt=1)


def plan_recheck(record: PairRecord) -> PendingRecheck | None:
    """A safe request of which everything is known, with a difference that its values' shapes don't explain."""
    result: ComparisonResult = record.result
    old, new = result.old, result.new
    if result.outcome != "mismatch" or old is None or new is None:
        return None
    request = old.request
    if (
        request.method not in RECHECKED_METHODS
        or get_status(new) >= INTERNAL_SERVER_ERROR
        or request.body.length
    ):
        return None
    if any(HASH_PREFIX in value or name in CONDITIONAL_HEADERS for name, value in request.headers):
        return None
    if is_explained_by_shape(result.differences, record.time_ms / 1000):
        return None
    return PendingRecheck(record, old, new)
