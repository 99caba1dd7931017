"""A load of pairs, and checks that the ledger holds each of them once after a fault."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import psycopg
import redis

from abreast.export.transport import RedisTransport, TransportError
from abreast.protocol.join import Keys, shard_of
from abreast.settings import Settings as ServiceSettings
from abreast_sidecar.settings import Settings
from support import WITHIN, eventually_async
from support_captures import encode
from support_pairs import SERVICE, capture, hourly_counts_match_pairs, query_value, rows

T = TypeVar("T")

PACE = 0.002  # seconds between two pairs
DIFFERS = 5  # one pair in so many shows the finding


@dataclass
class Load:
    """Send both captures of each pair like a service, and repeat a batch until Redis answers.

    `pairs` are those that Redis accepted, `refused` counts those that its limits rejected.
    """

    url: str
    pace: float = PACE
    service: ServiceSettings | None = None
    pairs: dict[str, bool] = field(default_factory=dict)  # pair id → answers differ
    refused: int = 0
    errors: int = 0
    over: bool = False  # set it to stop early

    async def run(self, count: int) -> None:
        settings = self.service or ServiceSettings(service=SERVICE, redis_url=self.url)
        link = RedisTransport(settings)
        await self._until(link, link.open)
        for _ in range(count):
            if self.over:
                break
            pair, differs = str(uuid.uuid4()), (len(self.pairs) + self.refused) % DIFFERS == 0
            captures = [
                capture(pair, "old", content={"n": 1}),
                capture(pair, "new", "shadow", {"n": 2 if differs else 1}),
            ]
            batch = [(capture.pair, capture.slot, capture.expected_captures, encode(capture)) for capture in captures]
            reply = await self._until(link, partial(link.join, shard_of(pair, settings.shards), batch))
            if reply.rejected_pairs + reply.rejected_bytes == len(batch):
                self.refused += 1
            else:
                self.pairs[pair] = differs
            await asyncio.sleep(self.pace)
        await link.close()

    async def _until(self, link: RedisTransport, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except TransportError as error:
                if not error.is_transient:
                    raise
                self.errors += 1
                await asyncio.sleep(0.05)
                with contextlib.suppress(TransportError):
                    await link.open()  # register the service again, in case Redis lost it


@asynccontextmanager
async def loading(load: Load, count: int) -> AsyncIterator[asyncio.Task[None]]:
    """Run the load during the block, and wait for its end."""
    task = asyncio.create_task(load.run(count))
    try:
        yield task
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def complete(postgres_url: str, load: Load, *, within: float = WITHIN) -> None:
    """Wait until each accepted pair has exactly one row, and check that all counters agree with the rows."""
    await eventually_async(
        lambda: _arrived(postgres_url, len(load.pairs)), within=within, description=f"{len(load.pairs)} rows"
    )
    outcomes = rows(postgres_url, "select id, outcome from abreast.pair")
    assert len(outcomes) == len(load.pairs)
    assert dict(outcomes) == {pair: "mismatch" if differs else "match" for pair, differs in load.pairs.items()}
    agrees(postgres_url)


async def _arrived(postgres_url: str, count: int) -> bool:
    with contextlib.suppress(psycopg.Error):
        return int(query_value(postgres_url, "select count(*) from abreast.pair")) >= count
    return False


def agrees(postgres_url: str) -> None:
    """Check that the counters of outcomes, findings and endpoints agree with the rows."""
    queries = (
        "select sum(pairs)::bigint from abreast.outcome_count",
        "select count(*) from abreast.pair",
        "select sum(count)::bigint from abreast.finding where part <> 'latency' and path <> 'no capture'",
        "select coalesce(sum(cardinality(findings)), 0)::bigint from abreast.pair",
        "select sum(compared)::bigint from abreast.endpoint",
        "select count(*) from abreast.pair where outcome in ('match', 'mismatch', 'oversize')",
    )
    tally, pairs, finding_count, visible_count, compared_count, comparable_count = (
        query_value(postgres_url, query) or 0 for query in queries
    )
    assert (tally, finding_count, compared_count) == (pairs, visible_count, comparable_count)
    hourly_counts_match_pairs(postgres_url)


async def empty(redis_url: str, *, shards: int = 1, within: float = WITHIN) -> None:
    """Wait until Redis holds no entry, no incomplete pair and no bytes."""

    async def is_empty() -> bool:
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(redis_url) as client:
            shard_keys = [Keys(SERVICE, shard) for shard in range(shards)]
            return all(
                client.xlen(keys.ready) == client.zcard(keys.due) == int(client.hget(keys.stats, "bytes") or 0) == 0
                for keys in shard_keys
            )
        return False

    await eventually_async(is_empty, within=within, description="redis is empty")


WORKER = """
import asyncio, json, sys
from abreast_sidecar.settings import Settings
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.ingest.pool import make_worker_name
from abreast_sidecar.store.database import Database
settings = Settings(**json.loads(sys.argv[1]))
async def main():
    async with Database(settings.postgres_url) as database:
        await Worker(settings, database, name=make_worker_name()).run(asyncio.Event())
asyncio.run(main())
"""


async def worker_process(settings: Settings) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, json.dumps(asdict(settings)))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Suspend the process during the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
