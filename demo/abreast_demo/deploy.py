"""Both versions of the shop with their databases and their cache, and Abreast around them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg

from abreast_demo.load import USER_HEADER
from abreast_demo.ports import LOOPBACK
from abreast_demo.service import SERVICE
from abreast_sidecar.embedded import PostgresServer, RedisServer, ServerProcess
from abreast_sidecar.embedded.faults import Fault, kill_tree, pause_fault, stack_faults
from abreast_sidecar.embedded.folder import FOLDER_MODE
from abreast_sidecar.embedded.process import answers, free_port
from abreast_sidecar.embedded.stack import Stack
from abreast_sidecar.envoy.settings import Endpoint, EnvoySettings, Sticky
from abreast_sidecar.errors import ServerError

VERSIONS = frozenset({"old", "new"})  # so Envoy's clusters of live traffic are called too
CODES = {"old": "old", "new": "new"}
SAMPLE = 1.0  # all safe requests: 15 seconds are short
BASELINE = 0.3  # of them go to old twice
HEALTHY_TIMEOUT = 30.0  # seconds
HEALTHY_POLL = 0.05
HEALTHY_STAT = "cluster.{}.membership_healthy"
HEALTHY_STATS = r"stats?format=json&filter=^cluster\.(old|new)\.membership_healthy$"
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
CACHE_LIMITS = ("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru")


@dataclass(frozen=True)
class Addresses:
    listen: Endpoint
    grpc: Endpoint
    http: Endpoint


@dataclass
class Deployed:
    """The stack, and what the shop is made of. Its database is not the ledger's: it outlives that in a drill."""

    stack: Stack
    database: PostgresServer
    cache_url: str
    upstreams: dict[str, Endpoint]
    codes: Mapping[str, str]
    shops: dict[str, ServerProcess]

    def start(self, *versions: str) -> None:
        """Start the versions at the same time, then wait for each."""
        for version in versions:
            self.shops[version] = _start(version, self)
        for version in versions:
            self.shops[version].wait_until(partial(_is_ready, self.upstreams[version]))

    def faults(self) -> dict[str, Fault]:
        """All drills."""
        new = self.shops["new"]
        return {
            "new-killed": Fault(lambda: kill_tree(new.pid), lambda: self.start("new")),
            "new-hangs": pause_fault(new.pid),
            "new-errors": Fault(
                lambda: os.kill(new.pid, signal.SIGUSR1), lambda: os.kill(new.pid, signal.SIGUSR2)
            ),
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
def deployed(
    addresses: Addresses, say: Callable[[str], None], *, codes: Mapping[str, str] = CODES, **more: Any
) -> Iterator[Stack]:
    """Everything runs and Envoy knows that both versions are well. Raise ServerError otherwise.

    `codes`: which code runs as each version; the old one as both is how a run without a regression looks. `more` are
    settings of Envoy, over the demo's.
    """
    with opened(addresses, say, codes=codes, **more) as found:
        yield found.stack


@contextmanager
def opened(
    addresses: Addresses,
    say: Callable[[str], None],
    *,
    codes: Mapping[str, str] = CODES,
    **more: Any,
) -> Iterator[Deployed]:
    """The same, with what it takes to break it."""
    upstreams = {version: Endpoint(LOOPBACK, free_port()) for version in VERSIONS}
    shares: dict[str, Any] = {"sample_safe": SAMPLE, "baseline_share": BASELINE, **more}
    envoy = EnvoySettings(
        service=SERVICE,
        listen=addresses.listen,
        old=(upstreams["old"],),
        new=(upstreams["new"],),
        sticky=Sticky("header", USER_HEADER),
        **shares,
    )
    with (
        Stack(envoy, grpc=addresses.grpc, http=addresses.http, say=say) as stack,
        contextlib.ExitStack() as opening,
    ):
        say("starting the shop, old and new")
        keep_open = (stack.folder.servers_lock,)
        cache = RedisServer(stack.folder.part("cache"), options=CACHE_LIMITS, keep_open=keep_open)
        opening.callback(cache.stop)
        cache.start()
        database = PostgresServer(stack.folder.part("shop-postgres", FOLDER_MODE), keep_open=keep_open)
        opening.callback(database.stop)
        database.start()
        found = Deployed(stack, database, cache.url, upstreams, codes, {})
        opening.callback(found.stop)
        for version in sorted(VERSIONS):
            _create_database(version, database)
        found.start(*sorted(VERSIONS))
        await_healthy(stack.admin_url)
        yield found


def _create_database(version: str, server: PostgresServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"create database {_database(version)}".encode())


def _database(version: str) -> str:
    return f"shop_{version}"


def _start(version: str, deployed: Deployed) -> ServerProcess:
    stack, listen = deployed.stack, deployed.upstreams[version]
    address = f"{listen.host}:{listen.port}"
    return ServerProcess.start(
        f"the {version} shop",
        [
            sys.executable,
            "-m",
            "abreast_demo.service",
            "--version",
            deployed.codes[version],
            "--listen",
            address,
        ],
        stack.folder.path / f"shop-{version}.log",
        ready=lambda _pid: True,  # the caller waits
        environment={
            "DATABASE_URL": deployed.database.url(_database(version)),
            "CACHE_URL": deployed.cache_url,
            "ABREAST_REDIS_URL": stack.redis_url,
        },
        keep_open=(stack.folder.servers_lock,),
    )


def _is_ready(listen: Endpoint, _pid: int) -> bool:
    return answers(listen.host, listen.port, HEALTH, b" 200 OK")


def await_healthy(admin_url: str) -> None:
    deadline = time.monotonic() + HEALTHY_TIMEOUT
    while missing := VERSIONS - _healthy(admin_url):
        if time.monotonic() > deadline:
            names = " and ".join(sorted(missing))
            raise ServerError(f"envoy did not find {names} healthy within {HEALTHY_TIMEOUT:g} s")
        time.sleep(HEALTHY_POLL)


def _healthy(admin_url: str) -> set[str]:
    try:
        with urllib.request.urlopen(f"{admin_url}/{HEALTHY_STATS}", timeout=5) as answer:  # noqa: S310  # http
            stats = json.load(answer)["stats"]
    except OSError:
        return set()
    return {
        version
        for version in VERSIONS
        for stat in stats
        if stat == {"name": HEALTHY_STAT.format(version), "value": 1}
    }
