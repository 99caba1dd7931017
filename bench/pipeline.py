"""Measure pairs per second from Redis through workers into Postgres.

python bench/pipeline.py [--quick] [--runs N] [--pairs N]

Servers are real. Bodies are JSON of 2 and 50 KB; none, one in a hundred or all differ. One or two workers run, each in a
separate process that waits until the stream is full. A name without a suffix is for equal bodies of 2 KB and one worker.

- `pipeline_pairs_per_s` is by wall clock, with everything on this machine.
- `pipeline_worker_us`, `pipeline_redis_us` (with the join) and `pipeline_postgres_us` are CPU time per pair.
- `pipeline_wal_bytes` is the size of Postgres's log per pair, without the whole pages after a checkpoint. For those,
  see bench/growth.py.
- `pipeline_worker_mib` is the peak resident memory of a worker, `pipeline_worker_idle_mib` before its first entry.
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

from abreast.protocol.capture import Answer, Body, Capture, Request, Role, Version
from abreast.protocol.join import JOIN_SCRIPT, SERVICES_KEY, Keys, Limits, join_arguments
from abreast_sidecar import aio
from abreast_sidecar.ingest.worker import Worker
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.migrate import migrate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SERVICE = "shop"
SEND = 200  # pairs per batch; a tenth of that for large bodies
ITEMS = {"2kb": 22, "50kb": 575}  # items per body
WITHIN = 120.0  # time limit of a run in seconds
LOOK = 0.01  # poll interval in seconds
READY, GO = "bench:ready", "bench:go"  # lists of waiting workers, and of their start signals
RUNS, PAIRS = 3, 20_000
QUICK_RUNS, QUICK_PAIRS = 1, 2_000
FORKED = multiprocessing.get_context("forkserver")  # workers start fast with preloaded modules
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
        """Return the number of pairs, which is smaller for slow cases."""
        return max(100, most // (10 if self.size == "50kb" else 1) // (3 if self.differs == "all" else 1))


CASES = [
    Case(differs, size, workers)
    for size, differs, workers in itertools.product(ITEMS, ("equal", "1pct", "all"), (1, 2))
]


@dataclass
class Measurements:
    """Values of one case, one per run: pairs per second, and µs of CPU per pair."""

    rate: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)
    redis: list[float] = field(default_factory=list)
    postgres: list[float] = field(default_factory=list)
    wal: list[float] = field(default_factory=list)  # bytes per pair
    memory: list[float] = field(default_factory=list)  # MiB, the maximum of all workers
    idle: list[float] = field(default_factory=list)


def body(price: float, many: int = ITEMS["2kb"]) -> bytes:
    items = [
        {"id": number, "name": f"article {number}", "price": 9.99 + number, "currency": "EUR", "tags": ["new", "sale"]}
        for number in range(many)
    ]
    items[3]["price"] = price
    return json.dumps({"page": 1, "total": many, "items": items}, separators=(",", ":")).encode()


def capture(pair: str, version: Version, role: Role, content: bytes) -> Capture:
    headers = (
        ("content-type", "application/json"),
        ("cache-control", "max-age=60"),
        ("content-length", str(len(content))),
    )
    request = Request("GET", "/products/17", "page=1", "/products/{id}", (("accept", "*/*"), ("host", "shop")))
    answer = Answer(200, headers, Body(content, len(content)))
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
    """Yield captures for the join. `share` is the share of pairs that differ."""
    from support_captures import encode

    def digits() -> str:
        return uuid.uuid4().hex

    old, changed = body(1.0, many), body(2.0, many)
    stream = f"{digits()[:8]}-0"
    for number in range(count):
        differs = share > 0 and number % round(1 / share) == 0
        pair = f"{stream}{number >> 12:03x}-8{number & 0xFFF:03x}-8{digits()[:3]}-{digits()[:12]}"  # as Envoy's
        captures = capture(pair, "old", "live", old), capture(pair, "new", "shadow", changed if differs else old)
        for each_capture in captures:
            yield pair, each_capture.slot, each_capture.expected_captures, encode(each_capture)


def send(client: redis.Redis, captures: Iterable[tuple[str, str, int, bytes]], at_once: int = 2 * SEND) -> None:
    """Fill the stream with the join script of the services."""
    keys = Keys(SERVICE, 0)
    bounds = Limits(max_bytes=2**40, max_pairs=10**7)
    join = client.register_script(JOIN_SCRIPT)
    client.hset(SERVICES_KEY, SERVICE, 1)
    source = iter(captures)
    while batch := list(itertools.islice(source, at_once)):
        names, arguments = join_arguments(keys, bounds, batch)
        join(keys=names, args=arguments)


def work(redis_url: str, postgres_url: str, name: str, log: str) -> None:
    """Run a worker's process: wait for the start signal, then work until it is killed."""
    with Path(log).open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    with redis.Redis.from_url(redis_url, socket_timeout=2 * WITHIN) as client:
        client.rpush(READY, name)
        client.blpop([GO], timeout=WITHIN)
    settings = Settings(redis_url=redis_url, postgres_url=postgres_url)
    aio.run(run_worker(settings, name))


async def run_worker(settings: Settings, name: str) -> None:
    async with Database(settings.postgres_url) as database:
        await Worker(settings, database, name=name).run(asyncio.Event())


class Bench:
    def __init__(self, valkey: RedisServer, postgres: PostgresServer, folder: Path) -> None:
        self._valkey, self._postgres, self._folder = valkey, postgres, folder
        self._client = redis.Redis.from_url(valkey.url)
        self.sent = self.differing = 0

    def run(self, case: Case, most: int, results: Measurements) -> None:
        count, large = case.pairs(most), case.size != "2kb"
        with self._workers(case.workers) as workers:
            parts = {"redis": self._pid(self._valkey), "postgres": self._pid(self._postgres)}
            before = {name: processes.cpu(pid) for name, pid in parts.items()}
            send(self._client, pairs(count, case.share, ITEMS[case.size]), 2 * SEND // 10 if large else 2 * SEND)
            self._ready(workers)
            idle, log = sum(processes.cpu(_pid(worker)) for worker in workers), self._written()
            results.idle.append(max(processes.highest(_pid(worker)) for worker in workers))
            seconds = self._drained(workers)
            results.rate.append(count / seconds)
            cpu_s = sum(processes.cpu(_pid(worker)) for worker in workers) - idle
            results.worker.append(cpu_s / count * 1e6)
            results.wal.append((self._written() - log) / count)
            results.memory.append(max(processes.highest(_pid(worker)) for worker in workers))
            for name, pid in parts.items():
                getattr(results, name).append((processes.cpu(pid) - before[name]) / count * 1e6)
        self.sent += count
        self.differing += len(range(0, count, round(1 / case.share))) if case.share else 0

    @contextlib.contextmanager
    def _workers(self, many: int) -> Iterator[list[BaseProcess]]:
        """Start the workers' processes, and kill them at the end."""
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
                worker.kill()  # everything is acknowledged, and a clean stop would wait for entries
            for worker in workers:
                worker.join()

    def _ready(self, workers: Sequence[BaseProcess]) -> None:
        began = time.monotonic()
        while self._client.llen(READY) < len(workers):
            self._look(workers, began)

    def _drained(self, workers: Sequence[BaseProcess]) -> float:
        """Start the workers, and return the seconds until the stream is empty."""
        began = time.monotonic()
        self._client.rpush(GO, *range(len(workers)))
        while self._client.xlen(Keys(SERVICE, 0).ready):
            self._look(workers, began)
        return time.monotonic() - began

    def _look(self, workers: Sequence[BaseProcess], began: float) -> None:
        time.sleep(LOOK)
        if not all(worker.is_alive() for worker in workers):
            logs = (path.read_text(errors="replace")[-2000:] for path in self._folder.glob("*.log"))
            raise RuntimeError("a worker has ended:\n" + "\n".join(logs))
        if time.monotonic() - began > WITHIN:
            raise RuntimeError(f"the stream is not empty after {WITHIN:g} s")

    def _written(self) -> int:
        """Return the position in Postgres's log in bytes."""
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
            raise RuntimeError(f"the ledger does not match the {self.sent} pairs sent: {rows}")


def _pid(worker: BaseProcess) -> int:
    assert worker.pid is not None
    return worker.pid


def measure(most: int, runs: int) -> dict[Case, Measurements]:
    results = {case: Measurements() for case in CASES}
    with RedisServer() as valkey, PostgresServer() as postgres, TemporaryDirectory() as folder:
        asyncio.run(migrate(postgres.url()))
        bench = Bench(valkey, postgres, Path(folder))
        for _ in range(runs):
            for case, measurements in results.items():
                bench.run(case, most, measurements)
        bench.check()
    return results


def rows(*, quick: bool = False, runs: int | None = None, most: int | None = None) -> list[Row]:
    measured = measure(most or (QUICK_PAIRS if quick else PAIRS), runs or (QUICK_RUNS if quick else RUNS))
    idle = [value for result in measured.values() for value in result.idle]
    rows = [
        row(f"pipeline_{name}{case.ending}", unit, values)
        for case, result in measured.items()
        for name, unit, values in (
            ("pairs_per_s", "1/s", result.rate),
            ("worker_us", "us", result.worker),
            ("redis_us", "us", result.redis),
            ("postgres_us", "us", result.postgres),
            ("wal_bytes", "B", result.wal),
            ("worker_mib", "MiB", result.memory),
        )
    ]
    return [*rows, row("pipeline_worker_idle_mib", "MiB", idle)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--pairs", type=int)
    arguments = parser.parse_args()
    end_in_order()
    for result in rows(quick=arguments.quick, runs=arguments.runs, most=arguments.pairs):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
