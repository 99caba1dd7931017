"""Fire drills: break one part of a stack under traffic, and measure the effect on users and on the ledger."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from abreast_demo.deploy import LOOPBACK, ShopDeployment, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, UserRequest, UserResponse, generate_requests
from abreast_demo.planted_changes import LedgerCounts
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.errors import ServerError

ANY_PORT = SocketAddress(LOOPBACK, 0)
NEW_DRILL_PREFIX = "new-"  # drills with this prefix break new
WARM_UP_S = 2.0  # traffic before the fault
MAX_WARM_UP_S = 30.0  # until the first response, on a busy machine
MAX_RECOVERY_S = 40.0  # from the repair until new must answer users
RECOVERY_POLL_S = 0.05

MessageHandler = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DrillOptions:
    names: tuple[str, ...]
    fault_duration_s: float = 6.0
    requests_per_s: float = 60.0
    new_share: float = 1.0  # share of users on new before the fault


@dataclass(frozen=True, slots=True)
class DrillReport:
    """Results of one drill, with times in seconds. None means unknown, or not applicable to this drill."""

    drill: str
    requests: int
    safe_errors: int  # errors for GET, HEAD and OPTIONS, like longest_wait
    unsafe_errors: int
    longest_wait: float
    until_old: float | None  # from the fault to the last response by new
    until_new: float | None  # from the repair to the first response by new
    sampled: int | None  # requests that Envoy sampled
    pending: int | None  # sampled requests still in Redis; a killed worker's pairs are claimed after a minute
    lost: int | None  # sampled requests that are neither in the ledger nor pending
    trouble: str  # reason of failure, or empty

    def to_json_object(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.trouble}


@dataclass
class DrillRun:
    """One drill: times of fault and repair, and the responses since the fault. Times are monotonic."""

    name: str
    fault_started_at: float = 0.0
    repaired_at: float = 0.0
    had_users_on_new: bool = True  # before the fault
    responses: list[UserResponse] = field(default_factory=list)

    @property
    def breaks_new(self) -> bool:
        return self.name.startswith(NEW_DRILL_PREFIX)

    @property
    def _recovered_responses(self) -> list[UserResponse]:
        return [
            response
            for response in self.responses
            if response.sent_at > self.repaired_at
            and not response.is_error
            and (response.version == "new" or not self.had_users_on_new)
        ]

    def has_recovered(self) -> bool:
        return bool(self._recovered_responses)

    @property
    def seconds_until_old(self) -> float | None:
        """Return None if the drill doesn't break new, or if new answered until the repair."""
        if not self.breaks_new:
            return None
        during_fault = [
            response for response in self.responses if self.fault_started_at < response.answered_at < self.repaired_at
        ]
        last_response_at = max(
            (response.answered_at for response in during_fault if response.version == "new"),
            default=self.fault_started_at,
        )
        if any(response.version == "old" and response.answered_at > last_response_at for response in during_fault):
            return last_response_at - self.fault_started_at
        return None

    @property
    def seconds_until_new(self) -> float | None:
        if not self.breaks_new or not self._recovered_responses:
            return None
        return max(min(response.answered_at for response in self._recovered_responses) - self.repaired_at, 0.0)

    def build_report(self, before: LedgerCounts, after: LedgerCounts) -> DrillReport:
        safe_responses = [response for response in self.responses if response.is_safe]
        safe_errors = sum(response.is_error for response in safe_responses)
        unsafe_errors = sum(response.is_error for response in self.responses) - safe_errors
        sampled = None if after.envoy_sampled is None else after.envoy_sampled - (before.envoy_sampled or 0)
        accounted_requests = after.total_pairs - before.total_pairs + (after.pending or 0) - (before.pending or 0)
        return DrillReport(
            drill=self.name,
            requests=len(self.responses),
            safe_errors=safe_errors,
            unsafe_errors=unsafe_errors,
            longest_wait=max((response.answered_at - response.sent_at for response in safe_responses), default=0.0),
            until_old=self.seconds_until_old,
            until_new=self.seconds_until_new,
            sampled=sampled,
            pending=after.pending,
            lost=None if sampled is None else sampled - accounted_requests,
            trouble=self._describe_failure(safe_errors, unsafe_errors),
        )

    def _describe_failure(self, safe_errors: int, unsafe_errors: int) -> str:
        if safe_errors:
            return f"{safe_errors} users of safe methods saw an error"
        if unsafe_errors and not self.breaks_new:
            return f"{unsafe_errors} users saw an error"
        if self.breaks_new and self.seconds_until_old is None:
            return "new still answered users when it was repaired"
        if not self.has_recovered():
            failure = "new answered no user" if self.had_users_on_new else "no user got an answer"
            return f"{failure} within {MAX_RECOVERY_S:g} s of the repair"
        return ""


@dataclass
class DrillRunner:
    deployment: ShopDeployment
    options: DrillOptions
    on_message: MessageHandler
    requests: Iterator[UserRequest] = field(default_factory=lambda: generate_requests(1))

    def run(self, name: str) -> DrillReport:
        run = DrillRun(name)
        before = asyncio.run(self._prepare())
        with self._send_in_background(run.responses):
            self._inject_and_repair(run)
        self.on_message(f"{name}: waiting for the ledger")
        return run.build_report(before, asyncio.run(self._wait_until_complete(before)))

    async def _prepare(self) -> LedgerCounts:
        async with self.deployment.connect() as calls:
            await calls.set_new_share(self.options.new_share, "drill")
            return await calls.wait_until_quiescent()

    async def _wait_until_complete(self, before: LedgerCounts) -> LedgerCounts:
        async with self.deployment.connect() as calls:
            return await calls.wait_until_complete(before)

    @contextmanager
    def _send_in_background(self, responses: list[UserResponse]) -> Iterator[None]:
        """Send from a thread, because the main thread must start servers and wait for them."""
        stopping = threading.Event()
        requests = itertools.takewhile(lambda _request: not stopping.is_set(), self.requests)

        async def send() -> None:
            async with LoadGenerator(self.deployment.stack.envoy_url, responses.append) as load:
                await load.send(requests, requests_per_s=self.options.requests_per_s)

        thread = threading.Thread(target=lambda: asyncio.run(send()))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def _inject_and_repair(self, run: DrillRun) -> None:
        time.sleep(WARM_UP_S)
        _wait_until(lambda: bool(run.responses), MAX_WARM_UP_S)
        warm_up_count = len(run.responses)
        run.had_users_on_new = any(response.version == "new" for response in run.responses)
        if run.breaks_new and not run.had_users_on_new:
            raise ServerError(
                f"{run.name}: new answered none of {warm_up_count} users, so there is nothing to break; "
                "send users to new with --new"
            )
        self.on_message(f"{run.name}: broken for {self.options.fault_duration_s:g} s")
        del run.responses[:warm_up_count]
        run.fault_started_at = time.monotonic()
        self.deployment.fault(run.name).inject()
        try:
            time.sleep(self.options.fault_duration_s)
        finally:
            run.repaired_at = time.monotonic()
            self.deployment.fault(run.name).repair()
        _wait_until(run.has_recovered, MAX_RECOVERY_S)


def _wait_until(is_done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done() and time.monotonic() < deadline:
        time.sleep(RECOVERY_POLL_S)


def run_drills(options: DrillOptions, *, on_message: MessageHandler) -> list[DrillReport]:
    """Run the drills on a separate stack. Raise ServerError if a part can't be started."""
    with deploy_shop(StackAddresses(ANY_PORT, ANY_PORT, ANY_PORT), on_message) as deployment:
        runner = DrillRunner(deployment, options, on_message)
        return [runner.run(name) for name in options.names]
