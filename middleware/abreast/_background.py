"""One daemon thread for work that would block the event loop: reading files and hashing large bodies."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

MAX_WAITING_BYTES = 16 * 1024 * 1024  # bytes that may wait for the thread
MAX_OPEN_FILES = 64

Job = Callable[[], None]


class BackgroundThread:
    """Run jobs one after another, in the order of submission."""

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self.open_files = 0
        self._pid = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[tuple[Job, int]] = SimpleQueue()

    @property
    def has_room(self) -> bool:
        return self.waiting_bytes < MAX_WAITING_BYTES

    def reserve_file(self) -> bool:
        """Count one more open file, or return False if there are too many."""
        with self._lock:
            self.open_files += 1
            if self.open_files <= MAX_OPEN_FILES:
                return True
            self.open_files -= 1
            return False

    def release_file(self) -> None:
        with self._lock:
            self.open_files -= 1

    def submit(self, job: Job, size: int = 0) -> None:
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            self.waiting_bytes += size
        self._jobs.put((job, size))

    def _start(self) -> None:
        """Start a thread in this process. Threads don't survive a fork, and the parent's locks may be held for ever."""
        self._lock = threading.Lock()
        self._jobs = SimpleQueue()
        self.waiting_bytes = self.open_files = 0
        self._pid = os.getpid()
        threading.Thread(target=self._run, args=(self._jobs,), name="abreast", daemon=True).start()

    def _run(self, jobs: SimpleQueue[tuple[Job, int]]) -> None:
        while True:
            job, size = jobs.get()
            with contextlib.suppress(Exception):  # jobs report their errors
                job()
            with self._lock:
                self.waiting_bytes -= size


BACKGROUND_THREAD = BackgroundThread()
