"""Connections between Envoy and the versions: services that accept slowly, close idle connections, or log connections in."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import pytest

from abreast_sidecar.stack.process import ServerProcess, is_port_free
from support import eventually_async, find_free_port
from support_envoy import abreast
from support_upstream import Answer, Received, Upstream, respond, slow

BENCH = Path(__file__).parents[2] / "bench"


@dataclass
class SlowToAccept(Upstream):
    """Its queue of connections is full until `accept`, as that of a busy service. The kernel then drops new ones."""

    listener: socket.socket | None = None
    queued: list[socket.socket] = field(default_factory=list)

    async def start(self) -> Self:
        self.reading.set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port = self.listener.getsockname()[1]
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", self.port))
            self.queued.append(client)
        return self

    async def accept(self) -> None:
        for client in self.queued:
            client.close()
        self._server = await asyncio.start_server(self._connection, sock=self.listener, limit=2**20)


async def test_old_may_take_seconds_to_accept_a_connection() -> None:
    async with abreast(old=SlowToAccept(), sample_safe=0.0) as proxy:
        assert isinstance(proxy.old, SlowToAccept)
        requests = [asyncio.create_task(proxy.client.request(method, "/", timeout=60)) for method in ("GET", "POST")]
        await asyncio.sleep(2.5)  # two attempts of one second each would have failed by now
        assert not any(request.done() for request in requests)
        await proxy.old.accept()

        assert [(await request).status_code for request in requests] == [200, 200]


async def test_endpoint_that_drops_packets_delays_a_request_by_seconds_if_another_can_answer() -> None:
    async with SlowToAccept() as full:
        async with abreast(more_old=(full.port,), sample_safe=0.0) as proxy:
            requests = [asyncio.create_task(proxy.client.get("/", timeout=20)) for _ in range(4)]

            assert {(await request).status_code for request in requests} == {200}
            assert await proxy.stat("cluster.old.upstream_cx_connect_timeout") > 0
        await full.accept()


def closing_after(seconds: float) -> Answer:
    """Close a connection that is idle for this time, as gunicorn does after two seconds."""
    timers: dict[asyncio.StreamWriter, asyncio.TimerHandle] = {}

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        if timer := timers.pop(writer, None):
            timer.cancel()
        await respond(writer, b"ok")
        timers[writer] = asyncio.get_running_loop().call_later(seconds, writer.close)

    return answer


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_request_meets_an_idle_connection_that_the_service_closes(method: str) -> None:
    """Each client pauses for about as long as the service keeps idle connections."""
    async with abreast(old=Upstream(answer=closing_after(2.0)), sample_safe=0.0) as proxy:

        async def client(number: int) -> list[int]:
            statuses = []
            for turn in range(4):
                statuses.append((await proxy.client.request(method, "/")).status_code)
                await asyncio.sleep(0.9 + 0.05 * ((number + turn) % 24))
            return statuses

        statuses = await asyncio.gather(*[client(number) for number in range(48)])

    assert {status for part in statuses for status in part} == {200}


@dataclass
class RealServer(Upstream):
    """A Python server with its defaults, which serves bench/echo.py."""

    command: tuple[str, ...] = ()
    log: Path = Path()
    process: ServerProcess | None = None

    async def start(self) -> Self:
        self.port = find_free_port()
        command = [sys.executable, "-m", *(part.format(bench=BENCH, port=self.port) for part in self.command)]
        self.process = ServerProcess.start(
            self.command[0], command, self.log, is_ready=lambda _: not is_port_free("127.0.0.1", self.port)
        )
        return self

    async def stop(self) -> None:
        assert self.process is not None
        self.process.stop()


SERVERS = {
    "gunicorn": ("gunicorn", "echo:wsgi", "--chdir={bench}", "--bind=127.0.0.1:{port}", "--worker-class=gthread"),
    "uvicorn": ("uvicorn", "echo:asgi", "--app-dir={bench}", "--port={port}"),
}


@pytest.mark.parametrize("name", SERVERS)
async def test_idle_connection_is_closed_before_a_server_with_defaults_closes_it(name: str, tmp_path: Path) -> None:
    async with abreast(old=RealServer(command=SERVERS[name], log=tmp_path / "log"), sample_safe=0.0) as proxy:
        for _ in range(2):
            requests = [proxy.client.request(method, "/") for method in ("GET", "POST") * 10]
            assert {response.status_code for response in await asyncio.gather(*requests)} == {200}

            async def closed() -> bool:
                return await proxy.stat("cluster.old.upstream_cx_active") == 0

            await eventually_async(closed, description="every connection is closed")

        by_envoy, by_server = [
            await proxy.stat(f"cluster.old.upstream_cx_destroy_{side}") for side in ("local", "remote")
        ]
        assert by_server <= by_envoy // 10, "Envoy may be late on a machine under load"
        assert by_envoy > 0


def logging_in() -> Answer:
    """Log a connection in with its first request, as NTLM does, and respond with the user of the connection."""
    users: dict[asyncio.StreamWriter, str] = {}

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        if user := request.headers.get("authorization", "").removeprefix("NTLM "):
            users[writer] = user
        await respond(writer, users.get(writer, "nobody").encode())

    return answer


async def test_login_of_a_connection_stays_with_its_client() -> None:
    async with abreast(
        old=Upstream(answer=logging_in()),
        new=Upstream(answer=logging_in()),
        connection_per_client=True,
        sample_safe=1.0,
    ) as proxy:
        clients = {name: httpx.AsyncClient(base_url=proxy.client.base_url) for name in ("ada", "bob", "cleo")}
        for name, client in clients.items():
            await client.get("/", headers={"authorization": f"NTLM {name}"})
        for _ in range(5):
            responses = await asyncio.gather(*[client.get("/") for client in clients.values()])
            assert [response.text for response in responses] == list(clients)
        await asyncio.gather(*[client.aclose() for client in clients.values()])
        await proxy.client.get("/anonymous")
        await proxy.wait_for_requests(proxy.new, 1)
        await proxy.settled()

        assert [copy.path for copy in proxy.new.received] == ["/anonymous"], "a copy would have no login"
        assert not [live for live in proxy.old.received if live.pair and live.path != "/anonymous"]


async def test_login_of_a_connection_is_counted_without_the_setting() -> None:
    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        await respond(writer, b"", 401, headers="www-authenticate: Negotiate\r\nwww-authenticate: NTLM\r\n")

    async with abreast(old=Upstream(answer=answer)) as proxy:
        await proxy.client.get("/")

        assert await proxy.stat("http.ingress.lua.copies.connection_logins") == 1


@pytest.mark.parametrize("stated", ["https", "http"])
async def test_scheme_of_a_proxy_on_this_machine_is_kept(stated: str) -> None:
    async with abreast() as proxy:
        await proxy.client.get("/", headers={"x-forwarded-proto": stated, "x-forwarded-for": "203.0.113.7"})
        await proxy.wait_for_requests(proxy.new, 1)

        [live], [copy] = proxy.old.received, proxy.new.received
        assert live.headers["x-forwarded-proto"] == copy.headers["x-forwarded-proto"] == stated
        assert live.headers["x-forwarded-for"].startswith("203.0.113.7,")


async def _use_until_closed(port: int, outcomes: list[str]) -> None:
    """Send requests over one connection until a response or an error closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b""
    try:
        while b"connection: close" not in head:
            writer.write(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        outcomes.append("closed")
    except (OSError, asyncio.IncompleteReadError) as error:
        outcomes.append(type(error).__name__)
    finally:
        writer.close()


async def test_stopping_breaks_no_request_of_a_connection_in_use() -> None:
    outcomes: list[str] = []
    async with abreast(old=Upstream(answer=slow(0.5)), new=Upstream(answer=slow(0.5))) as proxy:
        users = [asyncio.create_task(_use_until_closed(proxy.port, outcomes)) for _ in range(20)]
        await asyncio.sleep(1.2)
        await asyncio.to_thread(proxy.server.stop)
        await asyncio.gather(*users)
        await asyncio.to_thread(proxy.server.start)

    assert outcomes == ["closed"] * 20


async def test_server_of_one_connection_at_a_time_does_not_stall() -> None:
    """A server that works on after a response blocks its connection; the next request must not wait behind it."""
    busy: dict[asyncio.StreamWriter, float] = {}

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        if wait := busy.get(writer, 0.0) - loop.time():
            await asyncio.sleep(max(wait, 0.0))
        await respond(writer, b"ok")
        busy[writer] = loop.time() + 5.0

    async with abreast(old=Upstream(answer=answer), sample_safe=0.0, max_requests_per_connection=1) as proxy:
        start = asyncio.get_running_loop().time()
        statuses = [(await proxy.client.get("/")).status_code for _ in range(6)]

        assert statuses == [200] * 6
        assert asyncio.get_running_loop().time() - start < 5.0
