"""Two versions as processes with faults, behind two Envoys: one sends all users to new, the other half of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import is_answering
from abreast_sidecar.stack.servers import EnvoyServer
from support import eventually_async, free_ports
from support_envoy import started, weights
from support_rtds import RuntimeServer
from support_users import Users, users

SERVICE = Path(__file__).parent / "drill_service.py"
TRY_TIMEOUT = 2.0  # seconds per try; a healthy version on a loaded machine must be faster
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\n\r\n"


@dataclass
class Version:
    name: str
    port: int
    orders: Path
    process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        self.process = subprocess.Popen([sys.executable, SERVICE, str(self.port), self.name, self.orders])

    async def start(self) -> None:
        self.spawn()

        async def up() -> bool:
            return await asyncio.to_thread(is_answering, "127.0.0.1", self.port, HEALTH, b"HTTP/1.1 200")

        await eventually_async(up, description=f"{self.name} answers")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    async def be(self, mode: str) -> None:
        await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{self.port}/be/{mode}", timeout=30)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass
class Front:
    """One Envoy with its users."""

    share: float
    users: Users
    sidecar: RuntimeServer
    envoy: EnvoyServer

    async def stat(self, name: str) -> int:
        url = f"{self.envoy.admin_url}/stats?filter=^{name}$"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=30).read().decode())  # noqa: S310  # ours
        return int(text.rpartition(":")[2] or 0)

    async def new_is(self, count: int) -> None:
        """Wait until so many endpoints of new are healthy."""

        async def reached() -> bool:
            return await self.stat("cluster.new.membership_healthy") == count

        await eventually_async(reached, description=f"{count} endpoints of new are healthy")

    async def new_is_left_alone(self) -> None:
        await self.new_is(0)

        async def left_alone() -> bool:
            return {response.version for response in await self.users.wait_for(20)} == {"old"}

        await eventually_async(left_alone, description="old answers everyone")

    async def new_answers(self) -> None:
        async def back() -> bool:
            return any(response.version == "new" for response in await self.users.wait_for(5))

        await eventually_async(back, description="new answers users")


@dataclass
class Drill:
    old: Version
    new: Version
    fronts: list[Front]

    def executions(self) -> Counter[str]:
        """Return how often the versions executed each order."""
        return Counter(self.new.orders.read_text().split())


@asynccontextmanager
async def drill(folder: Path, *, new_runs: bool = True) -> AsyncIterator[Drill]:
    ports = free_ports(8)
    orders = folder / "orders"
    orders.touch()
    old, new = Version("old", ports[0], orders), Version("new", ports[1], orders)
    async with AsyncExitStack() as opening:
        opening.callback(old.end)
        opening.callback(new.end)
        await asyncio.gather(old.start(), *([new.start()] if new_runs else []))
        fronts = await asyncio.gather(
            opening.enter_async_context(front(old, new, 1.0, ports[2:5])),
            opening.enter_async_context(front(old, new, 0.5, ports[5:8])),
        )
        if new_runs:
            await asyncio.gather(*[entry.new_answers() for entry in fronts])
        yield Drill(old, new, list(fronts))


@asynccontextmanager
async def front(old: Version, new: Version, share: float, ports: tuple[int, ...]) -> AsyncIterator[Front]:
    listen, admin, sidecar = (SocketAddress("127.0.0.1", port) for port in ports)
    settings = EnvoySettings(
        listen=listen,
        admin=admin,
        sidecar=sidecar,
        old=(SocketAddress("127.0.0.1", old.port),),
        new=(SocketAddress("127.0.0.1", new.port),),
        per_try_timeout=TRY_TIMEOUT,
        sample_safe=0.2,
    )
    async with (
        RuntimeServer(sidecar.port, weights(share)) as server,
        started(settings) as envoy,
        users(listen.port) as load,
    ):
        yield Front(share, load, server, envoy)
