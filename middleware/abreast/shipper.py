"""The background task of one event loop: assembles captures, sends them in batches and reports, for ever.

It never fails: what can't be sent waits within the bounds of the backlog, and what doesn't fit there is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import threading
from collections import deque
from time import perf_counter, perf_counter_ns

from abreast.alarm import Alarm
from abreast.assemble import Assembler, settle
from abreast.backlog import (
    CAPTURE_ERROR,
    ENCODE_ERROR,
    REDIS_ERROR,
    REFUSED_BYTES,
    REFUSED_PAIRS,
    SHUTDOWN,
    Backlog,
    Held,
)
from abreast.join import Row, shard_of
from abreast.link import TIMEOUT, Link, LinkError, Reply
from abreast.recorder import Recorder
from abreast.redact import Redactor
from abreast.rescue import Rescue
from abreast.route import Routes
from abreast.settings import Settings

logger = logging.getLogger("abreast")

SLICE = 0.001  # seconds of work after which other tasks get their turn
BATCH_BYTES = 1024 * 1024  # of captures in one call of the script, which holds up Redis
BACKOFF = 0.1  # seconds before the second attempt; doubled for each one after it
BACKOFF_CAP = 5.0  # seconds
MOST_REFUSALS = 3  # of one batch, for reasons that won't pass by themselves
REPORT_INTERVAL = 1.0  # seconds, when something changed
REPORT_IDLE = 5.0  # seconds, when nothing did


class Shipper:
    def __init__(
        self,
        settings: Settings,
        backlog: Backlog,
        routes: Routes,
        rescue: Rescue,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self.ended = False
        self.thread = threading.get_ident()
        self.work = Alarm(loop)
        self._settings = settings
        self._backlog = backlog
        self._routes = routes
        self._rescue = rescue
        self._effect_wait = round(min(settings.effect_wait, settings.pair_timeout / 2) * 1e9)  # ns
        self._link = Link(settings)
        self._assembler: Assembler | None = None  # there while the connection is believed to work
        self._outgoing: deque[tuple[int, list[Held]]] = deque()  # batches by shard, encoded
        self._refusals = 0
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self._reported_at = 0.0
        self._reported: tuple[int, ...] = ()
        self._closing = False
        self._ending = False  # nothing is waited for any more
        # A context of its own, or the request that started the task would live in it for ever.
        self._task = loop.create_task(self._run(), name="abreast", context=contextvars.Context())

    async def aclose(self) -> None:
        """Send what waits, for `flush_timeout` at most; the rest is dropped and counted."""
        self._closing = True
        self.work.ring()
        _, late = await asyncio.wait([self._task], timeout=self._settings.flush_timeout)
        if late:  # in the middle of a turn with a slow Redis
            self._task.cancel()
            await asyncio.wait([self._task], timeout=TIMEOUT)

    async def _run(self) -> None:
        try:
            while not self._closing:
                self._heed()
                await self._wait()
                await self._turn()
            await self._flush()
            self._abandon()
            await self._last_report()
        except asyncio.CancelledError:
            if self._closing:  # the time is over
                self._abandon()
            else:  # the loop comes to its end
                await self._flush()
                await self._last_report()
            raise
        finally:
            self.ended = True
            while self._outgoing:
                self._backlog.settled.extendleft(reversed(self._outgoing.pop()[1]))
            with contextlib.suppress(Exception):
                await self._link.close()

    def _heed(self) -> None:
        """Python 3.11's wait_for, which redis-py uses, may swallow a cancellation; the loop would never end."""
        if self._task.cancelling():
            raise asyncio.CancelledError

    async def _wait(self) -> None:
        self.work.silence()
        backlog = self._backlog
        now = self.loop.time()
        if backlog.recorders:
            await self.work.wait(self._settings.ship_interval)
        elif self._failures:
            await self.work.wait(self._retry_at - now)
        elif backlog.running:
            await self.work.wait(min(self._settings.ship_interval, self._next_report() - now))
        elif await self.work.wait(self._next_report() - now):
            await self.work.wait(self._settings.ship_interval)  # others may come

    async def _turn(self) -> None:
        try:
            await self._settle()
            if self.loop.time() >= self._retry_at:
                given_up = self._backlog.dropped[REDIS_ERROR]
                await self._ship()
                if given_up == self._backlog.dropped[REDIS_ERROR]:
                    self._up()
                if self.loop.time() >= self._next_report():
                    await self._report()
        except LinkError as error:
            await self._down(error)
        except Exception as error:  # noqa: BLE001  # the task must live as long as the loop
            self._rescue("shipping", error)
            self._retry_at = self.loop.time() + REPORT_INTERVAL

    async def _settle(self) -> None:
        """Also while Redis is down, so that no request is held longer than it must be."""
        backlog, until = self._backlog, perf_counter() + SLICE
        while backlog.recorders:
            recorder, size = backlog.recorders.popleft()
            backlog.versions[recorder.marks[0]] += 1
            if recorder.fault:
                backlog.drop(CAPTURE_ERROR, size)
            else:
                self._take(recorder, size)
            if perf_counter() > until:
                await asyncio.sleep(0)
                until = perf_counter() + SLICE
        self._release()

    def _take(self, recorder: Recorder, size: int) -> None:
        """Encode it where nothing more comes; otherwise keep only what is needed of it."""
        backlog, held, assembler = self._backlog, Held(size, recorder), self._assembler
        try:
            recorder.route = self._routes.template(recorder.scope)
            if assembler is None or not recorder.returned:
                settle(recorder)
        except Exception as error:  # noqa: BLE001  # a capture that can't be made must not stop the others
            backlog.drop(CAPTURE_ERROR, size)
            self._rescue("settling", error)
            return
        if assembler is None or not recorder.returned:
            backlog.running.append(held)
        elif self._encoded(held, assembler):
            backlog.settled.append(held)

    def _release(self) -> None:
        """Let go what no background task adds to any more, or has had its time."""
        backlog, running = self._backlog, []
        over = perf_counter_ns() - self._effect_wait
        for held in backlog.running:
            recorder = held.recorder
            if recorder is None or recorder.returned or recorder.finished < over or self._ending:
                backlog.grown(held)
                backlog.settled.append(held)
            else:
                running.append(held)
        backlog.running = running

    async def _ship(self) -> None:
        if self._assembler is None:
            redactor = Redactor(await self._link.open(), self._settings.secret_headers)
            self._assembler = Assembler(self._settings, redactor)
        while self._outgoing or self._backlog.settled:
            if not self._outgoing:
                await self._pack(self._assembler)
                continue
            shard, batch = self._outgoing[0]
            try:
                reply = await self._link.join(shard, [held.row for held in batch if held.row])
            except LinkError as error:
                if not self._give_up(error):
                    raise
                self._done(batch, None)
            else:
                self._done(batch, reply)

    async def _pack(self, assembler: Assembler) -> None:
        """The next batch, by shard."""
        settled, shards = self._backlog.settled, self._settings.shards
        found: dict[int, list[Held]] = {}
        count, size, until = 0, 0, perf_counter() + SLICE
        try:
            while settled and count < self._settings.ship_batch and size < BATCH_BYTES:
                held = settled.popleft()
                row = held.row or self._encoded(held, assembler)
                if row is None:
                    continue
                found.setdefault(shard_of(row[0], shards) if shards > 1 else 0, []).append(held)
                count, size = count + 1, size + len(row[3])
                if perf_counter() > until:
                    await asyncio.sleep(0)
                    until = perf_counter() + SLICE
        finally:
            self._outgoing.extend(found.items())

    def _encoded(self, held: Held, assembler: Assembler) -> Row | None:
        """None when it can't be encoded, and was dropped."""
        recorder = held.recorder
        if recorder is None:  # done before
            return held.row
        try:
            self._backlog.grown(held)
            held.row = assembler.row(recorder)
        except Exception as error:  # noqa: BLE001  # one bad capture must not stop the others
            self._backlog.drop(ENCODE_ERROR, held.size)
            self._rescue("encoding", error)
            return None
        held.recorder = None
        return held.row

    def _done(self, batch: list[Held], reply: Reply | None) -> None:
        self._outgoing.popleft()
        self._refusals = 0
        size = sum(held.size for held in batch)
        if reply is None:
            self._backlog.drop(REDIS_ERROR, size, len(batch))
            return
        refused = reply.refused_pairs + reply.refused_bytes
        self._backlog.ship(size, len(batch) - refused)
        for reason, count in ((REFUSED_PAIRS, reply.refused_pairs), (REFUSED_BYTES, reply.refused_bytes)):
            if count:
                self._backlog.drop(reason, 0, count)

    def _give_up(self, error: LinkError) -> bool:
        if error.passing:
            return False
        self._refusals += 1
        if self._refusals >= MOST_REFUSALS:
            self._rescue("sending a batch", error)
        return self._refusals >= MOST_REFUSALS

    def _next_report(self) -> float:
        changed = self._totals() != self._reported
        return self._reported_at + (REPORT_INTERVAL if changed else REPORT_IDLE)

    def _totals(self) -> tuple[int, ...]:
        backlog = self._backlog
        return backlog.captured, backlog.shipped, backlog.dropped.total(), backlog.count

    async def _report(self) -> None:
        totals = self._totals()
        await self._link.report(self._backlog.id, self._backlog.report())
        self._reported, self._reported_at = totals, self.loop.time()

    def _up(self) -> None:
        if self._failures:
            logger.warning(
                "captures go to Redis again; dropped so far: %s", dict(self._backlog.dropped) or "none"
            )
        self._failures = 0

    async def _down(self, error: LinkError) -> None:
        if not self._failures:
            logger.warning("captures wait: %s", error)
        self._assembler = None
        delay = min(BACKOFF_CAP, BACKOFF * 2 ** min(self._failures, 10))
        self._failures += 1
        self._retry_at = self.loop.time() + delay * random.uniform(0.5, 1)  # noqa: S311  # not a secret
        with contextlib.suppress(Exception):
            await self._link.close()  # a replica that took over may have the same name

    async def _flush(self) -> None:
        """Until nothing waits, Redis fails or the time is over."""
        self._ending = True
        with contextlib.suppress(TimeoutError, LinkError):
            async with asyncio.timeout(self._settings.flush_timeout):
                while self._backlog.count:
                    await self._settle()
                    await self._ship()
                    if self._backlog.count:  # the thread still reads a body
                        await asyncio.sleep(SLICE)

    def _abandon(self) -> None:
        """Count what is left as dropped. What the thread still reads comes later, and is counted then."""
        backlog = self._backlog
        while self._outgoing:
            backlog.settled.extend(self._outgoing.popleft()[1])
        for recorder, size in backlog.recorders:
            backlog.versions[recorder.marks[0]] += 1
            recorder.close()
            backlog.drop(SHUTDOWN, size)
        for held in (*backlog.running, *backlog.settled):
            backlog.drop(SHUTDOWN, held.size)
        backlog.recorders.clear()
        backlog.running.clear()
        backlog.settled.clear()

    async def _last_report(self) -> None:
        if self._assembler is not None:
            with contextlib.suppress(LinkError, Exception):
                await self._report()
