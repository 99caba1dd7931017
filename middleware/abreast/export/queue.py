"""What the process holds that Redis has not got yet: bounded by count and by bytes, and counted to the last capture."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from abreast.protocol.join import CaptureRow
from abreast.recorder import RequestRecorder
from abreast.settings import Settings

CAPTURE_OVERHEAD_BYTES = 2048  # bytes that a capture takes beside its bodies, roughly

# Why captures are dropped.
QUEUE_COUNT = "queue_count"  # as many wait as may wait
QUEUE_BYTES = "queue_bytes"  # as many bytes wait as may wait
CAPTURE_ERROR = "capture_error"  # recording it went wrong
ENCODE_ERROR = "encode_error"  # it can't be written in the capture's format
REDIS_REJECTED_PAIRS = "redis_rejected_pairs"  # Redis holds as many pairs as it may
REDIS_REJECTED_BYTES = "redis_rejected_bytes"  # Redis holds as many bytes as it may
REDIS_ERROR = "redis_error"  # Redis refused a batch again and again
SHUTDOWN = "shutdown"  # there was no time left to send it

LATE_EFFECTS_LOCK = threading.Lock()  # they come from any thread


@dataclass(slots=True)
class QueuedCapture:
    """What waits to be sent: a recorder that is settled, or else what it was encoded to."""

    size: int  # bytes it counts for
    recorder: RequestRecorder | None
    row: CaptureRow | None = None


class CaptureQueue:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """A process of its own: at the start, and after a fork."""
        self.pid = os.getpid()
        self.id = uuid.uuid4().hex
        self.started_at = time.time()
        self.recorders: deque[tuple[RequestRecorder, int]] = deque()
        self.outbox: deque[QueuedCapture] = deque()
        self.awaiting_effects: list[QueuedCapture] = []  # settled, but background tasks may still record effects
        self.count = 0
        self.bytes = 0
        self.shipped_count = 0
        self.version_counts: Counter[str] = Counter()  # captured; those that wait for the thread come later
        self.drop_counts: Counter[str] = Counter()
        self.late_effect_count = 0

    def count_late_effect(self) -> None:
        """An effect came after its capture had left."""
        with LATE_EFFECTS_LOCK:
            self.late_effect_count += 1

    def reject(self, recorder: RequestRecorder) -> None:
        """Drop what can't be trusted or doesn't fit."""
        reason = QUEUE_COUNT if self.count >= self._settings.queue_count else QUEUE_BYTES
        self.version_counts[recorder.route_tags[0]] += 1
        self.drop_counts[CAPTURE_ERROR if recorder.error else reason] += 1
        recorder.close()

    @property
    def captured_count(self) -> int:
        return self.shipped_count + self.drop_counts.total() + self.count

    def account_growth(self, queued: QueuedCapture) -> None:
        """Count the effects that were recorded since it came."""
        recorder = queued.recorder
        if recorder is not None and recorder.context.effect_log is not None:
            growth = recorder.context.effect_log.payload_bytes - recorder.queued_effect_bytes
            recorder.queued_effect_bytes += growth
            queued.size += growth
            self.bytes += growth

    def drop(self, reason: str, size: int, count: int = 1) -> None:
        self.drop_counts[reason] += count
        self.count -= count
        self.bytes -= size

    def mark_shipped(self, size: int, count: int) -> None:
        self.shipped_count += count
        self.count -= count
        self.bytes -= size

    def build_report(self) -> dict[str, Any]:
        """Totals since the process began, so that writing one over another loses nothing."""
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
            "queue": {"count": self.count, "bytes": self.bytes},
        }
