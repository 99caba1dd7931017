"""What mirroring costs users through Envoy, and how soon a pair can be queried: python bench/mirror.py [--quick].

The whole stack on one machine: Envoy, both versions (bench/service.py, one uvicorn worker each), Redis, Postgres and a
sidecar. Rounds with no request mirrored and with all of them take turns. `mirror_p50_ratio` and `mirror_p99_ratio` are
the percentiles of users' times at a steady rate, mirrored to not mirrored, of the same round; `mirror_throughput_ratio`
is of as many requests as they can. `visible_p50_ms` and `visible_p99_ms` are from an answer to its pair's row, at as many
pairs a second as `visible_rate_per_s` says. Here the new version and the sidecar share two cores with the users' path,
which in production they do not.
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
RATE = 250.0  # requests a second; four processes share two cores
PAIRS = 1000.0  # a second, while it is measured how soon they are visible
LOOK = 0.01  # seconds between two looks: `visible` is as exact
SETTLE = 1.0  # seconds after as many requests as can be
ARRIVE = 20.0  # seconds that the ledger gets for the last pairs
ROWS = b"select id, at from abreast.pair where at >= %s"
OVERLAP = timedelta(seconds=1)  # a pair may be committed after a later one


@dataclass(frozen=True)
class Round:
    """Seconds of users' times and requests a second, not mirrored and mirrored; seconds until pairs were visible, and how
    many a second there were.
    """

    plain: list[float]
    mirrored: list[float]
    plain_rate: float
    mirrored_rate: float
    visible: list[float]
    visible_rate: float


@contextlib.contextmanager
def deployed() -> Iterator[tuple[Stack, dict[str, int]]]:
    """The stack, and the processes of both versions."""
    old, new = (SocketAddress("127.0.0.1", find_free_port()) for _ in range(2))
    listen = SocketAddress("127.0.0.1", 0)
    envoy = EnvoySettings(service="bench", listen=listen, old=(old,), new=(new,), sample_safe=0.0)
    with TemporaryDirectory() as folder, Stack(envoy) as stack, contextlib.ExitStack() as opening:
        pids = {
            name: opening.enter_context(service("abreast", at.port, Path(folder), stack.redis_url)).pid
            for name, at in (("old", old), ("new", new))
        }
        _await_healthy(stack.admin_url)
        yield stack, pids


def _await_healthy(admin: str) -> None:
    wanted = f"{admin}/stats?format=json&filter=^cluster.(old|new).membership_healthy$"
    until = time.monotonic() + ARRIVE
    while time.monotonic() < until:
        with urllib.request.urlopen(wanted, timeout=5) as answer:  # noqa: S310  # http
            if [one["value"] for one in json.load(answer)["stats"]] == [1, 1]:
                return
        time.sleep(LOOK)
    raise RuntimeError(f"envoy did not find both versions well within {ARRIVE:g} s")


async def sample(stack: Stack, share: float) -> None:
    async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
        asked = traffic_pb2.UpdateTrafficRequest(
            service="bench", sample_safe=share, baseline_share=0.0, actor="bench", reason="a measurement"
        )
        await traffic_pb2_grpc.TrafficServiceStub(channel).UpdateTraffic(asked)


async def measured(stack: Stack, seconds: float) -> Round:
    async with Users(stack.envoy_settings.listen.port, _request, count=USERS) as users:
        await sample(stack, 0.0)
        plain = await users.pace(RATE, seconds)
        plain_rate = await users.saturate(seconds)
        await sample(stack, 1.0)
        mirrored = await users.pace(RATE, seconds)
        mirrored_rate = await users.saturate(seconds)
        await asyncio.sleep(SETTLE)
        began = time.monotonic()
        asked, visible = await _seen(stack, users.pace(PAIRS, seconds))
        took = asked.pairs[-1][1] - began
    if errors := plain.errors + mirrored.errors + asked.errors:
        raise RuntimeError(f"users saw {errors} errors")
    return Round(plain.seconds, mirrored.seconds, plain_rate, mirrored_rate, visible, len(visible) / took)


def _request(number: int) -> bytes:
    return request(sampled=False, number=number)


async def _seen(stack: Stack, asking: Coroutine[Any, Any, Answers]) -> tuple[Answers, list[float]]:
    """Look for the rows while users ask, until all are there; seconds from each answer to its row."""
    came: dict[str, float] = {}
    task = asyncio.ensure_future(asking)
    connection = await psycopg.AsyncConnection.connect(stack.postgres_url, autocommit=True)
    async with connection:
        since, until = await _now(connection), None
        while until is None or time.monotonic() < until:
            rows = await (await connection.execute(ROWS, [since])).fetchall()
            seen = time.monotonic()
            for pair, at in rows:
                came.setdefault(pair, seen)
                since = max(since, at - OVERLAP)
            if task.done():
                if all(pair in came for pair, _ in task.result().pairs):
                    break
                until = until or time.monotonic() + ARRIVE
            await asyncio.sleep(LOOK)
    answered = await task
    return answered, [came[pair] - at for pair, at in answered.pairs]


async def _now(connection: psycopg.AsyncConnection[Any]) -> Any:
    row = await (await connection.execute("select now()")).fetchone()
    assert row is not None
    return row[0]


async def _rounds(stack: Stack, count: int, seconds: float) -> list[Round]:
    await measured(stack, seconds / 2)  # warms up
    return [await measured(stack, seconds) for _ in range(count)]


def rows(*, quick: bool = False) -> list[Row]:
    with deployed() as (stack, _pids):
        found = asyncio.run(_rounds(stack, *((1, 0.7) if quick else (5, 4.0))))
    per_mille = {"p50": 0.5, "p99": 0.99}
    times = [
        row(f"{kind}_{name}_ms", "ms", [percentile(getattr(each, kind), share) * 1000 for each in found])
        for kind in ("plain", "mirrored")
        for name, share in per_mille.items()
    ]
    ratios = [
        row(
            f"mirror_{name}_ratio",
            "",
            [percentile(each.mirrored, share) / percentile(each.plain, share) for each in found],
        )
        for name, share in per_mille.items()
    ]
    rate = row("mirror_throughput_ratio", "", [each.mirrored_rate / each.plain_rate for each in found])
    rates = [
        row("plain_per_s", "1/s", [each.plain_rate for each in found]),
        row("mirrored_per_s", "1/s", [each.mirrored_rate for each in found]),
        row("visible_rate_per_s", "1/s", [each.visible_rate for each in found]),
    ]
    visible = [
        row(f"visible_{name}_ms", "ms", [percentile(each.visible, share) * 1000 for each in found])
        for name, share in per_mille.items()
    ]
    return [*ratios, rate, *visible, *times, *rates]


if __name__ == "__main__":
    main(rows)
