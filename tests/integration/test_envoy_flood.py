"""A flood of copies at a new that hangs: users do not notice, and Envoy keeps no more of them than it may."""

from __future__ import annotations

import asyncio
import time

from support import eventually_async
from support_envoy import Abreast, abreast

COPIES = 8  # under way at once
BODY = b"x" * 200_000
REQUESTS = 240  # 48 MB of bodies
HEAD_ROOM = 25_000_000  # bytes: what 8 copies hold, the upload under way, and what an allocator does not give back


async def allocated(proxy: Abreast) -> int:
    answer = (await proxy.admin.get("/memory")).json()
    return int(answer["allocated"])


async def test_flood_of_copies_does_not_affect_users_and_memory_is_bounded() -> None:
    async with abreast(sample_unsafe=1.0, shadow_concurrency=COPIES, shadow_timeout=60.0) as proxy:
        proxy.new.reading.clear()
        await proxy.client.post("/", content=BODY)
        before = await allocated(proxy)
        start, most = time.monotonic(), 0
        for _ in range(REQUESTS // 20):
            answers = await asyncio.gather(*[proxy.client.post("/", content=BODY) for _ in range(20)])
            most = max(most, await allocated(proxy))
            assert {answer.status_code for answer in answers} == {200}
        duration = time.monotonic() - start

        assert most - before < HEAD_ROOM
        assert duration < 60, "a copy that is waited for takes 60 s"
        await count_copies(proxy)
        assert len(proxy.old.in_role("live")) == REQUESTS + 1


async def count_copies(proxy: Abreast) -> None:
    """Each is with new, waits for a connection, or is counted as done: dropped, or not connected in time."""
    names = ("upstream_rq_active", "upstream_rq_pending_active", "upstream_rq_completed")

    async def all_of_them() -> bool:
        return sum([await proxy.stat(f"cluster.new_shadow.{name}") for name in names]) == REQUESTS + 1

    await eventually_async(all_of_them, description="every copy is accounted for")
    for name in ("upstream_rq_active", "upstream_rq_pending_active"):
        assert 0 < await proxy.stat(f"cluster.new_shadow.{name}") <= COPIES
