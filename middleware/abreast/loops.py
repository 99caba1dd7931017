"""Finds the shipper of the running event loop, and starts it at the first capture.

A process has one loop as a rule; test clients make one for each request.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from asyncio import TimerHandle, get_running_loop
from threading import get_ident

from abreast.backlog import OVERHEAD, Backlog
from abreast.recorder import Recorder
from abreast.rescue import Rescue
from abreast.route import Routes
from abreast.settings import Settings
from abreast.shipper import Shipper
from abreast.worker import WORKER

# Parts of the time that a pair waits for its copies, within which an answer that goes on has to be captured.
LONGEST = 0.8
LEAST = 0.1  # from its first chunk on
ALL: weakref.WeakSet[Loops] = weakref.WeakSet()


class Loops:
    def __init__(self, settings: Settings, backlog: Backlog, routes: Routes, rescue: Rescue) -> None:
        self.body_limit = settings.body_limit
        self.rescue = rescue
        self._settings = settings
        self._backlog = backlog
        self._routes = routes
        self._batch = settings.ship_batch
        self._most = settings.queue_count
        self._most_bytes = settings.queue_bytes
        self._shipper: Shipper | None = None  # the latest one that was asked for
        self._shippers: list[Shipper] = []
        self._before_fork: list[Shipper] = []
        ALL.add(self)

    def recorded(self, recorder: Recorder) -> None:
        """Take what was recorded, or drop and count it. In the request's path."""
        shipper = self._shipper
        if shipper is None or shipper.ended or shipper.thread != get_ident() or not shipper.loop.is_running():
            shipper = self.start()  # asking for the running loop takes longer
        backlog = self._backlog
        size = OVERHEAD + (len(recorder.only) if recorder.plain else recorder.held)
        if recorder.now.held is not None:
            recorder.journaled = recorder.now.held.bytes
            size += recorder.journaled
        if recorder.fault or backlog.count >= self._most or backlog.bytes + size > self._most_bytes:
            backlog.refuse(recorder)
            return
        backlog.count += 1
        backlog.bytes += size
        if recorder.plain or not recorder.needs_thread:
            waiting = backlog.recorders
            waiting.append((recorder, size))
            count = len(waiting)
            if count == 1 or count == self._batch:  # noqa: PLR1714  # faster
                shipper.work.ring()
        else:
            WORKER.submit(lambda: self._finish(recorder, size, shipper))

    def goes_on(self, recorder: Recorder) -> TimerHandle:
        """Have it leave in time to be joined, however long its answer goes on. In the path of answers in several chunks."""
        since = (recorder.first_byte - recorder.now.began) / 1e9
        wait = max(LONGEST * self._settings.pair_timeout - since, LEAST * self._settings.pair_timeout)
        return get_running_loop().call_later(wait, recorder.leave)

    def start(self) -> Shipper:
        """The shipper of the running loop."""
        loop = get_running_loop()
        self._shippers = [each for each in self._shippers if not each.ended and not each.loop.is_closed()]
        for shipper in self._shippers:
            if shipper.loop is loop:
                break
        else:
            shipper = Shipper(self._settings, self._backlog, self._routes, self.rescue, loop)
            self._shippers.append(shipper)
        self._shipper = shipper
        return shipper

    def forked(self) -> None:
        """Begin anew in a child: what waits, and the counts, are the parent's."""
        self._before_fork += self._shippers  # kept, for a task that is thrown away while it waits complains
        self._shippers = []
        self._shipper = None
        self._backlog.reset()

    async def aclose(self) -> None:
        loop = get_running_loop()
        for shipper in [each for each in self._shippers if each.loop is loop]:
            try:
                await shipper.aclose()
            except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
                self.rescue("close", error)

    def _finish(self, recorder: Recorder, size: int, shipper: Shipper) -> None:
        """Runs in the thread."""
        recorder.finish()
        self._backlog.recorders.append((recorder, size))
        with contextlib.suppress(RuntimeError):  # the loop is closed; the next one will take it
            shipper.loop.call_soon_threadsafe(shipper.work.ring)


def _forked() -> None:
    for loops in list(ALL):
        loops.forked()


os.register_at_fork(after_in_child=_forked)
