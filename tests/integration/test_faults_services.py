"""Services under load, and killed: users notice nothing, and each sampled request is in the account by some name."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import psycopg
import pytest
from psycopg.types.json import Jsonb

from abreast.middleware import ParallelRunMiddleware
from abreast.recorder import Receive, Scope, Send
from abreast_sidecar.settings import Settings
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import ALL_TIME, LedgerReader
from abreast_sidecar.store.records import LedgerSummary
from support import eventually_async
from support_load import agrees
from support_middleware import call, http_scope, marks
from support_pairs import SERVICE, outcomes, run_jobs, run_worker

TESTS = Path(__file__).parents[1]
PROCESS = """
import asyncio, sys
from abreast.middleware import ParallelRunMiddleware
from support_middleware import call, http_scope, marks

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})

async def main(url, version, role, interval, *pairs):
    target = ParallelRunMiddleware(
        app, service="shop", redis_url=url, export_interval=float(interval), pair_timeout=1.0
    )
    for pair in pairs:
        await call(target, http_scope("/", headers=marks(pair, version=version, role=role)))
    print("asked", flush=True)
    await asyncio.sleep(60)

print("ready", flush=True)
sys.stdin.readline()
asyncio.run(main(*sys.argv[1:]))
"""


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answer"})


@asynccontextmanager
async def sidecar(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    housekeeping = asyncio.create_task(run_jobs(settings, stop))
    async with run_worker(settings):
        yield
    stop.set()
    await housekeeping


async def summary(settings: Settings) -> LedgerSummary:
    database = Database(settings.postgres_url)
    await database.open()
    try:
        return await LedgerReader(database).read_summary(SERVICE, ALL_TIME)
    finally:
        await database.close()


def envoy_counted(url: str, sampled: int) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(
            "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values ('edge', 'shop', now(), %s, '{}')",
            (Jsonb({"sampled": sampled}),),
        )


@asynccontextmanager
async def service(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Yield a process that answers requests on demand, and kill it at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", PROCESS, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        await process.wait()


async def answer_requests(*processes: asyncio.subprocess.Process) -> None:
    """They have answered, and hold or have sent their captures. Together, for a pair does not wait while one starts."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"asked\n"


async def test_killed_service_losses_are_counted_by_envoy(redis_url: str, postgres_url: str) -> None:
    """15 of 45 requests lack the copy that the process held; for 5 it held both."""
    settings = Settings(redis_url=redis_url, postgres_url=postgres_url)
    pairs, half, lost = ([str(uuid.uuid4()) for _ in range(number)] for number in (25, 15, 5))
    envoy_counted(postgres_url, 45)
    async with (
        sidecar(settings),
        service(redis_url, "old", "live", "0.01", *pairs, *half) as old,
        service(redis_url, "new", "shadow", "0.01", *pairs) as new,
    ):
        await answer_requests(old, new)
        async with (
            service(redis_url, "new", "shadow", "50", *half, *lost) as shadow,
            service(redis_url, "old", "live", "50", *lost) as also_held,
        ):
            await answer_requests(shadow, also_held)  # and killed here

        async def all_there() -> bool:
            return sum(outcomes(postgres_url).values()) == 40

        await eventually_async(all_there, description="40 rows")
    result = await summary(settings)

    assert result.outcomes == {"match": 25, "only_old": 15}
    assert result.accounts.unaccounted == 5
    assert sum(result.outcomes.values()) + result.accounts.unaccounted == result.accounts.envoy_sampled
    agrees(postgres_url)


@pytest.mark.parametrize("bound", [{"redis_pairs": 60}, {"redis_bytes": 60_000}])
async def test_users_notice_no_absent_sidecar_and_accounts_are_complete(
    redis_url: str, postgres_url: str, bound: dict[str, int]
) -> None:
    settings = Settings(redis_url=redis_url, postgres_url=postgres_url)
    old, new = (
        ParallelRunMiddleware(app, service="shop", redis_url=redis_url, pair_timeout=1.0, **bound)  # type: ignore[arg-type]  # a bound
        for _ in range(2)
    )
    durations: list[float] = []
    request_count = 300
    for _ in range(request_count):
        pair = str(uuid.uuid4())
        for target, version, role in ((old, "old", "live"), (new, "new", "shadow")):
            start = perf_counter()
            messages, error = await call(target, http_scope("/", headers=marks(pair, version=version, role=role)))
            durations.append(perf_counter() - start)
            assert error is None
            assert messages[1]["body"] == b"answer"
    await old.aclose()
    await new.aclose()
    envoy_counted(postgres_url, request_count)
    refused = old.queue.drop_counts.total() + new.queue.drop_counts.total()
    async with sidecar(settings):

        async def is_complete() -> bool:
            result = await summary(settings)
            return result.accounts.received > 0 and sum(drop.count for drop in result.drops) == refused

        await eventually_async(is_complete, description="refusals are told")

        async def all_there() -> bool:
            return 2 * outcomes(postgres_url).get("match", 0) + lonely(postgres_url) + refused == 2 * request_count

        await eventually_async(all_there, description="what was taken has its rows")
    result = await summary(settings)

    assert sorted(durations)[-request_count // 10] < 0.2  # but for those that had no processor
    assert refused > request_count
    assert result.accounts.unaccounted == request_count - sum(result.outcomes.values())
    assert lonely(postgres_url) <= 5
    agrees(postgres_url)


def lonely(url: str) -> int:
    counts = outcomes(url)
    return counts.get("only_old", 0) + counts.get("only_new", 0)
