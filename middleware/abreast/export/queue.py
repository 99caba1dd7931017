"""The queue of captures in a process: bounded by count and by bytes, and it accounts for every capture."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from abreast.export.transport import JoinResult
from abreast.protocol.join import CaptureRow
from abreast.recorder import RequestRecorder
from abreast.settings import Settings

CAPTURE_OVERHEAD_BYTES = 2048  # rough size of a capture without its bodies

# Reasons for dropped captures.
QUEUE_COUNT = "queue_count"  # the queue holds queue_count captures
QUEUE_BYTES = "queue_bytes"  # the queue holds queue_bytes bytes
CAPTURE_ERROR = "capture_error"  # recording failed
ENCODE_ERROR = "encode_error"  # the capture can't be written in its format
REDIS_REJECTED_PAIRS = "redis_rejected_pairs"  # Redis holds redis_pairs pairs
REDIS_REJECTED_BYTES = "redis_rejected_bytes"  # Redis holds redis_bytes bytes
REDIS_ERROR = "redis_error"  # Redis refused a batch repeatedly
SHUTDOWN = "shutdown"  # the process ended before the capture was sent
INVALID_HEADERS = "invalid_headers"  # an x-abreast-* header is missing, repeated or a trailer
UNPROVEN_LIVE = "unproven_live"  # a live request has no valid x-abreast-key
UNPROVEN_COPY = "unproven_copy"  # a copy has none, so the middleware refused it

LATE_EFFECTS_LOCK = threading.Lock()  # late effects come from any thread


@dataclass(slots=True)
class QueuedCapture:
    """A capture that waits to be sent: a finished recorder, or the row that it was encoded to."""

    size: int  # bytes that it takes in the queue
    recorder: RequestRecorder | None
    row: CaptureRow | None = None


class CaptureQueue:
    """Captures move from `recorders` to `awaiting_effects` or `outbox`. Only this class changes the counts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._max_count = settings.queue_count
        self._max_bytes = settings.queue_bytes
        self.reset()

    def reset(self) -> None:
        """Start empty: for a new process, and for a child after a fork."""
        self.pid = os.getpid()
        self.id = uuid.uuid4().hex
        self.started_at = time.time()
        self.recorders: deque[tuple[RequestRecorder, int]] = deque()
        self.outbox: deque[QueuedCapture] = deque()
        self.awaiting_effects: list[QueuedCapture] = []  # background tasks may still record effects
        self.count = 0
        self.bytes = 0
        self.shipped_count = 0
        self.version_counts: Counter[str] = Counter()  # captured; the ones that wait for the thread come later
        self.drop_counts: Counter[str] = Counter()
        self.late_effect_count = 0
        self.unconverted_counts: Counter[str] = Counter()  # gRPC calls that the collector could not convert, by reason

    @property
    def captured_count(self) -> int:
        return self.shipped_count + self.drop_counts.total() + self.count

    @property
    def totals(self) -> tuple[int, ...]:
        """The counts that change a report."""
        return self.captured_count, self.shipped_count, self.drop_counts.total(), self.count

    def reserve(self, recorder: RequestRecorder) -> int:
        """Reserve room and return the size in bytes, or drop the capture and return 0. In the path of requests."""
        size = CAPTURE_OVERHEAD_BYTES + (len(recorder.single_chunk) if recorder.fast_path else recorder.body_bytes)
        if recorder.context.effect_log is not None:
            recorder.queued_effect_bytes = recorder.context.effect_log.payload_bytes
            size += recorder.queued_effect_bytes
        if recorder.error or self.count >= self._max_count or self.bytes + size > self._max_bytes:
            reason = QUEUE_COUNT if self.count >= self._max_count else QUEUE_BYTES
            self.version_counts[recorder.route_tags[0]] += 1
            self.drop_counts[CAPTURE_ERROR if recorder.error else reason] += 1
            recorder.close()
            return 0
        self.count += 1
        self.bytes += size
        return size

    def add(self, recorder: RequestRecorder, size: int) -> int:
        """Add a recorder that has room reserved, and return the number of recorders that wait. Thread-safe."""
        recorders = self.recorders
        recorders.append((recorder, size))
        return len(recorders)

    def next_recorder(self) -> tuple[RequestRecorder, int] | None:
        """Take the oldest recorder, with its size in bytes. Drop those for which the growth of their bodies has no room."""
        while self.recorders:
            recorder, size = self.recorders.popleft()
            self.version_counts[recorder.route_tags[0]] += 1
            growth = recorder.growth_bytes
            if not growth:
                return recorder, size
            self.bytes += growth
            if growth < 0 or self.bytes <= self._max_bytes:
                return recorder, size + growth
            self.drop(QUEUE_BYTES, size + growth)
        return None

    def release_finished(self, cutoff_ns: int, *, is_flushing: bool) -> None:
        """Move to the outbox all captures that get no more effects, or that finished before `cutoff_ns`."""
        waiting = []
        for queued in self.awaiting_effects:
            recorder = queued.recorder
            if recorder is None or recorder.app_returned or recorder.finished_ns < cutoff_ns or is_flushing:
                self.account_growth(queued)
                self.outbox.append(queued)
            else:
                waiting.append(queued)
        self.awaiting_effects = waiting

    def account_growth(self, queued: QueuedCapture) -> None:
        """Account for the effects that were recorded after the capture entered the queue."""
        recorder = queued.recorder
        if recorder is not None and recorder.context.effect_log is not None:
            growth = recorder.context.effect_log.payload_bytes - recorder.queued_effect_bytes
            recorder.queued_effect_bytes += growth
            queued.size += growth
            self.bytes += growth

    def count_late_effect(self) -> None:
        """Count an effect that was recorded after its capture was encoded."""
        with LATE_EFFECTS_LOCK:
            self.late_effect_count += 1

    def drop(self, reason: str, size: int, count: int = 1) -> None:
        self.drop_counts[reason] += count
        self.count -= count
        self.bytes -= size

    def drop_all(self, reason: str) -> None:
        """Drop all captures. Captures in the background thread come later, and are counted then."""
        while (entry := self.next_recorder()) is not None:
            entry[0].close()
            self.drop(reason, entry[1])
        for queued in (*self.awaiting_effects, *self.outbox):
            self.drop(reason, queued.size)
        self.awaiting_effects.clear()
        self.outbox.clear()

    def account_sent(self, batch: list[QueuedCapture], result: JoinResult | None) -> None:
        """Account for a batch that Redis joined or rejected in part, or that is dropped if there is no result."""
        size = sum(queued.size for queued in batch)
        if result is None:
            self.drop(REDIS_ERROR, size, len(batch))
            return
        shipped_count = len(batch) - result.rejected_pairs - result.rejected_bytes
        self.shipped_count += shipped_count
        self.count -= shipped_count
        self.bytes -= size
        for reason, count in (
            (REDIS_REJECTED_PAIRS, result.rejected_pairs),
            (REDIS_REJECTED_BYTES, result.rejected_bytes),
        ):
            if count:
                self.drop(reason, 0, count)

    def build_report(self) -> dict[str, Any]:
        """Return totals since the start of the process, so that a report can replace the previous one."""
        settings = self._settings
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": self.pid,
            "service": settings.service,
            "versions": dict(self.version_counts),
            "release": settings.release,
            "started": self.started_at,
            "seen": time.time(),
            "captured": self.captured_count,
            "shipped": self.shipped_count,
            "dropped": dict(self.drop_counts),
            "late_effects": self.late_effect_count,
            "unconverted": dict(self.unconverted_counts),
            "queue": {"count": self.count, "bytes": self.bytes},
        }
