"""The HTTP server, and sockets with readable errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from abreast_sidecar.errors import ServerError

LISTEN_BACKLOG = 128  # connections
SHUTDOWN_GRACE_S = 2  # for requests in flight


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
        """Bind the port. Raises ServerError if it is in use."""
        self._socket = bind_socket(self.listen, "HTTP", "ABREAST_HTTP_LISTEN")
        self.port = self._socket.getsockname()[1]

    async def run(self) -> None:
        """Serve until `stop` is called and the last response is sent."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    async def stop(self, serve_task: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        await serve_task

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
