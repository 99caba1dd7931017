"""The whole of Abreast around two services, under constant load: what is not Envoy or a version may fail as it likes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.stack.process import is_answering
from abreast_sidecar.stack.stack import ANY_PORT_ADDRESS, Stack
from support import eventually, eventually_async, free_ports, frozen
from support_users import Users, users

SERVICE = Path(__file__).parents[1] / "small_service.py"
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n"
LONGEST = 1.5  # seconds that a user may wait, on a machine that does other things too
SOME = 120  # answers


@contextmanager
def version(name: str, port: int, stack: Stack) -> Iterator[None]:
    environment = {"ABREAST_REDIS_URL": stack.redis_url, "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([sys.executable, SERVICE, name, str(port)], env=environment)
    try:
        eventually(lambda: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"), description=f"{name} answers")
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Half of the users on new, everything is mirrored."""
    old, new = (SocketAddress("127.0.0.1", port) for port in free_ports(2))
    settings = EnvoySettings(
        service="shop", listen=ANY_PORT_ADDRESS, old=(old,), new=(new,), sample_safe=1.0, baseline_share=0.0
    )
    with (
        Stack(settings, settings={"ABREAST_NEW_SHARE": "0.5"}) as stack,
        version("old", old.port, stack),
        version("new", new.port, stack),
    ):
        yield stack


@pytest.fixture
async def load(stack: Stack) -> AsyncIterator[Users]:
    listen = stack.envoy_settings.listen.port
    async with users(listen, readers=4, writers=0, paths=("/products/{}",)) as load:

        async def has_both_versions() -> bool:
            return {response.version for response in await load.wait_for(20)} == {"old", "new"}

        await eventually_async(has_both_versions, description="both versions answer")
        yield load


def pairs(stack: Stack) -> int:
    with psycopg.connect(stack.postgres_url) as ledger:
        (row,) = ledger.execute("select count(*) from abreast.pair").fetchall()
        return int(row[0])


async def evidence_goes_on(stack: Stack) -> None:
    before = await asyncio.to_thread(pairs, stack)

    async def has_more() -> bool:
        return await asyncio.to_thread(pairs, stack) > before + 20

    await eventually_async(has_more, description="new pairs arrive in the ledger")


async def test_users_do_not_notice_outages_of_redis_postgres_and_sidecar(stack: Stack, load: Users) -> None:
    first = len(load.responses)
    for name in ("redis", "postgres", "sidecar"):
        server = stack.servers[name]
        assert server.process is not None
        with frozen(server.process.pid):
            await load.wait_for(SOME)
        server.process.popen.kill()
        server.process.popen.wait()
        await load.wait_for(SOME)
        shares = {response.version for response in load.responses[-SOME:]}
        await asyncio.to_thread(server.start)
        await load.wait_for(SOME)

        assert shares == {"old", "new"}, "Envoy keeps the last shares"
    await evidence_goes_on(stack)
    responses = load.responses[first:]

    assert [response for response in responses if response.trouble] == []
    assert max(response.seconds for response in responses) < LONGEST


async def test_envoy_restarted_without_sidecar_serves_from_old(stack: Stack, load: Users) -> None:
    stack.sidecar.stop()
    await asyncio.to_thread(stack.envoy.stop)
    await asyncio.to_thread(stack.envoy.start)

    async def served() -> bool:
        return all(not response.trouble and response.version == "old" for response in await load.wait_for(SOME))

    await eventually_async(served, description="old answers everyone")
    await asyncio.to_thread(stack.sidecar.start)

    async def reaches_new() -> bool:
        return any(response.version == "new" for response in await load.wait_for(20))

    await eventually_async(reaches_new, description="new answers its share again")
