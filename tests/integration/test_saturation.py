"""The same application on both sides. A load generator that waits for old only drives new into queueing."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from support import eventually_async, free_ports
from support_envoy import started, weights
from support_rtds import RuntimeServer
from support_serve import RunningSidecar, run_sidecar
from support_up import service

pytestmark = pytest.mark.postgres

CLIENTS = 8
NEIGHBOURS = 4  # clients of new alone, so that it can't keep up with its copies
SECONDS = 25.0


async def load(port: int, clients: int, seconds: float) -> list[float]:
    """Send requests from clients without pauses, and return the seconds that each took."""
    durations: list[float] = []
    deadline = time.monotonic() + seconds

    async def client_loop(client: httpx.AsyncClient) -> None:
        while (sent_at := time.monotonic()) < deadline:
            (await client.get(f"http://127.0.0.1:{port}/jobs/7", timeout=60)).raise_for_status()
            durations.append(time.monotonic() - sent_at)

    async with httpx.AsyncClient() as client:
        await asyncio.gather(*[client_loop(client) for _ in range(clients)])
    return durations


@contextlib.asynccontextmanager
async def parallel_run(redis_url: str, postgres_url: str) -> AsyncIterator[tuple[RunningSidecar, int, int, int]]:
    """Yield a sidecar, and the ports of Envoy, old and new."""
    listen, admin, control, old, new = (SocketAddress("127.0.0.1", port) for port in free_ports(5))
    settings = EnvoySettings(
        service="shop", listen=listen, admin=admin, sidecar=control, old=(old,), new=(new,), sample_safe=1.0,
        baseline_share=0.0,
    )  # fmt: skip
    with contextlib.ExitStack() as services:
        for version, address in (("old", old), ("new", new)):
            await asyncio.to_thread(services.enter_context, service(version, address.port, redis_url))
        async with (
            RuntimeServer(control.port, weights(0.0)),
            started(settings),
            run_sidecar(redis_url, postgres_url, envoy_admin=(f"127.0.0.1:{admin.port}",)) as sidecar,
        ):
            yield sidecar, listen.port, old.port, new.port


async def test_saturated_equal_versions_have_no_real_finding_and_no_fail(redis_url: str, postgres_url: str) -> None:
    async with parallel_run(redis_url, postgres_url) as (sidecar, envoy, old, new):
        direct = await load(old, CLIENTS, 5)
        durations, _ = await asyncio.gather(load(envoy, CLIENTS, SECONDS), load(new, NEIGHBOURS, SECONDS))

        async def is_complete() -> bool:
            summary = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())
            return bool(summary.pairs == summary.envoy_sampled == len(durations))

        await eventually_async(is_complete, description="every request has an outcome")
        await asyncio.sleep(6)  # detectors run every five seconds
        summary = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())
        verdict = await sidecar.comparison.GetVerdict(pb.GetVerdictRequest())
        findings = (await sidecar.comparison.ListFindings(pb.ListFindingsRequest())).findings

    outcomes = {row.outcome: row.count for row in summary.outcomes}
    shed = sum(row.count for row in summary.sheds if row.reason == "shed_queue")
    reasons = " ".join(reason.text for reason in verdict.reasons)
    assert [finding.reason for finding in findings if finding.state == pb.FINDING_STATE_REAL] == []
    assert verdict.state == pb.VERDICT_STATE_INCONCLUSIVE, reasons
    assert "copies queue" in reasons
    assert summary.load.unmatched * 2 > summary.load.pairs
    assert shed > 0
    assert shed == outcomes.get(common.OUTCOME_ONLY_OLD, 0), "a request lacks its copy only if Envoy dropped it"
    assert statistics.median(durations) < 2 * statistics.median(direct), "users don't wait for copies"
