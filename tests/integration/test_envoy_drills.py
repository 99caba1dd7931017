"""The new version fails under constant load, for all users and for half of them: nobody notices.

Drills with a failing new: safe requests succeed in time, no order executes twice, and new returns after recovery.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support_drill import TRY_TIMEOUT, Drill, Front, drill
from support_users import Seen

BROKEN = 60  # answers to users while new is broken
CUT = 12  # as long as half of them are cut: Envoy closes such a connection after a second
SLACK = 1.5  # seconds
UPSTREAM_TIMEOUT = 30.0  # seconds that users of a slow version wait without a second try

Step = Callable[[Drill], Awaitable[None]]


def sending(number: signal.Signals) -> Step:
    async def step(under: Drill) -> None:
        under.new.send(number)

    return step


def being(mode: str) -> Step:
    async def step(under: Drill) -> None:
        await under.new.be(mode)

    return step


async def starting(under: Drill) -> None:
    await under.new.start()


DRILLS: dict[str, tuple[Step, Step]] = {  # how it breaks, and how it recovers
    "killed": (sending(signal.SIGKILL), starting),
    "stopped": (sending(signal.SIGSTOP), sending(signal.SIGCONT)),
    "answers 5xx": (being("failing"), being("well")),
    "answers 5xx for one route": (being("failing-items"), being("well")),
    "answers after 30 s": (being("slow"), being("well")),
    "health check fails": (being("ill"), being("well")),
}
FOUND_BY_THE_HEALTH_CHECK = {"killed", "stopped", "health check fails"}


def unharmed(seen: list[Seen]) -> None:
    assert [one for one in seen if one.trouble] == []
    waits = sorted(one.seconds for one in seen)
    assert waits[len(waits) * 9 // 10] < TRY_TIMEOUT + SLACK
    assert waits[-1] < UPSTREAM_TIMEOUT / 2


def nothing_twice(under: Drill) -> None:
    executions = under.executions()
    assert executions
    assert set(executions.values()) == {1}


@pytest.mark.parametrize("name", DRILLS)
async def test_users_do_not_notice_that_new_is(name: str, tmp_path: Path) -> None:
    broken, recovered = DRILLS[name]
    async with drill(tmp_path) as under:
        await broken(under)
        during = await asyncio.gather(*[one.users.more(BROKEN) for one in under.fronts])
        if name in FOUND_BY_THE_HEALTH_CHECK:
            await asyncio.gather(*[one.new_is_left_alone() for one in under.fronts])
        else:
            assert all(any(one.version == "old" for one in seen) for seen in during)
        await recovered(under)
        await asyncio.gather(*[one.new_answers() for one in under.fronts])

        for one in under.fronts:
            unharmed(one.users.safe())
        nothing_twice(under)


async def test_users_see_only_truncated_responses_and_envoy_counts_them(tmp_path: Path) -> None:
    """Half an answer that is on its way can't be taken back."""
    async with drill(tmp_path) as under:
        await under.new.be("cutting")
        await asyncio.gather(*[one.users.more(CUT) for one in under.fronts])
        await under.new.be("well")
        await asyncio.gather(*[one.new_answers() for one in under.fronts])
        await asyncio.gather(*[one.users.more(10) for one in under.fronts])

        for one in under.fronts:
            await only_halves(one)
        nothing_twice(under)


async def only_halves(one: Front) -> None:
    cut = [seen for seen in one.users.seen if seen.trouble == "cut off"]
    counted = await one.stat("cluster.new.upstream_cx_destroy_remote_with_active_rq")

    assert {seen.trouble for seen in one.users.safe()} == {"", "cut off"}
    assert {seen.version for seen in cut} == {"new"}
    assert counted >= len(cut)


async def test_users_do_not_notice_that_new_never_started(tmp_path: Path) -> None:
    async with drill(tmp_path, new_runs=False) as under:
        for one in under.fronts:
            await one.users.more(BROKEN)
            assert {seen.version for seen in one.users.safe()} == {"old"}
        await under.new.start()
        await asyncio.gather(*[one.new_answers() for one in under.fronts])

        for one in under.fronts:
            unharmed(one.users.seen)
        nothing_twice(under)


async def test_recovered_new_gets_no_users_after_rollback(tmp_path: Path) -> None:
    async with drill(tmp_path) as under:
        under.new.send(signal.SIGKILL)
        for one in under.fronts:
            await one.sidecar.set({"abreast.weight.old": 10_000, "abreast.weight.new_or_old": 0})
        await under.new.start()
        await asyncio.gather(*[one.new_is(1) for one in under.fronts])
        after = await asyncio.gather(*[one.users.more(40) for one in under.fronts])

        assert {seen.version for front in after for seen in front} == {"old"}
        for one in under.fronts:
            unharmed(one.users.safe())
