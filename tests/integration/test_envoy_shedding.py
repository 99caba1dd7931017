"""Envoy drops and counts copies that would queue, and copies to a version in trouble. Users never wait for them."""

from __future__ import annotations

import asyncio
import time

import pytest

from abreast_sidecar.jobs.reports import count_streams
from support import eventually_async
from support_envoy import Abreast, abreast
from support_upstream import Answer, Received, Upstream, ok, respond

CLIENTS = 4
THREADS = 2
SPARE_COPIES = 8  # per thread, as in copy_upstream.lua
SHED = "cluster.{}.lua.copy.shed"


def answer_with(status: int, seconds: float = 0.0) -> Answer:
    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await respond(writer, b"", status)

    return answer


async def send(proxy: Abreast, count: int) -> list[float]:
    """Send requests from clients that wait for each response, and return the seconds that each took."""

    async def client() -> list[float]:
        durations = []
        for _ in range(count // CLIENTS):
            started = time.monotonic()
            await proxy.client.get("/")
            durations.append(time.monotonic() - started)
        return durations

    return [seconds for part in await asyncio.gather(*[client() for _ in range(CLIENTS)]) for seconds in part]


async def count_sampled(proxy: Abreast) -> int:
    return sum(count_streams(await proxy.stats("http.ingress.lua.copies.sampled")).values())


@pytest.mark.parametrize("weight", [0.0, 1.0])
async def test_copies_in_flight_are_bounded_by_live_requests(weight: float) -> None:
    """The other version hangs. Its copies are dropped, and sent again once it responds."""
    release = asyncio.Event()

    async def hang(request: Received, writer: asyncio.StreamWriter) -> None:
        if request.role == "shadow":
            await release.wait()
        await ok(request, writer)

    old, new = Upstream(answer=hang), Upstream(answer=hang)
    async with abreast(old=old, new=new, weight=weight, shadow_timeout=600.0) as proxy:  # no copy ends before `release`
        other, cluster = (proxy.old, "old_shadow") if weight else (proxy.new, "new_shadow")
        durations = await send(proxy, 400)
        shed = await proxy.stat(SHED.format(cluster))
        copies = len(other.in_role("shadow"))

        assert copies <= THREADS * (SPARE_COPIES + 2 * CLIENTS)
        assert copies + shed == await count_sampled(proxy) == 400
        assert await proxy.stat(f"cluster.{cluster}.lua.copy.sent") == copies
        assert sorted(durations)[360] < 1.0, "users wait for no copy"

        release.set()
        await proxy.settled()
        await asyncio.sleep(1.1)  # copies are counted again once a second
        await send(proxy, 40)
        await proxy.settled()
        assert await proxy.stat(SHED.format(cluster)) == shed
        assert await proxy.stat(f"cluster.{cluster}.lua.copy.answered") == len(other.in_role("shadow")) == copies + 40


async def test_version_that_keeps_up_gets_all_copies() -> None:
    slow = answer_with(200, 0.02)
    async with abreast(old=Upstream(answer=slow), new=Upstream(answer=slow), baseline_share=1.0) as proxy:
        await send(proxy, 400)
        await proxy.settled()

        assert len(proxy.new.in_role("shadow")) == len(proxy.old.in_role("baseline")) == 400


async def test_baseline_copies_stop_while_old_fails() -> None:
    """The requests stay pairs of two. New gets its copies."""
    old = Upstream(answer=answer_with(500))
    async with abreast(old=old, baseline_share=1.0) as proxy:
        await send(proxy, 200)
        await proxy.settled()
        baselines = len(old.in_role("baseline"))

        assert baselines < 100
        assert baselines + await proxy.stat("http.ingress.lua.copies.baseline_shed_failing") == 200
        assert len(proxy.new.in_role("shadow")) == 200
        assert [request.captures for request in proxy.new.in_role("shadow")].count(3) == baselines
        assert {request.captures for request in old.in_role("live")[-20:]} == {2}


async def test_copies_to_a_version_stop_while_its_live_requests_fail() -> None:
    """Users are on both versions, and old fails: requests to new get no copy at old, and are not sampled."""
    old = Upstream(answer=answer_with(500))
    async with abreast(old=old, weight=0.5) as proxy:
        await send(proxy, 400)
        await proxy.settled()
        not_sampled = await proxy.stat("http.ingress.lua.copies.shed_failing")

        assert not_sampled > 50
        assert await count_sampled(proxy) == 400 - not_sampled
        assert len(old.in_role("shadow")) < 100
        assert [request.role for request in proxy.new.received if not request.pair] == ["live"] * not_sampled


async def test_copies_stop_while_live_requests_queue() -> None:
    seconds = 0.0

    async def answer(_request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await respond(writer, b"", 200)

    old = Upstream(answer=answer)
    async with abreast(old=old, baseline_share=1.0) as proxy:
        await send(proxy, 2400)
        await proxy.settled()
        assert await proxy.stat("http.ingress.lua.copies.baseline_shed_queueing") == 0
        seconds = 0.2

        async def is_shed() -> bool:
            await send(proxy, 20)
            return await proxy.stat("http.ingress.lua.copies.baseline_shed_queueing") > 0

        await eventually_async(is_shed, description="baseline copies stop")
