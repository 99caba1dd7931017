"""Pairs a second from Redis through workers into Postgres: python bench/pipeline.py [--quick] [--runs N] [--pairs N].

Real servers, JSON bodies of 2 and 50 KB of which none, one in a hundred or all differ, one worker and two, each in a
process of its own that waits until the stream is full. `pipeline_pairs_per_s` is by wall clock, with everything on this
machine; `pipeline_worker_us`, `pipeline_redis_us` (the join included) and `pipeline_postgres_us` are CPU time a pair.
`pipeline_wal_bytes` is what Postgres's log gets for a pair, without the whole pages that follow a checkpoint (those are in
bench/growth.py). `pipeline_worker_mib` is the most that a worker's process was resident with, `pipeline_worker_idle_mib`
before its first entry. A name without an ending is of equal bodies of 2 KB and one worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import processes
import psycopg
import redis
from rows import Row, end_in_order, row

from abreast.protocol.capture import Answer, Body, Capture, Request, Role, Version, encode
from abreast.protocol.join import JOIN_SCRIPT, SERVICES_KEY, Keys, Limits, join_arguments
from abreast_sidecar import aio as runtime
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate

SERVICE = "shop"
SEND = 200  # pairs that are sent at once; a tenth of that where they are large
ITEMS = {"2kb": 22, "50kb": 575}  # of a body
WITHIN = 120.0  # seconds for a run
LOOK = 0.01  # seconds between two looks whether the stream is empty
READY, GO = "bench:ready", "bench:go"  # lists: workers that wait, and what lets one of them begin
RUNS, PAIRS = 3, 20_000
QUICK_RUNS, QUICK_PAIRS = 1, 2_000
FORKED = multiprocessing.get_context("forkserver")  # a worker is there at once: what it needs is imported
FORKED.set_forkserver_preload(["abreast_sidecar.ingest.worker", "abreast_sidecar.stack"])


@dataclass(frozen=True)
class Case:
    differs: str  # equal, 1pct, all
    size: str = "2kb"
    workers: int = 1

    @property
    def share(self) -> float:
        return {"equal": 0.0, "1pct": 0.01, "all": 1.0}[self.differs]

    @property
    def ending(self) -> str:
        parts = (
            self.differs * (self.differs != "equal"),
            self.size * (self.size != "2kb"),
            f"{self.workers}workers" * (self.workers > 1),
        )
        return "".join(f"_{part}" for part in parts if part)

    def pairs(self, most: int) -> int:
        """Fewer of what takes longer."""
        return max(100, most // (10 if self.size == "50kb" else 1) // (3 if self.differs == "all" else 1))


CASES = [
    Case(differs, size, workers)
    for size, differs, workers in itertools.product(ITEMS, ("equal", "1pct", "all"), (1, 2))
]


@dataclass
class Found:
    """Of one case, by run: pairs a second, and µs of CPU a pair."""

    rate: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)
    redis: list[float] = field(default_factory=list)
    postgres: list[float] = field(default_factory=list)
    wal: list[float] = field(default_factory=list)  # bytes a pair
    memory: list[float] = field(default_factory=list)  # MiB, the most of any worker
    idle: list[float] = field(default_factory=list)


def body(price: float, many: int = ITEMS["2kb"]) -> bytes:
    items = [
        {"id": number, "name": f"article {number}", "price": 9.99 + number, "currency": "EUR", "tags": ["new", "sale"]}
        for number in range(many)
    ]
    items[3]["price"] = price
    return json.dumps({"page": 1, "total": many, "items": items}, separators=(",", ":")).encode()


def capture(pair: str, version: Version, role: Role, held: bytes) -> Capture:
    headers = (
        ("content-type", "application/json"),
        ("cache-control", "max-age=60"),
        ("content-length", str(len(held))),
    )
    request = Request("GET", "/products/17", "page=1", "/products/{id}", (("accept", "*/*"), ("host", "shop")))
    answer = Answer(200, headers, Body(held, len(held)))
    return Capture(
        pair,
        SERVICE,
        version,
        role,
        request,
        answer,
        release="v1",
        started_at=time.time(),
        first_byte_us=1900,
        total_us=2000,
    )


def pairs(count: int, share: float, many: int = ITEMS["2kb"]) -> Iterator[tuple[str, str, int, bytes]]:
    """Captures for the join: of every 1/share pairs one differs."""
    old, changed = body(1.0, many), body(2.0, many)
    for number in range(count):
        differs = share > 0 and number % round(1 / share) == 0
        pair = str(uuid.uuid4())
        for one in (capture(pair, "old", "live", old), capture(pair, "new", "shadow", changed if differs else old)):
            yield pair, one.slot, one.expected_captures, encode(one)


def send(client: redis.Redis, captures: Iterable[tuple[str, str, int, bytes]], at_once: int = 2 * SEND) -> None:
    """Fill the stream, with the services' own script."""
    keys = Keys(SERVICE, 0)
    bounds = Limits(max_bytes=2**40, max_pairs=10**7)
    join = client.register_script(JOIN_SCRIPT)
    client.hset(SERVICES_KEY, SERVICE, 1)
    source = iter(captures)
    while batch := list(itertools.islice(source, at_once)):
        names, arguments = join_arguments(keys, bounds, batch)
        join(keys=names, args=arguments)


def work(redis_url: str, postgres_url: str, name: str, log: str) -> None:
    """A worker's process: wait, then work until it is killed."""
    with Path(log).open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    with redis.Redis.from_url(redis_url, socket_timeout=2 * WITHIN) as client:
        client.rpush(READY, name)
        client.blpop([GO], timeout=WITHIN)
    settings = Settings(redis_url=redis_url, postgres_url=postgres_url)
    runtime.run(run_worker(settings, name))


async def run_worker(settings: Settings, name: str) -> None:
    async with Database(settings.postgres_url) as database:
        await Worker(settings, database, name=name).run(asyncio.Event())


class Bench:
    def __init__(self, valkey: RedisServer, postgres: PostgresServer, folder: Path) -> None:
        self._valkey, self._postgres, self._folder = valkey, postgres, folder
        self._client = redis.Redis.from_url(valkey.url)
        self.sent = self.differing = 0

    def run(self, case: Case, most: int, found: Found) -> None:
        count, large = case.pairs(most), case.size != "2kb"
        with self._workers(case.workers) as workers:
            parts = {"redis": self._pid(self._valkey), "postgres": self._pid(self._postgres)}
            before = {name: processes.cpu(pid) for name, pid in parts.items()}
            send(self._client, pairs(count, case.share, ITEMS[case.size]), 2 * SEND // 10 if large else 2 * SEND)
            self._ready(workers)
            idle, log = sum(processes.cpu(_pid(worker)) for worker in workers), self._written()
            found.idle.append(max(processes.highest(_pid(worker)) for worker in workers))
            seconds = self._drained(workers)
            found.rate.append(count / seconds)
            took = sum(processes.cpu(_pid(worker)) for worker in workers) - idle
            found.worker.append(took / count * 1e6)
            found.wal.append((self._written() - log) / count)
            found.memory.append(max(processes.highest(_pid(worker)) for worker in workers))
            for name, pid in parts.items():
                getattr(found, name).append((processes.cpu(pid) - before[name]) / count * 1e6)
        self.sent += count
        self.differing += len(range(0, count, round(1 / case.share))) if case.share else 0

    @contextlib.contextmanager
    def _workers(self, many: int) -> Iterator[list[BaseProcess]]:
        """Their processes, which begin while the stream is filled."""
        self._client.delete(READY)
        urls = self._valkey.url, self._postgres.url()
        workers: list[BaseProcess] = [
            FORKED.Process(target=work, args=(*urls, f"bench-{n}", str(self._folder / f"{n}.log"))) for n in range(many)
        ]
        for worker in workers:
            worker.start()
        try:
            yield workers
        finally:
            for worker in workers:
                worker.kill()  # all is acknowledged, and an end in order would wait for entries first
            for worker in workers:
                worker.join()

    def _ready(self, workers: Sequence[BaseProcess]) -> None:
        began = time.monotonic()
        while self._client.llen(READY) < len(workers):
            self._look(workers, began)

    def _drained(self, workers: Sequence[BaseProcess]) -> float:
        """Seconds from the start until the stream is empty."""
        began = time.monotonic()
        self._client.rpush(GO, *range(len(workers)))
        while self._client.xlen(Keys(SERVICE, 0).ready):
            self._look(workers, began)
        return time.monotonic() - began

    def _look(self, workers: Sequence[BaseProcess], began: float) -> None:
        time.sleep(LOOK)
        if not all(worker.is_alive() for worker in workers):
            logs = (one.read_text(errors="replace")[-2000:] for one in self._folder.glob("*.log"))
            raise RuntimeError("a worker has ended:\n" + "\n".join(logs))
        if time.monotonic() - began > WITHIN:
            raise RuntimeError(f"the workers have not done their work after {WITHIN:g} s")

    def _written(self) -> int:
        """Bytes of Postgres's log since ever."""
        with psycopg.connect(self._postgres.url()) as connection:
            row = connection.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()
        assert row is not None
        return int(row[0])

    def _pid(self, server: RedisServer | PostgresServer) -> int:
        assert server.process is not None
        return server.process.pid

    def check(self) -> None:
        with psycopg.connect(self._postgres.url()) as connection:
            rows: dict[str, int] = dict(
                connection.execute("select outcome, count(*) from abreast.pair group by 1").fetchall()
            )
        if rows.get("mismatch", 0) != self.differing or sum(rows.values()) != self.sent:
            raise RuntimeError(f"the ledger does not hold what was sent: {rows}")


def _pid(worker: BaseProcess) -> int:
    assert worker.pid is not None
    return worker.pid


def measure(most: int, runs: int) -> dict[Case, Found]:
    found = {case: Found() for case in CASES}
    with RedisServer() as valkey, PostgresServer() as postgres, TemporaryDirectory() as folder:
        asyncio.run(migrate(postgres.url()))
        bench = Bench(valkey, postgres, Path(folder))
        for _ in range(runs):
            for case, kept in found.items():
                bench.run(case, most, kept)
        bench.check()
    return found


def rows(*, quick: bool = False, runs: int | None = None, most: int | None = None) -> list[Row]:
    measured = measure(most or (QUICK_PAIRS if quick else PAIRS), runs or (QUICK_RUNS if quick else RUNS))
    idle = [one for each in measured.values() for one in each.idle]
    found = [
        row(f"pipeline_{name}{case.ending}", unit, values)
        for case, each in measured.items()
        for name, unit, values in (
            ("pairs_per_s", "1/s", each.rate),
            ("worker_us", "us", each.worker),
            ("redis_us", "us", each.redis),
            ("postgres_us", "us", each.postgres),
            ("wal_bytes", "B", each.wal),
            ("worker_mib", "MiB", each.memory),
        )
    ]
    return [*found, row("pipeline_worker_idle_mib", "MiB", idle)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--pairs", type=int)
    arguments = parser.parse_args()
    end_in_order()
    for each in rows(quick=arguments.quick, runs=arguments.runs, most=arguments.pairs):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
