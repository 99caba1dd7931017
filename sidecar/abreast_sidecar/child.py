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
from abreast_sidecar.workers import well, worker_name

BEAT = 0.5  # seconds
PR_SET_PDEATHSIG = 1


def main() -> None:
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit("abreast: this process is started by `abreast sidecar --workers N`")
    given: dict[str, Any] = orjson.loads(line)
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    settings = Settings(**given)
    logs.configure(settings.log_level)
    _die_with_parent()
    runtime.run(work(settings))


def _die_with_parent() -> None:
    """The end of the input says it too, but a worker that is stuck doesn't read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


async def work(settings: Settings) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.get_running_loop().connect_read_pipe(lambda: UntilEnd(stop), sys.stdin)
    worker = Worker(settings, name=worker_name())
    beating = asyncio.create_task(_beat(worker))
    try:
        await worker.run(stop)
    finally:
        beating.cancel()


async def _beat(worker: Worker) -> None:
    while True:
        if well(worker):
            os.write(sys.stdout.fileno(), b"well\n")
        await asyncio.sleep(BEAT)


class UntilEnd(asyncio.Protocol):
    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self.stop.set()


if __name__ == "__main__":
    main()
