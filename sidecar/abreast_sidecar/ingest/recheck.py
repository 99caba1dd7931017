"""Rechecks: sends differing requests to both versions again, to detect drift of state.

Rechecks run beside a worker and never delay it. If the queue is full, a server is away or a version is slow, the pair
keeps its findings.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import structlog
from msgspec.structs import replace

from abreast.export.redaction import HASH_PREFIX
from abreast.protocol.capture import Answer, Body, Capture
from abreast_sidecar.aio import cancel_and_wait, wait_or_stop
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import CONDITIONAL_HEADERS, INTERNAL_SERVER_ERROR, compare_pair, get_status
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.volatile import is_explained_by_shape
from abreast_sidecar.errors import LedgerError, SettingError, SidecarError
from abreast_sidecar.settings import Settings
from abreast_sidecar.stats.drift import DifferenceKey, find_state_drift
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.counters import NO_RULE, CounterDeltas
from abreast_sidecar.store.database import AdvisoryLock, Database, fetch_rows, load_statement, sanitise_text, try_lock
from abreast_sidecar.store.records import PairRecord

RECHECK_HEADER = ("x-abreast-recheck", "1")
REPLAY_TIMEOUT_S = 5.0  # for a whole response
MAX_REPLAY_BODY_BYTES = 1024 * 1024  # per response
NOT_REPLAYED_HEADERS = frozenset({"content-length", "connection", "transfer-encoding", "expect", "upgrade", "te"})
DRIFT_REASON = "drift of state: in a recheck both versions agreed, and old returned what new had returned"
MINUTE_S = 60.0
MAX_CONCURRENT_RECHECKS = 4
MAX_RECHECK_DELAY_S = 30.0  # after it, too much state may have changed
RECHECKED_METHODS = frozenset({"GET", "HEAD"})

log = structlog.get_logger(__name__)


class ReplayError(SidecarError):
    """A version did not respond to a recheck as expected."""


class Replayer:
    """Sends captured requests again."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=REPLAY_TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._client.headers.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def replay(self, capture: Capture, base_url: str) -> Capture:
        """Send the request to `base_url`. Return the capture with the new response. Raise ReplayError."""
        request = capture.request
        target = f"{base_url.rstrip('/')}{request.path}{'?' + request.query if request.query else ''}"
        headers = [
            (name, value)
            for name, value in request.headers
            if name not in NOT_REPLAYED_HEADERS and not name.startswith("x-abreast-")
        ]
        try:
            async with (
                asyncio.timeout(REPLAY_TIMEOUT_S),
                self._client.stream(request.method, target, headers=[*headers, RECHECK_HEADER]) as response,
            ):
                body = await _read_body(response)
                response_headers = tuple(
                    (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw
                )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError, ValueError) as error:
            raise ReplayError(f"{base_url} does not respond to a recheck: {type(error).__name__} {error}") from error
        return replace(
            capture, answer=Answer(response.status_code, response_headers, Body(body, len(body))), complete=True
        )


async def _read_body(response: httpx.Response) -> bytes:
    chunks, length = [], 0
    async for chunk in response.aiter_raw():
        length += len(chunk)
        if length > MAX_REPLAY_BODY_BYTES:
            raise ValueError(f"the response has more than {MAX_REPLAY_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def needs_recheck(database: Database, record: PairRecord) -> bool:
    """Check that the pair shows a finding that is not noise. Raise LedgerError."""
    row = await database.fetch_one("recheck_needed", _make_pair_key(record))
    return bool(row and row["needed"])


async def record_drift(database: Database, record: PairRecord, keys: Sequence[DifferenceKey]) -> bool:
    """Take the findings off the pair, and return whether it showed them. Raise LedgerError.

    Drift is not recorded while rules are reapplied. Locks are taken in the order of the ledger's writers.
    """
    async with database.connection() as connection, connection.transaction():
        if not await try_lock(connection, AdvisoryLock.REAPPLY):
            return False
        pair_key = _make_pair_key(record)
        finding_keys = {(part, sanitise_text(path, MAX_PATH_CHARS), kind) for part, path, kind in keys}
        findings = [
            row
            for row in await fetch_rows(connection, "recheck_lock", pair_key)
            if (row["part"], row["path"], row["kind"]) in finding_keys
        ]
        if not findings:
            return False
        ids = sorted(row["id"] for row in findings)
        await connection.execute(load_statement("recheck_set"), {**pair_key, "ids": ids, "reason": DRIFT_REASON})
        deltas = CounterDeltas()
        for row in findings:
            counter_key = (NO_RULE, row["id"], row["old_release"], row["new_release"])
            impact, time_ms = row["impact"], record.time_ms
            deltas.add_finding("count", counter_key, row["marks"], impact=impact, time_ms=time_ms, sign=-1)
            deltas.get_finding(counter_key, impact, time_ms)["drift_count"] += 1
        await deltas.write_findings(connection)
        endpoints = {"ids": [findings[0]["endpoint_id"]]}
        await connection.execute(load_statement("endpoints_lock"), endpoints)
        await connection.execute(load_statement("noise_reset"), endpoints)
    return True


def _make_pair_key(record: PairRecord) -> dict[str, Any]:
    return {"pair": record.pair_id, "day": datetime.fromtimestamp(record.time_ms / 1000, UTC).date()}


@dataclass(frozen=True, slots=True)
class RecheckSettings:
    per_minute: int  # in this process
    delay_s: float
    old_url: str
    new_url: str

    @classmethod
    def from_settings(cls, settings: Settings) -> RecheckSettings | None:
        """Return None if rechecks are off. Raise SettingError."""
        if not settings.recheck_per_minute:
            return None
        missing = [name for name in ("recheck_old_url", "recheck_new_url") if not getattr(settings, name)]
        if missing:
            names = " and ".join(f"ABREAST_{name.upper()}" for name in missing)
            raise SettingError(f"ABREAST_RECHECK_PER_MINUTE needs the address of each version: set {names} too")
        per_process = max(1, settings.recheck_per_minute // max(1, settings.workers))
        return cls(per_process, settings.recheck_delay, settings.recheck_old_url, settings.recheck_new_url)


@dataclass(frozen=True, slots=True)
class PendingRecheck:
    record: PairRecord
    old: Capture
    new: Capture
    queued_at: float = field(default_factory=time.monotonic)


class Rechecker:
    """Rechecks committed pairs after a delay, within the limit per minute."""

    def __init__(self, settings: RecheckSettings, rules: CompareOptions, database: Database) -> None:
        self._settings = settings
        self._rules = rules
        self._database = database
        self._replayer = Replayer()
        self._queue: deque[PendingRecheck] = deque()
        self._replay_times: deque[float] = deque()  # during the last minute
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_RECHECKS)
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, records: Iterable[PairRecord]) -> None:
        """Queue the pairs that a recheck can decide, while the queue has room."""
        for record in records:
            if len(self._queue) >= self._settings.per_minute:
                return
            if pending := plan_recheck(record):
                self._queue.append(pending)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, and cancel rechecks in flight then."""
        try:
            while not stop.is_set():
                self._start_due()
                await wait_or_stop(stop, min(0.2, self._settings.delay_s / 4))
        finally:
            await cancel_and_wait(*self._tasks)
            await self._replayer.aclose()

    def _start_due(self) -> None:
        now = time.monotonic()
        while self._replay_times and self._replay_times[0] < now - MINUTE_S:
            self._replay_times.popleft()
        while self._queue and now - self._queue[0].queued_at >= self._settings.delay_s:
            if len(self._replay_times) >= self._settings.per_minute or len(self._tasks) >= 2 * MAX_CONCURRENT_RECHECKS:
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
            log.info("a recheck was not possible", pair=pending.record.pair_id, error=str(error))
        except Exception:
            log.exception("a recheck failed", pair=pending.record.pair_id)

    async def _replay_and_compare(self, pending: PendingRecheck) -> None:
        if not await needs_recheck(self._database, pending.record):
            return
        old = await self._replayer.replay(pending.old, self._settings.old_url)
        new = await self._replayer.replay(pending.new, self._settings.new_url)
        keys = await asyncio.to_thread(self._find_drift, pending, old, new)
        if keys and await record_drift(self._database, pending.record, keys):
            log.info("a recheck found drift of state", pair=pending.record.pair_id, findings=len(keys))

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
    """Return a recheck for a safe, completely captured request whose differences value shapes don't explain."""
    result: ComparisonResult = record.result
    old, new = result.old, result.new
    if result.outcome != "mismatch" or old is None or new is None:
        return None
    request = old.request
    if request.method not in RECHECKED_METHODS or get_status(new) >= INTERNAL_SERVER_ERROR or request.body.length:
        return None
    if any(HASH_PREFIX in value or name in CONDITIONAL_HEADERS for name, value in request.headers):
        return None
    if is_explained_by_shape(result.differences, record.time_ms / 1000):
        return None
    return PendingRecheck(record, old, new)
