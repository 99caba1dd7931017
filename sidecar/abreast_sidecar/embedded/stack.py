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

from abreast_sidecar.embedded.envoy import EnvoyServer
from abreast_sidecar.embedded.folder import FOLDER_MODE, RunFolder
from abreast_sidecar.embedded.postgres import PostgresServer
from abreast_sidecar.embedded.process import ServerProcess, free_port, port_is_free
from abreast_sidecar.embedded.record import RunRecord
from abreast_sidecar.embedded.redis import RedisServer
from abreast_sidecar.embedded.sidecar import SidecarServer
from abreast_sidecar.envoy.render import render
from abreast_sidecar.envoy.settings import Endpoint, EnvoySettings
from abreast_sidecar.errors import ServerError

LOOPBACK = "127.0.0.1"
ANY_PORT = Endpoint(LOOPBACK, 0)
DATABASE = "abreast"
PORTS = "ports.json"  # the ports that were chosen, so that services find Redis again after a restart


class Server(Protocol):
    server: ServerProcess | None

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
        grpc: Endpoint = ANY_PORT,
        http: Endpoint = ANY_PORT,
        redis_port: int = 0,
        settings: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.grpc = _with_port(grpc)
        self.http = _with_port(http)
        self.envoy_settings = dataclasses.replace(
            envoy,
            listen=_with_port(envoy.listen),
            sidecar=_reachable(self.grpc),
            admin=Endpoint(LOOPBACK, free_port()),
        )
        self.folder = RunFolder(data)
        self.servers: dict[str, Server] = {}
        self.down: set[str] = set()  # taken down on purpose
        self._redis_port = redis_port
        self._settings = dict(settings or {})
        self._say = say
        self._open = contextlib.ExitStack()

    @property
    def envoy_url(self) -> str:
        scheme = "https" if self.envoy_settings.tls_certificate else "http"
        return f"{scheme}://{_written(_reachable(self.envoy_settings.listen))}"

    @property
    def admin_url(self) -> str:
        return f"http://{_written(self.envoy_settings.admin)}"

    @property
    def grpc_address(self) -> str:
        return _written(_reachable(self.grpc))

    @property
    def http_url(self) -> str:
        return f"http://{_written(_reachable(self.http))}"

    @property
    def redis_url(self) -> str:
        return self.redis.url

    @property
    def postgres_url(self) -> str:
        return self.postgres.url(DATABASE)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            opening.enter_context(self.folder)
            self._check_listeners()
            self._start_stores(opening)
            self._start_sidecar(opening)
            self._start_envoy(opening)
            opening.enter_context(RunRecord(self.grpc_address, self._whereabouts()))
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _check_listeners(self) -> None:
        listeners = {
            "users' requests (--listen)": self.envoy_settings.listen,
            "the sidecar's gRPC (--grpc)": self.grpc,
            "the sidecar's HTTP (--http)": self.http,
        }
        for what, address in listeners.items():
            if not port_is_free(address.host, address.port):
                raise ServerError(
                    f"{_written(address)}, the address for {what}, is taken by another program; "
                    "stop that one, or choose another address"
                )

    def _start_stores(self, opening: contextlib.ExitStack) -> None:
        keep_open = (self.folder.servers_lock,)
        ports = self._ports()
        self.redis = RedisServer(self.folder.part("redis"), port=ports["redis"], keep_open=keep_open)
        try:
            self._start("redis", self.redis, opening)
        except ServerError:
            if port_is_free(LOOPBACK, self.redis.port):
                raise
            self.redis.port = ports["redis"] = free_port()  # another program was faster
            self._start("redis", self.redis, opening)
        folder = self.folder.part("postgres", FOLDER_MODE)
        self.postgres = PostgresServer(folder, port=ports["postgres"], keep_open=keep_open)
        self._start("postgres", self.postgres, opening)
        (self.folder.path / PORTS).write_text(json.dumps(ports) + "\n")
        _make_database(self.postgres)

    def _start_sidecar(self, opening: contextlib.ExitStack) -> None:
        shares = ("sample_safe", "sample_unsafe", "baseline_share")
        settings = {
            **{f"ABREAST_{share.upper()}": f"{getattr(self.envoy_settings, share):.9f}" for share in shares},
            **self._settings,
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_GRPC_LISTEN": _written(self.grpc),
            "ABREAST_HTTP_LISTEN": _written(self.http),
            "ABREAST_ENVOY_ADMIN": self.admin_url,
        }
        self.sidecar = SidecarServer(
            settings,
            _reachable(self.http),
            folder=self.folder.part("sidecar"),
            keep_open=(self.folder.servers_lock,),
        )
        self._start("sidecar", self.sidecar, opening)

    def _start_envoy(self, opening: contextlib.ExitStack) -> None:
        self.envoy = EnvoyServer(
            render(self.envoy_settings),
            folder=self.folder.part("envoy"),
            keep_open=(self.folder.servers_lock,),
        )
        self._start("envoy", self.envoy, opening)

    def _start(self, name: str, server: Server, opening: contextlib.ExitStack) -> None:
        self._say(f"starting {name}")
        opening.callback(server.stop)  # also what is interrupted while it starts
        server.start()
        self.servers[name] = server

    def revive(self) -> list[str]:
        """Start again what has ended by itself; what it was, with the end of its log. Raise ServerError where that fails."""
        found = []
        for name, server in self.servers.items():
            if name not in self.down and server.server is not None and not server.server.alive:
                code = server.server.process.returncode
                found.append(
                    f"{name} ended (exit code {code}), and is started again; the end of its log:\n{server.server.tail(5)}"
                )
                server.start()
        return found

    def take_down(self, name: str, *, kill: bool) -> None:
        """Until `bring_back`."""
        self.down.add(name)
        server = self.servers[name]
        if kill and server.server is not None:
            server.server.process.kill()
            server.server.process.wait()
        server.stop()

    def bring_back(self, name: str) -> None:
        """Raise ServerError where it does not start."""
        self.down.discard(name)
        self.servers[name].start()

    def _ports(self) -> dict[str, int]:
        """The ports of the last run in this folder where they are still free."""
        file = self.folder.path / PORTS
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            kept = {"redis": self._redis_port}
        return {name: _free_or_other(kept.get(name) or 0) for name in ("redis", "postgres")}

    def _whereabouts(self) -> dict[str, str]:
        """As settings, so that a command reads them like its environment."""
        return {
            "ABREAST_REDIS_URL": self.redis_url,
            "ABREAST_POSTGRES_URL": self.postgres_url,
            "ABREAST_ENVOY_ADMIN": self.admin_url,
            "ABREAST_HTTP_LISTEN": _written(_reachable(self.http)),
        }


def _make_database(server: PostgresServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        if connection.execute("select from pg_database where datname = %s", [DATABASE]).fetchone() is None:
            connection.execute(f"create database {DATABASE}".encode())


def _with_port(address: Endpoint) -> Endpoint:
    return address if address.port else Endpoint(address.host, free_port())


def _free_or_other(port: int) -> int:
    return port if port and port_is_free(LOOPBACK, port) else free_port()


def _reachable(address: Endpoint) -> Endpoint:
    """An address that a client on this machine can connect to."""
    return Endpoint({"0.0.0.0": LOOPBACK, "::": "::1"}.get(address.host, address.host), address.port)


def _written(address: Endpoint) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"
