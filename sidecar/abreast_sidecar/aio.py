"""Helpers for asyncio: cancellation, notification, outages of servers, bounded waits, listening sockets, and the event loop."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from abreast_sidecar.errors import ServerError

CANCEL_RETRY_S = 5.0  # longer than any task takes to clean up
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0
LOG_REMINDER_S = 60.0
ACTIVITY_S = 5.0  # after an event, in which periodic work runs at its full pace
OPTIONAL_CALL_TIMEOUT_S = 1.0
LISTEN_BACKLOG = 128  # connections
# Allocations between two collections. Captures and differences have no cycles, so a collection mostly finds live
# objects; with the default of 700, collections took a fifth of a worker's time.
GC_THRESHOLDS = (50_000, 20, 50)

log = structlog.get_logger()


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they are done. Their errors are ignored.

    Before Python 3.12, `asyncio.wait_for`, with which drivers wait for Redis and Postgres, swallows a cancellation that
    arrives together with the result. The task would run forever, so it is cancelled every CANCEL_RETRY_S.
    """
    while unfinished := [task for task in tasks if not task.done()]:
        for task in unfinished:
            task.cancel()
        await asyncio.wait(unfinished, timeout=CANCEL_RETRY_S)
    await asyncio.gather(*tasks, return_exceptions=True)


class Notifier:
    """Wakes all current waiters. It has no memory: check the state first, then wait."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify_all(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait(self) -> Coroutine[Any, Any, Any]:
        """Return a coroutine for the next notification after this call, even if it is awaited later."""
        return self._event.wait()


class Activity:
    """Sets the pace of periodic work: a job has a long interval while nothing happens, and an event ends it at once."""

    def __init__(self) -> None:
        self._notifier = Notifier()
        self._last_event = -ACTIVITY_S  # monotonic

    @property
    def is_recent(self) -> bool:
        return time.monotonic() - self._last_event < ACTIVITY_S

    async def record(self) -> None:
        """Record an event. A handler of notifications."""
        self._last_event = time.monotonic()
        self._notifier.notify_all()

    async def wait(self, stop: asyncio.Event, interval_s: float, idle_interval_s: float) -> None:
        """Wait for an interval: `interval_s` after a recent event, `idle_interval_s` without one, at most until `stop`."""
        deadline = time.monotonic() + idle_interval_s
        await wait_or_stop(stop, interval_s)
        if stop.is_set() or self.is_recent or time.monotonic() >= deadline:
            return
        tasks = [asyncio.create_task(self._notifier.wait()), asyncio.create_task(stop.wait())]
        try:
            await asyncio.wait(tasks, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*tasks)


class Outage:
    """Logs an outage of a server when it begins, every LOG_REMINDER_S, and when it ends.

    Several callers can share an outage. It ends when all callers that failed have succeeded again. Each has a separate
    backoff.
    """

    def __init__(self, server: str, **fields: str) -> None:
        self.server = server
        self.fields = fields
        self._backoffs_s: dict[str, float] = {}  # next backoff of each failing caller
        self._started_at = self._last_logged_at = 0.0

    @property
    def is_active(self) -> bool:
        return self._started_at > 0

    def record_failure(self, error: Exception, caller: str = "") -> None:
        now = time.monotonic()
        self._started_at = self._started_at or now
        self._backoffs_s.setdefault(caller, MIN_BACKOFF_S)
        if not self._last_logged_at or now - self._last_logged_at > LOG_REMINDER_S:
            self._last_logged_at = now
            outage_s = round(now - self._started_at, 1)
            log.warning("server unavailable", server=self.server, error=str(error), seconds=outage_s, **self.fields)

    def record_success(self, caller: str = "") -> None:
        self._backoffs_s.pop(caller, None)
        if self._backoffs_s:
            return
        if self.is_active:
            outage_s = round(time.monotonic() - self._started_at, 1)
            log.info("server available again", server=self.server, seconds=outage_s, **self.fields)
        self._started_at = self._last_logged_at = 0.0

    async def back_off(self, stop: asyncio.Event, caller: str = "") -> None:
        """Wait with exponential backoff and jitter, at most until `stop` is set."""
        delay_s = self._backoffs_s.get(caller, MIN_BACKOFF_S)
        self._backoffs_s[caller] = min(delay_s * 2, MAX_BACKOFF_S)
        await wait_or_stop(stop, delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # not a secret


async def wait_or_stop(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


async def error_within(task: asyncio.Task[Any]) -> str:
    """Wait for at most OPTIONAL_CALL_TIMEOUT_S. Return the error of the task, empty if it succeeded.

    The task is not cancelled: a driver that waits for a frozen Postgres ignores that, and continues once Postgres does.
    """
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs the exception
    await asyncio.wait({task}, timeout=OPTIONAL_CALL_TIMEOUT_S)
    if not task.done():
        return f"postgres has not answered for {OPTIONAL_CALL_TIMEOUT_S:g} s"
    error = task.exception()
    return str(error) if error else ""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a process of the sidecar, like asyncio.run, with uvloop and fewer garbage collections."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        import uvloop
    except ImportError:  # uvloop does not support Windows
        pass
    else:
        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


def bind_socket(listen: str, purpose: str, setting: str) -> socket.socket:
    """Return a socket that listens on `host:port`. Raises ServerError, for example if the port is in use."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ServerError(
            f"can't listen on {listen} for {purpose}: {error.strerror}; choose another address with {setting}"
        ) from error
    return listener
