"""Both versions of the shop with their databases and their cache, and Abreast around them."""

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
from dataclasses import dataclass
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


class PortReservations:
    """Two demos that start together must not take the same port: the UDP port of that number, which nobody needs here,
    says that it is taken. The system frees it however this process ends. Use as a context manager.
    """

    def __init__(self) -> None:
        self._reserved_sockets = contextlib.ExitStack()

    def reserve(self, port: int) -> int:
        """This port, or a free one where it is taken."""
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


VERSIONS = frozenset({"old", "new"})  # so Envoy's clusters of live traffic are called too
DEFAULT_CODE_BY_VERSION = {"old": "old", "new": "new"}
SAFE_SAMPLE_SHARE = 1.0  # all safe requests: 15 seconds are short
BASELINE_SHARE = 0.3  # of them go to old twice
HEALTHY_TIMEOUT_S = 30.0  # seconds
HEALTHY_POLL_S = 0.05
HEALTHY_STAT_NAME = "cluster.{}.membership_healthy"
HEALTHY_STATS_PATH = r"stats?format=json&filter=^cluster\.(old|new)\.membership_healthy$"
HEALTH_REQUEST = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
CACHE_REDIS_OPTIONS = ("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru")


@dataclass(frozen=True)
class StackAddresses:
    listen: SocketAddress
    grpc: SocketAddress
    http: SocketAddress


@dataclass
class ShopDeployment:
    """The stack, and what the shop is made of. Its database is not the ledger's: it outlives that in a drill."""

    stack: Stack
    database: PostgresServer
    cache_url: str
    upstreams: dict[str, SocketAddress]
    code_by_version: Mapping[str, str]
    shops: dict[str, ServerProcess]

    def start(self, *versions: str) -> None:
        """Start the versions at the same time, then wait for each."""
        for version in versions:
            self.shops[version] = _start_shop(version, self)
        for version in versions:
            self.shops[version].wait_until(partial(_is_ready, self.upstreams[version]))

    def faults(self) -> dict[str, Fault]:
        """All drills."""
        new = self.shops["new"]
        return {
            "new-killed": Fault(lambda: kill_tree(new.pid), lambda: self.start("new")),
            "new-hangs": pause_fault(new.pid),
            "new-errors": Fault(lambda: os.kill(new.pid, signal.SIGUSR1), lambda: os.kill(new.pid, signal.SIGUSR2)),
            **stack_faults(self.stack),
        }

    def fault(self, name: str) -> Fault:
        try:
            return self.faults()[name]
        except KeyError:
            raise ServerError(f"there is no drill {name}") from None

    def stop(self) -> None:
        for shop in self.shops.values():
            shop.stop()


@contextmanager
def deploy_stack(
    addresses: StackAddresses,
    on_message: Callable[[str], None],
    *,
    code_by_version: Mapping[str, str] = DEFAULT_CODE_BY_VERSION,
    **envoy_options: Any,
) -> Iterator[Stack]:
    """Everything runs and Envoy knows that both versions are well. Raise ServerError otherwise.

    `codes`: which code runs as each version; the old one as both is how a run without a regression looks. `more` are
    settings of Envoy, over the demo's.
    """
    with deploy_shop(addresses, on_message, code_by_version=code_by_version, **envoy_options) as deployment:
        yield deployment.stack


@contextmanager
def deploy_shop(
    addresses: StackAddresses,
    on_message: Callable[[str], None],
    *,
    code_by_version: Mapping[str, str] = DEFAULT_CODE_BY_VERSION,
    **envoy_options: Any,
) -> Iterator[ShopDeployment]:
    """The same, with what it takes to break it."""
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
        on_message("starting the shop, old and new")
        keep_open = (stack.data_directory.servers_lock,)
        cache = RedisServer(
            stack.data_directory.create_part("cache"), options=CACHE_REDIS_OPTIONS, inherited_fds=keep_open
        )
        exit_stack.callback(cache.stop)
        cache.start()
        database = PostgresServer(
            stack.data_directory.create_part("shop-postgres", DATA_DIRECTORY_MODE), inherited_fds=keep_open
        )
        exit_stack.callback(database.stop)
        database.start()
        deployment = ShopDeployment(stack, database, cache.url, upstreams, code_by_version, {})
        exit_stack.callback(deployment.stop)
        for version in sorted(VERSIONS):
            _create_database(version, database)
        deployment.start(*sorted(VERSIONS))
        wait_until_healthy(stack.admin_url)
        yield deployment


def _create_database(version: str, server: PostgresServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"create database {_database_name(version)}".encode())


def _database_name(version: str) -> str:
    return f"shop_{version}"


def _start_shop(version: str, deployment: ShopDeployment) -> ServerProcess:
    stack, listen_endpoint = deployment.stack, deployment.upstreams[version]
    address = f"{listen_endpoint.host}:{listen_endpoint.port}"
    return ServerProcess.start(
        f"the {version} shop",
        [
            sys.executable,
            "-m",
            "abreast_demo.service",
            "--version",
            deployment.code_by_version[version],
            "--listen",
            address,
        ],
        stack.data_directory.path / f"shop-{version}.log",
        is_ready=lambda _pid: True,  # the caller waits
        environment={
            "DATABASE_URL": deployment.database.url(_database_name(version)),
            "CACHE_URL": deployment.cache_url,
            "ABREAST_REDIS_URL": stack.redis_url,
        },
        inherited_fds=(stack.data_directory.servers_lock,),
    )


def _is_ready(listen_endpoint: SocketAddress, _pid: int) -> bool:
    return is_answering(listen_endpoint.host, listen_endpoint.port, HEALTH_REQUEST, b" 200 OK")


def wait_until_healthy(admin_url: str) -> None:
    deadline = time.monotonic() + HEALTHY_TIMEOUT_S
    while unhealthy_versions := VERSIONS - _list_healthy_versions(admin_url):
        if time.monotonic() > deadline:
            names = " and ".join(sorted(unhealthy_versions))
            raise ServerError(f"envoy did not find {names} healthy within {HEALTHY_TIMEOUT_S:g} s")
        time.sleep(HEALTHY_POLL_S)


def _list_healthy_versions(admin_url: str) -> set[str]:
    try:
        with urllib.request.urlopen(f"{admin_url}/{HEALTHY_STATS_PATH}", timeout=5) as response:  # noqa: S310  # http
            stats = json.load(response)["stats"]
    except OSError:
        return set()
    return {
        version
        for version in VERSIONS
        for stat in stats
        if stat == {"name": HEALTHY_STAT_NAME.format(version), "value": 1}
    }
