"""The guard of a running sidecar, with evidence that the tests write to its ledger."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import rollout_pb2 as pb
from abreast.v1 import traffic_pb2
from abreast_sidecar.envoy.settings import SocketAddress
from support import eventually_async, find_free_port
from support_edge import edge
from support_rollout import add, events, set_guard, set_share
from support_serve import Ledger, RunningSidecar, refused, run_sidecar

pytestmark = pytest.mark.postgres


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=1.0) as instance:
        instance.ledger().endpoint("shop")
        yield instance


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    return sidecar.ledger()


async def guard(sidecar: RunningSidecar) -> pb.Guard:
    return (await sidecar.rollout.GetGuard(pb.GetGuardRequest())).guard


async def saw(sidecar: RunningSidecar, *states: str) -> pb.Guard:
    """Wait until the guard has looked at what is there now."""
    since = dt.datetime.now(dt.UTC)
    expected = {pb.GuardState.Value(f"GUARD_STATE_{state}") for state in states}

    async def has_state() -> bool:
        status = await guard(sidecar)
        return status.evaluate_time.ToDatetime(dt.UTC) > since and status.state in expected

    await eventually_async(has_state, description=f"the guard looks, and is {states}")
    return await guard(sidecar)


async def rolled_back(sidecar: RunningSidecar) -> traffic_pb2.Traffic:
    async def back() -> bool:
        response = await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest())
        return response.traffic.rolled_back

    await eventually_async(back, within=60, description="the guard rolls back")
    return (await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest())).traffic


async def test_guard_is_off_by_default(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_share(sidecar, 0.5)
    add(ledger, 100, live="new", new_status=500)

    status = await guard(sidecar)

    assert (status.policy.mode, status.state, status.message) == (pb.GUARD_MODE_OFF, pb.GUARD_STATE_IDLE, "off")
    assert (status.policy.errors.limit, status.policy.errors.min_pairs) == (0.001, 10)
    assert not status.HasField("update_time")


async def test_guard_rolls_back_on_errors_of_live_users(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """It takes two seconds; the bound is for a loaded machine."""
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)
    add(ledger, 200)
    await saw(sidecar, "CLEAR", "BLIND")

    add(ledger, 20, live="new", new_status=500, outcome="mismatch")
    written_at = time.monotonic()
    traffic = await rolled_back(sidecar)
    duration = time.monotonic() - written_at

    event = (await events(sidecar))[0]
    assert duration < 5, f"{duration:.2f} s"
    assert traffic.new_share == 0
    assert (event.action, event.actor) == ("rollback", "guard")
    assert event.reason.startswith("errors: new failed 20 of 20 users' requests that old answered (100%")
    assert (event.before.new_share, event.after.new_share, event.after.rolled_back) == (0.5, 0.0, True)
    assert event.guard_after.mode == pb.GUARD_MODE_ACTING
    assert (await saw(sidecar, "IDLE")).message == "all users are on old"


async def test_guard_counts_failed_over_requests(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """A failover hides errors of new from users, not from the guard."""
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)

    add(ledger, 20, live="old", failed_over=True, new_status=None, outcome="only_old")
    await rolled_back(sidecar)

    assert "new failed 20 of 20" in (await events(sidecar))[0].reason


async def test_guard_ignores_errors_of_shadows_and_of_both_versions(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)

    add(ledger, 50, live="old", new_status=500)  # a copy
    add(ledger, 50, live="new", old_status=500, new_status=500)
    add(ledger, 30, live="new", old_status=500, new_status=200)
    add(ledger, 30, live="new", old_status=200, new_status=500)
    status = await saw(sidecar, "CLEAR", "BLIND")

    assert [event.action for event in await events(sidecar)] == ["update", "guard_set", "create"]
    assert status.state != pb.GUARD_STATE_BREACHED


@pytest.mark.parametrize("state", ["real", "undecided", "noise"])
async def test_guard_counts_only_real_mismatches(sidecar: RunningSidecar, ledger: Ledger, state: str) -> None:
    finding = ledger.finding(ledger.endpoint(), "$.price", state=state)
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)

    add(ledger, 100, findings=[finding], outcome="mismatch")
    if state == "real":
        await rolled_back(sidecar)
        assert "100 of 100 pairs have unexplained mismatches" in (await events(sidecar))[0].reason
    else:
        await saw(sidecar, "CLEAR", "BLIND")
        assert (await events(sidecar))[0].action == "update"


async def test_guard_rolls_back_on_slower_responses(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_guard(sidecar, "ACTING", slower=pb.GuardRule(limit=0.5))
    await set_share(sidecar, 0.5)
    add(ledger, 150, old_us=1000, new_us=1400)
    await saw(sidecar, "CLEAR", "BLIND")

    add(ledger, 600, old_us=1000, new_us=1600)
    await rolled_back(sidecar)

    assert "slower than old's by more than 50%" in (await events(sidecar))[0].reason


async def test_guard_ignores_the_cost_of_copies(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_guard(sidecar, "ACTING", slower=pb.GuardRule(limit=0.5))
    await set_share(sidecar, 0.5)
    add(ledger, 600, live="old", old_us=1000, new_us=2000)
    ledger.execute("update abreast.pair set baseline_us = 2000")
    await saw(sidecar, "CLEAR", "BLIND")
    assert (await events(sidecar))[0].action != "rollback"

    ledger.execute("update abreast.pair set baseline_us = 1000")
    await rolled_back(sidecar)


async def test_guard_in_watching_mode_only_records(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_guard(sidecar, "WATCHING")
    await set_share(sidecar, 0.5)

    add(ledger, 20, live="new", new_status=500)
    status = await saw(sidecar, "BREACHED")
    await saw(sidecar, "BREACHED")  # it has looked again, and cools down

    actions = [(event.action, event.actor) for event in await events(sidecar)]
    assert actions == [
        ("guard_would_roll_back", "guard"),
        ("update", "ada"),
        ("guard_set", "ada"),
        ("create", "sidecar"),
    ]
    event = (await events(sidecar))[0]
    assert event.before == event.after
    assert event.after.new_share == 0.5
    assert status.state == pb.GUARD_STATE_BREACHED


async def test_guard_ignores_evidence_before_the_last_exposure(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """A second attempt with a fixed new must not be rolled back for the errors of the first."""
    await set_guard(sidecar, "ACTING", errors=pb.GuardRule(cooldown=Duration()))
    await set_share(sidecar, 0.5)
    add(ledger, 20, live="new", new_status=500)
    await rolled_back(sidecar)

    await set_share(sidecar, 0.1)
    await saw(sidecar, "CLEAR", "BLIND")
    last_event = (await events(sidecar))[0]
    add(ledger, 20, live="new", new_status=500)
    await rolled_back(sidecar)

    assert (last_event.action, last_event.after.new_share) == ("update", 0.1)
    assert [event.actor for event in await events(sidecar)][:3] == ["guard", "ada", "guard"]


async def test_guard_pauses_for_its_cool_down(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """A user who overrides the guard keeps control for the cool-down period."""
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)
    add(ledger, 20, live="new", new_status=500)
    await rolled_back(sidecar)

    await set_share(sidecar, 0.1)
    add(ledger, 50, live="new", new_status=500)
    status = await saw(sidecar, "BREACHED")

    assert (await events(sidecar))[0].action == "update"
    assert status.message == "cooling down after: errors"


async def test_guard_is_blind_without_a_count_of_envoy(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await set_guard(sidecar, "ACTING")
    await set_share(sidecar, 0.5)
    add(ledger, 20)

    status = await saw(sidecar, "BLIND")

    assert status.message == "no Envoy's count is known; set ABREAST_ENVOY_ADMIN"
    metrics = (await sidecar.http.get("/metrics")).text
    assert 'abreast_guard_blind{service="shop"} 1.0' in metrics
    assert "abreast_leader 1.0" in metrics


async def test_guard_is_blind_while_an_envoy_overrides_the_settings(redis_url: str, postgres_url: str) -> None:
    """The settings say that all users are on old."""
    admin = SocketAddress("127.0.0.1", find_free_port())
    async with (
        run_sidecar(redis_url, postgres_url, envoy_admin=(f"127.0.0.1:{admin.port}",)) as sidecar,
        edge(sidecar.port, admin=admin) as envoy,
    ):
        await set_guard(sidecar, "ACTING")
        override = "/runtime_modify?abreast.weight.old=0&abreast.weight.new_or_old=10000"
        await asyncio.to_thread(envoy.server.ask_admin, "POST", override)
        status = await saw(sidecar, "BLIND")

    assert f"Envoy edge-1@127.0.0.1:{admin.port} overrides the sidecar" in status.message


async def test_guard_policy_change_is_recorded(sidecar: RunningSidecar) -> None:
    await set_guard(sidecar, "WATCHING", errors=pb.GuardRule(limit=0.02, window=Duration(seconds=60)))
    await set_guard(sidecar, "WATCHING", errors=pb.GuardRule(limit=0.02))  # no change

    (event, _) = await events(sidecar)
    assert (event.action, event.actor, event.reason) == ("guard_set", "ada", "because")
    assert (event.guard_before.errors.limit, event.guard_after.errors.limit) == (0.001, 0.02)
    assert (event.guard_before.mode, event.guard_after.mode) == (pb.GUARD_MODE_OFF, pb.GUARD_MODE_WATCHING)
    assert event.guard_after.errors.window.seconds == 60
    assert event.guard_after.errors.min_pairs == 10


async def test_guard_rejects_invalid_policies(sidecar: RunningSidecar) -> None:
    for policy, message_part in (
        (pb.GuardPolicy(), "set at least one field of policy"),
        (pb.GuardPolicy(errors=pb.GuardRule(limit=1.5)), "policy.errors.limit must be a share from 0 to 1"),
        (pb.GuardPolicy(slower=pb.GuardRule(min_pairs=0)), "policy.slower.min_pairs must be 1 to"),
        (pb.GuardPolicy(mismatches=pb.GuardRule(window=Duration(seconds=1))), "policy.mismatches.window must be"),
        (pb.GuardPolicy(confidence=1.0), "policy.confidence must be above 0 and below 1"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await sidecar.rollout.SetGuard(pb.SetGuardRequest(policy=policy))

        message = refused(error.value)
        assert message.code is grpc.StatusCode.INVALID_ARGUMENT, message_part
        assert message_part in message.message
