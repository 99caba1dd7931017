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

from abreast.join import Row
from abreast.recorder import Recorder
from abreast.settings import Settings

OVERHEAD = 2048  # bytes that a capture takes beside its bodies, roughly

# Why captures are dropped.
QUEUE_COUNT = "queue_count"  # as many wait as may wait
QUEUE_BYTES = "queue_bytes"  # as many bytes wait as may wait
CAPTURE_ERROR = "capture_error"  # recording it went wrong
ENCODE_ERROR = "encode_error"  # it can't be written in the capture's format
REFUSED_PAIRS = "refused_pairs"  # Redis holds as many pairs as it may
REFUSED_BYTES = "refused_bytes"  # Redis holds as many bytes as it may
REDIS_ERROR = "redis_error"  # Redis refused a batch again and again
SHUTDOWN = "shutdown"  # there was no time left to send it

LATE = threading.Lock()  # they come from any thread


@dataclass(slots=True)
class Held:
    """What waits to be sent: a recorder that is settled, or else what it was encoded to."""

    size: int  # bytes it counts for
    recorder: Recorder | None
    row: Row | None = None


class Backlog:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """A process of its own: at the start, and after a fork."""
        self.pid = os.getpid()
        self.id = uuid.uuid4().hex
        self.started = time.time()
        self.recorders: deque[tuple[Recorder, int]] = deque()
        self.settled: deque[Held] = deque()
        self.running: list[Held] = []  # settled, but background tasks may still record effects
        self.count = 0
        self.bytes = 0
        self.shipped = 0
        self.versions: Counter[str] = Counter()  # captured; those that wait for the thread come later
        self.dropped: Counter[str] = Counter()
        self.late_effects = 0

    def late(self) -> None:
        """An effect came after its capture had left."""
        with LATE:
            self.late_effects += 1

    def refuse(self, recorder: Recorder) -> None:
        """Drop what can't be trusted or doesn't fit."""
        reason = QUEUE_COUNT if self.count >= self._settings.queue_count else QUEUE_BYTES
        self.versions[recorder.marks[0]] += 1
        self.dropped[CAPTURE_ERROR if recorder.fault else reason] += 1
        recorder.close()

    @property
    def captured(self) -> int:
        return self.shipped + self.dropped.total() + self.count

    def grown(self, held: Held) -> None:
        """Count the effects that were recorded since it came."""
        recorder = held.recorder
        if recorder is not None and recorder.now.held is not None:
            more = recorder.now.held.bytes - recorder.journaled
            recorder.journaled += more
            held.size += more
            self.bytes += more

    def drop(self, reason: str, size: int, count: int = 1) -> None:
        self.dropped[reason] += count
        self.count -= count
        self.bytes -= size

    def ship(self, size: int, count: int) -> None:
        self.shipped += count
        self.count -= count
        self.bytes -= size

    def report(self) -> dict[str, Any]:
        """Totals since the process began, so that writing one over another loses nothing."""
        settings = self._settings
        return {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": self.pid,
            "service": settings.service,
            "versions": dict(self.versions),
            "release": settings.release,
            "started": self.started,
            "seen": time.time(),
            "captured": self.captured,
            "shipped": self.shipped,
            "dropped": dict(self.dropped),
            "late_effects": self.late_effects,
            "queue": {"count": self.count, "bytes": self.bytes},
        }
