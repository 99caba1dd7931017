"""Measure the effect of mirroring on users, and the delay until a pair can be queried: python bench/mirror.py [--quick].

The whole stack runs on one machine: Envoy, both versions (bench/service.py, one uvicorn worker each), Redis, Postgres
and a sidecar. Rounds with no request mirrored and with every request mirrored take turns.

- `mirror_p50_ratio` and `mirror_p99_ratio` compare percentiles of users' times at a steady rate in the same round.
- `mirror_throughput_ratio` compares the throughput of saturated users.
- `visible_p50_ms` and `visible_p99_ms` are the time from an answer to its pair's row, at `visible_rate_per_s`.

The new version and the sidecar share two cores with the users' path, unlike in production.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import psycopg
from asgi import request, service
from load import Answers, Users
from rows import Row, main, percentile, row

from abreast.v1 import traffic_pb2, traffic_pb2_grpc
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import find_free_port
from abreast_sidecar.stack.stack import Stack

USERS = 32
RATE = 250.0  # requests per second; four processes share two cores
PAIRS = 1000.0  # requests per second while `visible` is measured
LOOK = 0.01  # seconds between two queries, and the resolution of `visible`
SETTLE = 1.0  # seconds after saturation
ARRIVE = 20.0  # seconds until the last pairs must be in the ledger
ROWS = b"select id, at from abreast.pair where at >= %s"
OVERLAP = timedelta(seconds=1)  # a pair may be committed after a later one


@dataclass(frozen=True)
class Round:
    """Times in seconds and rates per second: users' without and with mirroring, and those of visible pairs."""

    plain: list[float]
    mirrored: list[float]
    plain_rate: float
    mirrored_rate: float
    visible: list[float]
    visible_rate: float


@contextlib.contextmanager
def deployed() -> Iterator[tuple[Stack, dict[str, int]]]:
    """Yield the stack and the process ids of both versions."""
    old, new = (SocketAddress("127.0.0.1", find_free_port()) for _ in range(2))
    listen = SocketAddress("127.0.0.1", 0)
    envoy = EnvoySettings(service="bench", listen=listen, old=(old,), new=(new,), sample_safe=0.0)
    with TemporaryDirectory() as folder, Stack(envoy) as stack, contextlib.ExitStack() as opening:
        pids = {
            name: opening.enter_context(service("abreast", at.port, Path(folder), stack.redis_url)).pid
            for name, at in (("old", old), ("new", new))
        }
        await_healthy(stack.admin_url)
        yield stack, pids


def await_healthy(admin: str) -> None:
    url = f"{admin}/stats?format=json&filter=^cluster.(old|new).membership_healthy$"
    until = time.monotonic() + ARRIVE
    while time.monotonic() < until:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # http
            if [stat["value"] for stat in json.load(answer)["stats"]] == [1, 1]:
                return
        time.sleep(LOOK)
    raise RuntimeError(f"envoy's health check did not pass for both versions within {ARRIVE:g} s")


async def sample(stack: Stack, share: float) -> None:
    async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
        update = traffic_pb2.UpdateTrafficRequest(
            service="bench", sample_safe=share, baseline_share=0.0, actor="bench", reason="a measurement"
        )
        await traffic_pb2_grpc.TrafficServiceStub(channel).UpdateTraffic(update)


async def measure(stack: Stack, seconds: float) -> Round:
    async with Users(stack.envoy_settings.listen.port, _request, count=USERS) as users:
        await sample(stack, 0.0)
        plain = await users.pace(RATE, seconds)
        plain_rate = await users.saturate(seconds)
        await sample(stack, 1.0)
        mirrored = await users.pace(RATE, seconds)
        mirrored_rate = await users.saturate(seconds)
        await asyncio.sleep(SETTLE)
        began = time.monotonic()
        answers, visible = await _measure_visibility(stack, users.pace(PAIRS, seconds))
        duration = answers.pairs[-1][1] - began
    if errors := plain.errors + mirrored.errors + answers.errors:
        raise RuntimeError(f"users saw {errors} errors")
    return Round(plain.seconds, mirrored.seconds, plain_rate, mirrored_rate, visible, len(visible) / duration)


def _request(number: int) -> bytes:
    return request(sampled=False, number=number)


async def _measure_visibility(stack: Stack, load: Coroutine[Any, Any, Answers]) -> tuple[Answers, list[float]]:
    """Query the rows under load until all pairs have one. Return the answers, and the seconds from each to its row."""
    seen_at: dict[str, float] = {}
    task = asyncio.ensure_future(load)
    connection = await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True)
    async with connection:
        since, until = await _now(connection), None
        while until is None or time.monotonic() < until:
            rows = await (await connection.execute(ROWS, [since])).fetchall()
            now = time.monotonic()
            for pair, at in rows:
                seen_at.setdefault(pair, now)
                since = max(since, at - OVERLAP)
            if task.done():
                if all(pair in seen_at for pair, _ in task.result().pairs):
                    break
                until = until or time.monotonic() + ARRIVE
            await asyncio.sleep(LOOK)
    answers = await task
    return answers, [seen_at[pair] - at for pair, at in answers.pairs]


async def _now(connection: psycopg.AsyncConnection[Any]) -> Any:
    row = await (await connection.execute("select now()")).fetchone()
    assert row is not None
    return row[0]


async def _rounds(stack: Stack, count: int, seconds: float) -> list[Round]:
    await measure(stack, seconds / 2)  # warms up
    return [await measure(stack, seconds) for _ in range(count)]


def rows(*, quick: bool = False) -> list[Row]:
    with deployed() as (stack, _pids):
        rounds = asyncio.run(_rounds(stack, *((1, 0.7) if quick else (5, 4.0))))
    percentiles = {"p50": 0.5, "p99": 0.99}
    times = [
        row(f"{kind}_{name}_ms", "ms", [percentile(getattr(round_, kind), share) * 1000 for round_ in rounds])
        for kind in ("plain", "mirrored")
        for name, share in percentiles.items()
    ]
    ratios = [
        row(
            f"mirror_{name}_ratio",
            "",
            [percentile(round_.mirrored, share) / percentile(round_.plain, share) for round_ in rounds],
        )
        for name, share in percentiles.items()
    ]
    rate = row("mirror_throughput_ratio", "", [round_.mirrored_rate / round_.plain_rate for round_ in rounds])
    rates = [
        row("plain_per_s", "1/s", [round_.plain_rate for round_ in rounds]),
        row("mirrored_per_s", "1/s", [round_.mirrored_rate for round_ in rounds]),
        row("visible_rate_per_s", "1/s", [round_.visible_rate for round_ in rounds]),
    ]
    visible = [
        row(f"visible_{name}_ms", "ms", [percentile(round_.visible, share) * 1000 for round_ in rounds])
        for name, share in percentiles.items()
    ]
    return [*ratios, rate, *visible, *times, *rates]


if __name__ == "__main__":
    main(rows)
