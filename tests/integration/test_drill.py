"""Drills on a real Envoy that a real sidecar steers."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import rollout_pb2 as pb
from abreast_sidecar.jobs.reports import collect_envoy_counts
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import Window
from support import eventually_async, find_free_port
from support_edge import REQUESTS as ASKED
from support_edge import Edge, acknowledged, edge, update
from support_rollout import add
from support_serve import RunningSidecar, run_sidecar

pytestmark = pytest.mark.postgres

REQUESTS = 200
ABORTS, DELAYS = "http.drill.fault.aborts_injected", "http.drill.fault.delays_injected"


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=0.0, new_share=1.0) as instance:
        yield instance


async def start(sidecar: RunningSidecar, share: float, *, seconds: int = 60, **fault: Any) -> pb.Drill:
    request = pb.StartDrillRequest(share=share, duration=Duration(seconds=seconds), actor="ada", **fault)
    drill: pb.Drill = (await sidecar.rollout.StartDrill(request)).drill
    await acknowledged(sidecar)
    return drill


async def count(envoy: Edge, stat: str) -> int:
    """Return the value of a counter of Envoy."""
    async with asyncio.timeout(5):
        text = (await envoy.client.get(f"{envoy.server.admin_url}/stats", params={"filter": f"^{stat}$"})).text
    return int(text.rpartition(" ")[2] or 0)


async def test_drill_fails_its_share_of_requests_and_old_answers_them(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        drill = await start(sidecar, 0.3)
        old, new, _ = await envoy.ask(REQUESTS)
        faults = await count(envoy, ABORTS)
        await sidecar.rollout.EndDrill(pb.EndDrillRequest(passed=True, actor="ada"))
        await acknowledged(sidecar)
        after = await envoy.ask(REQUESTS)

    assert drill.active
    assert (old, new) == (faults, REQUESTS - faults)
    assert 0.15 * REQUESTS < faults < 0.45 * REQUESTS
    assert after[:2] == (0, REQUESTS)


async def test_drill_delays_requests_which_new_then_answers(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await start(sidecar, 1.0, delay=Duration(nanos=200_000_000))
        began = asyncio.get_running_loop().time()
        answered = await envoy.ask(5)
        took = asyncio.get_running_loop().time() - began
        delays = await count(envoy, DELAYS)

    assert answered[:2] == (0, 5)
    assert delays == 5
    assert took >= 1.0


async def test_drill_by_header_spares_requests_without_it(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await start(sidecar, 1.0, by_header=True)
        spared = await envoy.ask(20)
        envoy.client.headers["abreast-drill"] = "1"
        drilled = await envoy.ask(20)
        faults = await count(envoy, ABORTS)
        await sidecar.rollout.EndDrill(pb.EndDrillRequest(passed=True, actor="ada"))
        await acknowledged(sidecar)
        after = await envoy.ask(20)
        await start(sidecar, 1.0)
        del envoy.client.headers["abreast-drill"]
        without_limit = await envoy.ask(20)

    assert (spared[:2], drilled[:2], faults) == ((0, 20), (20, 0), 20)
    assert (after[:2], without_limit[:2]) == ((0, 20), (20, 0))


async def test_drill_ends_at_its_deadline_without_the_caller(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await start(sidecar, 1.0, seconds=2)
        during = await envoy.ask(5)
        await envoy.wait_for_value("abreast.weight.drilled_or_old", "0")
        after = await envoy.ask(20)
        drill = (await sidecar.rollout.GetDrill(pb.GetDrillRequest())).drill

    assert during[:2] == (5, 0)
    assert after[:2] == (0, 20)
    assert not drill.active


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
async def test_drill_ends_with_its_command(sidecar: RunningSidecar, sent: signal.Signals) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        words = (
            "drill",
            "--reason",
            "test",
            "--share",
            "30%",
            "--duration",
            "10m",
            "--address",
            f"127.0.0.1:{sidecar.port}",
        )
        command = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "abreast_sidecar", *words, stdout=PIPE, stderr=PIPE
        )
        await envoy.wait_for_value("abreast.weight.drilled_or_old", "3000")
        command.send_signal(sent)
        output, error = await command.communicate()
        drill = (await sidecar.rollout.GetDrill(pb.GetDrillRequest())).drill
        await acknowledged(sidecar)
        old, new, _ = await envoy.ask()

    assert (command.returncode, error.strip()) == (130, b"")
    assert b"interrupt" in output
    assert not drill.active
    assert (old, new) == (0, ASKED)


async def test_envoy_that_loses_the_sidecar_in_a_drill_sends_all_users_to_old(
    redis_url: str, postgres_url: str
) -> None:
    port = find_free_port()
    async with run_sidecar(redis_url, postgres_url, grpc_port=port, new_share=1.0) as sidecar, edge(port) as envoy:
        await acknowledged(sidecar)
        await start(sidecar, 0.5, seconds=1)
        await sidecar.halt()
        await envoy.wait_for_value("abreast.weight.old", "10000")

        assert (await envoy.ask(20))[:2] == (20, 0)


async def test_any_change_of_traffic_ends_a_drill(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await start(sidecar, 1.0)
        await update(sidecar, new_share=0.5)
        values = await envoy.runtime()

    assert (values["abreast.weight.drilled_or_old"], values["abreast.weight.new_or_old"]) == ("0", "5000")


async def test_drill_is_refused_without_users_during_a_ramp_and_during_a_drill(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        await update(sidecar, new_share=0.0)
        messages = [await refusal(sidecar)]
        await update(sidecar, new_share=1.0)
        await start(sidecar, 0.1)
        messages.append(await refusal(sidecar))
        await sidecar.rollout.StartRamp(pb.StartRampRequest(plan=pb.RampPlan(steps=[0.5, 1.0])))
        messages.append(await refusal(sidecar))

    parts = ("needs users on new", "has a drill already", "has an active ramp")
    assert all(part in message for part, message in zip(parts, messages, strict=True)), messages


async def refusal(sidecar: RunningSidecar) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(sidecar, 0.1)
    return str(caught.value.details())


async def add_release(sidecar: RunningSidecar, label: str) -> None:
    async with sidecar.sidecar.database.connection() as connection:
        await connection.execute(
            b"insert into abreast.release (service, version, label) values ('shop', 'new', %s)", [label]
        )


async def test_ramp_may_require_a_drill_that_passed_with_the_newest_release(sidecar: RunningSidecar) -> None:
    request = pb.StartRampRequest(plan=pb.RampPlan(steps=[0.5, 1.0]), require_drill=True)
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        for is_passed in (None, False):
            if is_passed is not None:
                await sidecar.rollout.EndDrill(pb.EndDrillRequest(passed=is_passed))
            with pytest.raises(grpc.aio.AioRpcError, match="no drill has passed"):
                await sidecar.rollout.StartRamp(request)
        await add_release(sidecar, "2")
        await sidecar.rollout.EndDrill(pb.EndDrillRequest(passed=True))
        await add_release(sidecar, "")  # a capture without a label is no later release
        ramp = (await sidecar.rollout.StartRamp(request)).ramp

    assert ramp.state.phase == pb.RAMP_PHASE_PROGRESSING


async def test_drill_reports_what_envoy_counted(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy, sidecar.sidecar.database.connection() as connection:
        await acknowledged(sidecar)
        assert not (await sidecar.rollout.GetDrill(pb.GetDrillRequest())).drill.HasField("faults")
        await start(sidecar, 1.0)
        await envoy.ask(7)

        async def counted() -> bool:
            await collect_envoy_counts(connection, envoy.server.admin_url)
            drill = (await sidecar.rollout.GetDrill(pb.GetDrillRequest())).drill
            return (drill.responses, drill.server_errors, drill.faults) == (7, 0, 7)

        await eventually_async(counted, description="the drill has 7 faults that nobody noticed")


async def test_requests_that_a_drill_failed_are_no_evidence_against_new(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    fields = {"outcome": "only_old", "new_status": None, "new_us": None, "live": "old", "failed_over": True}
    add(ledger, 300)
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        await start(sidecar, 0.5)
        add(ledger, 200, **fields)
        during = await count_unanswered(sidecar)
        await sidecar.rollout.EndDrill(pb.EndDrillRequest(passed=True))
        ledger.execute("update abreast.traffic_event set at = at - interval '1 minute'")
        ledger.execute("update abreast.pair set at = at - interval '1 minute' where new_status is null")
        add(ledger, 3, **fields)

    assert during == 0
    assert await count_unanswered(sidecar) == 3


async def count_unanswered(sidecar: RunningSidecar) -> int:
    evidence = await LedgerReader(sidecar.sidecar.database).read_evidence(
        "shop", Window(dt.datetime.now(dt.UTC) - dt.timedelta(minutes=30)), 1.0, all_releases=True
    )
    return sum(counts.old_requests - counts.new_requests for counts in evidence.endpoints)
