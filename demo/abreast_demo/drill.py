"""`abreast drill`: break one part while users come, and measure what they and the ledger saw of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from abreast_demo.client import Client
from abreast_demo.deploy import Addresses, Deployed, opened
from abreast_demo.load import SERVER_ERROR, USER_HEADER, Load
from abreast_demo.ports import LOOPBACK
from abreast_demo.service import SERVICE
from abreast_demo.traffic import Request, requests
from abreast_demo.verdict import Ledger
from abreast_sidecar.embedded.stack import Server
from abreast_sidecar.envoy.settings import Endpoint

VERSION_HEADER = "x-abreast-version"
ANY_PORT = Endpoint(LOOPBACK, 0)
WARM = 2.0  # seconds of traffic before
RECOVERY = 40.0  # seconds that new gets to answer users again
ALL_NEW = 1.0
POLL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Options:
    names: tuple[str, ...]
    seconds: float = 6.0  # for how long the part is broken
    rate: float = 60.0  # requests a second
    share: float = ALL_NEW  # of users on new


@dataclass(frozen=True, slots=True)
class Answered:
    sent: float  # monotonic
    at: float
    version: str  # empty where nobody answered
    safe: bool
    error: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Times in seconds. What is None has no meaning for this drill, or was not seen in time."""

    drill: str
    requests: int
    safe_errors: int  # that users of GET, HEAD, OPTIONS saw
    unsafe_errors: int
    longest_wait: float  # of those users
    until_old: float | None  # from the break to the last answer by new
    until_new: float | None  # from the repair to the first one
    sampled: int | None  # by Envoy's own count
    pending: (
        int | None
    )  # of them, still on their way: what a dead sidecar had begun with is taken over after a minute
    lost: int | None  # of them, neither in the ledger nor on their way
    trouble: str  # why the drill failed; empty where it did not

    def for_machines(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.trouble}


class Users(Load):
    """The shop's users; keeps who answered, and when."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.seen: list[Answered] = []

    async def _one(self, request: Request) -> None:
        sent, version, error = time.monotonic(), "", True
        headers = {
            USER_HEADER: request.user,
            **({"content-type": "application/json"} if request.body else {}),
        }
        try:
            answer = await self.client.request(
                request.method, request.path, content=request.body or None, headers=headers
            )
            version = answer.headers.get(VERSION_HEADER, "")
            error = answer.status_code >= SERVER_ERROR
        except httpx.HTTPError:
            pass
        finally:
            self._places.release()
        self.tally.requests += 1
        self.seen.append(Answered(sent, time.monotonic(), version, request.safe, error))


@dataclass(frozen=True, slots=True)
class Part:
    """What is broken, how, and how it is repaired."""

    breaks: Callable[[Deployed], None]
    repairs: Callable[[Deployed], None]
    is_new: bool = False


def _shop(number: signal.Signals) -> Callable[[Deployed], None]:
    def send(deployed: Deployed) -> None:
        shop = deployed.shops["new"].process
        os.kill(shop.pid, number)
        if number == signal.SIGKILL:
            shop.wait()

    return send


def _kill(name: str) -> Callable[[Deployed], None]:
    def kill(deployed: Deployed) -> None:
        server: Server = deployed.stack.servers[name]
        assert server.server is not None
        server.server.process.kill()
        server.server.process.wait()

    return kill


def _start(name: str) -> Callable[[Deployed], None]:
    def start(deployed: Deployed) -> None:
        deployed.stack.servers[name].start()

    return start


def _stop(name: str) -> Callable[[Deployed], None]:
    return lambda deployed: deployed.stack.servers[name].stop()


DRILLS: dict[str, Part] = {
    "new-killed": Part(_shop(signal.SIGKILL), lambda deployed: deployed.start("new"), is_new=True),
    "new-hangs": Part(_shop(signal.SIGSTOP), _shop(signal.SIGCONT), is_new=True),
    "new-errors": Part(_shop(signal.SIGUSR1), _shop(signal.SIGUSR2), is_new=True),
    "sidecar-killed": Part(_kill("sidecar"), _start("sidecar")),
    "redis-down": Part(_kill("redis"), _start("redis")),
    "postgres-down": Part(_stop("postgres"), _start("postgres")),
}


@dataclass
class Run:
    """One drill: when the part was broken and repaired, and what users saw from then on."""

    name: str
    users: Users
    broken: float = 0.0
    repaired: float = 0.0
    since: int = 0  # of users.seen

    @property
    def part(self) -> Part:
        return DRILLS[self.name]

    @property
    def seen(self) -> list[Answered]:
        return self.users.seen[self.since :]

    def new_is_back(self) -> bool:
        return any(one.version == "new" and one.sent > self.repaired for one in self.seen)

    @property
    def until_old(self) -> float | None:
        """None too where new still answered when it was repaired, or nobody noticed in time."""
        if not self.part.is_new:
            return None
        late = [one.at for one in self.seen if one.version == "new" and self.broken < one.at < self.repaired]
        last = max(late, default=self.broken)
        after = [one for one in self.seen if last < one.at < self.repaired]
        return last - self.broken if after else None

    @property
    def until_new(self) -> float | None:
        back = [one.at for one in self.seen if one.version == "new" and one.sent > self.repaired]
        return min(back) - self.repaired if self.part.is_new and back else None

    def report(self, before: Ledger, after: Ledger) -> Report:
        safe = [one for one in self.seen if one.safe]
        errors = {kind: sum(one.error for one in self.seen if one.safe is kind) for kind in (True, False)}
        sampled = _difference(after.envoy, before.envoy)
        arrived = after.rows - before.rows + (after.pending or 0) - (before.pending or 0)
        return Report(
            drill=self.name,
            requests=len(self.seen),
            safe_errors=errors[True],
            unsafe_errors=errors[False],
            longest_wait=max((one.at - one.sent for one in safe), default=0.0),
            until_old=self.until_old,
            until_new=self.until_new,
            sampled=sampled,
            pending=after.pending,
            lost=None if sampled is None else sampled - arrived,
            trouble=self._trouble(errors),
        )

    def _trouble(self, errors: dict[bool, int]) -> str:
        if errors[True]:
            return f"{errors[True]} users of safe methods saw an error"
        if errors[False] and not self.part.is_new:
            return f"{errors[False]} users saw an error"
        if self.part.is_new and self.until_old is None:
            return "new was not left alone in time"
        if not self.new_is_back():
            return f"new did not answer users again within {RECOVERY:g} s"
        return ""


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None else after - (before or 0)


class Crowd:
    """Users in a thread of their own: servers must be started by the main one, which waits for them meanwhile."""

    def __init__(self, users: Users, requests: Iterator[Request], rate: float) -> None:
        self._enough = threading.Event()
        coming = itertools.takewhile(lambda _request: not self._enough.is_set(), requests)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._come(users, coming, rate)))

    async def _come(self, users: Users, coming: Iterator[Request], rate: float) -> None:
        async with users:
            await users.send(coming, seconds=float("inf"), rate=rate)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._enough.set()
        self._thread.join()


@dataclass
class Drills:
    deployed: Deployed
    options: Options
    say: Callable[[str], None]
    finished: Callable[[Report], None]
    requests: Iterator[Request] = field(default_factory=lambda: requests(1))

    def run(self) -> list[Report]:
        reports = []
        for name in self.options.names:
            report = self._one(name)
            self.finished(report)
            reports.append(report)
        return reports

    def _one(self, name: str) -> Report:
        users = Users(self.deployed.stack.envoy_url)
        before = asyncio.run(self._prepared())
        with Crowd(users, self.requests, self.options.rate):
            run = self._broken(Run(name, users))
        self.say(f"{name}: waiting until everything is in the ledger")
        after = asyncio.run(self._settled((before.envoy or 0) + 1))
        return run.report(before, after)

    async def _prepared(self) -> Ledger:
        async with self._client() as client:
            await client.move(self.options.share, "drill")
            return await client.settled(0)

    async def _settled(self, sampled: int) -> Ledger:
        async with self._client() as client:
            return await client.settled(sampled)

    def _client(self) -> Client:
        return Client(self.deployed.stack.grpc_address, SERVICE)

    def _broken(self, run: Run) -> Run:
        time.sleep(WARM)
        self.say(f"{run.name}: broken for {self.options.seconds:g} s")
        run.since, run.broken = len(run.users.seen), time.monotonic()
        run.part.breaks(self.deployed)
        time.sleep(self.options.seconds)
        run.repaired = time.monotonic()
        run.part.repairs(self.deployed)
        deadline = time.monotonic() + RECOVERY
        while not run.new_is_back() and time.monotonic() < deadline:
            time.sleep(POLL)
        return run


def drill(
    options: Options, *, say: Callable[[str], None], finished: Callable[[Report], None]
) -> list[Report]:
    """Raise ServerError where something can't be started, or started again."""
    addresses = Addresses(ANY_PORT, ANY_PORT, ANY_PORT)
    with opened(addresses, say, own_database=True) as deployed:
        return Drills(deployed, options, say, finished).run()
