"""Whether the sidecar can do its work: the sum of its parts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping

import redis.asyncio as aioredis
import structlog
import uvicorn
from redis.exceptions import RedisError
from starlette.types import ASGIApp

from abreast_sidecar.errors import ServerError
from abreast_sidecar.redis_client import list_shards

LISTEN_BACKLOG = 128


def bind_socket(listen: str, purpose: str, setting: str) -> socket.socket:
    """A socket that listens on host:port. Raise ServerError, in words for people, when the port is taken."""
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
            f"can't listen on {listen} for {purpose}: {error.strerror}; choose another with {setting}"
        ) from error
    return listener


log = structlog.get_logger(__name__)


class PairBacklog:
    def __init__(self, client: aioredis.Redis) -> None:
        self.client = client

    async def count(self, service: str) -> int | None:
        """Pairs that wait for a copy or for a worker; None while Redis can't be reached."""
        try:
            waiting = 0
            for keys in [keys for keys in await list_shards(self.client) if keys.service == service]:
                waiting += await self.client.zcard(keys.due) + await self.client.xlen(keys.ready)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("redis does not tell how many pairs wait", error=str(error))
            return None
        return waiting


CHECK_INTERVAL_S = 1.0  # seconds between checks
STARTUP_CHECK_INTERVAL_S = 0.1  # seconds, until all is well
CHECK_TIMEOUT_S = 3.0  # seconds that one check may take


ReadinessCheck = Callable[[], Awaitable[None]]  # raises what is wrong
ReadinessListener = Callable[[bool], Awaitable[None]]


class NotReadyError(Exception):
    """Says in plain words what a part waits for."""


class Readiness:
    def __init__(self, checks: Mapping[str, ReadinessCheck], listener: ReadinessListener) -> None:
        self.checks = checks
        self.listener = listener
        self.is_draining = False
        self.problems: dict[str, str] = dict.fromkeys(checks, "not checked yet")
        self._reported_ready: bool | None = None
        self._once_ready_parts: set[str] = set()  # parts that were ready once

    @property
    def is_ready(self) -> bool:
        return not self.problems and not self.is_draining

    def describe_parts(self) -> dict[str, str]:
        """Each part's state in words: ok, or what is wrong."""
        return {name: self.problems.get(name, "ok") for name in self.checks}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.gather(*[self._check(name) for name in self.checks])
            await self._report()
            await asyncio.sleep(STARTUP_CHECK_INTERVAL_S if self.problems else CHECK_INTERVAL_S)

    async def drain(self) -> None:
        self.is_draining = True
        await self._report()

    async def _check(self, name: str) -> None:
        problem = ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self.checks[name]()
        except TimeoutError:
            problem = f"no answer within {CHECK_TIMEOUT_S:g} s"
        except Exception as error:  # noqa: BLE001  # whatever is wrong, the part is not ready
            problem = str(error) or type(error).__name__
        if problem and self.problems.get(name) != problem:
            (log.warning if name in self._once_ready_parts and not self.is_draining else log.info)(
                "not ready", part=name, error=problem
            )
        elif not problem and name in self.problems:
            self._once_ready_parts.add(name)
            log.info("ready", part=name)
        self.problems.pop(name, None)
        if problem:
            self.problems[name] = problem

    async def _report(self) -> None:
        if self.is_ready != self._reported_ready:
            self._reported_ready = self.is_ready
            await self.listener(self.is_ready)


SHUTDOWN_GRACE_S = 2  # seconds that requests under way get at the end


class NoSignalsServer(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    def __init__(self, listen: str, app: ASGIApp) -> None:
        self.listen = listen
        self.port = 0
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            ws="none",
        )
        self._server = NoSignalsServer(config)
        self._socket: socket.socket | None = None

    def bind(self) -> None:
        """Raise ServerError when the port is taken."""
        self._socket = bind_socket(self.listen, "HTTP", "ABREAST_HTTP_LISTEN")
        self.port = self._socket.getsockname()[1]

    async def run(self) -> None:
        """Until `stop` was called and the last request is answered."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    async def stop(self, serve_task: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        await serve_task

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
