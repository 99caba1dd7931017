"""Runs workers inside this process, or in separate processes that restart when they die."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import secrets
import signal
import socket
import sys
import time
from typing import Any

import orjson
import structlog

from abreast_sidecar import aio, logs
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database

WORKER_STALE_S = 15.0  # without a read or a commit; an idle worker reads once a second
HEARTBEAT_INTERVAL_S = 0.5
HEARTBEAT_STALE_S = 5.0
MIN_RESTART_BACKOFF_S = 0.2
MAX_RESTART_BACKOFF_S = 15.0
STABLE_UPTIME_S = 30.0  # resets the backoff
MAX_WORKER_CONNECTIONS = 4  # to read rules and to record rechecks; pairs have a separate connection
DRAIN_TIME_SHARE = 0.7  # share of the shutdown timeout; the servers get the rest
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

log = structlog.get_logger(__name__)


def create_pool(settings: Settings, database: Database) -> InProcessPool | ProcessPool:
    pool_settings = dataclasses.replace(settings, shutdown_timeout=settings.shutdown_timeout * DRAIN_TIME_SHARE)
    return ProcessPool(pool_settings) if settings.workers else InProcessPool(pool_settings, database)


def make_worker_name() -> str:
    """Return a unique name: workers with the same name would take each other's entries."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def is_healthy(worker: Worker) -> bool:
    return worker.is_running and time.monotonic() - worker.last_heartbeat < WORKER_STALE_S


class InProcessPool:
    """Runs a worker. `problem` describes what is wrong with it; it is empty if nothing is."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.worker = Worker(settings, database, name=make_worker_name())

    def problem(self) -> str:
        if is_healthy(self.worker):
            return ""
        return "the worker makes no progress" if self.worker.is_running else "the worker does not run"

    async def run(self, stop: asyncio.Event) -> None:
        await self.worker.run(stop)


class ProcessPool:
    """Runs worker processes, like InProcessPool."""

    def __init__(self, settings: Settings) -> None:
        self.processes = [WorkerProcess(settings, number) for number in range(settings.workers)]

    def problem(self) -> str:
        silent_count = sum(not process.is_healthy for process in self.processes)
        return f"{silent_count} of {len(self.processes)} worker processes make no progress" if silent_count else ""

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for process in self.processes:
                group.create_task(process.run(stop))


class WorkerProcess:
    """Runs one worker process at a time. It ends with its standard input, so it never outlives this process."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.settings = settings
        self.number = number
        self.pid = 0
        self._last_heartbeat = -float("inf")

    @property
    def is_healthy(self) -> bool:
        return time.monotonic() - self._last_heartbeat < HEARTBEAT_STALE_S

    async def run(self, stop: asyncio.Event) -> None:
        backoff_s = MIN_RESTART_BACKOFF_S
        while not stop.is_set():
            started = time.monotonic()
            code = await self._run_once(stop)
            self._last_heartbeat = -float("inf")
            if stop.is_set():
                return
            log.error("a worker process ended", number=self.number, pid=self.pid, code=code, restart_in=backoff_s)
            await aio.wait_or_stop(stop, backoff_s)
            backoff_s = (
                MIN_RESTART_BACKOFF_S
                if time.monotonic() - started > STABLE_UPTIME_S
                else min(backoff_s * 2, MAX_RESTART_BACKOFF_S)
            )

    async def _run_once(self, stop: asyncio.Event) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "abreast_sidecar.ingest.pool"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the parent, which closes the input
        )
        self.pid = process.pid
        log.info("a worker process started", number=self.number, pid=self.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(orjson.dumps(dataclasses.asdict(self.settings)) + b"\n")
        heartbeat_task = asyncio.create_task(self._read_heartbeats(process.stdout))
        stop_task = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({heartbeat_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.shutdown_timeout + 1):
                    return await process.wait()
            process.kill()
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            heartbeat_task.cancel()
            stop_task.cancel()

    async def _read_heartbeats(self, output: asyncio.StreamReader) -> None:
        while await output.readline():
            self._last_heartbeat = time.monotonic()


def worker_main() -> None:
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit("abreast: use `abreast sidecar --workers N`, which starts this process")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in orjson.loads(line).items()
    }
    settings = Settings(**values)
    logs.configure(settings.log_level)
    if sys.platform == "linux":  # a worker that hangs doesn't notice the end of its input
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    aio.run(run_worker(settings))


async def run_worker(settings: Settings) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.get_running_loop().connect_read_pipe(lambda: StopOnEof(stop), sys.stdin)
    async with Database(settings.postgres_url, max_connections=MAX_WORKER_CONNECTIONS) as database:
        worker = Worker(settings, database, name=make_worker_name())
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
