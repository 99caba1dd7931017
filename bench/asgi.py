"""Measure the cost of a middleware for a uvicorn worker: python bench/asgi.py [--quick].

The subject is a Starlette service that returns 2 KB of JSON. It runs bare, with Abreast's middleware (every request
sampled, or none), with OpenTelemetry's middleware, and with a BaseHTTPMiddleware that does nothing. The variants are
saturated in turn, so that a busy machine slows all of them alike.

- `NAME_throughput_ratio` is relative to the bare service in the same round.
- `uvicorn_NAME_cpu_us` is the worker's CPU time per request, background work included. Other load on the machine
  affects it less.
- `otel_us` and `basehttp_us` are the time that these two add to a request in the process, like `middleware_sampled_us`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import middleware
import processes
import redis
from load import Users
from rows import Row, main, row
from service import wrapped

from abreast_sidecar.stack.process import ServerProcess, find_free_port, is_answering
from abreast_sidecar.stack.servers import RedisServer

SERVICE = Path(__file__).with_name("service.py")
USERS = 16
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n"
TURNS = 40  # in-process rounds


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str  # argument of bench/service.py
    sampled: bool = False


VARIANTS = (
    Variant("bare", "bare"),
    Variant("middleware", "abreast", sampled=True),
    Variant("middleware_unsampled", "abreast"),
    Variant("otel", "otel"),
    Variant("basehttp", "basehttp"),
)


def request(*, sampled: bool, number: int) -> bytes:
    headers = {
        "host": "bench",
        "user-agent": "bench/1.0",
        "accept": "application/json",
        "x-request-id": "7b0bbbd0-8d3c-4a53-9d3d-6f8f5a5c5f7b",
    }
    if sampled:
        headers |= {
            "x-abreast-pair": f"{number:036d}",
            "x-abreast-copies": "2",
            "x-abreast-version": "old",
            "x-abreast-role": "live",
        }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET /products HTTP/1.1\r\n{lines}\r\n".encode()


@contextlib.contextmanager
def service(kind: str, port: int, folder: Path, redis_url: str) -> Iterator[ServerProcess]:
    server = ServerProcess.start(
        kind,
        [sys.executable, SERVICE, str(port), kind],
        folder / f"{kind}-{port}.log",
        is_ready=lambda _pid: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"),
        environment={"ABREAST_REDIS_URL": redis_url},
    )
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Measurements:
    """Values of one variant, one per round."""

    rates: list[float] = field(default_factory=list)  # requests per second
    cpu: list[float] = field(default_factory=list)  # µs of the worker per request


def throughput(runs: int, seconds: float) -> dict[str, Measurements]:
    results = {variant.name: Measurements() for variant in VARIANTS}
    with RedisServer() as server, TemporaryDirectory() as folder, contextlib.ExitStack() as opening:
        workers = {}
        for kind in {variant.kind for variant in VARIANTS}:
            port = find_free_port()
            workers[kind] = port, opening.enter_context(service(kind, port, Path(folder), server.url)).pid
        with redis.Redis.from_url(server.url) as client:
            for number in range(runs + 1):
                for variant in VARIANTS:
                    port, pid = workers[variant.kind]
                    before = processes.cpu(pid)
                    rate = asyncio.run(saturated(port, variant, seconds))
                    cpu_s = processes.cpu(pid) - before
                    client.flushall()  # no sidecar consumes the captures
                    if number:  # the first round warms up
                        results[variant.name].rates.append(rate)
                        results[variant.name].cpu.append(cpu_s / (rate * seconds) * 1e6)
    return results


async def saturated(port: int, variant: Variant, seconds: float) -> float:
    def build_request(number: int) -> bytes:
        return request(sampled=variant.sampled, number=number)

    async with Users(port, build_request, count=USERS) as users:
        return await users.saturate(seconds)


async def added(kind: str, turns: int) -> list[float]:
    """Return the µs that a middleware adds to a request in the process, one value per round."""
    target = wrapped(middleware.app, kind)
    added_us = []
    for number in range(turns + 1):
        bare_us = await middleware.turn(middleware.app, sampled=False, first=0)
        wrapped_us = await middleware.turn(target, sampled=False, first=0)
        if number:
            added_us.append(wrapped_us - bare_us)
    return added_us


def rows(*, quick: bool = False) -> list[Row]:
    runs, seconds, turns = (2, 0.3, 10) if quick else (9, 1.5, TURNS)
    results = throughput(runs, seconds)
    bare_rates = results["bare"].rates
    ratios = [
        row(f"{name}_throughput_ratio", "", [rate / bare for rate, bare in zip(result.rates, bare_rates, strict=True)])
        for name, result in results.items()
        if name != "bare"
    ]
    costs = [row(f"{kind}_us", "us", asyncio.run(added(kind, turns))) for kind in ("otel", "basehttp")]
    rates = [row(f"uvicorn_{name}_per_s", "1/s", result.rates) for name, result in results.items()]
    cpu = [row(f"uvicorn_{name}_cpu_us", "us", result.cpu) for name, result in results.items()]
    return [*ratios, *costs, *rates, *cpu]


if __name__ == "__main__":
    main(rows)
