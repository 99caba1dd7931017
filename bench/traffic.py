"""Measure the time to a rollback and the effect of a hanging new: python bench/traffic.py [--quick].

Servers are real, and the load is constant.

- `rollback_ms` is the time from the call to the last request that new answers. The budget is 100.
- `guard_ms` is the time from evidence in the ledger to the guard's rollback. The evidence is twenty requests that only
  new failed. The budget is 2,000.
- `flood_p99_ratio` compares users' p99 with and without mirroring to a new that never answers.
- `flood_envoy_mb` is Envoy's memory at the end of that load, with bodies of 64 KB.
- `flood_errors` counts users under that load whose status is not 200.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import processes
import psycopg
from google.protobuf.duration_pb2 import Duration
from rows import Row, end_in_order, row

from abreast.v1 import rollout_pb2, rollout_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_answering
from abreast_sidecar.stack.stack import ANY_PORT_ADDRESS, Stack

SERVICE = "shop"
USERS = 8  # connections, each with one request in flight
BODY = b"x" * 65536
ANSWER = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\nok"
FAILURES = """
with endpoint as (
    insert into abreast.endpoint (service, method, route) values (%s, 'GET', '/') on conflict do nothing returning id
)
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us)
select (clock_timestamp() at time zone 'utc')::date, gen_random_uuid()::text, clock_timestamp(),
       (select id from endpoint union all select id from abreast.endpoint where method = 'GET' and route = '/' limit 1),
       'mismatch', 'new', 200, 500, 1000, 1000
from generate_series(1, 20)
"""
ROLLED_BACK = "select at from abreast.traffic_event where actor = 'guard' and action = 'rollback' and at > %s"
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\ncontent-length: 0\r\n\r\n"


@dataclass
class Load:
    """Load on one port. `seen` holds answers as (arrived, seconds, version, status)."""

    port: int
    body: bytes = b""
    seen: list[tuple[float, float, str, str]] = field(default_factory=list)

    async def user(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        method = "POST" if self.body else "GET"
        head = f"{method} / HTTP/1.1\r\nhost: shop\r\ncontent-length: {len(self.body)}\r\n\r\n".encode()
        try:
            while True:
                began = time.monotonic()
                writer.write(head + self.body)
                answer = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(_header(answer, "content-length")))
                now = time.monotonic()
                version = _header(answer, "x-abreast-version")
                self.seen.append((now, now - began, version, answer.split(" ", 2)[1]))
        finally:
            writer.close()


def _header(answer: str, name: str) -> str:
    return answer.partition(f"{name}: ")[2].partition("\r\n")[0]


@asynccontextmanager
async def users(port: int, body: bytes = b"") -> AsyncIterator[Load]:
    load = Load(port, body)
    tasks = [asyncio.create_task(load.user()) for _ in range(USERS)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def version(name: str, port: int) -> Iterator[None]:
    with TemporaryDirectory() as folder:
        server = ServerProcess.start(
            name,
            [sys.executable, __file__, "--serve", str(port), name],
            Path(folder) / "log",
            is_ready=lambda _pid: is_answering("127.0.0.1", port, HEALTH, b" 200 "),
        )
        try:
            yield
        finally:
            server.stop()


async def serve(port: int, name: str) -> None:
    """Serve a version that answers at once. Mirrored requests to new hang."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(_header(head, "content-length") or 0))
                if name == "new" and "x-abreast-role: shadow" in head:
                    await asyncio.sleep(3600)
                writer.write(ANSWER)
        except (EOFError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(connection, "127.0.0.1", port) as server:
        await server.serve_forever()


@contextmanager
def deployed() -> Iterator[Stack]:
    old, new = SocketAddress("127.0.0.1", find_free_port()), SocketAddress("127.0.0.1", find_free_port())
    settings = EnvoySettings(service=SERVICE, listen=ANY_PORT_ADDRESS, old=(old,), new=(new,), sample_safe=0.0)
    with version("old", old.port), version("new", new.port), Stack(settings) as stack:
        yield stack


class Client:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.channel = grpc.aio.insecure_channel(stack.grpc_address)
        self.traffic = traffic_pb2_grpc.TrafficServiceStub(self.channel)
        self.rollout = rollout_pb2_grpc.RolloutServiceStub(self.channel)

    async def set(self, **shares: float) -> None:
        await self.traffic.UpdateTraffic(
            traffic_pb2.UpdateTrafficRequest(
                service=SERVICE,
                wait=Duration(seconds=5),
                force=True,
                **shares,  # type: ignore[arg-type]  # names of fields
            )
        )


async def rollbacks(stack: Stack, runs: int) -> list[float]:
    client, times_ms = Client(stack), []
    async with users(stack.envoy_settings.listen.port) as load:
        for _ in range(runs):
            await client.set(new_share=1.0)
            await asyncio.sleep(0.5)
            if load.seen[-1][2] != "new":
                raise RuntimeError("new does not answer users half a second after it got a share of 100%")
            called = time.monotonic()
            await client.traffic.Rollback(traffic_pb2.RollbackRequest(service=SERVICE, reason="bench"))
            await asyncio.sleep(0.3)
            last = max((at for at, _took, name, _status in load.seen if name == "new"), default=called)
            times_ms.append(max(last - called, 0.0) * 1000)
            load.seen.clear()
    await client.channel.close()
    return times_ms


async def guarded(stack: Stack, runs: int) -> list[float]:
    """Measure guard rollbacks in ms. The guard looks twice per second, so each run starts at another offset."""
    client, times_ms = Client(stack), []
    policy = rollout_pb2.GuardPolicy(
        mode=rollout_pb2.GUARD_MODE_ACTING, errors=rollout_pb2.GuardRule(cooldown=Duration(seconds=1))
    )
    ledger = await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True)
    async with ledger:
        await ledger.execute("select abreast.open_day((clock_timestamp() at time zone 'utc')::date)")
        for run in range(runs):
            await client.set(new_share=0.5)
            await client.rollout.SetGuard(
                rollout_pb2.SetGuardRequest(service=SERVICE, policy=policy, reason=f"bench {run}")
            )
            await asyncio.sleep(2.0 + run / runs)
            await ledger.execute(FAILURES, (SERVICE,))
            times_ms.append(await _rolled_back(ledger))
    await client.channel.close()
    return times_ms


async def _rolled_back(ledger: psycopg.AsyncConnection[Any]) -> float:
    """Return the milliseconds until the rollback, by Postgres's clock."""
    since = (await (await ledger.execute("select clock_timestamp()")).fetchall())[0][0]
    for _ in range(1000):
        if seen := await (await ledger.execute(ROLLED_BACK, (since,))).fetchone():
            return float((seen[0] - since).total_seconds() * 1000)
        await asyncio.sleep(0.01)
    raise RuntimeError("the guard did not roll back within ten seconds")


async def p99(stack: Stack, seconds: float) -> tuple[float, int]:
    """Return the p99 in milliseconds, and the number of statuses other than 200."""
    async with users(stack.envoy_settings.listen.port, BODY) as load:
        await asyncio.sleep(seconds)
    times = sorted(took for _at, took, _name, _status in load.seen)
    errors = sum(status != "200" for _at, _took, _name, status in load.seen)
    return times[int(len(times) * 0.99)] * 1000, errors


async def floods(stack: Stack, runs: int, seconds: float) -> dict[str, list[float]]:
    client = Client(stack)
    results: dict[str, list[float]] = {"flood_p99_ratio": [], "flood_envoy_mb": [], "flood_errors": []}
    assert stack.envoy.process is not None
    for _ in range(runs):
        await client.set(new_share=0.0, sample_unsafe=0.0)
        unmirrored, _errors = await p99(stack, seconds)
        await client.set(sample_unsafe=1.0)
        flooded, errors = await p99(stack, seconds)
        results["flood_p99_ratio"].append(flooded / unmirrored)
        results["flood_envoy_mb"].append(processes.resident(stack.envoy.process.pid, {}))
        results["flood_errors"].append(errors)
    await client.channel.close()
    return results


UNITS = {"flood_p99_ratio": "x", "flood_envoy_mb": "MB", "flood_errors": "requests"}


def rows(*, quick: bool = False) -> list[Row]:
    with deployed() as stack:
        took = asyncio.run(rollbacks(stack, 3 if quick else 10))
        guards = asyncio.run(guarded(stack, 1 if quick else 10))
        flooded = asyncio.run(floods(stack, 1 if quick else 3, 1.0 if quick else 4.0))
    rolled = [row("rollback_ms", "ms", took), row("guard_ms", "ms", guards)]
    return [*rolled, *[row(name, UNITS[name], flooded[name]) for name in UNITS]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "VERSION"), help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(int(arguments.serve[0]), arguments.serve[1]))
        return
    end_in_order()
    for result in rows(quick=arguments.quick):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
