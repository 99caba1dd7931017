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
from support_users import UserResponse

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


async def failing(under: Drill) -> None:
    """Fail one route until old answers its users, then fail all."""
    await under.new.be("failing-items")
    for front in under.fronts:
        assert "old" in {response.version for response in await front.users.wait_for(BROKEN)}
    await under.new.be("failing")


async def starting(under: Drill) -> None:
    await under.new.start()


DRILLS: dict[str, tuple[Step, Step]] = {  # how it breaks, and how it recovers
    "killed": (sending(signal.SIGKILL), starting),
    "stopped": (sending(signal.SIGSTOP), sending(signal.SIGCONT)),
    "answers 5xx, first for one route": (failing, being("well")),
    "answers after 30 s": (being("slow"), being("well")),
    "health check fails": (being("ill"), being("well")),
}
FOUND_BY_THE_HEALTH_CHECK = {"killed", "stopped", "health check fails"}


def assert_users_unharmed(responses: list[UserResponse]) -> None:
    assert [response for response in responses if response.trouble] == []
    waits = sorted(response.seconds for response in responses)
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
        during = await asyncio.gather(*[front.users.wait_for(BROKEN) for front in under.fronts])
        if name in FOUND_BY_THE_HEALTH_CHECK:
            await asyncio.gather(*[front.new_is_left_alone() for front in under.fronts])
        else:
            assert all(any(response.version == "old" for response in responses) for responses in during)
        await recovered(under)
        await asyncio.gather(*[front.new_answers() for front in under.fronts])

        for front in under.fronts:
            assert_users_unharmed(front.users.safe())
        nothing_twice(under)


async def test_users_see_only_truncated_responses_and_envoy_counts_them(tmp_path: Path) -> None:
    """Half an answer that is on its way can't be taken back."""
    async with drill(tmp_path) as under:
        await under.new.be("cutting")
        await asyncio.gather(*[front.users.wait_for(CUT) for front in under.fronts])
        await under.new.be("well")
        await asyncio.gather(*[front.new_answers() for front in under.fronts])
        await asyncio.gather(*[front.users.wait_for(10) for front in under.fronts])

        for front in under.fronts:
            await assert_only_truncated(front)
        nothing_twice(under)


async def assert_only_truncated(front: Front) -> None:
    truncated = [response for response in front.users.responses if response.trouble == "cut off"]
    resets = await front.stat("cluster.new.upstream_cx_destroy_remote_with_active_rq")

    assert {response.trouble for response in front.users.safe()} == {"", "cut off"}
    assert {response.version for response in truncated} == {"new"}
    assert resets >= len(truncated)


async def test_users_do_not_notice_that_new_never_started(tmp_path: Path) -> None:
    async with drill(tmp_path, new_runs=False) as under:
        for front in under.fronts:
            await front.users.wait_for(BROKEN)
            assert {response.version for response in front.users.safe()} == {"old"}
        await under.new.start()
        await asyncio.gather(*[front.new_answers() for front in under.fronts])

        for front in under.fronts:
            assert_users_unharmed(front.users.responses)
        nothing_twice(under)


async def test_recovered_new_gets_no_users_after_rollback(tmp_path: Path) -> None:
    async with drill(tmp_path) as under:
        under.new.send(signal.SIGKILL)
        for front in under.fronts:
            await front.sidecar.set({"abreast.weight.old": 10_000, "abreast.weight.new_or_old": 0})
        await under.new.start()
        await asyncio.gather(*[front.new_is(1) for front in under.fronts])
        after = await asyncio.gather(*[front.users.wait_for(40) for front in under.fronts])

        assert {response.version for front in after for response in front} == {"old"}
        for front in under.fronts:
            assert_users_unharmed(front.users.safe())
