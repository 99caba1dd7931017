"""The HTTP server: uvicorn, on a socket and with a life that are ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from abreast_sidecar.serve.listen import bind_socket

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
