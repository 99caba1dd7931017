"""Starts both versions of the shop with their databases and cache, behind a whole Abreast stack."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import psycopg

from abreast_demo.load import USER_HEADER
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress, StickyKey
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import DATA_DIRECTORY_MODE
from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_answering, is_port_free, kill_tree
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.stack.stack import Fault, Stack, pause_fault, stack_faults

LOOPBACK = "127.0.0.1"
VERSIONS = ("old", "new")
DEFAULT_CODE_BY_VERSION = {"old": "old", "new": "new"}
SAFE_SAMPLE_SHARE = 1.0
BASELINE_SHARE = 0.3  # share of sampled requests that old gets twice
HEALTHY_TIMEOUT_S = 30.0
HEALTHY_POLL_S = 0.05
HEALTHY_STAT_NAME = "cluster.{}.membership_healthy"
HEALTHY_STATS_PATH = r"stats?format=json&filter=^cluster\.(old|new)\.membership_healthy$"
HEALTH_REQUEST = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
CACHE_REDIS_OPTIONS = ("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru")


class PortReservations:
    """Keep demos that start at the same time from choosing the same TCP port.

    A context manager that binds the UDP port of the same number. The system frees it however the process ends.
    """

    def __init__(self) -> None:
        self._reserved_sockets = contextlib.ExitStack()

    def reserve(self, port: int) -> int:
        """Return this port, or a free one if it is taken."""
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reservation.bind((LOOPBACK, port))
        except OSError:
            reservation.close()
            return find_free_port()
        self._reserved_sockets.callback(reservation.close)
        return port if is_port_free(LOOPBACK, port) else find_free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._reserved_sockets.close()


@dataclass(frozen=True)
class StackAddresses:
    listen: SocketAddress
    grpc: SocketAddress
    http: SocketAddress


@dataclass
class ShopDeployment:
    """A running stack with both versions of the shop.

    The shop has a separate Postgres server, so that it survives a drill that stops the ledger's.
    """

    stack: Stack
    database: PostgresServer
    cache_url: str
    upstreams: dict[str, SocketAddress]
    code_by_version: Mapping[str, str]
    shops: dict[str, ServerProcess] = field(default_factory=dict)

    def start(self, *versions: str) -> None:
        """Start the versions at the same time, then wait for each."""
        for version in versions:
            self.shops[version] = self._start_shop(version)
        for version in versions:
            self.shops[version].wait_until(partial(_is_ready, self.upstreams[version]))

    def _start_shop(self, version: str) -> ServerProcess:
        upstream, directory = self.upstreams[version], self.stack.data_directory
        options = ["--version", self.code_by_version[version], "--listen", f"{upstream.host}:{upstream.port}"]
        return ServerProcess.start(
            f"the {version} shop",
            [sys.executable, "-m", "abreast_demo.service", *options],
            directory.path / f"shop-{version}.log",
            is_ready=lambda _pid: True,  # start() waits
            environment={
                "DATABASE_URL": self.database.url(_database_name(version)),
                "CACHE_URL": self.cache_url,
                "ABREAST_REDIS_URL": self.stack.redis_url,
            },
            inherited_fds=(directory.servers_lock,),
        )

    def fault(self, name: str) -> Fault:
        """Return the fault of a drill."""
        new = self.shops["new"]
        faults = {
            "new-killed": Fault(lambda: kill_tree(new.pid), lambda: self.start("new")),
            "new-hangs": pause_fault(new.pid),
            "new-errors": Fault(lambda: os.kill(new.pid, signal.SIGUSR1), lambda: os.kill(new.pid, signal.SIGUSR2)),
            **stack_faults(self.stack),
        }
        return faults[name]

    def stop(self) -> None:
        for shop in self.shops.values():
            shop.stop()


@contextmanager
def deploy_shop(
    addresses: StackAddresses,
    on_message: Callable[[str], None],
    *,
    code_by_version: Mapping[str, str] = DEFAULT_CODE_BY_VERSION,
    **envoy_options: Any,
) -> Iterator[ShopDeployment]:
    """Run the stack and the shop until the context ends. Raise ServerError if a part can't be started.

    `code_by_version` names the code that runs as each version. With the old code as both, no regression is planted.
    `envoy_options` override the demo's Envoy settings.
    """
    upstreams = {version: SocketAddress(LOOPBACK, find_free_port()) for version in VERSIONS}
    shares: dict[str, Any] = {"sample_safe": SAFE_SAMPLE_SHARE, "baseline_share": BASELINE_SHARE, **envoy_options}
    envoy_settings = EnvoySettings(
        service=SHOP_SERVICE,
        listen=addresses.listen,
        old=(upstreams["old"],),
        new=(upstreams["new"],),
        sticky=StickyKey("header", USER_HEADER),
        **shares,
    )
    with (
        Stack(envoy_settings, grpc=addresses.grpc, http=addresses.http, report=on_message) as stack,
        contextlib.ExitStack() as exit_stack,
    ):
        on_message("starting both versions of the shop")
        directory = stack.data_directory
        inherited_fds = (directory.servers_lock,)
        cache = RedisServer(directory.create_part("cache"), options=CACHE_REDIS_OPTIONS, inherited_fds=inherited_fds)
        exit_stack.callback(cache.stop)
        cache.start()
        database = PostgresServer(
            directory.create_part("shop-postgres", DATA_DIRECTORY_MODE), inherited_fds=inherited_fds
        )
        exit_stack.callback(database.stop)
        database.start()
        with psycopg.connect(database.url(), autocommit=True) as connection:
            for version in VERSIONS:
                connection.execute(f"create database {_database_name(version)}".encode())
        deployment = ShopDeployment(stack, database, cache.url, upstreams, code_by_version)
        exit_stack.callback(deployment.stop)
        deployment.start(*VERSIONS)
        _wait_until_healthy(stack.admin_url)
        yield deployment


def _database_name(version: str) -> str:
    return f"shop_{version}"


def _is_ready(upstream: SocketAddress, _pid: int) -> bool:
    return is_answering(upstream.host, upstream.port, HEALTH_REQUEST, b" 200 OK")


def _wait_until_healthy(admin_url: str) -> None:
    deadline = time.monotonic() + HEALTHY_TIMEOUT_S
    while unhealthy_versions := set(VERSIONS) - _list_healthy_versions(admin_url):
        if time.monotonic() > deadline:
            names = " and ".join(sorted(unhealthy_versions))
            raise ServerError(f"envoy's health check of {names} failed for {HEALTHY_TIMEOUT_S:g} s; see its log")
        time.sleep(HEALTHY_POLL_S)


def _list_healthy_versions(admin_url: str) -> set[str]:
    try:
        with urllib.request.urlopen(f"{admin_url}/{HEALTHY_STATS_PATH}", timeout=30) as response:  # noqa: S310  # http
            stats = json.load(response)["stats"]
    except OSError:
        return set()
    return {version for version in VERSIONS if {"name": HEALTHY_STAT_NAME.format(version), "value": 1} in stats}
