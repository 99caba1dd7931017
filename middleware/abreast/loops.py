"""Finds the shipper of the running event loop, and starts it at the first capture.

A process has one loop as a rule; test clients make one for each request.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from asyncio import TimerHandle, get_running_loop
from threading import get_ident

from abreast.backlog import CAPTURE_OVERHEAD_BYTES, CaptureQueue
from abreast.recorder import RequestRecorder
from abreast.rescue import ErrorReporter
from abreast.route import RouteResolver
from abreast.settings import Settings
from abreast.shipper import Exporter
from abreast.worker import BACKGROUND_THREAD

# Parts of the time that a pair waits for its copies, within which an answer that goes on has to be captured.
TRUNCATION_DEADLINE_RATIO = 0.8
MIN_TRUNCATION_DELAY_RATIO = 0.1  # from its first chunk on
EXPORTER_POOLS: weakref.WeakSet[ExporterPool] = weakref.WeakSet()


class ExporterPool:
    def __init__(
        self,
        settings: Settings,
        queue: CaptureQueue,
        route_resolver: RouteResolver,
        report_error: ErrorReporter,
    ) -> None:
        self.body_limit = settings.body_limit
        self.report_error = report_error
        self._settings = settings
        self._queue = queue
        self._route_resolver = route_resolver
        self._batch_size = settings.ship_batch
        self._max_count = settings.queue_count
        self._max_bytes = settings.queue_bytes
        self._exporter: Exporter | None = None  # the latest one that was asked for
        self._exporters: list[Exporter] = []
        self._parent_exporters: list[Exporter] = []
        EXPORTER_POOLS.add(self)

    def enqueue(self, recorder: RequestRecorder) -> None:
        """Take what was recorded, or drop and count it. In the request's path."""
        exporter = self._exporter
        if (
            exporter is None
            or exporter.is_stopped
            or exporter.thread_id != get_ident()
            or not exporter.loop.is_running()
        ):
            exporter = self.start()  # asking for the running loop takes longer
        queue = self._queue
        size = CAPTURE_OVERHEAD_BYTES + (
            len(recorder.single_chunk) if recorder.fast_path else recorder.body_bytes
        )
        if recorder.context.effect_log is not None:
            recorder.queued_effect_bytes = recorder.context.effect_log.payload_bytes
            size += recorder.queued_effect_bytes
        if recorder.error or queue.count >= self._max_count or queue.bytes + size > self._max_bytes:
            queue.reject(recorder)
            return
        queue.count += 1
        queue.bytes += size
        if recorder.fast_path or not recorder.needs_thread:
            recorders = queue.recorders
            recorders.append((recorder, size))
            count = len(recorders)
            if count == 1 or count == self._batch_size:  # noqa: PLR1714  # faster
                exporter.wake_event.set()
        else:
            BACKGROUND_THREAD.submit(lambda: self._finish_in_thread(recorder, size, exporter))

    def schedule_truncation(self, recorder: RequestRecorder) -> TimerHandle:
        """Have it leave in time to be joined, however long its answer goes on. In the path of answers in several chunks."""
        elapsed_s = (recorder.first_byte_ns - recorder.context.started_ns) / 1e9
        delay_s = max(
            TRUNCATION_DEADLINE_RATIO * self._settings.pair_timeout - elapsed_s,
            MIN_TRUNCATION_DELAY_RATIO * self._settings.pair_timeout,
        )
        return get_running_loop().call_later(delay_s, recorder.truncate_at_deadline)

    def start(self) -> Exporter:
        """The shipper of the running loop."""
        loop = get_running_loop()
        self._exporters = [
            candidate
            for candidate in self._exporters
            if not candidate.is_stopped and not candidate.loop.is_closed()
        ]
        for exporter in self._exporters:
            if exporter.loop is loop:
                break
        else:
            exporter = Exporter(self._settings, self._queue, self._route_resolver, self.report_error, loop)
            self._exporters.append(exporter)
        self._exporter = exporter
        return exporter

    def after_fork(self) -> None:
        """Begin anew in a child: what waits, and the counts, are the parent's."""
        self._parent_exporters += (
            self._exporters
        )  # kept, for a task that is thrown away while it waits complains
        self._exporters = []
        self._exporter = None
        self._queue.reset()

    async def aclose(self) -> None:
        loop = get_running_loop()
        for exporter in [candidate for candidate in self._exporters if candidate.loop is loop]:
            try:
                await exporter.aclose()
            except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
                self.report_error("close", error)

    def _finish_in_thread(self, recorder: RequestRecorder, size: int, exporter: Exporter) -> None:
        """Runs in the thread."""
        recorder.finish()
        self._queue.recorders.append((recorder, size))
        with contextlib.suppress(RuntimeError):  # the loop is closed; the next one will take it
            exporter.loop.call_soon_threadsafe(exporter.wake_event.set)


def _after_fork() -> None:
    for pool in list(EXPORTER_POOLS):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork)
