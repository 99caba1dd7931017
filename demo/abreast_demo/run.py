"""The demo from one end to the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from abreast_demo.client import Client
from abreast_demo.deploy import Addresses, Deployed, opened
from abreast_demo.load import Load, Tally
from abreast_demo.plants import REGRESSIONS
from abreast_demo.ports import LOOPBACK, Ports
from abreast_demo.service import SERVICE
from abreast_demo.traffic import Request, requests
from abreast_demo.verdict import Result, Seen, regressions
from abreast_sidecar.embedded.stack import Stack
from abreast_sidecar.envoy.settings import Endpoint

USERS_PORT, GRPC_PORT, HTTP_PORT = 8080, 50051, 8090
STEPS = (0.0, 0.1, 0.25)  # share of users that new answers, each for an equal part of the time
TRICKLE = 3.0  # requests a second, while the shop stays up
FOR_EVER = float("inf")
FINDINGS_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    seconds: float = 15.0
    rate: float = 150.0  # requests a second
    seed: int = 1
    listen: Endpoint | None = None
    stay: bool = True


@dataclass(frozen=True, slots=True)
class Finished:
    """The traffic is over and settled; `examples` are ids of pairs by finding."""

    stack: Stack
    result: Result
    examples: dict[int, str]


@dataclass(frozen=True)
class Listener:
    """What a run tells of itself."""

    say: Callable[[str], None]
    wait: Callable[[str], None]
    ready: Callable[[Stack, Options], None]
    step: Callable[[float], None]
    progress: Callable[[Tally], None]
    regression: Callable[[Seen], None]
    finished: Callable[[Finished], None]


def run(options: Options, listener: Listener) -> Result | None:
    """Return the result; None when the user ended it before there was one."""
    results: list[Result] = []
    _end_as_ctrl_c_does()
    with Ports() as ports:
        addresses = Addresses(
            listen=options.listen or Endpoint(LOOPBACK, ports.prefer(USERS_PORT)),
            grpc=Endpoint(LOOPBACK, ports.prefer(GRPC_PORT)),
            http=Endpoint(LOOPBACK, ports.prefer(HTTP_PORT)),
        )
        try:
            with opened(addresses, listener.wait) as shop:
                listener.ready(shop.stack, options)
                asyncio.run(_session(shop, options, listener, results))
        except KeyboardInterrupt:
            listener.say("stopped")
    return results[0] if results else None


def _end_as_ctrl_c_does() -> None:
    """Let SIGTERM, and a terminal that closes, do what Ctrl-C does. A script's `&` has SIGINT ignored, which is undone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for other in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(other) is not signal.SIG_IGN:  # as under nohup
            signal.signal(other, lambda _number, _frame: signal.raise_signal(signal.SIGINT))


async def _session(shop: Deployed, options: Options, listener: Listener, results: list[Result]) -> None:
    users, stack = requests(options.seed), shop.stack
    async with (
        Client(stack.grpc_address, SERVICE) as client,
        Load(stack.envoy_url, listener.progress) as load,
    ):
        announcing = asyncio.create_task(_announce(client, listener))
        try:
            await _traffic(client, load, users, options, listener)
        finally:
            announcing.cancel()
        listener.wait("waiting until everything is in the ledger")
        finished = await _finished(stack, client, load.tally)
    results.append(finished.result)
    listener.finished(finished)
    if options.stay:
        async with Load(stack.envoy_url) as trickle:
            await trickle.send(users, seconds=FOR_EVER, rate=TRICKLE)


async def _traffic(
    client: Client, load: Load, users: Iterator[Request], options: Options, listener: Listener
) -> None:
    part = options.seconds / len(STEPS)
    for share in STEPS:
        if share:
            await client.move(share)
        listener.step(share)
        await load.send(itertools.islice(users, round(part * options.rate)), seconds=part, rate=options.rate)


async def _announce(client: Client, listener: Listener) -> None:
    """Report each planted regression as soon as the sidecar has it."""
    unseen = {plant.place for plant in REGRESSIONS}
    with contextlib.suppress(grpc.aio.AioRpcError):  # the run itself meets the error too, and reports it
        while unseen:
            for seen in regressions(await client.findings()):
                if seen.place in unseen:
                    unseen.remove(seen.place)
                    listener.regression(seen)
            await asyncio.sleep(FINDINGS_POLL_S)


async def _finished(stack: Stack, client: Client, tally: Tally) -> Finished:
    result = Result(tally, await client.settled(tally.safe), await client.all_found())
    examples = {one.id: await client.an_example(one.id) for one in result.regressions[:1]}
    return Finished(stack, result, examples)
