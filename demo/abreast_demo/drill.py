"""`abreast drill`: break one part while users come, and measure what they and the ledger saw of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from abreast_demo.client import DemoClient
from abreast_demo.deploy import StackAddresses, deploy_shop
from abreast_demo.noticed import MAX_RECOVERY_S, DrillReport, DrillRun, RecordingLoadGenerator
from abreast_demo.ports import LOOPBACK
from abreast_demo.service import SHOP_SERVICE
from abreast_demo.traffic import UserRequest, generate_requests
from abreast_demo.verdict import LedgerCounts
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.errors import ServerError

ANY_PORT = SocketAddress(LOOPBACK, 0)
WARM_UP_S = 2.0  # seconds of traffic before
RECOVERY_POLL_S = 0.05  # seconds

MessageHandler = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DrillOptions:
    names: tuple[str, ...]
    fault_duration_s: float = 6.0  # for how long the part is broken
    requests_per_s: float = 60.0  # requests a second
    new_share: float = 1.0  # of users on new


@dataclass(frozen=True)
class DrillTarget:
    """What is drilled."""

    url: str
    grpc_address: str
    service: str
    requests: Iterator[UserRequest]
    inject_fault: Callable[[str], None]
    repair_fault: Callable[[str], None]


class TrafficThread:
    """Users in a thread of their own: servers must be started by the main one, which waits for them meanwhile."""

    def __init__(self, users: RecordingLoadGenerator, requests: Iterator[UserRequest], rate: float) -> None:
        self._stop = threading.Event()
        remaining_requests = itertools.takewhile(lambda _request: not self._stop.is_set(), requests)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._send_requests(users, remaining_requests, rate))
        )

    async def _send_requests(
        self, users: RecordingLoadGenerator, remaining_requests: Iterator[UserRequest], rate: float
    ) -> None:
        async with users:
            await users.send(remaining_requests, seconds=float("inf"), rate=rate)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class DrillRunner:
    target: DrillTarget
    options: DrillOptions
    on_message: MessageHandler

    def run(self) -> list[DrillReport]:
        return [self._run_drill(name) for name in self.options.names]

    def _run_drill(self, name: str) -> DrillReport:
        users = RecordingLoadGenerator(self.target.url)
        before = asyncio.run(self._prepare())
        with TrafficThread(users, self.target.requests, self.options.requests_per_s):
            run = self._inject_and_repair(DrillRun(name, users))
        self.on_message(f"{name}: waiting until everything is in the ledger")
        return run.build_report(before, asyncio.run(self._wait_until_complete(before)))

    async def _prepare(self) -> LedgerCounts:
        async with self._client() as client:
            await client.set_new_share(self.options.new_share, "drill")
            return await client.wait_until_quiescent()

    async def _wait_until_complete(self, before: LedgerCounts) -> LedgerCounts:
        async with self._client() as client:
            return await client.wait_until_complete(before)

    def _client(self) -> DemoClient:
        return DemoClient(self.target.grpc_address, self.target.service)

    def _inject_and_repair(self, run: DrillRun) -> DrillRun:
        time.sleep(WARM_UP_S)
        run.had_users_on_new = run.users.has_response_from("new")
        if run.breaks_new and not run.had_users_on_new:
            raise ServerError(
                f"{run.name}: new answered none of {len(run.users.responses)} users, so nothing was broken; "
                "let users onto new for the drill with --new"
            )
        self.on_message(f"{run.name}: broken for {self.options.fault_duration_s:g} s")
        run.first_response_index, run.break_started_at = len(run.users.responses), time.monotonic()
        self.target.inject_fault(run.name)
        run.break_done_at = time.monotonic()
        try:
            time.sleep(self.options.fault_duration_s)
        finally:
            run.repaired_at = time.monotonic()
            self.target.repair_fault(run.name)
        deadline = time.monotonic() + MAX_RECOVERY_S
        while not run.has_recovered() and time.monotonic() < deadline:
            time.sleep(RECOVERY_POLL_S)
        return run


def run_drills(options: DrillOptions, *, on_message: MessageHandler) -> list[DrillReport]:
    """In a stack of its own. Raise ServerError where something can't be started, or started again."""
    addresses = StackAddresses(ANY_PORT, ANY_PORT, ANY_PORT)
    with deploy_shop(addresses, on_message) as deployment:
        stack = deployment.stack
        target = DrillTarget(
            stack.envoy_url,
            stack.grpc_address,
            SHOP_SERVICE,
            generate_requests(1),
            lambda name: deployment.fault(name).inject(),
            lambda name: deployment.fault(name).repair(),
        )
        return DrillRunner(target, options, on_message).run()
