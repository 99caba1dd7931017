"""Everything Abreast needs beside the two versions: Redis, Postgres, the sidecar, and Envoy in front."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psycopg

from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import DATA_DIRECTORY_MODE, DataDirectory, RunRegistry
from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_port_free
from abreast_sidecar.stack.servers import EnvoyServer, PostgresServer, RedisServer, SidecarServer

LOOPBACK = "127.0.0.1"
ANY_PORT_ADDRESS = SocketAddress(LOOPBACK, 0)
DATABASE_NAME = "abreast"
PORTS_FILE = "ports.json"  # the ports that were chosen, so that services find Redis again after a restart


class StackServer(Protocol):
    process: ServerProcess | None

    def start(self) -> object: ...
    def stop(self) -> None: ...


class Stack:
    """Start everything in `__enter__`, stop it in `__exit__`; use from the main thread, since servers die with it.

    `envoy` says what to serve and where; its `admin` and `sidecar` are set here, and a port 0 is replaced by a free
    one. `data` keeps what was compared over restarts. `settings` are further ABREAST_* variables for the sidecar.
    `say` is told what starts. Raise ServerError where a server can't start.
    """

    def __init__(
        self,
        envoy: EnvoySettings,
        *,
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
            admin=SocketAddress(LOOPBACK, find_free_port()),
        )
        self.data_directory = DataDirectory(data)
        self.servers: dict[str, StackServer] = {}
        self.stopped_servers: set[str] = set()  # taken down on purpose
        self._redis_port = redis_port
        self._settings = dict(settings or {})
        self._report = report
        self._resources = contextlib.ExitStack()

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
        return self.redis.url

    @property
    def postgres_url(self) -> str:
        return self.postgres.url(DATABASE_NAME)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            opening.enter_context(self.data_directory)
            self._check_listeners()
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
                    f"{_format_address(address)}, the address for {purpose}, is taken by another program; "
                    "stop that one, or choose another address"
                )

    def _start_stores(self, opening: contextlib.ExitStack) -> None:
        inherited_fds = (self.data_directory.servers_lock,)
        ports = self._load_ports()
        self.redis = RedisServer(
            self.data_directory.create_part("redis"), port=ports["redis"], inherited_fds=inherited_fds
        )
        try:
            self._start("redis", self.redis, opening)
        except ServerError:
            if is_port_free(LOOPBACK, self.redis.port):
                raise
            self.redis.port = ports["redis"] = find_free_port()  # another program was faster
            self._start("redis", self.redis, opening)
        folder = self.data_directory.create_part("postgres", DATA_DIRECTORY_MODE)
        self.postgres = PostgresServer(folder, port=ports["postgres"], inherited_fds=inherited_fds)
        self._start("postgres", self.postgres, opening)
        (self.data_directory.path / PORTS_FILE).write_text(json.dumps(ports) + "\n")
        _create_database(self.postgres)

    def _start_sidecar(self, opening: contextlib.ExitStack) -> None:
        shares = ("sample_safe", "sample_unsafe", "baseline_share")
        settings = {
            **{f"ABREAST_{share.upper()}": f"{getattr(self.envoy_settings, share):.9f}" for share in shares},
            **self._settings,
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_GRPC_LISTEN": _format_address(self.grpc),
            "ABREAST_HTTP_LISTEN": _format_address(self.http),
            "ABREAST_ENVOY_ADMIN": self.admin_url,
        }
        self.sidecar = SidecarServer(
            settings,
            _to_client_address(self.http),
            folder=self.data_directory.create_part("sidecar"),
            inherited_fds=(self.data_directory.servers_lock,),
        )
        self._start("sidecar", self.sidecar, opening)

    def _start_envoy(self, opening: contextlib.ExitStack) -> None:
        self.envoy = EnvoyServer(
            render_config(self.envoy_settings),
            folder=self.data_directory.create_part("envoy"),
            inherited_fds=(self.data_directory.servers_lock,),
        )
        self._start("envoy", self.envoy, opening)

    def _start(self, name: str, server: StackServer, opening: contextlib.ExitStack) -> None:
        self._report(f"starting {name}")
        opening.callback(server.stop)  # also what is interrupted while it starts
        server.start()
        self.servers[name] = server

    def restart_exited(self) -> list[str]:
        """Start again what has ended by itself; what it was, with the end of its log. Raise ServerError where that fails."""
        messages = []
        for name, server in self.servers.items():
            if name not in self.stopped_servers and server.process is not None and not server.process.is_alive:
                code = server.process.popen.returncode
                messages.append(
                    f"{name} ended (exit code {code}), and is started again; the end of its log:\n{server.process.read_log_tail(5)}"
                )
                server.start()
        return messages

    def stop_server(self, name: str, *, kill: bool) -> None:
        """Until `bring_back`."""
        self.stopped_servers.add(name)
        server = self.servers[name]
        if kill and server.process is not None:
            server.process.popen.kill()
            server.process.popen.wait()
        server.stop()

    def start_server(self, name: str) -> None:
        """Raise ServerError where it does not start."""
        self.stopped_servers.discard(name)
        self.servers[name].start()

    def _load_ports(self) -> dict[str, int]:
        """The ports of the last run in this folder where they are still free."""
        file = self.data_directory.path / PORTS_FILE
        try:
            stored_ports = json.loads(file.read_text())
        except (OSError, ValueError):
            stored_ports = {"redis": self._redis_port}
        return {name: _reuse_or_find_port(stored_ports.get(name) or 0) for name in ("redis", "postgres")}

    def _get_connection_settings(self) -> dict[str, str]:
        """As settings, so that a command reads them like its environment."""
        return {
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_ENVOY_ADMIN": self.admin_url,
            "ABREAST_HTTP_LISTEN": _format_address(_to_client_address(self.http)),
        }


def _create_database(server: PostgresServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        if connection.execute("select from pg_database where datname = %s", [DATABASE_NAME]).fetchone() is None:
            connection.execute(f"create database {DATABASE_NAME}".encode())


def _choose_port(address: SocketAddress) -> SocketAddress:
    return address if address.port else SocketAddress(address.host, find_free_port())


def _reuse_or_find_port(port: int) -> int:
    return port if port and is_port_free(LOOPBACK, port) else find_free_port()


def _to_client_address(address: SocketAddress) -> SocketAddress:
    """An address that a client on this machine can connect to."""
    return SocketAddress({"0.0.0.0": LOOPBACK, "::": "::1"}.get(address.host, address.host), address.port)


def _format_address(address: SocketAddress) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"
