"""What users and the ledger noticed of one drill."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from abreast_demo.client import DemoClient
from abreast_demo.deploy import LOOPBACK, StackAddresses, deploy_shop
from abreast_demo.load import MIN_SERVER_ERROR_STATUS, USER_HEADER, LoadGenerator, UserRequest, generate_requests
from abreast_demo.planted_changes import LedgerCounts
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.errors import ServerError

VERSION_HEADER = "x-abreast-version"
MAX_RECOVERY_S = 40.0  # seconds that new gets to answer users again
NEW_DRILL_PREFIX = "new-"  # drills whose names begin so break new
NEW_KILLED_DRILL = "new-killed"


@dataclass(frozen=True, slots=True)
class UserResponse:
    sent_at: float  # monotonic
    answered_at: float
    version: str  # empty where nobody answered
    is_safe: bool
    is_error: bool


@dataclass(frozen=True, slots=True)
class DrillReport:
    """Times in seconds. What is None has no meaning for this drill, or was not seen in time."""

    drill: str
    requests: int
    safe_errors: int  # that users of GET, HEAD, OPTIONS saw
    unsafe_errors: int
    longest_wait: float  # of those users
    until_old: float | None  # from the break to the last answer by new
    until_new: float | None  # from the repair to the first one
    sampled: int | None  # by Envoy's own count
    pending: int | None  # of them, still on their way: what a dead sidecar had begun with is taken over after a minute
    lost: int | None  # of them, neither in the ledger nor on their way
    trouble: str  # why the drill failed; empty where it did not

    def to_json_object(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.trouble}


class RecordingLoadGenerator(LoadGenerator):
    """Keeps who answered, and when."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.responses: list[UserResponse] = []

    async def _send_request(self, request: UserRequest) -> None:
        sent_at, version, is_error = time.monotonic(), "", True
        headers = {USER_HEADER: request.user, **({"content-type": "application/json"} if request.body else {})}
        try:
            response = await self.client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            version = response.headers.get(VERSION_HEADER, "")
            is_error = response.status_code >= MIN_SERVER_ERROR_STATUS
        except httpx.HTTPError:
            pass
        finally:
            self._request_slots.release()
        self.tally.requests += 1
        self.responses.append(UserResponse(sent_at, time.monotonic(), version, request.is_safe, is_error))

    def has_response_from(self, version: str) -> bool:
        return any(response.version == version for response in self.responses)


@dataclass
class DrillRun:
    """One drill: when the part was broken and repaired, and what users saw from then on."""

    name: str
    users: RecordingLoadGenerator
    break_started_at: float = 0.0  # when that began
    break_done_at: float = 0.0  # when it was done
    repaired_at: float = 0.0
    first_response_index: int = 0  # of users.seen
    had_users_on_new: bool = True  # users were on new before

    @property
    def breaks_new(self) -> bool:
        return self.name.startswith(NEW_DRILL_PREFIX)

    @property
    def responses(self) -> list[UserResponse]:
        return self.users.responses[self.first_response_index :]

    @property
    def _recovered_responses(self) -> list[UserResponse]:
        """Answers as they were before."""
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
        """None too where new still answered when it was repaired, or nobody noticed in time."""
        if not self.breaks_new:
            return None
        late_times = [
            response.answered_at
            for response in self.responses
            if response.version == "new"
            and self.break_started_at < response.answered_at < self.repaired_at
            and (self.name != NEW_KILLED_DRILL or response.sent_at <= self.break_done_at)
        ]
        last_time = max(late_times, default=self.break_started_at)
        old_responses = [
            response
            for response in self.responses
            if last_time < response.answered_at < self.repaired_at and response.version == "old"
        ]
        return last_time - self.break_started_at if old_responses else None

    @property
    def seconds_until_new(self) -> float | None:
        if not self.breaks_new or not self._recovered_responses:
            return None
        return max(min(response.answered_at for response in self._recovered_responses) - self.repaired_at, 0.0)

    def build_report(self, before: LedgerCounts, after: LedgerCounts) -> DrillReport:
        safe_responses = [response for response in self.responses if response.is_safe]
        errors_by_safety = {
            kind: sum(response.is_error for response in self.responses if response.is_safe is kind)
            for kind in (True, False)
        }
        sampled = _subtract_counts(after.envoy_sampled, before.envoy_sampled)
        accounted_requests = after.total_pairs - before.total_pairs + (after.pending or 0) - (before.pending or 0)
        return DrillReport(
            drill=self.name,
            requests=len(self.responses),
            safe_errors=errors_by_safety[True],
            unsafe_errors=errors_by_safety[False],
            longest_wait=max((response.answered_at - response.sent_at for response in safe_responses), default=0.0),
            until_old=self.seconds_until_old,
            until_new=self.seconds_until_new,
            sampled=sampled,
            pending=after.pending,
            lost=None if sampled is None else sampled - accounted_requests,
            trouble=self._describe_failure(errors_by_safety),
        )

    def _describe_failure(self, errors_by_safety: dict[bool, int]) -> str:
        if errors_by_safety[True]:
            return f"{errors_by_safety[True]} users of safe methods saw an error"
        if errors_by_safety[False] and not self.breaks_new:
            return f"{errors_by_safety[False]} users saw an error"
        if self.breaks_new and self.seconds_until_old is None:
            return "new was not left alone in time"
        if not self.has_recovered():
            failure = "new did not answer users" if self.had_users_on_new else "nobody answered users"
            return f"{failure} again within {MAX_RECOVERY_S:g} s"
        return ""


def _subtract_counts(after: int | None, before: int | None) -> int | None:
    return None if after is None else after - (before or 0)


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
