"""Connections of a sidecar to Postgres: their number, and those that never get an answer."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from abreast.v1 import comparison_pb2 as api
from support_database import execute
from support_serve import run_sidecar

SETTLE_S = 8.0  # until all parts have tried to connect, and their first attempts have failed
OBSERVE_S = 20.0


@pytest.fixture
def silent_postgres_url() -> Iterator[str]:
    """Yield the URL of a server whose kernel accepts connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        yield f"postgresql://postgres@127.0.0.1:{server.getsockname()[1]}/abreast"


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.usefixtures("no_collection")
async def test_timed_out_connections_are_closed(redis_url: str, silent_postgres_url: str) -> None:
    async with run_sidecar(redis_url, silent_postgres_url, ready=False):
        await asyncio.sleep(SETTLE_S)
        before = count_descriptors()
        peak = before
        for _ in range(int(OBSERVE_S)):
            await asyncio.sleep(1)
            peak = max(peak, count_descriptors())

    assert peak <= before + 4, "attempts in progress vary"


@pytest.mark.parametrize("workers", [0, 2])
async def test_connections_are_at_most_those_of_the_documentation(
    redis_url: str, postgres_url: str, workers: int
) -> None:
    """docs/scaling.md: 18, and six more for each worker. A lock makes 60 pages and 60 calls wait for their queries."""

    async def count_connections() -> int:
        rows = await asyncio.to_thread(
            execute,
            postgres_url,
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()",
        )
        return int(rows[0][0])

    async with run_sidecar(redis_url, postgres_url, workers=workers) as running:
        idle = await count_connections()
        async with running.ledger().locked("abreast.finding, abreast.endpoint"):
            pages = [asyncio.create_task(running.http.get("/shop", timeout=10)) for _ in range(60)]
            calls = [running.comparison.ListCauses(api.ListCausesRequest(service="shop")) for _ in range(60)]
            peak = 0
            for _ in range(20):
                await asyncio.sleep(0.1)
                peak = max(peak, await count_connections())
        await asyncio.gather(*pages, *calls, return_exceptions=True)

    assert idle < peak <= 18 + 6 * workers + 1, "the test holds the lock with one of them"
