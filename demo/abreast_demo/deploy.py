"""Starts both versions of the shop with their databases and cache, behind a whole Abreast stack, and calls its sidecar."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import psycopg

from abreast.v1 import common_pb2, comparison_pb2, traffic_pb2
from abreast_demo.load import USER_HEADER
from abreast_demo.planted_changes import FindingLocation, LedgerCounts, ReportedFinding, find_missed_changes
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.client.output import impact_name, kind_name, part_name
from abreast_sidecar.client.sidecar_client import MAX_PAGE_ROWS, Calls, SidecarClient
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress, StickyKey
from abreast_sidecar.errors import ServerError
from abreast_sidecar.stack.data import DATA_DIRECTORY_MODE
from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_answering, is_port_free, kill_tree
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.stack.stack import Fault, Stack, pause_fault, stack_faults

LOOPBACK = "127.0.0.1"
VERSIONS = ("old", "new")
DEFAULT_CODE_BY_VERSION = {"old": "old", "new": "new"}
DEFAULT_PLAIN_VERSIONS = ("old",)  # Envoy captures it, as it does most services
SAFE_SAMPLE_SHARE = 1.0
BASELINE_SHARE = 1.0  # all, so that a few seconds of traffic decide each finding
HEALTHY_TIMEOUT_S = 30.0
HEALTHY_POLL_S = 0.05
HEALTHY_STAT_NAME = "cluster.{}.membership_healthy"
HEALTHY_STATS_PATH = r"stats?format=json&filter=^cluster\.(old|new)\.membership_healthy$"
HEALTH_REQUEST = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
CACHE_REDIS_OPTIONS = ("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru")
CALL_TIMEOUT_S = 10.0
SETTLE_TIMEOUT_S = 30.0  # a pair waits at most 10 s for a capture that never arrives
JOIN_TIMEOUT_S = 12.0  # after this time, no pair waits for a capture
QUIESCENT_AFTER_S = 2.5  # the sidecar reads Envoy's counters every second
FINDINGS_TIMEOUT_S = 12.0  # the sidecar looks for slow endpoints every 5 s
POLL_INTERVAL_S = 0.2
UNSAMPLED_REASONS = ("shed_failing", "shed_queueing")  # a reason of other sheds concerns copies

Value = TypeVar("Value")


class PortReservations(contextlib.ExitStack):
    """Keep demos that start at the same time from choosing the same TCP port.

    A context manager that binds the UDP port of the same number. The system frees it however the process ends.
    """

    def reserve(self, port: int) -> int:
        """Return this port, or a free one if it is taken."""
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reservation.bind((LOOPBACK, port))
        except OSError:
            reservation.close()
            return find_free_port()
        self.callback(reservation.close)
        return port if is_port_free(LOOPBACK, port) else find_free_port()


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
    plain_versions: Sequence[str]
    shop_environment: Mapping[str, str]
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
        if version in self.plain_versions:
            options.append("--plain")
        return ServerProcess.start(
            f"the {version} shop",
            [sys.executable, "-m", "abreast_demo.service", *options],
            directory.path / f"shop-{version}.log",
            is_ready=lambda _pid: True,  # start() waits
            environment={
                "DATABASE_URL": self.database.url(_database_name(version)),
                "CACHE_URL": self.cache_url,
                "ABREAST_REDIS_URL": self.stack.service_redis_url,
                "ABREAST_REDACT_KEY_FILE": str(self.stack.redaction_key_file),
                **self.shop_environment,
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

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SidecarCalls]:
        """Open a channel to the sidecar. If a call failed, the end of the context raises SidecarError."""
        async with SidecarClient(self.stack.grpc_address, CALL_TIMEOUT_S).connect() as calls:
            yield SidecarCalls(calls)


@contextmanager
def deploy_shop(
    addresses: StackAddresses,
    on_message: Callable[[str], None],
    *,
    code_by_version: Mapping[str, str] = DEFAULT_CODE_BY_VERSION,
    plain_versions: Sequence[str] = DEFAULT_PLAIN_VERSIONS,
    shop_environment: Mapping[str, str] | None = None,
    sidecar_environment: Mapping[str, str] | None = None,
    **envoy_options: Any,
) -> Iterator[ShopDeployment]:
    """Run the stack and the shop until the context ends. Raise ServerError if a part can't be started.

    `code_by_version` names the code that runs as each version. With the old code as both, no regression is planted.
    `plain_versions` run without the middleware. The environments have further variables. `envoy_options` override the demo's Envoy settings.
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
        Stack(
            envoy_settings,
            grpc=addresses.grpc,
            http=addresses.http,
            settings=sidecar_environment or {},
            report=on_message,
        ) as stack,
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
        deployment = ShopDeployment(
            stack, database, cache.url, upstreams, code_by_version, plain_versions, shop_environment or {}
        )
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


@dataclass(frozen=True)
class SidecarCalls:
    """Calls to the sidecar of a deployment, and waits for their results."""

    calls: Calls

    async def set_new_share(self, new_share: float, actor: str) -> None:
        request = traffic_pb2.UpdateTrafficRequest(
            service=SHOP_SERVICE, new_share=new_share, actor=actor, reason=f"a step of the {actor}", force=True
        )
        await self.calls.traffic.UpdateTraffic(request, timeout=CALL_TIMEOUT_S)

    async def get_ledger_counts(self) -> LedgerCounts:
        request = comparison_pb2.GetSummaryRequest(service=SHOP_SERVICE)
        summary = await self.calls.comparison.GetSummary(request, timeout=CALL_TIMEOUT_S)
        traffic_request = traffic_pb2.GetTrafficRequest(service=SHOP_SERVICE)
        response = await self.calls.traffic.GetTraffic(traffic_request, timeout=CALL_TIMEOUT_S)
        is_all_sampled = response.traffic.sample_safe >= SAFE_SAMPLE_SHARE
        return LedgerCounts(
            outcomes={
                common_pb2.Outcome.Name(row.outcome).removeprefix("OUTCOME_").lower(): row.count
                for row in summary.outcomes
            },
            **{
                name: getattr(summary, name) if summary.HasField(name) else None
                for name in ("envoy_sampled", "unaccounted", "pending")
            },
            explained_pairs=summary.explained,
            drops={f"{row.stage} {row.reason}": row.count for row in summary.drops},
            unsampled=sum(row.count for row in summary.sheds if row.reason in UNSAMPLED_REASONS)
            if is_all_sampled
            else None,
        )

    async def list_findings(self) -> tuple[ReportedFinding, ...]:
        request = comparison_pb2.ListFindingsRequest(service=SHOP_SERVICE, include_noise=True, page_size=MAX_PAGE_ROWS)
        response = await self.calls.comparison.ListFindings(request, timeout=CALL_TIMEOUT_S)
        return tuple(
            ReportedFinding(
                id=finding.id,
                location=FindingLocation(
                    endpoint=f"{finding.endpoint.method} {finding.endpoint.route}",
                    part=part_name(finding.part),
                    path=finding.path,
                    kind=kind_name(finding.kind),
                ),
                impact=impact_name(finding.impact),
                noise=finding.noise,
                count=finding.count,
                summary=finding.summary,
            )
            for finding in response.findings
        )

    async def get_example_pair_id(self, finding_id: int) -> str:
        """Return the id of a stored pair that shows the finding, or an empty string."""
        request = comparison_pb2.GetFindingRequest(id=finding_id)
        response = await self.calls.comparison.GetFinding(request, timeout=CALL_TIMEOUT_S)
        return response.examples[0].pair.id if response.examples else ""

    async def wait_until_settled(self, sent_requests: int) -> LedgerCounts:
        """Wait until the ledger holds every request that Envoy sampled. Return the last counts on timeout."""
        return await _poll(
            self.get_ledger_counts, lambda counts: counts.is_settled(sent_requests), timeout_s=SETTLE_TIMEOUT_S
        )

    async def wait_until_complete(self, before: LedgerCounts) -> LedgerCounts:
        """Wait until the ledger holds every request sampled since `before`. Return the last counts on timeout."""
        return await _poll(
            self.get_ledger_counts, lambda counts: counts.is_complete_since(before), timeout_s=SETTLE_TIMEOUT_S
        )

    async def wait_until_quiescent(self) -> LedgerCounts:
        """Wait until the ledger is settled, or stops changing because earlier requests were lost."""
        previous_counts, changed_at = await self.get_ledger_counts(), time.monotonic()

        def is_quiescent(counts: LedgerCounts) -> bool:
            nonlocal previous_counts, changed_at
            if counts != previous_counts:
                previous_counts, changed_at = counts, time.monotonic()
            is_stable = not counts.pending and time.monotonic() - changed_at > QUIESCENT_AFTER_S
            return counts.is_settled(0) or is_stable

        return await _poll(self.get_ledger_counts, is_quiescent, timeout_s=JOIN_TIMEOUT_S)

    async def wait_for_planted_findings(self) -> tuple[ReportedFinding, ...]:
        """Wait until every planted regression is reported. Return the last findings on timeout."""
        return await _poll(
            self.list_findings, lambda findings: not find_missed_changes(findings), timeout_s=FINDINGS_TIMEOUT_S
        )


async def _poll(fetch: Callable[[], Awaitable[Value]], is_done: Callable[[Value], bool], *, timeout_s: float) -> Value:
    deadline = time.monotonic() + timeout_s
    while True:
        value = await fetch()
        if is_done(value) or time.monotonic() > deadline:
            return value
        await asyncio.sleep(POLL_INTERVAL_S)
