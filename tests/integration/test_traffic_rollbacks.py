"""Rollbacks from any state, also while Postgres and even Redis are down."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import pytest
import redis

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.cli.doctor.services import check_sidecar
from abreast_sidecar.stack.servers import SERVICE_USER, SIDECAR_USER, PostgresServer, RedisServer, render_redis_acl
from abreast_sidecar.traffic import pending_rollbacks
from abreast_sidecar.traffic.model import AuditNote
from abreast_sidecar.traffic.pending_rollbacks import ROLLBACKS_HASH_KEY, PendingRollback
from support import eventually_async, find_free_port, frozen
from support_edge import LONG, REQUESTS, Edge, acknowledged, edge, update
from support_serve import RunningSidecar, run_sidecar

SOON = 5.0  # seconds; an answer that had waited for Postgres would take longer
KEY = "a key that only the sidecars have"


async def events(sidecar: RunningSidecar) -> list[tuple[str, str, str]]:
    response = await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(service="shop"))
    return [(event.action, event.actor, event.reason) for event in response.events]


async def recorded(sidecar: RunningSidecar, times: int = 1) -> None:
    async def is_recorded() -> bool:
        try:
            return [event[0] for event in await events(sidecar)][:times] == ["rollback"] * times
        except grpc.aio.AioRpcError:
            return False

    await eventually_async(is_recorded, description="the rollback is in the ledger")


async def roll_back(sidecar: RunningSidecar, reason: str = "on fire") -> pb.RollbackResponse:
    start = time.monotonic()
    answer: pb.RollbackResponse = await sidecar.traffic.Rollback(
        pb.RollbackRequest(service="shop", actor="ada", reason=reason, wait=LONG)
    )
    assert time.monotonic() - start < SOON
    return answer


async def all_on_old(envoy: Edge) -> None:
    assert (await envoy.ask())[:2] == (REQUESTS, 0)


async def test_rollback_does_not_wait_for_a_frozen_postgres(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url()) as sidecar, edge(sidecar.port) as envoy:
            await acknowledged(sidecar)
            before = await update(sidecar, new_share=1.0, sample_safe=0.5)
            assert postgres.process is not None
            with frozen(postgres.process.pid) as thaw:
                answer = await roll_back(sidecar)
                await all_on_old(envoy)
                with pytest.raises(grpc.aio.AioRpcError, match="a rollback must be recorded before any other change"):
                    await sidecar.traffic.Promote(pb.PromoteRequest(service="shop"))
                thaw()
                await recorded(sidecar)
            await all_on_old(envoy)
            response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
            recorded_events = await events(sidecar)

    assert (answer.previous, answer.traffic.new_share, answer.traffic.rolled_back) == (before.traffic, 0.0, True)
    assert answer.traffic.sample_safe == 0.5
    assert [envoy.acknowledged_version for envoy in answer.envoys] == [answer.traffic.version]
    assert "the rollback is not recorded: postgres has not answered" in answer.recording_error
    assert [event[0] for event in recorded_events] == ["rollback", "update", "create"]
    assert recorded_events[0][1:] == ("ada", "on fire")
    assert (response.traffic.new_share, response.traffic.version) == (0.0, answer.traffic.version)


async def test_rollback_survives_a_restart_and_older_settings(redis_url: str) -> None:
    port = find_free_port()
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url(), grpc_port=port) as sidecar, edge(port) as envoy:
            await acknowledged(sidecar)
            await update(sidecar, new_share=1.0)
            postgres.stop()
            answer = await roll_back(sidecar)
            await sidecar.halt()
            async with run_sidecar(redis_url, postgres.url(), ready=False, grpc_port=port) as restarted:
                postgres.start()
                await recorded(restarted)
                await acknowledged(restarted)
                await all_on_old(envoy)
                recorded_events = await events(restarted)
                promoted = await restarted.traffic.Promote(pb.PromoteRequest(service="shop", wait=LONG))
                await envoy.wait_for_value("abreast.weight.new_or_old", "10000")

    assert "it outlives a restart" in answer.recording_error
    assert [event[0] for event in recorded_events] == ["rollback", "update", "create"]
    assert recorded_events[0][1] == "ada"
    assert recorded_events[0][2].startswith("on fire (called at ")
    assert (promoted.traffic.new_share, promoted.traffic.rolled_back) == (1.0, False)


async def test_rollback_reaches_other_sidecars_through_redis_as_one_event(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_rollbacks, "SUBSCRIBED_POLL_INTERVAL_S", 600.0)  # only the message is in time

    await roll_back_through_redis(redis_url)


async def test_rollback_reaches_other_sidecars_without_the_right_to_subscribe(tmp_path: Path) -> None:
    full_acl = render_redis_acl(["shop"], "s" * 32, "w" * 32)
    acl = full_acl.replace(" &abreast:rollbacks", "")
    assert acl != full_acl
    with RedisServer(tmp_path, acl=acl, passwords={SIDECAR_USER: "s" * 32, SERVICE_USER: "w" * 32}) as server:
        await roll_back_through_redis(server.url_for(SIDECAR_USER))


async def roll_back_through_redis(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with (
            run_sidecar(redis_url, postgres.url()) as local,
            run_sidecar(redis_url, postgres.url()) as remote,
            edge(remote.port) as envoy,
        ):
            await acknowledged(remote)
            await update(remote, new_share=1.0)
            await eventually_async(lambda: _knows(local, 1.0), description="the other sidecar knows")
            postgres.stop()
            answer = await roll_back(local)
            await envoy.wait_for_value("abreast.weight.new_or_old", "0")
            postgres.start()
            await recorded(local)
            await recorded(remote)
            await sidecars_have_settled(local, remote)
            recorded_events = await events(local)

    assert not answer.envoys
    assert "other sidecars find it in Redis within seconds" in answer.recording_error
    assert [event[0] for event in recorded_events] == ["rollback", "update", "create"]


async def _knows(sidecar: RunningSidecar, share: float) -> bool:
    settings = sidecar.sidecar.control.current("shop")
    return settings is not None and settings.traffic.shares.new_share == round(share * 10_000)


async def sidecars_have_settled(*sidecars: RunningSidecar) -> None:
    async def settled() -> bool:
        return not any(sidecar.sidecar.control.pending_rollbacks.list_services() for sidecar in sidecars)

    await eventually_async(settled, description="no sidecar holds a rollback that is not recorded")


async def test_rollback_needs_neither_store_nor_known_settings() -> None:
    """A sidecar that started without Postgres knows only the name of the Envoy's service."""
    with PostgresServer() as postgres, RedisServer() as redis:
        postgres.stop()
        redis.stop()
        async with (
            run_sidecar(redis.url, postgres.url(), ready=False, new_share=1.0) as sidecar,
            edge(sidecar.port) as envoy,
        ):
            await eventually_async(lambda: _connected(sidecar), description="the Envoy is connected")
            answer = await roll_back(sidecar, reason="")
            await envoy.wait_for_value("abreast.weight.old", "10000")
            redis.start()
            postgres.start()
            await recorded(sidecar)
            await all_on_old(envoy)

    assert not answer.HasField("previous")
    assert (answer.traffic.rolled_back, answer.traffic.sample_safe) == (True, 0.0)
    assert "a restart of this sidecar forgets it" in answer.recording_error


async def _connected(sidecar: RunningSidecar) -> bool:
    return bool(sidecar.sidecar.control.connections.count_by_service())


async def test_two_rollbacks_while_postgres_is_down_are_two_events(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url()) as sidecar:
            sidecar.ledger().endpoint("shop")
            await update(sidecar, new_share=1.0)
            postgres.stop()
            first, second = await roll_back(sidecar, "one"), await roll_back(sidecar, "two")
            postgres.start()
            await recorded(sidecar, times=2)
            await sidecars_have_settled(sidecar)
            recorded_events = await events(sidecar)

    assert first.traffic.rolled_back
    assert second.traffic.rolled_back
    assert [action for action, _actor, _reason in recorded_events] == ["rollback", "rollback", "update", "create"]
    assert {reason.split()[0] for action, _actor, reason in recorded_events if action == "rollback"} == {"one", "two"}


async def test_two_rollbacks_while_postgres_is_frozen_are_two_events(redis_url: str) -> None:
    """Both answers promise an event, although the second rollback changes nothing."""
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url()) as sidecar:
            sidecar.ledger().endpoint("shop")
            await update(sidecar, new_share=1.0)
            assert postgres.process is not None
            with frozen(postgres.process.pid):
                answers = [await roll_back(sidecar, "one"), await roll_back(sidecar, "two")]
            await recorded(sidecar, times=2)
            await sidecars_have_settled(sidecar)
            recorded_events = await events(sidecar)

    assert all("recorded as soon as Postgres is back" in answer.recording_error for answer in answers)
    assert [action for action, _actor, _reason in recorded_events] == ["rollback", "rollback", "update", "create"]
    assert {reason.split()[0] for action, _actor, reason in recorded_events if action == "rollback"} == {"one", "two"}


def stored(redis_url: str) -> dict[bytes, bytes]:
    with redis.Redis.from_url(redis_url) as client:
        stored_rollbacks: dict[bytes, bytes] = client.hgetall(ROLLBACKS_HASH_KEY)
    return stored_rollbacks


def store(redis_url: str, call_id: str | bytes, document: str | bytes) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.hset(ROLLBACKS_HASH_KEY, call_id, document)


async def rejected(sidecar: RunningSidecar, reason: str, number: int) -> None:
    async def counted() -> bool:
        line = f'abreast_rejected_rollbacks_total{{reason="{reason}"}} {number:.1f}'
        return line in (await sidecar.http.get("/metrics")).text

    await eventually_async(counted, description=f"{number} {reason} rollbacks are counted")


async def test_forged_rollbacks_are_rejected_and_named(redis_url: str, postgres_url: str) -> None:
    """Services can write to Redis."""
    values = {"service": "shop", "actor": "ceo@corp", "reason": "trust me", "at": "2026-03-04T12:00:00+00:00"}
    signed = PendingRollback("shop", AuditNote("ceo@corp", "trust me"), "one").to_json(b"another key")
    forged = [values, {**values, "signature": "0" * 64}, {**values, "signature": "ü"}, {**values, "signature": 7}]
    async with run_sidecar(redis_url, postgres_url) as sidecar, edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        await update(sidecar, new_share=1.0)
        documents: list[str | bytes] = [*map(json.dumps, forged), signed, "[]", "no JSON", b"\xff"]
        for number, document in enumerate(documents):
            store(redis_url, f"call-{number}", document)
        store(redis_url, b"\xff", json.dumps(values))
        await rejected(sidecar, "forged", 9)
        response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
        base = str(sidecar.http.base_url)
        address = f"127.0.0.1:{sidecar.port}"
        checks = await asyncio.to_thread(lambda: list(check_sidecar(address, base, "shop")))
        assert (await envoy.ask())[:2] == (0, REQUESTS)

    assert response.traffic.new_share == 1.0
    assert "rejected rollbacks that someone stored in Redis (9 forged)" in response.warnings[0]
    assert [check.found for check in checks if check.state == "fail"] == [response.warnings[0]]


async def test_replayed_rollback_is_rejected_with_and_without_postgres(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_rollbacks, "REPLAY_GRACE_S", 0.0)
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url()) as sidecar, edge(sidecar.port) as envoy:
            await acknowledged(sidecar)
            await update(sidecar, new_share=1.0)
            postgres.stop()
            await roll_back(sidecar)
            ((call_id, document),) = stored(redis_url).items()
            postgres.start()
            await recorded(sidecar)
            await gone_from_redis(redis_url)
            await sidecar.traffic.Promote(pb.PromoteRequest(service="shop", wait=LONG))
            store(redis_url, call_id, document)
            await rejected(sidecar, "replayed", 1)
            await gone_from_redis(redis_url)
            postgres.stop()
            store(redis_url, call_id, document)
            await rejected(sidecar, "replayed", 2)
            assert (await envoy.ask())[:2] == (0, REQUESTS)


async def gone_from_redis(redis_url: str) -> None:
    async def gone() -> bool:
        return not stored(redis_url)

    await eventually_async(gone, description="no rollback is in Redis")


async def test_sidecars_share_the_key_of_the_settings(redis_url: str) -> None:
    """A sidecar that starts while Postgres is down can't read the ledger's key."""
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url(), control_key=KEY) as here:
            here.ledger().endpoint("shop")
            await update(here, new_share=1.0)
            postgres.stop()
            await roll_back(here)
            async with (
                run_sidecar(redis_url, postgres.url(), ready=False, control_key=KEY) as there,
                run_sidecar(redis_url, postgres.url(), ready=False, control_key=KEY.upper()) as stranger,
                edge(there.port) as envoy,
            ):
                await eventually_async(lambda: _rolled_back(there), description="the other sidecar has the rollback")
                await envoy.wait_for_value("abreast.weight.new_or_old", "0")
                await rejected(stranger, "forged", 1)


async def _rolled_back(sidecar: RunningSidecar) -> bool:
    return sidecar.sidecar.control.current("shop") is not None
