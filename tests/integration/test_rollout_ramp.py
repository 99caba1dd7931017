"""Ramps of a running sidecar, with evidence that the tests write to its ledger."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import comparison_pb2, traffic_pb2
from abreast.v1 import rollout_pb2 as pb
from support import eventually_async
from support_rollout import NOW, add, events, moment, sampled, set_guard, set_share
from support_serve import Ledger, Refused, RunningSidecar, refused, run_sidecar

pytestmark = pytest.mark.postgres

WAITING = "select pid from pg_stat_activity where application_name = 'abreast leader' and wait_event_type = 'Lock'"
EASY = comparison_pb2.Budget(max_mismatch=0.05, max_error=0.05, max_slower=1.0)


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=1.0) as instance:
        instance.ledger().endpoint("shop")
        yield instance


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    return sidecar.ledger()


async def start(sidecar: RunningSidecar, *steps: float, hold: float = 0.0, **changes: Any) -> pb.Ramp:
    plan = pb.RampPlan(
        steps=steps,
        hold=Duration(nanos=round(hold * 1e9)),
        min_pairs=changes.pop("min_pairs", 20),
        budget=changes.pop("budget", EASY),
    )
    request = pb.StartRampRequest(plan=plan, actor="ada", reason="release 2")
    return (await sidecar.rollout.StartRamp(request)).ramp


async def ramp(sidecar: RunningSidecar) -> pb.Ramp:
    return (await sidecar.rollout.GetRamp(pb.GetRampRequest())).ramp


async def until(sidecar: RunningSidecar, phase: str, step: int | None = None) -> pb.Ramp:
    async def has_phase() -> bool:
        state = (await ramp(sidecar)).state
        expected = pb.RampPhase.Value(f"RAMP_PHASE_{phase}")
        return bool(state.phase == expected and step in {None, state.step})

    await eventually_async(has_phase, description=f"the ramp is {phase} at step {step}")
    return await ramp(sidecar)


async def wait_for_look(sidecar: RunningSidecar) -> pb.Ramp:
    """Wait until it has looked twice at what is there now: the first may have begun before."""
    for _ in range(2):
        since = moment()

        async def has_looked(since: dt.datetime = since) -> bool:
            return bool((await ramp(sidecar)).evaluate_time.ToDatetime(dt.UTC) > since)

        await eventually_async(has_looked, description="the ramp is looked at")
    return await ramp(sidecar)


async def share(sidecar: RunningSidecar) -> float:
    return (await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest())).traffic.new_share


def good(ledger: Ledger, count: int = 300) -> None:
    add(ledger, count, live="new", new_us=900)
    sampled(ledger)


async def refusal(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return refused(error.value)


async def test_ramp_climbs_to_the_end_on_pass(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    begun = await start(sidecar, 0.01, 0.5, 1.0)
    assert (begun.state.step, await share(sidecar)) == (0, 0.01)

    for step in (1, 2):
        good(ledger)
        await until(sidecar, "PROGRESSING", step)
    good(ledger)
    final = await until(sidecar, "SUCCEEDED")

    changes = [(event.action, event.actor, event.after.new_share) for event in await events(sidecar)]
    assert changes == [
        ("ramp_succeed", "ramp", 1.0),
        ("ramp_step", "ramp", 1.0),
        ("ramp_step", "ramp", 0.5),
        ("ramp_start", "ada", 0.01),
        ("create", "sidecar", 0.0),
    ]
    climbed = (await events(sidecar))[1]
    assert climbed.reason.startswith("the verdict is PASS after 600 pairs, 300 in this step")
    assert (climbed.before.new_share, climbed.ramp_before.step, climbed.ramp_after.step) == (0.5, 1, 2)
    assert final.HasField("end_time")


async def test_ramp_waits_for_evidence(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.01, 1.0)
    good(ledger, 25)

    status = await wait_for_look(sidecar)

    assert status.state.step == 0
    assert status.verdict == comparison_pb2.VERDICT_STATE_INCONCLUSIVE
    assert "the verdict is INCONCLUSIVE: " in status.state.message


async def test_ramp_needs_pairs_and_time_for_each_step(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.01, 0.5, 1.0)
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)
    good(ledger, 19)
    few = await wait_for_look(sidecar)
    good(ledger, 1)
    await until(sidecar, "PROGRESSING", 2)

    assert few.state.message == "19 of 20 pairs were compared in this step"
    assert few.verdict == comparison_pb2.VERDICT_STATE_PASS

    await sidecar.rollout.AbortRamp(pb.AbortRampRequest())
    await start(sidecar, 0.01, 0.5, hold=0.9, min_pairs=1)
    good(ledger)
    assert (
        "holds 1% for another 1 s" in (await wait_for_look(sidecar)).state.message or (await ramp(sidecar)).state.step
    )
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)


async def test_ramp_rolls_back_on_fail(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)

    add(ledger, 100, live="new", new_status=500, outcome="mismatch")
    sampled(ledger)
    final = await until(sidecar, "FAILED")

    event = (await events(sidecar))[0]
    assert (event.action, event.actor, event.after.rolled_back) == ("rollback", "ramp", True)
    assert "the verdict since the ramp began is FAIL: 100 of 100 pairs have errors of new" in event.reason
    assert await share(sidecar) == 0
    assert final.state.message.startswith("rolled back from 25%")
    assert final.verdict == comparison_pb2.VERDICT_STATE_FAIL


async def test_ramp_rolls_back_on_a_defect_of_the_last_step(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.01, 1.0)
    good(ledger, 5000)
    await until(sidecar, "PROGRESSING", 1)

    add(ledger, 40, live="new", new_status=500, outcome="mismatch")
    sampled(ledger)
    await until(sidecar, "FAILED")

    assert "the verdict since 100% is FAIL" in (await events(sidecar))[0].reason


@pytest.mark.parametrize(
    ("beyond", "age", "message"),
    [
        (100, -600.0, "the ledger has 300 of 400 requests sampled in this step, 99% are required"),
        (0, 60.0, "the count of the Envoy edge@127.0.0.1:1 is"),
        (0, 7200.0, "no Envoy reports its count any more"),
    ],
)
async def test_ramp_waits_with_incomplete_evidence(
    sidecar: RunningSidecar, ledger: Ledger, beyond: int, age: float, message: str
) -> None:
    """Captures stop while Envoy still counts, or Envoy's count is stale."""
    sampled(ledger)
    await start(sidecar, 0.01, 1.0)
    add(ledger, 300, live="new", new_us=900)
    sampled(ledger, beyond, age=age)

    status = await wait_for_look(sidecar)

    assert status.state.step == 0
    assert message in status.state.message

    sampled(ledger)
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)


async def test_ramp_waits_for_a_count_of_envoy(sidecar: RunningSidecar, ledger: Ledger) -> None:
    await start(sidecar, 0.01, 1.0)
    add(ledger, 300, live="new", new_us=900)
    blind = await wait_for_look(sidecar)
    sampled(ledger)
    counted_ramp = await wait_for_look(sidecar)
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)

    assert "no Envoy's count is known" in blind.state.message
    assert counted_ramp.state.step == 0
    assert counted_ramp.step_time.ToDatetime() > blind.step_time.ToDatetime()


async def test_ramp_pauses_and_resumes(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.01, 1.0)
    paused = (await sidecar.rollout.PauseRamp(pb.PauseRampRequest(actor="grace", reason="lunch"))).ramp
    good(ledger)
    status = await wait_for_look(sidecar)
    resumed = (await sidecar.rollout.ResumeRamp(pb.ResumeRampRequest(actor="grace"))).ramp
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)

    assert (paused.state.phase, status.state.message, status.state.step) == (pb.RAMP_PHASE_PAUSED, "paused", 0)
    assert resumed.step_time.ToDatetime() > paused.step_time.ToDatetime()
    changes = [(event.action, event.actor, event.reason) for event in await events(sidecar)][1:3]
    assert changes == [("ramp_resume", "grace", ""), ("ramp_pause", "grace", "lunch")]


async def test_ramp_rolls_back_while_paused(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)
    await sidecar.rollout.PauseRamp(pb.PauseRampRequest())

    add(ledger, 100, live="new", new_status=500, outcome="mismatch")
    sampled(ledger)

    await until(sidecar, "FAILED")


async def test_ramp_abort_sends_all_users_to_old(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)
    final = (await sidecar.rollout.AbortRamp(pb.AbortRampRequest(actor="grace", reason="no"))).ramp
    error = await refusal(sidecar.rollout.AbortRamp(pb.AbortRampRequest()))

    event = (await events(sidecar))[0]
    assert (final.state.phase, final.state.message) == (pb.RAMP_PHASE_ABORTED, "aborted at 25%")
    assert (event.action, event.actor, event.reason) == ("ramp_abort", "grace", "no")
    assert (event.after.new_share, event.after.rolled_back) == (0.0, True)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONFLICT")
    assert "shop has no active ramp" in error.message


@pytest.mark.parametrize("action", ["rollback", "promote", "update"])
async def test_ramp_ends_when_the_traffic_is_set(sidecar: RunningSidecar, ledger: Ledger, action: str) -> None:
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)
    by: dict[str, Any] = {"actor": "grace", "reason": "stop", "wait": NOW}
    if action == "rollback":
        await sidecar.traffic.Rollback(traffic_pb2.RollbackRequest(**by))
    elif action == "promote":
        await sidecar.traffic.Promote(traffic_pb2.PromoteRequest(**by))
    else:
        await set_share(sidecar, 0.1, actor="grace")
    good(ledger)
    final = await until(sidecar, "SUPERSEDED")

    assert final.state.message.startswith(f"ended at 25%: {action} by grace")
    assert await share(sidecar) == {"rollback": 0.0, "promote": 1.0, "update": 0.1}[action]
    assert [event.action for event in await events(sidecar)][:2] == ["ramp_end", action]


async def test_ramp_continues_when_only_mirroring_changes(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)
    await sidecar.traffic.UpdateTraffic(traffic_pb2.UpdateTrafficRequest(sample_safe=0.5, wait=NOW))
    good(ledger)
    await until(sidecar, "PROGRESSING", 1)

    response = await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest())
    assert (response.traffic.new_share, response.traffic.sample_safe) == (1.0, 0.5)


async def test_ramp_ends_when_the_guard_fires(sidecar: RunningSidecar, ledger: Ledger) -> None:
    sampled(ledger)
    await set_guard(sidecar, "ACTING")
    await start(sidecar, 0.25, 1.0, budget=comparison_pb2.Budget(max_error=1.0, max_mismatch=1.0))
    add(ledger, 20, live="new", new_status=500, outcome="mismatch")

    final = await until(sidecar, "SUPERSEDED")

    assert "rollback by guard: errors: new failed 20 of 20" in final.state.message


async def test_ramp_step_loses_to_a_concurrent_rollback(sidecar: RunningSidecar, ledger: Ledger) -> None:
    """The ramp has decided to step, and waits for the row that a rollback has locked."""
    sampled(ledger)
    await start(sidecar, 0.25, 1.0)
    async with await psycopg.AsyncConnection.connect(sidecar.postgres_url) as rollback:
        await rollback.execute("select from abreast.traffic for update")
        good(ledger)

        async def steps() -> bool:
            return bool(ledger.execute(WAITING))

        await eventually_async(steps, description="the ramp is about to step")
        await rollback.execute(
            "update abreast.traffic set new_share = 0, rolled_back = true, version = version + 1, "
            "updated_at = clock_timestamp()"
        )
    await until(sidecar, "SUPERSEDED")

    assert await share(sidecar) == 0
    assert [event.action for event in await events(sidecar)][:2] == ["ramp_end", "ramp_start"]


async def test_ramp_continues_on_another_sidecar(redis_url: str, postgres_url: str) -> None:
    async with run_sidecar(redis_url, postgres_url) as first:
        ledger = first.ledger()
        ledger.endpoint("shop")
        sampled(ledger)
        begun = await start(first, 0.01, 0.5)
    async with run_sidecar(redis_url, postgres_url) as second:
        good(ledger)
        status = await until(second, "PROGRESSING", 1)

        assert status.state.id == begun.state.id
        assert status.start_time == begun.start_time


async def test_ramp_rejects_invalid_plans(sidecar: RunningSidecar) -> None:
    for plan, message in (
        (pb.RampPlan(), "plan.steps must be 1 to 100 shares of users, got 0"),
        (pb.RampPlan(steps=[0.5, 0.25]), "plan.steps must rise, above 0% and up to 100%, got 50%, 25%"),
        (pb.RampPlan(steps=[0.0, 0.25]), "plan.steps must rise"),
        (pb.RampPlan(steps=[1.5]), "plan.steps must be a share from 0 to 1"),
        (pb.RampPlan(steps=[0.5], hold=Duration(seconds=-1)), "plan.hold must be 0 to"),
        (pb.RampPlan(steps=[0.5], min_pairs=0), "plan.min_pairs must be 1 to"),
        (pb.RampPlan(steps=[0.5], budget=comparison_pb2.Budget(confidence=2)), "budget.confidence must be"),
    ):
        error = await refusal(sidecar.rollout.StartRamp(pb.StartRampRequest(plan=plan)))

        assert error.code is grpc.StatusCode.INVALID_ARGUMENT, message
        assert message in error.message


async def test_ramp_rejects_a_second_one(sidecar: RunningSidecar) -> None:
    assert not (await sidecar.rollout.GetRamp(pb.GetRampRequest())).HasField("ramp")
    await start(sidecar, 0.25, 1.0)

    error = await refusal(sidecar.rollout.StartRamp(pb.StartRampRequest(plan=pb.RampPlan(steps=[1.0]))))

    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "shop has a ramp, progressing at 25%; abort it first" in error.message
