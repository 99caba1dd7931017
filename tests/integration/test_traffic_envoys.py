"""The list of Envoys across sidecars, and their acknowledgements."""

from __future__ import annotations

import datetime as dt
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.stack.servers import PostgresServer
from abreast_sidecar.traffic import envoys
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support import eventually_async, find_free_port, frozen
from support_discovery import answer, stream
from support_edge import LONG, acknowledged, edge, update
from support_replica import replica
from support_serve import RunningSidecar, run_sidecar

pytestmark = pytest.mark.postgres

MOMENT = Duration(nanos=3 * 10**8)


def list_versions(envoys: Sequence[pb.EnvoyStatus]) -> list[tuple[str, int]]:
    """Node, and the port of its sidecar."""
    return [(envoy.node, int(envoy.sidecar.rpartition(":")[2])) for envoy in envoys]


async def traffic(sidecar: RunningSidecar) -> pb.GetTrafficResponse:
    answer: pb.GetTrafficResponse = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
    return answer


async def names(sidecar: RunningSidecar, *nodes: str, within: float = 15.0) -> None:
    async def has_names() -> bool:
        try:
            return [envoy.node for envoy in (await traffic(sidecar)).envoys] == list(nodes)
        except grpc.aio.AioRpcError:  # the service is not named yet, or Postgres is away
            return False

    await eventually_async(has_names, within=within, description=f"it names {nodes}")


@asynccontextmanager
async def two_sidecars(redis_url: str, postgres_url: str) -> AsyncIterator[tuple[RunningSidecar, RunningSidecar]]:
    async with run_sidecar(redis_url, postgres_url) as local, run_sidecar(redis_url, postgres_url) as remote:
        yield local, remote


async def test_registry_lists_the_envoys_of_all_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        two_sidecars(redis_url, postgres_url) as (local, remote),
        edge(local.port, option="a1"),
        edge(local.port, option="a2"),
        edge(remote.port, option="b1"),
        edge(remote.port, option="b2"),
    ):
        await acknowledged(local, envoys=2)
        await acknowledged(remote, envoys=2)
        await names(local, "a1", "a2", "b1", "b2")
        await names(remote, "a1", "a2", "b1", "b2")
        start = time.monotonic()
        updated = await update(local, new_share=0.25)
        promoted = await remote.traffic.Promote(pb.PromoteRequest(service="shop", wait=LONG))
        back = await remote.traffic.Rollback(pb.RollbackRequest(service="shop", wait=LONG))
        duration = time.monotonic() - start
        response = await traffic(local)
        watched = await anext(aiter(local.traffic.WatchTraffic(pb.WatchTrafficRequest(service="shop"))))
        page = (await local.http.get("/", params={"service": "shop"})).text

    for reply in (updated, promoted, back, response, watched):
        assert list_versions(reply.envoys) == [
            ("a1", local.port),
            ("a2", local.port),
            ("b1", remote.port),
            ("b2", remote.port),
        ]
        assert {envoy.acknowledged_version for envoy in reply.envoys} == {reply.traffic.version}
        for envoy in reply.envoys:
            assert dt.timedelta(0) < envoy.acknowledged_after.ToTimedelta() < dt.timedelta(seconds=3)
        assert reply.peers_error == ""
    assert duration < 3 * LONG.seconds / 2, "nothing waited until its time was over"
    assert f"b1 at {response.envoys[2].sidecar}" in page


async def test_registry_lists_hanging_envoys_of_other_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        two_sidecars(redis_url, postgres_url) as (local, remote),
        edge(local.port, option="a1"),
        edge(remote.port, option="b1") as hanging,
    ):
        await acknowledged(local)
        await acknowledged(remote)
        await names(local, "a1", "b1")
        assert hanging.server.process is not None
        with frozen(hanging.server.process.pid):
            request = pb.UpdateTrafficRequest(service="shop", new_share=0.5, wait=MOMENT)
            changed = await local.traffic.UpdateTraffic(request)
        waited = await update(local, new_share=0.6)

    first, second = changed.envoys
    assert first.acknowledged_version == changed.traffic.version
    assert second.acknowledged_version == changed.traffic.version - 1
    assert not second.HasField("acknowledged_after")
    assert {envoy.acknowledged_version for envoy in waited.envoys} == {waited.traffic.version}


async def test_registry_reports_refusals_at_other_sidecars(redis_url: str, postgres_url: str) -> None:
    request = wire.DiscoveryRequest(node=wire.Node(id="b\0" + "x" * 5000, cluster="shop"), resource_names=["abreast"])
    async with two_sidecars(redis_url, postgres_url) as (local, remote), stream(remote, request) as call:
        await call.write(answer(await call.read(), error="no\0such weight" + "!" * 5000))

        async def is_listed() -> bool:
            return any(envoy.error for envoy in (await traffic(local)).envoys)

        await eventually_async(is_listed, description="the refusal is known")
        start = time.monotonic()
        response = await update(local, sample_safe=0.2)
        duration = time.monotonic() - start

    (envoy,) = response.envoys
    assert envoy.error.startswith("no␀such weight!")
    assert len(envoy.node) == len(envoy.error) == envoys.MAX_ENVOY_TEXT_CHARS
    assert duration < LONG.seconds / 2


async def test_registry_forgets_a_killed_sidecar_within_seconds(
    redis_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoys, "REPLICA_EXPIRY_S", 3.0)
    async with run_sidecar(redis_url, postgres_url) as local, stream(local):
        with replica(redis_url, postgres_url, tmp_path / "there") as remote:
            async with edge(remote.port, option="b1"):
                await names(local, "b1", "edge-1")
                os.kill(remote.pid, signal.SIGKILL)
                still = await traffic(local)
                await names(local, "edge-1")

        async def dropped() -> bool:
            return local.ledger().execute("select count(*) from abreast.sidecar") == [(1,)]

        await eventually_async(dropped, description="its row is dropped")

    assert list_versions(still.envoys)[0] == ("b1", remote.port)


async def test_registry_forgets_a_stopped_sidecar_at_once(redis_url: str, postgres_url: str) -> None:
    async with two_sidecars(redis_url, postgres_url) as (local, remote), stream(remote):
        await names(local, "edge-1")
        await remote.halt()

        assert not (await traffic(local)).envoys


async def test_registry_replaces_a_restarted_sidecar(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoys, "REPLICA_EXPIRY_S", 60.0)
    port = find_free_port()
    async with run_sidecar(redis_url, postgres_url) as local:
        ledger = local.ledger()
        ledger.endpoint("shop")
        ledger.execute(
            "insert into abreast.sidecar values (gen_random_uuid(), %s, now(), "
            """'[{"service": "shop", "node": "edge-1", "peer": "", "number": 1, "error": ""}]')""",
            f"{socket.gethostname()}:{port}",
        )
        before = await traffic(local)
        async with run_sidecar(redis_url, postgres_url, grpc_port=port):
            await names(local)

    assert list_versions(before.envoys) == [("edge-1", port)]


async def test_registry_forgets_a_dead_sidecar_despite_a_clock_set_back(redis_url: str, postgres_url: str) -> None:
    """The dead sidecar leaves a heartbeat in the future."""
    async with run_sidecar(redis_url, postgres_url) as local:
        ledger = local.ledger()
        ledger.endpoint("shop")
        ledger.execute(
            "insert into abreast.sidecar values (gen_random_uuid(), 'dead', now() + interval '1 hour', "
            """'[{"service": "shop", "node": "gone", "peer": "", "number": 1, "error": ""}]')"""
        )
        response = await traffic(local)

        async def dropped() -> bool:
            return not ledger.execute("select from abreast.sidecar where address = 'dead'")

        await eventually_async(dropped, description="its row is dropped")

    assert not response.envoys


async def test_unrecorded_rollback_lists_local_envoys_only(redis_url: str, postgres_url: str) -> None:
    async with two_sidecars(redis_url, postgres_url) as (local, remote), edge(local.port) as envoy, stream(remote):
        await names(local, "edge-1", "edge-1")
        await update(local, new_share=1.0, wait=MOMENT)
        async with local.ledger().locked("abreast.traffic"):
            back = await local.traffic.Rollback(pb.RollbackRequest(service="shop", wait=LONG))
            await envoy.wait_for_value("abreast.weight.new_or_old", "0")

    assert list_versions(back.envoys) == [("edge-1", local.port)]
    assert "the ledger, which lists them, can't be reached" in back.peers_error


async def test_registry_reports_a_postgres_that_hangs(redis_url: str, postgres_url: str) -> None:
    async with run_sidecar(redis_url, postgres_url) as local, stream(local):
        await names(local, "edge-1")
        async with local.ledger().locked("abreast.sidecar"):
            start = time.monotonic()
            response = await traffic(local)
            duration = time.monotonic() - start

    assert [envoy.node for envoy in response.envoys] == ["edge-1"]
    assert response.peers_error == "postgres has not answered for 1 s"
    assert duration < 5


async def test_registry_publishes_again_after_an_outage_of_postgres(redis_url: str) -> None:
    """An unlogged table is empty after a crash of Postgres."""
    with PostgresServer() as postgres:
        async with two_sidecars(redis_url, postgres.url()) as (local, remote), stream(remote):
            await names(local, "edge-1")
            local.ledger().execute("truncate abreast.sidecar")
            await names(local, "edge-1")
            postgres.stop()
            postgres.start()
            await names(local, "edge-1")
