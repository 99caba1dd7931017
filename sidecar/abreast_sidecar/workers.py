"""Where workers run: inside this process, or in processes of their own that are started again when they die."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import signal
import socket
import sys
import time
from typing import Protocol

import orjson
import structlog

from abreast_sidecar.settings import Settings
from abreast_sidecar.worker import Worker

STALE = 15.0  # seconds without a read or a commit; a quiet worker reads once a second
CHILD_STALE = 5.0  # seconds without a word from a child, which speaks twice a second while it is well
FIRST_BACKOFF = 0.2  # seconds
LONGEST_BACKOFF = 15.0  # seconds
GOOD_LIFE = 30.0  # seconds after which a child's next death is a first one again
DRAIN = 0.7  # of the time to stop; the rest is for the others

log = structlog.get_logger(__name__)


class Workers(Protocol):
    def trouble(self) -> str:
        """What is wrong with the workers; empty for nothing."""

    async def run(self, stop: asyncio.Event) -> None:
        """Return once `stop` is set and the work under way is done."""


def workers(settings: Settings) -> Workers:
    drained = dataclasses.replace(settings, shutdown_timeout=settings.shutdown_timeout * DRAIN)
    return Children(drained) if settings.workers else Inside(drained)


def worker_name() -> str:
    """One that no other worker has: who shares a name takes the other's entries."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def well(worker: Worker) -> bool:
    return worker.alive and time.monotonic() - worker.last_beat < STALE


class Inside:
    def __init__(self, settings: Settings) -> None:
        self.worker = Worker(settings, name=worker_name())

    def trouble(self) -> str:
        if well(self.worker):
            return ""
        return "the worker does not get on" if self.worker.alive else "the worker does not run"

    async def run(self, stop: asyncio.Event) -> None:
        await self.worker.run(stop)


class Children:
    def __init__(self, settings: Settings) -> None:
        self.children = [Child(settings, number) for number in range(settings.workers)]

    def trouble(self) -> str:
        silent = sum(not child.well for child in self.children)
        return f"{silent} of {len(self.children)} worker processes do not work" if silent else ""

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for child in self.children:
                group.create_task(child.run(stop))


class Child:
    """One worker process at a time. It ends when its standard input does, so it never outlives this process."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.settings = settings
        self.number = number
        self.pid = 0
        self._heard = -float("inf")

    @property
    def well(self) -> bool:
        return time.monotonic() - self._heard < CHILD_STALE

    async def run(self, stop: asyncio.Event) -> None:
        backoff = FIRST_BACKOFF
        while not stop.is_set():
            began = time.monotonic()
            code = await self._live(stop)
            self._heard = -float("inf")
            if stop.is_set():
                return
            log.error("a worker process ended", number=self.number, pid=self.pid, code=code, again_in=backoff)
            await _sleep(stop, backoff)
            backoff = (
                FIRST_BACKOFF if time.monotonic() - began > GOOD_LIFE else min(backoff * 2, LONGEST_BACKOFF)
            )

    async def _live(self, stop: asyncio.Event) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "abreast_sidecar.child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the input
        )
        self.pid = process.pid
        log.info("a worker process began", number=self.number, pid=self.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(orjson.dumps(dataclasses.asdict(self.settings)) + b"\n")
        listening = asyncio.create_task(self._listen(process.stdout))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({listening, stopping}, return_when=asyncio.FIRST_COMPLETED)
            process.stdin.close()
            return await self._end(process)
        finally:
            if process.returncode is None:
                process.kill()
            listening.cancel()
            stopping.cancel()

    async def _listen(self, output: asyncio.StreamReader) -> None:
        while await output.readline():
            self._heard = time.monotonic()

    async def _end(self, process: asyncio.subprocess.Process) -> int:
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout + 1):
                return await process.wait()
        except TimeoutError:
            process.send_signal(signal.SIGKILL)
            return await process.wait()


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
