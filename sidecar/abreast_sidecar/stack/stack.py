"""The servers of a parallel run next to the two versions: Redis, Postgres, the sidecar, and Envoy in front."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import psycopg

from abreast.settings import secret_key
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import ENVIRONMENT_PREFIX, EnvoySettings, SocketAddress
from abreast_sidecar.errors import ServerError, SettingError
from abreast_sidecar.stack.data import DATA_DIRECTORY_MODE, REDACTION_KEY_VARIABLE, DataDirectory, RunRegistry
from abreast_sidecar.stack.process import LocalServer, find_free_port, is_port_free, lower_priority, process_tree
from abreast_sidecar.stack.servers import (
    SERVICE_USER,
    SIDECAR_USER,
    EnvoyServer,
    PostgresServer,
    RedisServer,
    SidecarServer,
    render_redis_acl,
)

LOOPBACK = "127.0.0.1"
ANY_PORT_ADDRESS = SocketAddress(LOOPBACK, 0)
DATABASE_NAME = "abreast"
STACK_VARIABLES = (  # the stack sets them for its sidecar
    "ABREAST_REDIS_URL",
    "ABREAST_POSTGRES_URL",
    "ABREAST_GRPC_LISTEN",
    "ABREAST_HTTP_LISTEN",
    "ABREAST_COLLECTOR_LISTEN",
    "ABREAST_ENVOY_ADMIN",
    "ABREAST_ENVOY_TOKEN",
)
NICENESS = 5  # a third of Envoy's weight
PORTS_FILE = "ports.json"  # so that services find Redis again in the next run
MAX_SOCKET_PATH = 108  # bytes, with the zero at the end
CONTROL_KEY_FILE, EDGE_KEY_FILE, ENVOY_TOKEN_FILE = "control.key", "edge-key", "envoy-token"
REDACTION_KEY_FILE = "redact-key"
REDIS_USERS = (SIDECAR_USER, SERVICE_USER)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that a drill injects and then repairs."""

    inject: Callable[[], None]
    repair: Callable[[], None]


class Stack:
    """Context manager that starts the servers, and stops them at its end. Raise ServerError if one can't start.

    Use it from the main thread, because the servers end with the thread that started them.

    `envoy` has the addresses of the versions and of the listener. The stack sets its `admin` and `sidecar`, and
    replaces port 0 by a free port. `more_services` are further services behind the same Envoy, and `config` is the file of
    all of them. `data` keeps the data across restarts. `settings` are additional ABREAST_* variables for the sidecar.
    `report` receives a line for each server that starts.
    """

    def __init__(
        self,
        envoy: EnvoySettings,
        *more_services: EnvoySettings,
        config: Path | None = None,
        data: Path | None = None,
        grpc: SocketAddress = ANY_PORT_ADDRESS,
        http: SocketAddress = ANY_PORT_ADDRESS,
        redis_port: int = 0,
        settings: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.grpc = _choose_port(grpc)
        self.http = _choose_port(http)
        self.envoy_settings = dataclasses.replace(
            envoy,
            listen=_choose_port(envoy.listen),
            sidecar=_to_client_address(self.grpc),
            collector=SocketAddress(LOOPBACK, find_free_port()),
            admin=SocketAddress(LOOPBACK, find_free_port()),
        )
        self.more_services = more_services
        self.config = config
        self.data_directory = DataDirectory(data)
        self.servers: dict[str, LocalServer] = {}
        self.stopped_servers: set[str] = set()  # by stop_server
        self._redis_port = redis_port
        self._settings = dict(settings or {})
        self._report = report
        self._resources = contextlib.ExitStack()

    @property
    def services(self) -> tuple[EnvoySettings, ...]:
        return (self.envoy_settings, *self.more_services)

    @property
    def envoy_url(self) -> str:
        scheme = "https" if self.envoy_settings.tls_certificate else "http"
        return f"{scheme}://{_format_address(_to_client_address(self.envoy_settings.listen))}"

    @property
    def admin_url(self) -> str:
        return f"http://{_format_address(self.envoy_settings.admin)}"

    @property
    def grpc_address(self) -> str:
        return _format_address(_to_client_address(self.grpc))

    @property
    def http_url(self) -> str:
        return f"http://{_format_address(_to_client_address(self.http))}"

    @property
    def redis_url(self) -> str:
        """The URL for the sidecar and commands."""
        return self.redis.url

    @property
    def service_redis_url(self) -> str:
        """The URL for the processes of the service, which can only write to its join."""
        return self.redis.url_for(SERVICE_USER)

    @property
    def redaction_key_file(self) -> Path:
        return self.data_directory.path / REDACTION_KEY_FILE

    @property
    def postgres_url(self) -> str:
        return self.postgres.url(DATABASE_NAME)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            opening.enter_context(self.data_directory)
            self._check_listeners()
            self.envoy_settings = dataclasses.replace(
                self.envoy_settings,
                edge_key=self._choose_edge_key(),
                sidecar_token=self.data_directory.load_key(ENVOY_TOKEN_FILE),
                admin_socket=self._choose_admin_socket(),
            )
            self._start_stores(opening)
            self._start_sidecar(opening)
            self._start_envoy(opening)
            opening.enter_context(RunRegistry(self.grpc_address, self._get_connection_settings()))
            self._resources = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def _check_listeners(self) -> None:
        listeners = {
            "users' requests (--listen)": self.envoy_settings.listen,
            "the sidecar's gRPC (--grpc)": self.grpc,
            "the sidecar's HTTP (--http)": self.http,
        }
        for purpose, address in listeners.items():
            if not is_port_free(address.host, address.port):
                raise ServerError(
                    f"{_format_address(address)}, the address for {purpose}, is used by another program; "
                    "stop it, or choose another address"
                )

    def _choose_admin_socket(self) -> str:
        """Return a path in the data directory, or the default if it is too long for the address of a socket."""
        path = self.data_directory.create_part("envoy") / "admin.sock"
        return str(path) if len(os.fsencode(path)) < MAX_SOCKET_PATH else ""

    def _choose_edge_key(self) -> str:
        """Return the key of the settings, or of the variable that they name, or of the data directory. Raise SettingError."""
        key = self.envoy_settings.edge_key
        if key.startswith(ENVIRONMENT_PREFIX):
            key = os.environ.get(key.removeprefix(ENVIRONMENT_PREFIX), "")
            try:
                secret_key(key)
            except ValueError as error:
                raise SettingError(
                    f"the variable of edge_key, {self.envoy_settings.edge_key}, must have {error}"
                ) from None
        return key or self.data_directory.load_key(EDGE_KEY_FILE)

    def _start_stores(self, opening: contextlib.ExitStack) -> None:
        inherited_fds = (self.data_directory.servers_lock,)
        ports = self._load_ports()
        self.data_directory.load_key(REDACTION_KEY_FILE)
        passwords = {user: self.data_directory.load_key(f"redis-{user}.password") for user in REDIS_USERS}
        self.redis = RedisServer(
            self.data_directory.create_part("redis"),
            port=ports["redis"],
            inherited_fds=inherited_fds,
            acl=render_redis_acl(
                [settings.service for settings in self.services], passwords[SIDECAR_USER], passwords[SERVICE_USER]
            ),
            passwords=passwords,
        )
        try:
            self._start("redis", self.redis, opening)
        except ServerError:
            if is_port_free(LOOPBACK, self.redis.port):
                raise
            self.redis.port = ports["redis"] = find_free_port()  # another program took the port
            self._start("redis", self.redis, opening)
        folder = self.data_directory.create_part("postgres", DATA_DIRECTORY_MODE)
        self.postgres = PostgresServer(folder, port=ports["postgres"], inherited_fds=inherited_fds)
        self._start("postgres", self.postgres, opening)
        (self.data_directory.path / PORTS_FILE).write_text(json.dumps(ports) + "\n")
        _create_database(self.postgres)

    def _start_sidecar(self, opening: contextlib.ExitStack) -> None:
        shares = ("sample_safe", "sample_unsafe", "baseline_share")
        settings = {
            "ABREAST_CONTROL_KEY": self.data_directory.load_key(CONTROL_KEY_FILE),
            **self._settings,
            **{f"ABREAST_{share.upper()}": f"{getattr(self.envoy_settings, share):.9f}" for share in shares},
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_GRPC_LISTEN": _format_address(self.grpc),
            "ABREAST_HTTP_LISTEN": _format_address(self.http),
            "ABREAST_COLLECTOR_LISTEN": _format_address(self.envoy_settings.collector),
            "ABREAST_EDGE_KEY": self.envoy_settings.edge_key,
            REDACTION_KEY_VARIABLE: str(self.redaction_key_file),
            "ABREAST_ENVOY_ADMIN": self.admin_url,
            "ABREAST_ENVOY_TOKEN": self.envoy_settings.sidecar_token,
        }
        folder, config = self.data_directory.create_part("sidecar"), None
        if self.config:  # a copy, so that a change of the file can't prevent a restart
            config = folder / self.config.name
            config.write_bytes(self.config.read_bytes())
        self.sidecar = SidecarServer(
            settings,
            _to_client_address(self.http),
            folder=folder,
            config=config,
            inherited_fds=(self.data_directory.servers_lock,),
        )
        self._start("sidecar", self.sidecar, opening)

    def _start_envoy(self, opening: contextlib.ExitStack) -> None:
        self.envoy = EnvoyServer(
            render_config(*self.services),
            folder=self.data_directory.create_part("envoy"),
            inherited_fds=(self.data_directory.servers_lock,),
        )
        self._start("envoy", self.envoy, opening)

    def _start(self, name: str, server: LocalServer, opening: contextlib.ExitStack) -> None:
        self._report(f"starting {name}")
        opening.callback(server.stop)  # also if the start is interrupted
        _start_server(server)
        self.servers[name] = server

    def restart_exited(self) -> list[str]:
        """Restart servers that have ended. Return a message per server, with the end of its log. Raise ServerError."""
        messages = []
        for name, server in self.servers.items():
            process = server.process
            if name not in self.stopped_servers and process is not None and not process.is_alive:
                messages.append(
                    f"{name} ended (exit code {process.popen.returncode}) and is being restarted; "
                    f"the end of its log:\n{process.read_log_tail(5)}"
                )
                _start_server(server)
        return messages

    def restart_envoy(self, service: str, **changes: Any) -> None:
        """Restart Envoy with changed settings of a service, after it has drained its connections. Raise ServerError."""
        self.envoy_settings, *others = (
            dataclasses.replace(settings, **changes) if settings.service == service else settings
            for settings in self.services
        )
        self.more_services = tuple(others)
        self.envoy.stop()
        self.envoy.config = render_config(*self.services)
        self.envoy.start()

    def stop_server(self, name: str, *, kill: bool) -> None:
        """Stop or kill a server until `start_server`."""
        self.stopped_servers.add(name)
        server = self.servers[name]
        if kill and server.process is not None:
            server.process.popen.kill()
            server.process.popen.wait()
        server.stop()

    def start_server(self, name: str) -> None:
        """Start a stopped server. Raise ServerError."""
        self.stopped_servers.discard(name)
        _start_server(self.servers[name])

    def _load_ports(self) -> dict[str, int]:
        """Return the ports of the last run in this directory if they are free, or else other free ports."""
        file = self.data_directory.path / PORTS_FILE
        try:
            stored_ports = json.loads(file.read_text())
        except (OSError, ValueError):
            stored_ports = {"redis": self._redis_port}
        ports = {name: stored_ports.get(name) or 0 for name in ("redis", "postgres")}
        return {
            name: port if port and is_port_free(LOOPBACK, port) else find_free_port() for name, port in ports.items()
        }

    def _get_connection_settings(self) -> dict[str, str]:
        """Return the addresses of the servers as ABREAST_* settings."""
        return {
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_ENVOY_ADMIN": self.admin_url,
            "ABREAST_ADMIN_SOCKET": self.envoy_settings.admin_socket_path,
            "ABREAST_HTTP_LISTEN": _format_address(_to_client_address(self.http)),
            REDACTION_KEY_VARIABLE: str(self.redaction_key_file),
        }


def stack_faults(stack: Stack) -> dict[str, Fault]:
    """Return the faults of Abreast's own servers by the name of their drill."""

    def fault(name: str, *, kill: bool) -> Fault:
        return Fault(lambda: stack.stop_server(name, kill=kill), lambda: stack.start_server(name))

    return {
        "sidecar-killed": fault("sidecar", kill=True),
        "redis-down": fault("redis", kill=True),
        "postgres-down": fault("postgres", kill=False),
    }


def pause_fault(pid: int) -> Fault:
    """Return a fault that suspends a process and all of its descendants, so that they hang."""

    def for_each(action: str) -> None:
        for process in process_tree(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    return Fault(lambda: for_each("suspend"), lambda: for_each("resume"))


def _start_server(server: LocalServer) -> None:
    """Start a server. Once it is ready, users' requests come first: Envoy alone keeps its priority."""
    server.start()
    if server.process is not None and not isinstance(server, EnvoyServer):
        lower_priority(server.process.pid, NICENESS)


def _create_database(server: PostgresServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        if connection.execute("select from pg_database where datname = %s", [DATABASE_NAME]).fetchone() is None:
            connection.execute(f"create database {DATABASE_NAME}".encode())


def _choose_port(address: SocketAddress) -> SocketAddress:
    return address if address.port else SocketAddress(address.host, find_free_port())


def _to_client_address(address: SocketAddress) -> SocketAddress:
    """Return an address that clients on this machine can connect to."""
    return SocketAddress({"0.0.0.0": LOOPBACK, "::": "::1"}.get(address.host, address.host), address.port)


def _format_address(address: SocketAddress) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"
