"""The background task of one event loop: assembles captures, sends them in batches and reports, for ever.

It never fails: what can't be sent waits within the bounds of the backlog, and what doesn't fit there is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import random
import threading
import weakref
from asyncio import TimerHandle, get_running_loop
from collections import deque
from threading import get_ident
from time import perf_counter, perf_counter_ns

from abreast._thread import BACKGROUND_THREAD
from abreast.errors import ErrorReporter
from abreast.export.queue import (
    CAPTURE_ERROR,
    CAPTURE_OVERHEAD_BYTES,
    ENCODE_ERROR,
    REDIS_ERROR,
    REDIS_REJECTED_BYTES,
    REDIS_REJECTED_PAIRS,
    SHUTDOWN,
    CaptureQueue,
    QueuedCapture,
)
from abreast.export.redaction import Redactor
from abreast.export.routes import RouteResolver
from abreast.export.serializer import CaptureSerializer, trim_scope
from abreast.export.transport import REPLY_TIMEOUT_S, JoinResult, RedisTransport, TransportError
from abreast.protocol.join import CaptureRow, shard_of
from abreast.recorder import RequestRecorder
from abreast.settings import Settings


class WakeEvent:
    """Of one task, in the thread of its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        self._wake()

    def clear(self) -> None:
        """Forget that it rang."""
        self._is_set = False

    async def wait(self, seconds: float) -> bool:
        """Whether it rang within the time, or had before. It is silent then."""
        if not self._is_set and seconds > 0:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        was_set, self._is_set = self._is_set, False
        return was_set

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


logger = logging.getLogger("abreast")

WORK_SLICE_S = 0.001  # seconds of work after which other tasks get their turn
MAX_BATCH_BYTES = 1024 * 1024  # of captures in one call of the script, which holds up Redis
BACKOFF_S = 0.1  # seconds before the second attempt; doubled for each one after it
MAX_BACKOFF_S = 5.0  # seconds
MAX_REJECTIONS = 3  # of one batch, for reasons that won't pass by themselves
REPORT_INTERVAL_S = 1.0  # seconds, when something changed
IDLE_REPORT_INTERVAL_S = 5.0  # seconds, when nothing did


class Exporter:
    def __init__(
        self,
        settings: Settings,
        queue: CaptureQueue,
        route_resolver: RouteResolver,
        report_error: ErrorReporter,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self.is_stopped = False
        self.thread_id = threading.get_ident()
        self.wake_event = WakeEvent(loop)
        self._settings = settings
        self._queue = queue
        self._route_resolver = route_resolver
        self._report_error = report_error
        self._effect_wait_ns = round(min(settings.effect_wait, settings.pair_timeout / 2) * 1e9)  # ns
        self._transport = RedisTransport(settings)
        self._serializer: CaptureSerializer | None = None  # there while the connection is believed to work
        self._batches: deque[tuple[int, list[QueuedCapture]]] = deque()  # batches by shard, encoded
        self._rejections = 0
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self._last_report_at = 0.0
        self._last_report_totals: tuple[int, ...] = ()
        self._is_closing = False
        self._is_flushing = False  # nothing is waited for any more
        # A context of its own, or the request that started the task would live in it for ever.
        self._task = loop.create_task(self._run(), name="abreast", context=contextvars.Context())

    async def aclose(self) -> None:
        """Send what waits, for `flush_timeout` at most; the rest is dropped and counted."""
        self._is_closing = True
        self.wake_event.set()
        _, unfinished = await asyncio.wait([self._task], timeout=self._settings.flush_timeout)
        if unfinished:  # in the middle of a turn with a slow Redis
            self._task.cancel()
            await asyncio.wait([self._task], timeout=REPLY_TIMEOUT_S)

    async def _run(self) -> None:
        try:
            while not self._is_closing:
                self._raise_if_cancelled()
                await self._wait_for_work()
                await self._run_once()
            await self._flush()
            self._drop_all()
            await self._send_last_report()
        except asyncio.CancelledError:
            if self._is_closing:  # the time is over
                self._drop_all()
            else:  # the loop comes to its end
                await self._flush()
                await self._send_last_report()
            raise
        finally:
            self.is_stopped = True
            while self._batches:
                self._queue.outbox.extendleft(reversed(self._batches.pop()[1]))
            with contextlib.suppress(Exception):
                await self._transport.close()

    def _raise_if_cancelled(self) -> None:
        """Python 3.11's wait_for, which redis-py uses, may swallow a cancellation; the loop would never end."""
        if self._task.cancelling():
            raise asyncio.CancelledError

    async def _wait_for_work(self) -> None:
        self.wake_event.clear()
        queue = self._queue
        now = self.loop.time()
        if queue.recorders:
            await self.wake_event.wait(self._settings.export_interval)
        elif self._failures:
            await self.wake_event.wait(self._retry_at - now)
        elif queue.awaiting_effects:
            await self.wake_event.wait(min(self._settings.export_interval, self._next_report_at() - now))
        elif await self.wake_event.wait(self._next_report_at() - now):
            await self.wake_event.wait(self._settings.export_interval)  # others may come

    async def _run_once(self) -> None:
        try:
            await self._drain()
            if self.loop.time() >= self._retry_at:
                dropped_before = self._queue.drop_counts[REDIS_ERROR]
                await self._send_batches()
                if dropped_before == self._queue.drop_counts[REDIS_ERROR]:
                    self._mark_connected()
                if self.loop.time() >= self._next_report_at():
                    await self._send_report()
        except TransportError as error:
            await self._mark_disconnected(error)
        except Exception as error:  # noqa: BLE001  # the task must live as long as the loop
            self._report_error("shipping", error)
            self._retry_at = self.loop.time() + REPORT_INTERVAL_S

    async def _drain(self) -> None:
        """Also while Redis is down, so that no request is held longer than it must be."""
        queue, slice_end = self._queue, perf_counter() + WORK_SLICE_S
        while queue.recorders:
            recorder, size = queue.recorders.popleft()
            queue.version_counts[recorder.route_tags[0]] += 1
            if recorder.error:
                queue.drop(CAPTURE_ERROR, size)
            else:
                self._accept(recorder, size)
            if perf_counter() > slice_end:
                await asyncio.sleep(0)
                slice_end = perf_counter() + WORK_SLICE_S
        self._finalise()

    def _accept(self, recorder: RequestRecorder, size: int) -> None:
        """Encode it where nothing more comes; otherwise keep only what is needed of it."""
        queue, queued, serializer = self._queue, QueuedCapture(size, recorder), self._serializer
        try:
            recorder.route = self._route_resolver.resolve(recorder.scope)
            if serializer is None or not recorder.app_returned:
                trim_scope(recorder)
        except Exception as error:  # noqa: BLE001  # a capture that can't be made must not stop the others
            queue.drop(CAPTURE_ERROR, size)
            self._report_error("settling", error)
            return
        if serializer is None or not recorder.app_returned:
            queue.awaiting_effects.append(queued)
        elif self._encode(queued, serializer):
            queue.outbox.append(queued)

    def _finalise(self) -> None:
        """Let go what no background task adds to any more, or has had its time."""
        queue, awaiting_effects = self._queue, []
        cutoff_ns = perf_counter_ns() - self._effect_wait_ns
        for queued in queue.awaiting_effects:
            recorder = queued.recorder
            if recorder is None or recorder.app_returned or recorder.finished_ns < cutoff_ns or self._is_flushing:
                queue.account_growth(queued)
                queue.outbox.append(queued)
            else:
                awaiting_effects.append(queued)
        queue.awaiting_effects = awaiting_effects

    async def _send_batches(self) -> None:
        if self._serializer is None:
            redactor = Redactor(await self._transport.open(), self._settings.secret_headers)
            self._serializer = CaptureSerializer(self._settings, redactor)
        while self._batches or self._queue.outbox:
            if not self._batches:
                await self._build_batches(self._serializer)
                continue
            shard, batch = self._batches[0]
            try:
                result = await self._transport.join(shard, [queued.row for queued in batch if queued.row])
            except TransportError as error:
                if not self._should_drop_batch(error):
                    raise
                self._finish_batch(batch, None)
            else:
                self._finish_batch(batch, result)

    async def _build_batches(self, serializer: CaptureSerializer) -> None:
        """The next batch, by shard."""
        outbox, shards = self._queue.outbox, self._settings.shards
        batches: dict[int, list[QueuedCapture]] = {}
        count, size, slice_end = 0, 0, perf_counter() + WORK_SLICE_S
        try:
            while outbox and count < self._settings.export_batch and size < MAX_BATCH_BYTES:
                queued = outbox.popleft()
                row = queued.row or self._encode(queued, serializer)
                if row is None:
                    continue
                batches.setdefault(shard_of(row[0], shards) if shards > 1 else 0, []).append(queued)
                count, size = count + 1, size + len(row[3])
                if perf_counter() > slice_end:
                    await asyncio.sleep(0)
                    slice_end = perf_counter() + WORK_SLICE_S
        finally:
            self._batches.extend(batches.items())

    def _encode(self, queued: QueuedCapture, serializer: CaptureSerializer) -> CaptureRow | None:
        """None when it can't be encoded, and was dropped."""
        recorder = queued.recorder
        if recorder is None:  # done before
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

    def _finish_batch(self, batch: list[QueuedCapture], result: JoinResult | None) -> None:
        self._batches.popleft()
        self._rejections = 0
        size = sum(queued.size for queued in batch)
        if result is None:
            self._queue.drop(REDIS_ERROR, size, len(batch))
            return
        rejected_count = result.rejected_pairs + result.rejected_bytes
        self._queue.mark_shipped(size, len(batch) - rejected_count)
        for reason, count in (
            (REDIS_REJECTED_PAIRS, result.rejected_pairs),
            (REDIS_REJECTED_BYTES, result.rejected_bytes),
        ):
            if count:
                self._queue.drop(reason, 0, count)

    def _should_drop_batch(self, error: TransportError) -> bool:
        if error.is_transient:
            return False
        self._rejections += 1
        if self._rejections >= MAX_REJECTIONS:
            self._report_error("sending a batch", error)
        return self._rejections >= MAX_REJECTIONS

    def _next_report_at(self) -> float:
        has_changed = self._totals() != self._last_report_totals
        return self._last_report_at + (REPORT_INTERVAL_S if has_changed else IDLE_REPORT_INTERVAL_S)

    def _totals(self) -> tuple[int, ...]:
        queue = self._queue
        return queue.captured_count, queue.shipped_count, queue.drop_counts.total(), queue.count

    async def _send_report(self) -> None:
        totals = self._totals()
        await self._transport.report(self._queue.id, self._queue.build_report())
        self._last_report_totals, self._last_report_at = totals, self.loop.time()

    def _mark_connected(self) -> None:
        if self._failures:
            logger.warning("captures go to Redis again; dropped so far: %s", dict(self._queue.drop_counts) or "none")
        self._failures = 0

    async def _mark_disconnected(self, error: TransportError) -> None:
        if not self._failures:
            logger.warning("captures wait: %s", error)
        self._serializer = None
        delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(self._failures, 10))
        self._failures += 1
        self._retry_at = self.loop.time() + delay_s * random.uniform(0.5, 1)  # noqa: S311  # not a secret
        with contextlib.suppress(Exception):
            await self._transport.close()  # a replica that took over may have the same name

    async def _flush(self) -> None:
        """Until nothing waits, Redis fails or the time is over."""
        self._is_flushing = True
        with contextlib.suppress(TimeoutError, TransportError):
            async with asyncio.timeout(self._settings.flush_timeout):
                while self._queue.count:
                    await self._drain()
                    await self._send_batches()
                    if self._queue.count:  # the thread still reads a body
                        await asyncio.sleep(WORK_SLICE_S)

    def _drop_all(self) -> None:
        """Count what is left as dropped. What the thread still reads comes later, and is counted then."""
        queue = self._queue
        while self._batches:
            queue.outbox.extend(self._batches.popleft()[1])
        for recorder, size in queue.recorders:
            queue.version_counts[recorder.route_tags[0]] += 1
            recorder.close()
            queue.drop(SHUTDOWN, size)
        for queued in (*queue.awaiting_effects, *queue.outbox):
            queue.drop(SHUTDOWN, queued.size)
        queue.recorders.clear()
        queue.awaiting_effects.clear()
        queue.outbox.clear()

    async def _send_last_report(self) -> None:
        if self._serializer is not None:
            with contextlib.suppress(TransportError, Exception):
                await self._send_report()


# Parts of the time that a pair waits for its copies, within which an answer that goes on has to be captured.
TRUNCATION_DEADLINE_RATIO = 0.8
MIN_TRUNCATION_DELAY_RATIO = 0.1  # from its first chunk on
EXPORTER_POOLS: weakref.WeakSet[ExporterPool] = weakref.WeakSet()


class ExporterPool:
    def __init__(
        self, settings: Settings, queue: CaptureQueue, route_resolver: RouteResolver, report_error: ErrorReporter
    ) -> None:
        self.body_limit = settings.body_limit
        self.report_error = report_error
        self._settings = settings
        self._queue = queue
        self._route_resolver = route_resolver
        self._batch_size = settings.export_batch
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
        size = CAPTURE_OVERHEAD_BYTES + (len(recorder.single_chunk) if recorder.fast_path else recorder.body_bytes)
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
            candidate for candidate in self._exporters if not candidate.is_stopped and not candidate.loop.is_closed()
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
        self._parent_exporters += self._exporters  # kept, for a task that is thrown away while it waits complains
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
