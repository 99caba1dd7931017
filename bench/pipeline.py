"""Pairs a second from Redis through one worker into Postgres: real servers, 2 KB JSON bodies.

python bench/pipeline.py [--runs N] [--pairs N] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import resource
import time
import uuid
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import redis
from rows import Row, row

from abreast.capture import Answer, Body, Capture, Request, Role, Version, encode
from abreast.join import JOIN, SERVICES, Bounds, Keys, join_arguments
from abreast_sidecar import runtime
from abreast_sidecar.embedded import PostgresServer, RedisServer
from abreast_sidecar.settings import Settings
from abreast_sidecar.store import migrate
from abreast_sidecar.worker import Worker

SERVICE = "shop"
SHARES: dict[str, float] = {"equal": 0.0, "1pct": 0.01, "all": 1.0}  # of the pairs that differ
SEND = 200  # pairs that are sent at once
ITEMS = 22  # of a body: 2 KB
WITHIN = 120.0  # seconds for a run
LOOK = 0.1  # seconds; looking costs the worker's process time


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu: float  # seconds of the worker's process
    pairs: int


def body(price: float) -> bytes:
    items = [
        {
            "id": number,
            "name": f"article {number}",
            "price": 9.99 + number,
            "currency": "EUR",
            "tags": ["new", "sale"],
        }
        for number in range(ITEMS)
    ]
    items[3]["price"] = price
    return json.dumps({"page": 1, "total": ITEMS, "items": items}, separators=(",", ":")).encode()


def capture(pair: str, version: Version, role: Role, held: bytes) -> Capture:
    headers = (
        ("content-type", "application/json"),
        ("cache-control", "max-age=60"),
        ("content-length", str(len(held))),
    )
    request = Request(
        "GET", "/products/17", "page=1", "/products/{id}", (("accept", "*/*"), ("host", "shop"))
    )
    answer = Answer(200, headers, Body(held, len(held)))
    return Capture(
        pair,
        SERVICE,
        version,
        role,
        request,
        answer,
        release="v1",
        started=time.time(),
        first_byte_us=1900,
        total_us=2000,
    )


def pairs(count: int, share: float) -> Iterator[tuple[str, str, int, bytes]]:
    """Captures for the join: of every 1/share pairs one differs."""
    old, changed = body(1.0), body(2.0)
    for number in range(count):
        differs = share > 0 and number % round(1 / share) == 0
        pair = str(uuid.uuid4())
        for one in (
            capture(pair, "old", "live", old),
            capture(pair, "new", "shadow", changed if differs else old),
        ):
            yield pair, one.slot, one.arms, encode(one)


def send(client: redis.Redis, captures: Iterable[tuple[str, str, int, bytes]]) -> None:
    """Fill the stream, with the services' own script."""
    keys = Keys(SERVICE, 0)
    bounds = Bounds(bytes=2**40, pairs=10**7)
    join = client.register_script(JOIN)
    client.hset(SERVICES, SERVICE, 1)
    batch: list[tuple[str, str, int, bytes]] = []
    for one in captures:
        batch.append(one)
        if len(batch) == 2 * SEND:
            names, arguments = join_arguments(keys, bounds, batch)
            join(keys=names, args=arguments)
            batch.clear()
    if batch:
        names, arguments = join_arguments(keys, bounds, batch)
        join(keys=names, args=arguments)


async def drain(settings: Settings, client: redis.Redis, count: int) -> Run:
    """Run one worker until the stream is empty."""
    stop = asyncio.Event()
    worker = Worker(settings, name="bench")
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    task = asyncio.create_task(worker.run(stop))
    while client.xlen(Keys(SERVICE, 0).ready):
        await asyncio.sleep(LOOK)
        if time.monotonic() - began > WITHIN or task.done():
            raise RuntimeError(f"the worker did not empty the stream within {WITHIN:g} s")
    seconds = worker.last_beat - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    stop.set()
    await task
    return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, count)


async def _noted(draining: Coroutine[Any, Any, Run], runs: list[Run]) -> None:
    runs.append(await draining)


def measure(count: int, runs: int, profile: cProfile.Profile | None = None) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {name: [] for name in SHARES}
    with RedisServer() as valkey, PostgresServer() as postgres, redis.Redis.from_url(valkey.url) as client:
        settings = Settings(redis_url=valkey.url, postgres_url=postgres.url())
        asyncio.run(migrate(postgres.url()))
        for _ in range(runs):
            for name, share in SHARES.items():
                send(client, pairs(count, share))
                if profile is not None:
                    profile.enable()
                runtime.run(_noted(drain(settings, client, count), found[name]))
                if profile is not None:
                    profile.disable()
        _check(postgres.url(), count * runs)
    return found


def _check(url: str, each: int) -> None:
    with psycopg.connect(url) as connection:
        rows: dict[str, int] = dict(
            connection.execute("select outcome, count(*) from abreast.pair group by 1").fetchall()
        )
    differing = each + len([n for n in range(each) if n % 100 == 0])
    if abs(rows.get("mismatch", 0) - differing) > each * 0.001 + 100 or sum(rows.values()) != 3 * each:
        raise RuntimeError(f"the ledger does not hold what was sent: {rows}")


def bench(runs: int = 3, count: int = 20_000) -> list[Row]:
    """`pipeline_pairs_per_s` by wall clock, `pipeline_worker_us` of the worker's CPU a pair; of equal pairs, and by share."""
    rows: list[Row] = []
    for name, measured in measure(count, runs).items():
        ending = "" if name == "equal" else f"_{name}"
        rate = [run.pairs / run.seconds for run in measured]
        cost = [run.cpu / run.pairs * 1e6 for run in measured]
        rows += [
            row(f"pipeline_pairs_per_s{ending}", "1/s", rate),
            row(f"pipeline_worker_us{ending}", "us", cost),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile:
        profile = cProfile.Profile()
        measure(arguments.pairs, 1, profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return
    for each in bench(arguments.runs, arguments.pairs):
        print(json.dumps(each))


if __name__ == "__main__":
    main()
