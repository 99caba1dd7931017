"""Rollbacks from any state, also while Postgres and even Redis are down."""

from __future__ import annotations

import time

import grpc
import pytest

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from support import eventually_async, find_free_port, frozen
from support_edge import LONG, REQUESTS, Edge, acknowledged, edge, update
from support_serve import Running, running

SOON = 5.0  # seconds; an answer that had waited for Postgres would take longer


async def events(sidecar: Running) -> list[tuple[str, str, str]]:
    found = await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(service="shop"))
    return [(one.action, one.actor, one.reason) for one in found.events]


async def recorded(sidecar: Running, times: int = 1) -> None:
    async def there() -> bool:
        try:
            return [one[0] for one in await events(sidecar)][:times] == ["rollback"] * times
        except grpc.aio.AioRpcError:
            return False

    await eventually_async(there, what="the rollback is in the ledger")


async def roll_back(sidecar: Running, reason: str = "on fire") -> pb.RollbackResponse:
    began = time.monotonic()
    answer: pb.RollbackResponse = await sidecar.traffic.Rollback(
        pb.RollbackRequest(service="shop", actor="ada", reason=reason, wait=LONG)
    )
    assert time.monotonic() - began < SOON
    return answer


async def all_on_old(envoy: Edge) -> None:
    assert (await envoy.ask())[:2] == (REQUESTS, 0)


async def test_rollback_does_not_wait_for_a_frozen_postgres(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with running(redis_url, postgres.url()) as sidecar, edge(sidecar.port) as envoy:
            await acknowledged(sidecar)
            before = await update(sidecar, new_share=1.0, sample_safe=0.5)
            assert postgres.process is not None
            with frozen(postgres.process.pid) as thaw:
                answer = await roll_back(sidecar)
                await all_on_old(envoy)
                with pytest.raises(grpc.aio.AioRpcError, match="must be recorded before any other change"):
                    await sidecar.traffic.Promote(pb.PromoteRequest(service="shop"))
                thaw()
                await recorded(sidecar)
            await all_on_old(envoy)
            found = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
            told = await events(sidecar)

    assert (answer.previous, answer.traffic.new_share, answer.traffic.rolled_back) == (before.traffic, 0.0, True)
    assert answer.traffic.sample_safe == 0.5
    assert [one.acknowledged_version for one in answer.envoys] == [answer.traffic.version]
    assert "the rollback is not recorded: postgres has not answered" in answer.recording_error
    assert [one[0] for one in told] == ["rollback", "update", "create"]
    assert told[0][1:] == ("ada", "on fire")
    assert (found.traffic.new_share, found.traffic.version) == (0.0, answer.traffic.version)


async def test_rollback_survives_a_restart_and_older_settings(redis_url: str) -> None:
    port = find_free_port()
    with PostgresServer() as postgres:
        async with running(redis_url, postgres.url(), grpc_port=port) as sidecar, edge(port) as envoy:
            await acknowledged(sidecar)
            await update(sidecar, new_share=1.0)
            postgres.stop()
            answer = await roll_back(sidecar)
            await sidecar.halt()
            async with running(redis_url, postgres.url(), ready=False, grpc_port=port) as again:
                postgres.start()
                await recorded(again)
                await acknowledged(again)
                await all_on_old(envoy)
                told = await events(again)
                promoted = await again.traffic.Promote(pb.PromoteRequest(service="shop", wait=LONG))
                await envoy.has("abreast.weight.new_or_old", "10000")

    assert "it outlives a restart" in answer.recording_error
    assert [one[0] for one in told] == ["rollback", "update", "create"]
    assert told[0][1] == "ada"
    assert told[0][2].startswith("on fire (called at ")
    assert (promoted.traffic.new_share, promoted.traffic.rolled_back) == (1.0, False)


async def test_rollback_reaches_other_sidecars_through_redis_as_one_event(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with (
            running(redis_url, postgres.url()) as here,
            running(redis_url, postgres.url()) as there,
            edge(there.port) as envoy,
        ):
            await acknowledged(there)
            await update(there, new_share=1.0)
            await eventually_async(lambda: _knows(here, 1.0), what="the other sidecar knows")
            postgres.stop()
            answer = await roll_back(here)
            await envoy.has("abreast.weight.new_or_old", "0")
            postgres.start()
            await recorded(here)
            await recorded(there)
            await sidecars_have_settled(here, there)
            told = await events(here)

    assert not answer.envoys
    assert "other sidecars find it in Redis within seconds" in answer.recording_error
    assert [one[0] for one in told] == ["rollback", "update", "create"]


async def _knows(sidecar: Running, share: float) -> bool:
    held = sidecar.sidecar.control.current("shop")
    return held is not None and held.traffic.shares.new_share == round(share * 10_000)


async def sidecars_have_settled(*sidecars: Running) -> None:
    async def settled() -> bool:
        return not any(one.sidecar.control.pending_rollbacks.list_services() for one in sidecars)

    await eventually_async(settled, what="no sidecar holds a rollback that is not recorded")


async def test_rollback_needs_neither_store_nor_known_settings() -> None:
    """A sidecar that started without Postgres knows only the name of the Envoy's service."""
    with PostgresServer() as postgres, RedisServer() as redis:
        postgres.stop()
        redis.stop()
        async with (
            running(redis.url, postgres.url(), ready=False, new_share=1.0) as sidecar,
            edge(sidecar.port) as envoy,
        ):
            await eventually_async(lambda: _connected(sidecar), what="the Envoy is connected")
            answer = await roll_back(sidecar, reason="")
            await envoy.has("abreast.weight.old", "10000")
            redis.start()
            postgres.start()
            await recorded(sidecar)
            await all_on_old(envoy)

    assert not answer.HasField("previous")
    assert (answer.traffic.rolled_back, answer.traffic.sample_safe) == (True, 0.0)
    assert "a restart of this sidecar forgets it" in answer.recording_error


async def _connected(sidecar: Running) -> bool:
    return bool(sidecar.sidecar.control.connections.count_by_service())


async def test_two_rollbacks_while_postgres_is_down_are_two_events(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with running(redis_url, postgres.url()) as sidecar:
            sidecar.ledger().endpoint("shop")
            await update(sidecar, new_share=1.0)
            postgres.stop()
            first, second = await roll_back(sidecar, "one"), await roll_back(sidecar, "two")
            postgres.start()
            await recorded(sidecar, times=2)
            await sidecars_have_settled(sidecar)
            told = await events(sidecar)

    assert first.traffic.rolled_back
    assert second.traffic.rolled_back
    assert [action for action, _actor, _reason in told] == ["rollback", "rollback", "update", "create"]
    assert {reason.split()[0] for action, _actor, reason in told if action == "rollback"} == {"one", "two"}


async def test_two_rollbacks_while_postgres_is_frozen_are_two_events(redis_url: str) -> None:
    """Both answers promise an event, although the second rollback changes nothing."""
    with PostgresServer() as postgres:
        async with running(redis_url, postgres.url()) as sidecar:
            sidecar.ledger().endpoint("shop")
            await update(sidecar, new_share=1.0)
            assert postgres.process is not None
            with frozen(postgres.process.pid):
                answers = [await roll_back(sidecar, "one"), await roll_back(sidecar, "two")]
            await recorded(sidecar, times=2)
            await sidecars_have_settled(sidecar)
            told = await events(sidecar)

    assert all("recorded as soon as Postgres is back" in one.recording_error for one in answers)
    assert [action for action, _actor, _reason in told] == ["rollback", "rollback", "update", "create"]
    assert {reason.split()[0] for action, _actor, reason in told if action == "rollback"} == {"one", "two"}
