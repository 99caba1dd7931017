"""Runs the demo: deploys the shop, sends the traffic, and collects the result."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from abreast_demo import client
from abreast_demo.deploy import LOOPBACK, PortReservations, ShopDeployment, StackAddresses, deploy_shop
from abreast_demo.load import LoadGenerator, UserTally, generate_requests
from abreast_demo.planted_changes import PLANTED_REGRESSIONS, DemoResult, ReportedFinding, select_regressions
from abreast_demo.shop import SHOP_SERVICE
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.stack.stack import Stack

USERS_PORT, GRPC_PORT, HTTP_PORT = 8080, 50051, 8090
NEW_SHARE_STEPS = (0.0, 0.1, 0.25)  # share of users on new, each for a third of the traffic
MAX_STEP_STRETCH = 4  # a slow machine may take so many times as long for the same requests
TRICKLE_REQUESTS_PER_S = 3.0  # while the shop stays open
FINDINGS_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    duration_s: float = 15.0
    requests_per_s: float = 150.0
    seed: int = 1
    listen: SocketAddress | None = None
    keep_open: bool = True


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """The result, and ids of example pairs by the id of their finding."""

    stack: Stack
    result: DemoResult
    example_pair_ids: dict[int, str]


@dataclass(frozen=True)
class DemoCallbacks:
    """Functions that a run calls on progress."""

    on_message: Callable[[str], None]
    on_wait: Callable[[str], None]
    on_ready: Callable[[Stack, DemoOptions], None]
    on_step: Callable[[float], None]
    on_progress: Callable[[UserTally], None]
    on_regression: Callable[[ReportedFinding], None]
    on_outcome: Callable[[DemoOutcome], None]


def run_demo(options: DemoOptions, callbacks: DemoCallbacks) -> DemoResult | None:
    """Run the demo. Return None if the user stops it before there is a result."""
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
    """Handle SIGTERM and SIGHUP like Ctrl-C, and SIGINT even if a script's `&` made the process ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))


async def _run_session(
    deployment: ShopDeployment, options: DemoOptions, callbacks: DemoCallbacks, results: list[DemoResult]
) -> None:
    user_requests, stack = generate_requests(options.seed), deployment.stack
    async with (
        client.connect(stack.grpc_address, SHOP_SERVICE) as demo_client,
        LoadGenerator(stack.envoy_url, lambda _response: callbacks.on_progress(load.tally)) as load,
    ):
        announcement = asyncio.create_task(_announce_regressions(demo_client, callbacks))
        try:
            step_duration_s = options.duration_s / len(NEW_SHARE_STEPS)
            for share in NEW_SHARE_STEPS:
                if share:
                    await demo_client.set_new_share(share)
                callbacks.on_step(share)
                await load.send(
                    itertools.islice(user_requests, round(step_duration_s * options.requests_per_s)),
                    requests_per_s=options.requests_per_s,
                    timeout_s=step_duration_s * MAX_STEP_STRETCH,
                )
        finally:
            announcement.cancel()
        callbacks.on_wait("waiting until the ledger holds every request")
        result = DemoResult(
            load.tally,
            await demo_client.wait_until_settled(load.tally.safe_requests),
            await demo_client.wait_for_planted_findings(),
        )
        results.append(result)
        examples = {
            finding.id: await demo_client.get_example_pair_id(finding.id) for finding in result.regression_findings[:1]
        }
    callbacks.on_outcome(DemoOutcome(stack, result, examples))
    if options.keep_open:
        async with LoadGenerator(stack.envoy_url) as trickle:
            await trickle.send(user_requests, requests_per_s=TRICKLE_REQUESTS_PER_S)


async def _announce_regressions(demo_client: client.DemoClient, callbacks: DemoCallbacks) -> None:
    """Report each planted regression as soon as the sidecar lists it."""
    unreported = {change.location for change in PLANTED_REGRESSIONS}
    with contextlib.suppress(grpc.aio.AioRpcError):  # the session's own calls fail too, and raise
        while unreported:
            for finding in select_regressions(await demo_client.list_findings()):
                if finding.location in unreported:
                    unreported.remove(finding.location)
                    callbacks.on_regression(finding)
            await asyncio.sleep(FINDINGS_POLL_S)
