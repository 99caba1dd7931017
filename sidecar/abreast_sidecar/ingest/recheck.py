"""Sends differing requests again: once to both versions to detect drift of state, and then to settle rare findings.

A recheck compares later responses of both versions with the first ones. A retest sends the request of an undecided finding
three times at once, in random order: twice to old and once to new. So it makes a triple as live requests with second
copies do, and the finding needs no second copy of the few requests that show it. New gets one request: with two, a
response that is wrong at random would differ between them as often as from old.

Rechecks and retests run beside a worker and never delay it. If the queue is full, a server is away or a version is slow,
the pair keeps its findings.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
import structlog
from msgspec.structs import replace

from abreast.protocol.capture import HASH_PREFIX, Answer, Body, Capture, Role, Version
from abreast_sidecar.aio import cancel_and_wait, wait_or_stop
from abreast_sidecar.compare.model import ComparisonResult
from abreast_sidecar.compare.pair import CONDITIONAL_HEADERS, INTERNAL_SERVER_ERROR, compare_pair, get_status
from abreast_sidecar.compare.rules import CompareOptions
from abreast_sidecar.compare.volatile import is_explained_by_shape
from abreast_sidecar.errors import LedgerError, SettingError, SidecarError, locate_error
from abreast_sidecar.rules.reapply import mark_endpoints_due
from abreast_sidecar.settings import Settings
from abreast_sidecar.stats.drift import Place, find_state_drift
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.counters import MARKS, NO_RULE, SIGN_MARKS, CounterDeltas, compute_marks
from abreast_sidecar.store.database import (
    AdvisoryLock,
    Database,
    Row,
    fetch_rows,
    load_statement,
    sanitise_text,
    try_lock,
)
from abreast_sidecar.store.records import PairRecord
from abreast_sidecar.store.samples import BET_PERIOD_MS, identify_client, list_bets, name_bet_place

RECHECK_HEADER = ("x-abreast-recheck", "1")
REPLAY_TIMEOUT_S = 5.0  # for a whole response
MAX_REPLAY_BODY_BYTES = 1024 * 1024  # per response
NOT_REPLAYED_HEADERS = frozenset({"content-length", "connection", "transfer-encoding", "expect", "upgrade", "te"})
DRIFT_REASON = "drift of state: in a recheck both versions agreed, and old returned what new had returned"
MINUTE_S = 60.0
MAX_CONCURRENT_RECHECKS = 4
MAX_RECHECK_DELAY_S = 30.0  # after it, too much state may have changed
RECHECKED_METHODS = frozenset({"GET", "HEAD"})
RETEST_INTERVAL_S = BET_PERIOD_MS / 1000  # more retests in a period would not count
MAX_RETESTS = 30  # of one pair
RETESTS_PER_MINUTE = 6
MAX_RETEST_SHARE = 0.5  # of the replays per minute
NOT_REPLAYED: dict[str, Any] = {"effects": (), "effects_dropped": 0, "spans": (), "cache": None, "exception": ""}
NO_COOKIES = CookieJar(
    DefaultCookiePolicy(allowed_domains=())
)  # a response must not change the request of another user

log = structlog.get_logger(__name__)


class ReplayError(SidecarError):
    """A version did not respond to a recheck as expected."""


class Replayer:
    """Sends captured requests again."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(
            timeout=REPLAY_TIMEOUT_S, follow_redirects=False, trust_env=False, cookies=NO_COOKIES
        )
        self._client.headers.clear()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def replay(self, capture: Capture, base_url: str, *, host: str = "") -> Capture:
        """Send the request to `base_url`. Return the capture with the new response. Raise ReplayError.

        `host`: the header of a request whose capture has none, since a response may contain it.
        """
        request = capture.request
        headers = [
            (name, value)
            for name, value in request.headers
            if name.lower() not in NOT_REPLAYED_HEADERS and not name.lower().startswith("x-abreast-")
        ]
        if host and not any(name.lower() == "host" for name, _ in headers):
            headers.append(("host", host))
        try:
            url = build_replay_url(base_url, request.path, request.query)
            async with (
                asyncio.timeout(REPLAY_TIMEOUT_S),
                self._client.stream(request.method, url, headers=[*headers, RECHECK_HEADER]) as response,
            ):
                body = await _read_body(response)
                response_headers = tuple(
                    (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw
                )
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
            # The message may contain captured values.
            raise ReplayError(f"{base_url} does not respond to a recheck: {type(error).__name__}") from error
        return replace(
            capture, answer=Answer(response.status_code, response_headers, Body(body, len(body))), complete=True
        )


def build_replay_url(base_url: str, path: str, query: str) -> httpx.URL:
    """Return the address of a captured target below `base_url`. Raise ReplayError if it would be elsewhere.

    A capture is not trusted: its target must not name another host, and not end the request line.
    """
    target = f"{path}?{query}" if query else path
    is_plain = target.isascii() and target.isprintable() and not set(target) & set(" #") and "?" not in path
    if not path.startswith("/") or not is_plain:
        raise ReplayError("the captured target is no path and query")
    base = httpx.URL(base_url)
    url = base.copy_with(raw_path=base.raw_path.partition(b"?")[0].rstrip(b"/") + target.encode())
    if (url.scheme, url.netloc, url.userinfo) != (base.scheme, base.netloc, base.userinfo):
        raise ReplayError("the captured target leaves the host of the recheck")
    return url


async def _read_body(response: httpx.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_REPLAY_BODY_BYTES:
            raise ReplayError(f"the response to a recheck has more than {MAX_REPLAY_BODY_BYTES} bytes")
    return body


async def record_drift(database: Database, record: PairRecord, places: Sequence[Place]) -> bool:
    """Take the findings off the pair, and return whether it showed them. Raise LedgerError.

    Drift is not recorded while rules are reapplied. Locks are taken in the order of the ledger's writers.
    """
    async with database.connection() as connection, connection.transaction():
        if not await try_lock(connection, AdvisoryLock.REAPPLY):
            return False
        pair_key = _make_pair_key(record)
        finding_keys = set(map(_make_finding_key, places))
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
        await mark_endpoints_due(connection, {findings[0]["endpoint_id"]})
        await connection.execute(load_statement("pairs_notify"))
    return True


async def record_bets(
    database: Database, record: PairRecord, findings: Sequence[Row], result: ComparisonResult
) -> None:
    """Count the bets of a retest on these findings of the pair. Raise LedgerError.

    A client bets once per period, also if live requests or another sidecar made a bet. Nothing is counted while rules are
    reapplied.
    """
    time_ms = int(time.time() * 1000)
    bets: dict[int, tuple[Row, str]] = {}  # by key
    for row in findings:
        differences, noise = (
            [item for item in group if _make_finding_key(item.place) == (row["part"], row["path"], row["kind"])]
            for group in (result.differences, result.noise)
        )
        if not (differences or noise):
            continue
        time_s, copies_writes = record.time_ms / 1000, row["copies_writes"]
        marks = compute_marks(result, differences, noise, time_s, copies_writes=copies_writes) & SIGN_MARKS
        place = name_bet_place(row["id"], (differences or noise)[0], pool=row["pool"], compared=row["compared"])
        for key in list_bets(place, marks, identify_client(result), time_ms).values():
            bets[key] = row, "other_only" if marks & MARKS["other_only"] else "same_only"
    if not bets:
        return
    async with database.connection() as connection, connection.transaction():
        if not await try_lock(connection, AdvisoryLock.REAPPLY):
            return
        deltas = CounterDeltas()
        for new_bet in await fetch_rows(connection, "bets_add", {"keys": list(bets)}):
            row, name = bets[new_bet["key"]]
            counter_key = (NO_RULE, row["id"], row["old_release"], row["new_release"])
            deltas.get_finding(counter_key, row["impact"], record.time_ms)[name] += 1
        await deltas.write_findings(connection)
        await mark_endpoints_due(connection, {findings[0]["endpoint_id"]})
        await connection.execute(load_statement("pairs_notify"))


def _make_finding_key(place: Place) -> Place:
    part, path, kind = place
    return part, sanitise_text(path, MAX_PATH_CHARS), kind


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


@dataclass(slots=True)
class Retest:
    """A pair with undecided findings. Its request is sent again once per interval."""

    pending: PendingRecheck
    findings: set[int]
    due_at: float  # monotonic
    remaining: int = MAX_RETESTS
    is_running: bool = False


class Rechecker:
    """Rechecks committed pairs after a delay, and retests those that stay undecided, within the limit per minute."""

    def __init__(self, settings: RecheckSettings, get_rules: Callable[[], CompareOptions], database: Database) -> None:
        self._settings = settings
        self._get_rules = get_rules
        self._database = database
        self._replayer = Replayer()
        self._queue: deque[PendingRecheck] = deque()
        self._replay_times: deque[float] = deque()  # during the last minute
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_RECHECKS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._retests: dict[str, Retest] = {}  # by pair
        self._max_retests = max(1, int(settings.per_minute * MAX_RETEST_SHARE / RETESTS_PER_MINUTE))

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
            self._start(self._replay_and_compare(pending), pending, now)
        for retest in list(self._retests.values()):
            if len(self._replay_times) >= self._settings.per_minute or len(self._tasks) >= 2 * MAX_CONCURRENT_RECHECKS:
                break
            if retest.due_at <= now and not retest.is_running:
                retest.is_running = True
                retest.due_at, retest.remaining = now + RETEST_INTERVAL_S, retest.remaining - 1
                self._start(self._retest(retest), retest.pending, now)

    def _start(self, replay: Coroutine[Any, Any, None], pending: PendingRecheck, now: float) -> None:
        self._replay_times.append(now)
        task = asyncio.create_task(self._run(replay, pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, replay: Coroutine[Any, Any, None], pending: PendingRecheck) -> None:
        pair_id = pending.record.pair_id
        try:
            async with self._slots:
                await replay
        except (ReplayError, LedgerError) as error:
            self._retests.pop(pair_id, None)  # spare a version that does not respond
            log.info("a recheck was not possible", pair=pair_id, error=str(error))
        except Exception as error:  # noqa: BLE001  # logged
            self._retests.pop(pair_id, None)
            log.warning("a recheck failed", pair=pair_id, error=locate_error(error))
        finally:
            replay.close()  # it has not begun if this task is cancelled early

    async def _replay_and_compare(self, pending: PendingRecheck) -> None:
        row = await self._database.fetch_one("recheck_needed", _make_pair_key(pending.record))
        if not (row and row["needed"]):  # no finding of the pair, or only noise
            return
        old = await self._replayer.replay(pending.old, self._settings.old_url)
        new = await self._replayer.replay(pending.new, self._settings.new_url)
        places = await asyncio.to_thread(self._find_drift, pending, old, new)
        if places and await record_drift(self._database, pending.record, places):
            log.info("a recheck found drift of state", pair=pending.record.pair_id, findings=len(places))
        await self._plan_retests(pending)

    async def _plan_retests(self, pending: PendingRecheck) -> None:
        """Plan retests of a pair with undecided findings that no planned one covers, while there is room."""
        rows = await self._database.fetch_all("retest_findings", _make_pair_key(pending.record))
        findings = {row["id"] for row in rows}
        covered = {finding for retest in self._retests.values() for finding in retest.findings}
        if findings - covered and len(self._retests) < self._max_retests:
            self._retests[pending.record.pair_id] = Retest(pending, findings, time.monotonic())

    async def _retest(self, retest: Retest) -> None:
        try:
            is_settled = await self._replay_and_bet(retest.pending) or retest.remaining <= 0
        finally:
            retest.is_running = False
        if is_settled:
            self._retests.pop(retest.pending.record.pair_id, None)

    async def _replay_and_bet(self, pending: PendingRecheck) -> bool:
        """Count the bets of one retest. Return True if the pair needs no further one."""
        rows = await self._database.fetch_all("retest_findings", _make_pair_key(pending.record))
        if not rows:
            return True
        captures = await self._replay_triple(pending)
        if any(get_status(capture) > INTERNAL_SERVER_ERROR for capture in captures):
            return True  # the request may have caused it
        result = await asyncio.to_thread(compare_pair, captures, self._get_rules())
        await record_bets(self._database, pending.record, rows, result)
        return False

    async def _replay_triple(self, pending: PendingRecheck) -> list[Capture]:
        """Send the request twice to old and once to new, at the same time."""
        sides = {"old": (pending.old, self._settings.old_url), "new": (pending.new, self._settings.new_url)}
        roles: list[tuple[Version, Role]] = [("old", "live"), ("old", "baseline"), ("new", "shadow")]
        random.shuffle(roles)
        host = httpx.URL(self._settings.old_url).netloc.decode()
        replays = await asyncio.gather(
            *(self._replayer.replay(*sides[version], host=host) for version, _ in roles), return_exceptions=True
        )
        captures = []
        for capture, (version, role) in zip(replays, roles, strict=True):
            if isinstance(capture, BaseException):
                raise capture
            captures.append(
                replace(capture, version=version, role=role, attempt=1, expected_captures=3, **NOT_REPLAYED)
            )
        return captures

    def _find_drift(self, pending: PendingRecheck, old: Capture, new: Capture) -> list[Place]:
        rules = self._get_rules()
        old_change, recheck = (
            compare_pair(
                [
                    replace(first, version="old", role="live", attempt=1),
                    replace(second, version="new", role="shadow", attempt=1),
                ],
                rules,
            )
            for first, second in ((pending.old, old), (old, new))
        )
        return find_state_drift(pending.record.result, old_change, recheck)


def plan_recheck(record: PairRecord) -> PendingRecheck | None:
    """Return a recheck for a safe, completely captured request whose differences value shapes don't explain.

    Both versions get the request that old captured.
    """
    result: ComparisonResult = record.result
    old, new = result.old, result.new
    if result.outcome != "mismatch" or old is None or new is None:
        return None
    request = old.request
    is_down = get_status(new) > INTERNAL_SERVER_ERROR  # the request may have caused it
    if request.method not in RECHECKED_METHODS or is_down or request.body.length:
        return None
    if HASH_PREFIX in request.path or HASH_PREFIX in request.query:
        return None
    if any(HASH_PREFIX in value or name in CONDITIONAL_HEADERS for name, value in request.headers):
        return None
    if is_explained_by_shape(result.differences, record.time_ms / 1000):
        return None
    return PendingRecheck(record, old, replace(new, request=request))
