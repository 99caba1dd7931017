"""The sidecar as a child process, the way `abreast sidecar` runs it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from abreast_sidecar.embedded.process import ServerProcess, is_answering
from abreast_sidecar.settings import ENV_PREFIX


class SidecarServer:
    """`settings` are names and values of the environment, such as {"ABREAST_REDIS_URL": …}; `http` is its address."""

    def __init__(
        self,
        settings: Mapping[str, str],
        http_address: tuple[str, int],
        *,
        folder: Path,
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        if not all(name.startswith(ENV_PREFIX) for name in settings):
            raise ValueError(f"the sidecar's settings begin with {ENV_PREFIX}")
        self.settings = dict(settings)
        self.http_address = http_address
        self.folder = folder
        self.inherited_fds = inherited_fds
        self.process: ServerProcess | None = None

    def start(self) -> Self:
        host, port = self.http_address
        request = f"GET /readyz HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        self.process = ServerProcess.start(
            "sidecar",
            [sys.executable, "-m", "abreast_sidecar", "sidecar"],
            self.folder / "sidecar.log",
            is_ready=lambda _pid: is_answering(host, port, request, b" 200 OK"),
            stop_signal=signal.SIGTERM,
            environment=self.settings,
            inherited_fds=self.inherited_fds,
        )
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
