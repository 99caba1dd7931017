"""Pairs that differ wait here for a moment, are asked again on both versions, and may turn out to be drift.

It runs beside a worker and never makes it wait: what finds no room, and what a lost server or a slow version spoils,
stays the finding that it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import httpx
import structlog
from msgspec.structs import replace

from abreast.export.redaction import HASH_PREFIX
from abreast.protocol.capture import Answer, Body, Capture
from abreast_sidecar.aio import cancel_and_wait, wait_or_stop
from abreast_sidecar.compare.model import ComparisonResult, Difference
from abreast_sidecar.compare.pair import CONDITIONAL_HEADERS, INTERNAL_SERVER_ERROR, compare_pair, get_status
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.volatile import get_direction, is_explained_by_shape
from abreast_sidecar.errors import LedgerError, SettingError, SidecarError
from abreast_sidecar.settings import Settings
from abreast_sidecar.stats.drift import DifferenceKey, find_state_drift
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.database import Connection, Database, Row, load_statement, sanitise_text, to_json
from abreast_sidecar.store.records import PairRecord

RECHECK_HEADER = ("x-abreast-recheck", "1")
REPLAY_TIMEOUT_S = 5.0  # seconds for a whole answer
MAX_REPLAY_BODY_BYTES = 1024 * 1024  # bytes of an answer's body
NOT_REPLAYED_HEADERS = frozenset({"content-length", "connection", "transfer-encoding", "expect", "upgrade", "te"})


class ReplayError(SidecarError):
    """A version did not answer as it should."""


class Replayer:
    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=REPLAY_TIMEOUT_S, follow_redirects=False, trust_env=False)
        self._client.headers.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def replay(self, capture: Capture, base_url: str) -> Capture:
        """The same capture with the answer of now. Raise AskError."""
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
            raise ReplayError(f"{base_url} can't be asked again: {type(error).__name__} {error}") from error
        return replace(
            capture, answer=Answer(response.status_code, response_headers, Body(body, len(body))), complete=True
        )


async def _read_body(response: httpx.Response) -> bytes:
    chunks, length = [], 0
    async for chunk in response.aiter_raw():
        length += len(chunk)
        if length > MAX_REPLAY_BODY_BYTES:
            raise ValueError(f"the answer is longer than {MAX_REPLAY_BODY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


REAPPLY_LOCK_KEY = 0x616272657007  # who holds this lock changes pairs
DRIFT_REASON = "drift of state: asked again, both agree, and old says what new said"

DriftedFindingKey = tuple[str, str, str]


async def needs_recheck(database: Database, record: PairRecord) -> bool:
    """Whether the pair shows something that may be a finding. Raise LedgerError."""
    row = await database.fetch_one("recheck_needed", _make_pair_key(record))
    return bool(row and row["needed"])


async def record_drift(database: Database, record: PairRecord, keys: Sequence[DriftedFindingKey]) -> bool:
    """Whether it was written: not while rules are judged again, and not twice. Raise LedgerError."""
    async with database.connection() as connection, connection.transaction():
        cursor = await connection.execute(load_statement("lock_try"), {"lock": REAPPLY_LOCK_KEY})
        row = await cursor.fetchone()
        if not row or not row["locked"]:
            return False
        cursor = await connection.execute(load_statement("recheck_lock"), _make_pair_key(record))
        finding_keys = {(part, sanitise_text(path, MAX_PATH_CHARS), kind) for part, path, kind in keys}
        finding_rows = [
            row for row in await cursor.fetchall() if (row["part"], row["path"], row["kind"]) in finding_keys
        ]
        if finding_rows:
            await _remove_from_pair(connection, record, finding_rows)
        return bool(finding_rows)


async def _remove_from_pair(connection: Connection, record: PairRecord, finding_rows: Sequence[Row]) -> None:
    """Locks in the order of the ledger's writers: pairs and their sums, findings by id, endpoints by id."""
    ids = sorted(row["id"] for row in finding_rows)
    await connection.execute(
        load_statement("recheck_set"), {**_make_pair_key(record), "ids": ids, "reason": DRIFT_REASON}
    )
    await connection.execute(load_statement("findings_lock"), {"ids": ids})
    deltas = to_json([_build_removal_deltas(record, row) for row in finding_rows]).decode()
    await connection.execute(load_statement("findings_count"), {"rows": deltas})
    await connection.execute(load_statement("finding_drift_add"), {"ids": ids})
    endpoints = [finding_rows[0]["endpoint_id"]]
    await connection.execute(load_statement("endpoints_lock"), {"ids": endpoints})
    await connection.execute(load_statement("noise_reset"), {"ids": endpoints})


def _build_removal_deltas(record: PairRecord, row: Row) -> dict[str, Any]:
    """What the pair had added, taken away."""
    differences = [difference for difference in record.result.differences if _is_same_finding(difference, row)]
    sign = get_direction(differences[0])
    return {
        "id": row["id"],
        "old_release": row["old_release"],
        "new_release": row["new_release"],
        "count": -1,
        "baseline_count": 0,
        "shape_explained": -int(is_explained_by_shape(differences, record.time_ms / 1000)),
        "new_greater": -int(sign > 0),
        "new_smaller": -int(sign < 0),
        "impact": row["impact"],
        "first_ms": record.time_ms,
        "last_ms": record.time_ms,
    }


def _is_same_finding(difference: Difference, row: Row) -> bool:
    return (difference.part, sanitise_text(difference.path, MAX_PATH_CHARS), difference.kind) == (
        row["part"],
        row["path"],
        row["kind"],
    )


def _make_pair_key(record: PairRecord) -> dict[str, Any]:
    return {"pair": record.pair_id, "day": _to_utc_date(record.time_ms)}


def _to_utc_date(time_ms: int) -> date:
    return datetime.fromtimestamp(time_ms / 1000, UTC).date()


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
        if not settings.recheck_per_minute:
            return None
        missing = [name for name in ("old", "new") if not getattr(settings, f"ask_again_{name}")]
        if missing:
            names = " and ".join(f"ABREAST_RECHECK_PER_MINUTE_{name.upper()}" for name in missing)
            raise SettingError(f"ABREAST_RECHECK_PER_MINUTE needs the address of each version, set {names} too")
        per_process = max(1, settings.recheck_per_minute // max(1, settings.workers))
        return cls(per_process, settings.recheck_delay, settings.recheck_old_url, settings.recheck_new_url)


@dataclass(frozen=True, slots=True)
class PendingRecheck:
    record: PairRecord
    old: Capture
    new: Capture
    queued_at: float = field(default_factory=time.monotonic)


class Rechecker:
    """Offer what was committed; `run` does the rest."""

    def __init__(self, settings: RecheckSettings, rules: CompareOptions, database: Database) -> None:
        self._settings = settings
        self._rules = rules
        self._database = database
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
    if request.method not in RECHECKED_METHODS or get_status(new) >= INTERNAL_SERVER_ERROR or request.body.length:
        return None
    if any(HASH_PREFIX in value or name in CONDITIONAL_HEADERS for name, value in request.headers):
        return None
    if is_explained_by_shape(result.differences, record.time_ms / 1000):
        return None
    return PendingRecheck(record, old, new)
