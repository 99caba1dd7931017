"""Measure what the whole stack costs at everyday rates: python bench/everyday.py [--quick].

Envoy, Redis, Postgres and a sidecar run beside two versions whose 1.6 KB responses all differ by noise (an id, a clock, a
shuffled list). Every request is sampled, and one in ten of these goes to old twice. Load is open-loop, in steps: idle, 10, 50,
150 and 400 requests a second. R is the CPU time to parse both bodies with orjson and compare them with `==`, in the same run.

- `everyday_N_PART_percent` is the CPU of redis, postgres, sidecar or envoy in percent of one core, `everyday_N_r` the CPU of
  the first three together in R per pair. `everyday_idle_r_percent` has the percentage on a machine where R is 11 µs.
- `everyday_N_transactions_per_s`, `everyday_N_redis_commands_per_s` and, per pair, `everyday_N_wal_bytes` and
  `everyday_N_rows` (inserted, updated or deleted in the ledger) do not depend on the machine.
- `everyday_N_p50_ms` and `everyday_N_p99_ms` are times of users, `everyday_N_mirror_p50_ms` and `everyday_N_mirror_p99_ms` those of an Envoy
  that mirrors each request and does nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import processes
import psycopg
import redis
from asgi import service
from load import Users
from mirror import await_healthy
from rows import Row, main, percentile, row
from service import noisy_body
from transparency import format_bare_config

from abreast_sidecar.aio import ACTIVITY_S
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import find_free_port
from abreast_sidecar.stack.servers import EnvoyServer
from abreast_sidecar.stack.stack import ANY_PORT_ADDRESS, Stack

RATES = (0, 10, 50, 150, 400)  # requests per second
USERS = 32
SETTLE_S = ACTIVITY_S + 3.0  # until the sidecar is idle
REFERENCE_R_US = 11.0
STORES = ("redis", "postgres", "sidecar")
MIRROR_POLICY = ", request_mirror_policies: [{cluster: copy}]"
COPY_CLUSTER = """
  - name: copy
    connect_timeout: 5s
    load_assignment:
      cluster_name: copy
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}
"""
ROWS_SQL = """
select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint from pg_stat_user_tables where schemaname = 'abreast'
"""
TRANSACTIONS_SQL = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
WAL_SQL = "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
PAIRS_SQL = "select count(*) from abreast.pair"


@dataclasses.dataclass(frozen=True)
class Reading:
    """Counts since the start of the servers. CPU is in seconds."""

    at: float
    cpu: dict[str, float]
    commands: int
    transactions: int
    wal_bytes: int
    rows: int
    pairs: int


class Meter:
    """Reads counters. Its own queries and commands are a few per step."""

    def __init__(self, stack: Stack) -> None:
        self._pids = {name: server.process.pid for name, server in stack.servers.items() if server.process is not None}
        self._redis = redis.Redis.from_url(stack.redis_url)
        self._postgres = psycopg.connect(stack.postgres_url, autocommit=True)

    def read(self) -> Reading:
        self._postgres.execute("select pg_stat_force_next_flush()")
        return Reading(
            time.monotonic(),
            {name: processes.cpu(pid) for name, pid in self._pids.items()},
            self._redis.info("stats")["total_commands_processed"],
            self._count(TRANSACTIONS_SQL),
            self._count(WAL_SQL),
            self._count(ROWS_SQL),
            self._count(PAIRS_SQL),
        )

    def close(self) -> None:
        self._redis.close()
        self._postgres.close()

    def _count(self, query: str) -> int:
        fetched = self._postgres.execute(query.encode()).fetchone()
        assert fetched is not None
        return int(fetched[0])


def request(number: int) -> bytes:
    return f"GET /noisy?page={number % 20} HTTP/1.1\r\nhost: bench\r\naccept: application/json\r\n\r\n".encode()


def measure_r(runs: int) -> list[float]:
    """Return the CPU time in µs to parse two bodies and compare them."""
    old, new = noisy_body(), noisy_body()
    times = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(1000):
            _ = orjson.loads(old) == orjson.loads(new)
        times.append((time.process_time() - start) * 1000)
    return times


@contextlib.contextmanager
def deployed() -> Iterator[tuple[Stack, int]]:
    """Yield the stack, and the port of an Envoy that only mirrors."""
    old, new = (SocketAddress("127.0.0.1", find_free_port()) for _ in range(2))
    envoy = EnvoySettings(
        service="bench", listen=ANY_PORT_ADDRESS, old=(old,), new=(new,), sample_safe=1.0, baseline_share=0.1
    )
    port = find_free_port()
    config = format_bare_config(port, old.port, MIRROR_POLICY) + COPY_CLUSTER.lstrip("\n") % new.port
    with TemporaryDirectory() as folder, Stack(envoy) as stack, contextlib.ExitStack() as opening:
        for address in (old, new):
            opening.enter_context(service("abreast", address.port, Path(folder), stack.redis_url))
        await_healthy(stack.admin_url)
        opening.enter_context(EnvoyServer(config))
        yield stack, port


async def send(port: int, rate: int, seconds: float) -> list[float]:
    """Send requests at a rate, and return the times in seconds. A rate of 0 waits."""
    if not rate:
        await asyncio.sleep(seconds)
        return [0.0]
    async with Users(port, request, count=USERS) as users:
        answers = await users.pace(rate, seconds)
    if answers.errors:
        raise RuntimeError(f"users saw {answers.errors} errors")
    return answers.seconds


async def measure(stack: Stack, mirror_port: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the values of each step by name, without the prefix `everyday_`."""
    meter, values = Meter(stack), defaultdict[str, dict[str, float]](dict)
    try:
        await send(stack.envoy_settings.listen.port, RATES[-1], seconds / 3)  # warms up
        await asyncio.sleep(max(seconds / 3, SETTLE_S))
        for rate in RATES:
            mirror_times = await send(mirror_port, rate, seconds / 2) if rate else [0.0]
            before = meter.read()
            times = await send(stack.envoy_settings.listen.port, rate, seconds)
            await asyncio.sleep(0.5)  # the last pairs reach the ledger
            values[str(rate) if rate else "idle"] = describe(before, meter.read(), times, mirror_times, rate)
    finally:
        meter.close()
    return values


def describe(
    before: Reading, after: Reading, times: list[float], mirror_times: list[float], rate: int
) -> dict[str, float]:
    duration, pairs = after.at - before.at, after.pairs - before.pairs
    cpu = {name: after.cpu[name] - before.cpu[name] for name in after.cpu}
    values = {f"{name}_percent": cpu[name] / duration * 100 for name in cpu}
    values["percent"] = sum(cpu[name] for name in STORES) / duration * 100
    values["transactions_per_s"] = (after.transactions - before.transactions) / duration
    values["redis_commands_per_s"] = (after.commands - before.commands) / duration
    if rate:
        values["cpu_us"] = sum(cpu[name] for name in STORES) / pairs * 1e6
        values["wal_bytes"] = (after.wal_bytes - before.wal_bytes) / pairs
        values["rows"] = (after.rows - before.rows) / pairs
        for name, sample in (("", times), ("mirror_", mirror_times)):
            values[f"{name}p50_ms"], values[f"{name}p99_ms"] = (percentile(sample, at) * 1000 for at in (0.5, 0.99))
    return values


def rows(*, quick: bool = False) -> list[Row]:
    reference_us = measure_r(5)
    with deployed() as (stack, mirror_port):
        steps = asyncio.run(measure(stack, mirror_port, 3.0 if quick else 20.0))
    reference_us += measure_r(5)
    reference = row("everyday_reference_us", "µs", reference_us)
    results = [reference]
    for step, values in steps.items():
        for name, value in values.items():
            unit = {"percent": "%", "ms": "ms", "us": "µs", "bytes": "bytes", "s": "1/s"}.get(name.rsplit("_")[-1], "")
            results.append(row(f"everyday_{step}_{name}", unit, [value]))
        scale = REFERENCE_R_US / reference["value"]
        results.append(row(f"everyday_{step}_percent_at_11us", "%", [values["percent"] * scale]))
        if "cpu_us" in values:
            results.append(row(f"everyday_{step}_r", "R", [values["cpu_us"] / reference["value"]]))
    return results


if __name__ == "__main__":
    main(rows)
