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
        eventually(lambda: is_answering("127.0.0.1", port, HEALTH, b" 200 OK"), what=f"{name} answers")
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
        Stack(settings, settings={"ABREAST_NEW_SHARE": "0.5"}) as found,
        version("old", old.port, found),
        version("new", new.port, found),
    ):
        yield found


@pytest.fixture
async def load(stack: Stack) -> AsyncIterator[Users]:
    listen = stack.envoy_settings.listen.port
    async with users(listen, readers=4, writers=0, paths=("/products/{}",)) as found:

        async def both() -> bool:
            return {one.version for one in await found.more(20)} == {"old", "new"}

        await eventually_async(both, what="both versions answer")
        yield found


def pairs(stack: Stack) -> int:
    with psycopg.connect(stack.postgres_url) as ledger:
        (row,) = ledger.execute("select count(*) from abreast.pair").fetchall()
        return int(row[0])


async def evidence_goes_on(stack: Stack) -> None:
    before = await asyncio.to_thread(pairs, stack)

    async def more() -> bool:
        return await asyncio.to_thread(pairs, stack) > before + 20

    await eventually_async(more, what="new pairs arrive in the ledger")


async def test_users_do_not_notice_outages_of_redis_postgres_and_sidecar(stack: Stack, load: Users) -> None:
    began = len(load.seen)
    for name in ("redis", "postgres", "sidecar"):
        server = stack.servers[name]
        assert server.process is not None
        with frozen(server.process.pid):
            await load.more(SOME)
        server.process.popen.kill()
        server.process.popen.wait()
        await load.more(SOME)
        shares = {one.version for one in load.seen[-SOME:]}
        await asyncio.to_thread(server.start)
        await load.more(SOME)

        assert shares == {"old", "new"}, "Envoy keeps the last shares"
    await evidence_goes_on(stack)
    seen = load.seen[began:]

    assert [one for one in seen if one.trouble] == []
    assert max(one.seconds for one in seen) < LONGEST


async def test_envoy_restarted_without_sidecar_serves_from_old(stack: Stack, load: Users) -> None:
    stack.sidecar.stop()
    await asyncio.to_thread(stack.envoy.stop)
    await asyncio.to_thread(stack.envoy.start)

    async def served() -> bool:
        return all(not one.trouble and one.version == "old" for one in await load.more(SOME))

    await eventually_async(served, what="old answers everyone")
    await asyncio.to_thread(stack.sidecar.start)

    async def again() -> bool:
        return any(one.version == "new" for one in await load.more(20))

    await eventually_async(again, what="new answers its share again")
