"""The sidecar as a child process, the way `abreast sidecar` runs it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from abreast_sidecar.embedded.process import ServerProcess, answers
from abreast_sidecar.settings import PREFIX


class SidecarServer:
    """`settings` are names and values of the environment, such as {"ABREAST_REDIS_URL": …}; `http` is its address."""

    def __init__(
        self,
        settings: Mapping[str, str],
        http: tuple[str, int],
        *,
        folder: Path,
        keep_open: tuple[int, ...] = (),
    ) -> None:
        if not all(name.startswith(PREFIX) for name in settings):
            raise ValueError(f"the sidecar's settings begin with {PREFIX}")
        self.settings = dict(settings)
        self.http = http
        self.folder = folder
        self.keep_open = keep_open
        self.server: ServerProcess | None = None

    def start(self) -> Self:
        host, port = self.http
        question = f"GET /readyz HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        self.server = ServerProcess.start(
            "sidecar",
            [sys.executable, "-m", "abreast_sidecar", "sidecar"],
            self.folder / "sidecar.log",
            ready=lambda _pid: answers(host, port, question, b" 200 OK"),
            stop_signal=signal.SIGTERM,
            environment=self.settings,
            keep_open=self.keep_open,
        )
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
