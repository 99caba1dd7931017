"""`abreast drill`: break one part while users come, and measure what they and the ledger saw of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from abreast_demo.client import Client
from abreast_demo.deploy import Addresses, opened
from abreast_demo.noticed import RECOVERY, Report, Run, Users
from abreast_demo.ports import LOOPBACK
from abreast_demo.service import SERVICE
from abreast_demo.traffic import Request, requests
from abreast_demo.verdict import Ledger
from abreast_sidecar.envoy.settings import Endpoint
from abreast_sidecar.errors import ServerError

ANY_PORT = Endpoint(LOOPBACK, 0)
WARM = 2.0  # seconds of traffic before
POLL = 0.05  # seconds

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    names: tuple[str, ...]
    seconds: float = 6.0  # for how long the part is broken
    rate: float = 60.0  # requests a second
    share: float = 1.0  # of users on new


@dataclass(frozen=True)
class Target:
    """What is drilled."""

    url: str
    grpc_address: str
    service: str
    requests: Iterator[Request]
    breaks: Callable[[str], None]
    repairs: Callable[[str], None]


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
    target: Target
    options: Options
    say: Say

    def run(self) -> list[Report]:
        return [self._one(name) for name in self.options.names]

    def _one(self, name: str) -> Report:
        users = Users(self.target.url)
        before = asyncio.run(self._prepared())
        with Crowd(users, self.target.requests, self.options.rate):
            run = self._broken(Run(name, users))
        self.say(f"{name}: waiting until everything is in the ledger")
        return run.report(before, asyncio.run(self._arrived(before)))

    async def _prepared(self) -> Ledger:
        async with self._client() as client:
            await client.move(self.options.share, "drill")
            return await client.quiet()

    async def _arrived(self, before: Ledger) -> Ledger:
        async with self._client() as client:
            return await client.arrived(before)

    def _client(self) -> Client:
        return Client(self.target.grpc_address, self.target.service)

    def _broken(self, run: Run) -> Run:
        time.sleep(WARM)
        run.with_new = run.users.met("new")
        if run.is_new and not run.with_new:
            raise ServerError(
                f"{run.name}: new answered none of {len(run.users.seen)} users, so nothing was broken; "
                "let users onto new for the drill with --new"
            )
        self.say(f"{run.name}: broken for {self.options.seconds:g} s")
        run.since, run.broken = len(run.users.seen), time.monotonic()
        self.target.breaks(run.name)
        run.gone = time.monotonic()
        try:
            time.sleep(self.options.seconds)
        finally:
            run.repaired = time.monotonic()
            self.target.repairs(run.name)
        deadline = time.monotonic() + RECOVERY
        while not run.is_back() and time.monotonic() < deadline:
            time.sleep(POLL)
        return run


def drill(options: Options, *, say: Say) -> list[Report]:
    """In a stack of its own. Raise ServerError where something can't be started, or started again."""
    addresses = Addresses(ANY_PORT, ANY_PORT, ANY_PORT)
    with opened(addresses, say) as deployed:
        stack = deployed.stack
        target = Target(
            stack.envoy_url,
            stack.grpc_address,
            SERVICE,
            requests(1),
            lambda name: deployed.fault(name).inject(),
            lambda name: deployed.fault(name).repair(),
        )
        return Drills(target, options, say).run()
