"""What a middleware costs a uvicorn worker: python bench/asgi.py [--quick].

One Starlette service (2 KB of JSON) bare, with Abreast's middleware (all requests sampled, and none), with
OpenTelemetry's, and with a BaseHTTPMiddleware that does nothing. Each is saturated in turn, so that a busy machine slows
all alike. A ratio is to the bare service of the same round; `uvicorn_NAME_cpu_us` is the CPU time that the worker takes for
a request, background included, which who else uses the machine changes less; `otel_us` and `basehttp_us` are what those two add to a
request in the process, by the same clock as `middleware_sampled_us`.
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
TURNS = 40  # in the process, of each


@dataclass(frozen=True)
class Variant:
    name: str
    kind: str  # of bench/service.py
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
class Found:
    """Of one variant, by round."""

    rates: list[float] = field(default_factory=list)  # requests a second
    cpu: list[float] = field(default_factory=list)  # µs of the worker a request


def throughput(runs: int, seconds: float) -> dict[str, Found]:
    found = {variant.name: Found() for variant in VARIANTS}
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
                    took = processes.cpu(pid) - before
                    client.flushall()  # no sidecar empties it
                    if number:  # the first round warms up
                        found[variant.name].rates.append(rate)
                        found[variant.name].cpu.append(took / (rate * seconds) * 1e6)
    return found


async def saturated(port: int, variant: Variant, seconds: float) -> float:
    def one(number: int) -> bytes:
        return request(sampled=variant.sampled, number=number)

    async with Users(port, one, count=USERS) as users:
        return await users.saturate(seconds)


async def added(kind: str, turns: int) -> list[float]:
    """µs that a middleware adds to a request in the process, of each turn."""
    target = wrapped(middleware.app, kind)
    found = []
    for number in range(turns + 1):
        bare = await middleware.turn(middleware.app, sampled=False, first=0)
        took = await middleware.turn(target, sampled=False, first=0)
        if number:
            found.append(took - bare)
    return found


def rows(*, quick: bool = False) -> list[Row]:
    runs, seconds, turns = (2, 0.3, 10) if quick else (9, 1.5, TURNS)
    found = throughput(runs, seconds)
    bare = found["bare"].rates
    ratios = [
        row(f"{name}_throughput_ratio", "", [one / other for one, other in zip(each.rates, bare, strict=True)])
        for name, each in found.items()
        if name != "bare"
    ]
    costs = [row(f"{kind}_us", "us", asyncio.run(added(kind, turns))) for kind in ("otel", "basehttp")]
    rates = [row(f"uvicorn_{name}_per_s", "1/s", each.rates) for name, each in found.items()]
    cpu = [row(f"uvicorn_{name}_cpu_us", "us", each.cpu) for name, each in found.items()]
    return [*ratios, *costs, *rates, *cpu]


if __name__ == "__main__":
    main(rows)
