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
from abreast.redact import MARK
from abreast_sidecar.again.ask import Asker, AskError
from abreast_sidecar.compare import Judgement, Rules, judge
from abreast_sidecar.compare.drift import Key, drifted
from abreast_sidecar.compare.evidence import explained
from abreast_sidecar.compare.judge import CONDITIONS, ERROR, status
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import LedgerError, SettingError
from abreast_sidecar.outage import pause
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import Judged
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.drifts import wanted, write

MINUTE = 60.0  # seconds
AT_ONCE = 4  # pairs
LATEST = 30.0  # seconds after which what waits is not asked any more: too much may have changed
SAFE = frozenset({"GET", "HEAD"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class AgainSettings:
    """`per_minute` is for this process."""

    per_minute: int
    after: float
    old: str
    new: str

    @classmethod
    def of(cls, settings: Settings) -> AgainSettings | None:
        """None where it is off. Raise SettingError."""
        if not settings.ask_again:
            return None
        missing = [name for name in ("old", "new") if not getattr(settings, f"ask_again_{name}")]
        if missing:
            names = " and ".join(f"ABREAST_ASK_AGAIN_{name.upper()}" for name in missing)
            raise SettingError(f"ABREAST_ASK_AGAIN needs the address of each version, set {names} too")
        share = max(1, settings.ask_again // max(1, settings.workers))
        return cls(share, settings.ask_again_after, settings.ask_again_old, settings.ask_again_new)


@dataclass(frozen=True, slots=True)
class Waiting:
    judged: Judged
    old: Capture
    new: Capture
    since: float = field(default_factory=time.monotonic)


class Again:
    """Offer what was committed; `run` does the rest."""

    def __init__(self, settings: AgainSettings, rules: Rules, postgres_url: str) -> None:
        self._settings = settings
        self._rules = rules
        self._database = Database(postgres_url)
        self._asker = Asker()
        self._waiting: deque[Waiting] = deque()
        self._asked: deque[float] = deque()  # when, of the last minute
        self._places = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, batch: Iterable[Judged]) -> None:
        """Take what can be asked again and finds room."""
        for judged in batch:
            if len(self._waiting) >= self._settings.per_minute:
                return
            if found := askable(judged):
                self._waiting.append(found)

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set; what is under way is given up."""
        try:
            await self._database.open()
            while not stop.is_set():
                self._begin_due()
                await pause(stop, min(0.2, self._settings.after / 4))
        finally:
            await ended(*self._tasks)
            await self._asker.aclose()
            await self._database.close()

    def _begin_due(self) -> None:
        now = time.monotonic()
        while self._asked and self._asked[0] < now - MINUTE:
            self._asked.popleft()
        while self._waiting and now - self._waiting[0].since >= self._settings.after:
            if len(self._asked) >= self._settings.per_minute or len(self._tasks) >= 2 * AT_ONCE:
                break
            one = self._waiting.popleft()
            if now - one.since > LATEST + self._settings.after:
                continue
            self._asked.append(now)
            task = asyncio.create_task(self._one(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, one: Waiting) -> None:
        try:
            async with self._places:
                await self._settle(one)
        except (AskError, LedgerError) as error:
            log.info("a pair could not be asked again", pair=one.judged.pair, error=str(error))
        except Exception:
            log.exception("asking a pair again failed", pair=one.judged.pair)

    async def _settle(self, one: Waiting) -> None:
        if not await wanted(self._database, one.judged):
            return
        old = await self._asker.ask(one.old, self._settings.old)
        new = await self._asker.ask(one.new, self._settings.new)
        keys = await asyncio.to_thread(self._compared, one, old, new)
        if keys and await write(self._database, one.judged, keys):
            log.info("a difference was drift of state", pair=one.judged.pair, places=len(keys))

    def _compared(self, one: Waiting, old: Capture, new: Capture) -> list[Key]:
        moved = judge([_as(one.old, "old"), _as(old, "new")], self._rules)
        return drifted(one.judged.judgement, moved, judge([_as(old, "old"), _as(new, "new")], self._rules))


def _as(capture: Capture, version: str) -> Capture:
    if version == "old":
        return replace(capture, version="old", role="live", attempt=1)
    return replace(capture, version="new", role="shadow", attempt=1)


def askable(judged: Judged) -> Waiting | None:
    """A safe request of which everything is known, with a difference that its values' shapes don't explain."""
    judgement: Judgement = judged.judgement
    old, new = judgement.old, judgement.new
    if judgement.outcome != "mismatch" or old is None or new is None:
        return None
    request = old.request
    if request.method not in SAFE or status(new) >= ERROR or request.body.length:
        return None
    if any(MARK in value or name in CONDITIONS for name, value in request.headers):
        return None
    if explained(judgement.differences, judged.at / 1000):
        return None
    return Waiting(judged, old, new)
