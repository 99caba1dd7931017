"""The demo from one end to the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from abreast_demo.client import DemoClient
from abreast_demo.deploy import LOOPBACK, PortReservations, ShopDeployment, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, UserRequest, UserTally, generate_requests
from abreast_demo.planted_changes import PLANTED_REGRESSIONS, DemoResult, ReportedFinding, select_regressions
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.stack.stack import Stack

USERS_PORT, GRPC_PORT, HTTP_PORT = 8080, 50051, 8090
NEW_SHARE_STEPS = (0.0, 0.1, 0.25)  # share of users that new answers, each for an equal part of the time
TRICKLE_REQUESTS_PER_S = 3.0  # requests a second, while the shop stays up
FOREVER_S = float("inf")
FINDINGS_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    duration_s: float = 15.0
    requests_per_s: float = 150.0  # requests a second
    seed: int = 1
    listen: SocketAddress | None = None
    keep_open: bool = True


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """The traffic is over and settled; `examples` are ids of pairs by finding."""

    stack: Stack
    result: DemoResult
    example_pair_ids: dict[int, str]


@dataclass(frozen=True)
class DemoCallbacks:
    """What a run tells of itself."""

    on_message: Callable[[str], None]
    on_wait: Callable[[str], None]
    on_ready: Callable[[Stack, DemoOptions], None]
    on_step: Callable[[float], None]
    on_progress: Callable[[UserTally], None]
    on_regression: Callable[[ReportedFinding], None]
    on_outcome: Callable[[DemoOutcome], None]


def run_demo(options: DemoOptions, callbacks: DemoCallbacks) -> DemoResult | None:
    """Return the result; None when the user ended it before there was one."""
    results: list[DemoResult] = []
    _treat_signals_as_interrupt()
    with PortReservations() as ports:
        addresses = StackAddresses(
            listen=options.listen or SocketAddress(LOOPBACK, ports.reserve(USERS_PORT)),
            grpc=SocketAddress(LOOPBACK, ports.reserve(GRPC_PORT)),
            http=SocketAddress(LOOPBACK, ports.reserve(HTTP_PORT)),
        )
        try:
            with deploy_shop(addresses, callbacks.on_wait) as deployment:
                callbacks.on_ready(deployment.stack, options)
                asyncio.run(_run_session(deployment, options, callbacks, results))
        except KeyboardInterrupt:
            callbacks.on_message("stopped")
    return results[0] if results else None


def _treat_signals_as_interrupt() -> None:
    """Let SIGTERM, and a terminal that closes, do what Ctrl-C does. A script's `&` has SIGINT ignored, which is undone."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))


async def _run_session(
    deployment: ShopDeployment, options: DemoOptions, callbacks: DemoCallbacks, results: list[DemoResult]
) -> None:
    user_requests, stack = generate_requests(options.seed), deployment.stack
    async with (
        DemoClient(stack.grpc_address, SHOP_SERVICE) as client,
        LoadGenerator(stack.envoy_url, callbacks.on_progress) as load,
    ):
        announcing = asyncio.create_task(_announce(client, callbacks))
        try:
            await _send_traffic(client, load, user_requests, options, callbacks)
        finally:
            announcing.cancel()
        callbacks.on_wait("waiting until everything is in the ledger")
        outcome = await _collect_outcome(stack, client, load.tally)
    results.append(outcome.result)
    callbacks.on_outcome(outcome)
    if options.keep_open:
        async with LoadGenerator(stack.envoy_url) as trickle:
            await trickle.send(user_requests, seconds=FOREVER_S, rate=TRICKLE_REQUESTS_PER_S)


async def _send_traffic(
    client: DemoClient,
    load: LoadGenerator,
    user_requests: Iterator[UserRequest],
    options: DemoOptions,
    callbacks: DemoCallbacks,
) -> None:
    step_duration_s = options.duration_s / len(NEW_SHARE_STEPS)
    for share in NEW_SHARE_STEPS:
        if share:
            await client.set_new_share(share)
        callbacks.on_step(share)
        await load.send(
            itertools.islice(user_requests, round(step_duration_s * options.requests_per_s)),
            seconds=step_duration_s,
            rate=options.requests_per_s,
        )


async def _announce(client: DemoClient, callbacks: DemoCallbacks) -> None:
    """Report each planted regression as soon as the sidecar has it."""
    unseen = {change.location for change in PLANTED_REGRESSIONS}
    with contextlib.suppress(grpc.aio.AioRpcError):  # the run itself meets the error too, and reports it
        while unseen:
            for finding in select_regressions(await client.list_findings()):
                if finding.location in unseen:
                    unseen.remove(finding.location)
                    callbacks.on_regression(finding)
            await asyncio.sleep(FINDINGS_POLL_S)


async def _collect_outcome(stack: Stack, client: DemoClient, tally: UserTally) -> DemoOutcome:
    result = DemoResult(
        tally, await client.wait_until_settled(tally.safe_requests), await client.wait_for_planted_findings()
    )
    examples = {finding.id: await client.get_example_pair_id(finding.id) for finding in result.regression_findings[:1]}
    return DemoOutcome(stack, result, examples)
