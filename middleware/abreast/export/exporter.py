"""The export of captures to Redis: one background task per event loop encodes them, sends batches and reports.

The task never fails. Captures that can't be sent wait in the queue, and the queue counts the ones it has to drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import random
import time
import weakref
from asyncio import TimerHandle, get_running_loop
from collections import deque
from concurrent.futures import Future
from threading import get_ident
from time import perf_counter, perf_counter_ns

from abreast.errors import ErrorReporter
from abreast.export.queue import CAPTURE_ERROR, ENCODE_ERROR, REDIS_ERROR, SHUTDOWN, CaptureQueue, QueuedCapture
from abreast.export.routes import RouteResolver
from abreast.export.serializer import CaptureSerializer, RotatingRedactor, trim_scope
from abreast.export.transport import REPLY_TIMEOUT_S, RedisTransport, TransportError
from abreast.protocol.join import CaptureRow, shard_of
from abreast.recorder import BACKGROUND_THREAD, RequestRecorder
from abreast.settings import Settings

logger = logging.getLogger("abreast")

WORK_SLICE_S = 0.001  # seconds of work, after which other tasks get their turn
MAX_LOOP_BYTES = 8 * 1024  # bytes of a capture; a larger one may need more than 2 ms, so the thread encodes it
MAX_BATCH_BYTES = 1024 * 1024  # bytes of captures per call of the script, which blocks Redis
BACKOFF_S = 0.1  # seconds before the second attempt, doubled for each further one
MAX_BACKOFF_S = 5.0  # seconds
MAX_REJECTIONS = 3  # permanent errors for one batch, after which it is dropped
REPORT_INTERVAL_S = 1.0  # seconds between reports if a total changed
IDLE_REPORT_INTERVAL_S = 5.0  # seconds between reports if no total changed
# Shares of pair_timeout: a capture of a long response has to leave before its pair times out.
TRUNCATION_DEADLINE_RATIO = 0.8
MIN_TRUNCATION_DELAY_RATIO = 0.1  # from the first chunk


_pools: weakref.WeakSet[ExporterPool] = weakref.WeakSet()


class Exporter:
    def __init__(self, pool: ExporterPool, loop: asyncio.AbstractEventLoop) -> None:
        settings = pool.settings
        self.loop = loop
        self.is_stopped = False
        self.thread_id = get_ident()
        self.wake_event = asyncio.Event()  # set in the thread of the loop
        self._settings = settings
        self._queue = pool.queue
        self._route_resolver = pool.route_resolver
        self._report_error = pool.report_error
        self._work_slice_s = pool.work_slice_s
        self._effect_wait_ns = round(min(settings.effect_wait, settings.pair_timeout / 2) * 1e9)  # ns
        self._transport = RedisTransport(settings)
        self._redactor = RotatingRedactor(settings)
        self._serializer: CaptureSerializer | None = None  # None while there is no connection
        self._batches: deque[tuple[int, list[QueuedCapture]]] = deque()  # (shard, encoded captures)
        self._rejections = 0
        self._failures = 0  # consecutive
        self._retry_at = 0.0
        self._last_report_at = 0.0
        self._last_report_totals: tuple[int, ...] = ()
        self._is_closing = False
        self._is_flushing = False  # captures no longer wait for effects
        # With a separate context, the request that starts the task is not kept alive.
        self._task = loop.create_task(self._run(), name="abreast", context=contextvars.Context())

    async def aclose(self) -> None:
        """Send the queue for at most `flush_timeout` seconds, then drop and count the remaining captures."""
        self._is_closing = True
        self.wake_event.set()
        _, unfinished = await asyncio.wait([self._task], timeout=self._settings.flush_timeout)
        if unfinished:  # Redis is slow
            self._task.cancel()
            await asyncio.wait([self._task], timeout=REPLY_TIMEOUT_S)

    async def _run(self) -> None:
        try:
            while not self._is_closing:
                if self._task.cancelling():  # wait_for of Python 3.11, in redis-py, may swallow a cancellation
                    raise asyncio.CancelledError  # noqa: TRY301  # as a cancellation would be
                await self._wait_for_work()
                await self._run_once()
            await self._flush()
            self._drop_all()
            await self._send_last_report()
        except asyncio.CancelledError:
            if self._is_closing:  # flush_timeout is over
                self._drop_all()
            else:  # the loop is closing
                await self._flush()
                await self._send_last_report()
            raise
        finally:
            self.is_stopped = True
            self._requeue_batches()
            with contextlib.suppress(Exception):
                await self._transport.close()

    async def _wait_for_work(self) -> None:
        self.wake_event.clear()
        queue = self._queue
        now = self.loop.time()
        if queue.recorders:
            await self._wait(self._settings.export_interval)
        elif self._failures:
            await self._wait(self._retry_at - now)
        elif queue.awaiting_effects:
            await self._wait(min(self._settings.export_interval, self._next_report_at() - now))
        elif await self._wait(self._next_report_at() - now):
            await self._wait(self._settings.export_interval)  # collect a batch

    async def _wait(self, seconds: float) -> bool:
        """Wait for the wake event. Return True if it was set before the timeout, and clear it."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.wake_event.wait()
        was_set = self.wake_event.is_set()
        self.wake_event.clear()
        return was_set

    async def _run_once(self) -> None:
        try:
            if self._redactor.is_stale:
                BACKGROUND_THREAD.submit(self._refresh_redactor)  # the file may be on a slow disk
            await self._drain()
            if self.loop.time() >= self._retry_at:
                dropped_before = self._queue.drop_counts[REDIS_ERROR]
                await self._send_batches()
                drop_counts = self._queue.drop_counts
                if dropped_before == drop_counts[REDIS_ERROR]:
                    if self._failures:
                        logger.warning("captures go to Redis again; dropped so far: %s", dict(drop_counts) or "none")
                    self._failures = 0
                if self.loop.time() >= self._next_report_at():
                    await self._send_report()
        except TransportError as error:
            await self._mark_disconnected(error)
        except Exception as error:  # noqa: BLE001  # the task must live as long as its loop
            self._report_error("exporting", error)
            self._retry_at = self.loop.time() + REPORT_INTERVAL_S

    async def _drain(self) -> None:
        """Encode or trim the recorders, also while Redis is down, so that they keep no request alive."""
        queue, slice_end = self._queue, perf_counter() + self._work_slice_s
        while (entry := queue.next_recorder()) is not None:
            recorder, size = entry
            if recorder.error:
                queue.drop(CAPTURE_ERROR, size)
            else:
                self._accept(recorder, size)
            if perf_counter() > slice_end:
                await asyncio.sleep(0)
                slice_end = perf_counter() + self._work_slice_s
        cutoff_ns = perf_counter_ns() - self._effect_wait_ns
        queue.release_finished(cutoff_ns, is_flushing=self._is_flushing)

    def _accept(self, recorder: RequestRecorder, size: int) -> None:
        """Encode a capture that is final. Otherwise keep only what a capture needs of the request."""
        queue, queued, serializer = self._queue, QueuedCapture(size, recorder), self._serializer
        try:
            recorder.prepare_export(self._route_resolver.resolve)
            if serializer is None or not recorder.app_returned:
                trim_scope(recorder)
                queue.awaiting_effects.append(queued)
                return
            if _is_expensive(queued, recorder):
                trim_scope(recorder)
                queue.outbox.append(queued)
                return
        except Exception as error:  # noqa: BLE001  # one bad capture must not stop the others
            queue.drop(CAPTURE_ERROR, size)
            self._report_error("resolving a route", error)
            return
        if self._encode(queued, serializer):
            queue.outbox.append(queued)

    async def _send_batches(self) -> None:
        if self._serializer is None:
            await self._transport.open()
            self._serializer = CaptureSerializer(self._settings, self._redactor)
        while self._batches or self._queue.outbox:
            if not self._batches:
                await self._build_batches(self._serializer)
                continue
            shard, batch = self._batches[0]
            try:
                result = await self._transport.join(shard, [queued.row for queued in batch if queued.row])
            except TransportError as error:
                self._rejections += not error.is_transient
                if error.is_transient or self._rejections < MAX_REJECTIONS:
                    raise
                self._report_error("sending a batch", error)
                result = None
            self._batches.popleft()
            self._rejections = 0
            self._queue.account_sent(batch, result)

    async def _build_batches(self, serializer: CaptureSerializer) -> None:
        """Encode the next batch and split it by shard."""
        queue, shards = self._queue, self._settings.shards
        batches: dict[int, list[QueuedCapture]] = {}
        count, size, slice_end = 0, 0, perf_counter() + self._work_slice_s
        try:
            while queue.outbox and count < self._settings.export_batch and size < MAX_BATCH_BYTES:
                queued = queue.outbox.popleft()
                if queued.recorder is not None and _is_expensive(queued, queued.recorder):
                    row = await self._encode_in_thread(queued, queued.recorder, serializer)
                else:
                    row = queued.row or self._encode(queued, serializer)
                if row is None:
                    continue
                batches.setdefault(shard_of(row[0], shards) if shards > 1 else 0, []).append(queued)
                count, size = count + 1, size + len(row[3])
                if perf_counter() > slice_end:
                    await asyncio.sleep(0)
                    slice_end = perf_counter() + self._work_slice_s
        finally:
            self._batches.extend(batches.items())

    def _encode(self, queued: QueuedCapture, serializer: CaptureSerializer) -> CaptureRow | None:
        """Return the row, or drop the capture and return None."""
        recorder = queued.recorder
        if recorder is None:  # already encoded
            return queued.row
        try:
            self._queue.account_growth(queued)
            queued.row = serializer.serialize(recorder)
        except Exception as error:  # noqa: BLE001  # one bad capture must not stop the others
            self._queue.drop(ENCODE_ERROR, queued.size)
            self._report_error("encoding", error)
            return None
        queued.recorder = None
        return queued.row

    async def _encode_in_thread(
        self, queued: QueuedCapture, recorder: RequestRecorder, serializer: CaptureSerializer
    ) -> CaptureRow | None:
        """Encode a capture while the loop serves requests. Otherwise the same as `_encode`."""
        result: Future[CaptureRow] = Future()

        def encode() -> None:
            try:
                result.set_result(serializer.serialize(recorder))
            except Exception as error:  # noqa: BLE001  # for the loop
                result.set_exception(error)

        self._queue.account_growth(queued)
        BACKGROUND_THREAD.submit(encode)
        try:
            queued.row = await asyncio.shield(asyncio.wrap_future(result))
        except asyncio.CancelledError:  # the result is lost, and the effect log is closed
            self._queue.drop(SHUTDOWN, queued.size)
            raise
        except Exception as error:  # noqa: BLE001  # one bad capture must not stop the others
            self._queue.drop(ENCODE_ERROR, queued.size)
            self._report_error("encoding", error)
            return None
        queued.recorder = None
        return queued.row

    def _refresh_redactor(self) -> None:
        try:
            self._redactor.refresh()
        except (OSError, ValueError) as error:
            self._report_error("reading the redaction key again", error)

    def _next_report_at(self) -> float:
        has_changed = self._queue.totals != self._last_report_totals
        return self._last_report_at + (REPORT_INTERVAL_S if has_changed else IDLE_REPORT_INTERVAL_S)

    async def _send_report(self) -> None:
        totals = self._queue.totals
        report = {**self._queue.build_report(), "redaction_key": self._redactor.at(time.time()).key_id}
        await self._transport.report(self._queue.id, report)
        self._last_report_totals, self._last_report_at = totals, self.loop.time()

    async def _mark_disconnected(self, error: TransportError) -> None:
        if not self._failures:
            logger.warning("can't send captures to Redis; they stay queued: %s", error)
        self._serializer = None
        delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(self._failures, 10))
        self._failures += 1
        self._retry_at = self.loop.time() + delay_s * random.uniform(0.5, 1)  # noqa: S311  # not a secret
        with contextlib.suppress(Exception):
            await self._transport.close()  # after a failover, the address may be that of another server

    async def _flush(self) -> None:
        """Send until the queue is empty, Redis fails or `flush_timeout` is over."""
        self._is_flushing = True
        with contextlib.suppress(TimeoutError, TransportError):
            async with asyncio.timeout(self._settings.flush_timeout):
                while self._queue.count:
                    await self._drain()
                    await self._send_batches()
                    if self._queue.count:  # the background thread still reads a body
                        await asyncio.sleep(WORK_SLICE_S)

    def _drop_all(self) -> None:
        self._requeue_batches()
        self._queue.drop_all(SHUTDOWN)

    def _requeue_batches(self) -> None:
        while self._batches:
            self._queue.outbox.extendleft(reversed(self._batches.pop()[1]))

    async def _send_last_report(self) -> None:
        if self._serializer is not None:
            with contextlib.suppress(TransportError, Exception):
                await self._send_report()


class ExporterPool:
    """The exporters of a process, one per event loop."""

    def __init__(
        self,
        settings: Settings,
        queue: CaptureQueue,
        route_resolver: RouteResolver,
        report_error: ErrorReporter,
        work_slice_s: float = WORK_SLICE_S,
    ) -> None:
        self.body_limit = settings.body_limit
        self.report_error = report_error
        self.settings = settings
        self.queue = queue
        self.route_resolver = route_resolver
        self.work_slice_s = work_slice_s
        self._batch_size = settings.export_batch
        self._exporter: Exporter | None = None  # the latest one, for the fast path
        self._exporters: list[Exporter] = []
        self._parent_exporters: list[Exporter] = []
        _pools.add(self)

    def enqueue(self, recorder: RequestRecorder) -> None:
        """Queue a capture for export, or drop and count it. In the path of requests."""
        exporter = self._exporter
        if (
            exporter is None
            or exporter.is_stopped
            or exporter.thread_id != get_ident()
            or not exporter.loop.is_running()
        ):
            exporter = self.start()  # slower: looks up the running loop
        size = self.queue.reserve(recorder)
        if not size:
            return
        if recorder.fast_path or not recorder.needs_thread:
            count = self.queue.add(recorder, size)
            if count == 1 or count == self._batch_size:  # noqa: PLR1714  # faster
                exporter.wake_event.set()
        else:
            BACKGROUND_THREAD.submit(lambda: self._finish_in_thread(recorder, size, exporter))

    def count_drop(self, reason: str) -> None:
        """Count a request that gets no capture, and start the exporter, which reports the count."""
        self.queue.drop_counts[reason] += 1
        if self.settings.enabled:
            try:
                self.start()
            except Exception as error:  # noqa: BLE001  # the caller still has to refuse the request
                self.report_error("start", error)

    def schedule_truncation(self, recorder: RequestRecorder) -> TimerHandle:
        """Have the capture of a long response leave before its pair times out. In the path of responses in several chunks."""
        elapsed_s = (recorder.first_byte_ns - recorder.context.started_ns) / 1e9
        delay_s = max(
            TRUNCATION_DEADLINE_RATIO * self.settings.pair_timeout - elapsed_s,
            MIN_TRUNCATION_DELAY_RATIO * self.settings.pair_timeout,
        )
        return get_running_loop().call_later(delay_s, recorder.truncate_at_deadline)

    def start(self) -> Exporter:
        """Return the exporter of the running loop, and start it if necessary."""
        loop = get_running_loop()
        self._exporters = [
            candidate for candidate in self._exporters if not candidate.is_stopped and not candidate.loop.is_closed()
        ]
        exporter = next((candidate for candidate in self._exporters if candidate.loop is loop), None)
        if exporter is None:
            exporter = Exporter(self, loop)
            self._exporters.append(exporter)
        self._exporter = exporter
        return exporter

    def after_fork(self) -> None:
        """Start empty in a child: the captures and counts belong to the parent."""
        self._parent_exporters += self._exporters  # kept: asyncio warns of a pending task that is destroyed
        self._exporters = []
        self._exporter = None
        self.queue.reset()

    async def aclose(self) -> None:
        loop = get_running_loop()
        for exporter in [candidate for candidate in self._exporters if candidate.loop is loop]:
            try:
                await exporter.aclose()
            except Exception as error:  # noqa: BLE001  # nothing of ours may reach the app
                self.report_error("close", error)

    def _finish_in_thread(self, recorder: RequestRecorder, size: int, exporter: Exporter) -> None:
        recorder.finish()
        self.queue.add(recorder, size)
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the next exporter sends the capture
            exporter.loop.call_soon_threadsafe(exporter.wake_event.set)


def _is_expensive(queued: QueuedCapture, recorder: RequestRecorder) -> bool:
    """Tell whether the encoding may block the loop for too long. A compressed body may be much larger than it looks."""
    if queued.size > MAX_LOOP_BYTES:
        return True
    headers = recorder.headers
    if recorder.request_body is not None:
        headers = [*headers, *recorder.scope["headers"]]
    return any(b"content-encoding" in row or b"Content-Encoding" in row for row in headers)


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork)
