"""A worker process: python -m abreast_sidecar.child, with settings on standard input, whose end stops it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

import orjson

from abreast_sidecar import logs, runtime
from abreast_sidecar.settings import Settings
from abreast_sidecar.worker import Worker
from abreast_sidecar.workers import is_healthy, make_worker_name

HEARTBEAT_INTERVAL_S = 0.5  # seconds
PR_SET_PDEATHSIG = 1


def worker_main() -> None:
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit("abreast: this process is started by `abreast sidecar --workers N`")
    settings_fields: dict[str, Any] = orjson.loads(line)
    for name, value in settings_fields.items():
        settings_fields[name] = tuple(value) if isinstance(value, list) else value
    settings = Settings(**settings_fields)
    logs.configure(settings.log_level)
    _die_with_parent()
    runtime.run(run_worker(settings))


def _die_with_parent() -> None:
    """The end of the input says it too, but a worker that is stuck doesn't read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


async def run_worker(settings: Settings) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.get_running_loop().connect_read_pipe(lambda: StopOnEof(stop), sys.stdin)
    worker = Worker(settings, name=make_worker_name())
    heartbeat_task = asyncio.create_task(_send_heartbeats(worker))
    try:
        await worker.run(stop)
    finally:
        heartbeat_task.cancel()


async def _send_heartbeats(worker: Worker) -> None:
    while True:
        if is_healthy(worker):
            os.write(sys.stdout.fileno(), b"well\n")
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


class StopOnEof(asyncio.Protocol):
    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.stop.set()


if __name__ == "__main__":
    worker_main()
