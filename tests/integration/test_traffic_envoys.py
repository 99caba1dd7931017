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
from abreast_sidecar.traffic import envoys as registry
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support import eventually_async, find_free_port, frozen
from support_discovery import answer, stream
from support_edge import LONG, acknowledged, edge, update
from support_replica import replica
from support_serve import Running, running

pytestmark = pytest.mark.postgres

MOMENT = Duration(nanos=3 * 10**8)


def told(envoys: Sequence[pb.EnvoyStatus]) -> list[tuple[str, int]]:
    """Node, and the port of its sidecar."""
    return [(envoy.node, int(envoy.sidecar.rpartition(":")[2])) for envoy in envoys]


async def traffic(sidecar: Running) -> pb.GetTrafficResponse:
    answer: pb.GetTrafficResponse = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service="shop"))
    return answer


async def names(sidecar: Running, *nodes: str, within: float = 15.0) -> None:
    async def so() -> bool:
        try:
            return [envoy.node for envoy in (await traffic(sidecar)).envoys] == list(nodes)
        except grpc.aio.AioRpcError:  # the service is not named yet, or Postgres is away
            return False

    await eventually_async(so, within=within, what=f"it names {nodes}")


@asynccontextmanager
async def two(redis_url: str, postgres_url: str) -> AsyncIterator[tuple[Running, Running]]:
    async with running(redis_url, postgres_url) as here, running(redis_url, postgres_url) as there:
        yield here, there


async def test_registry_lists_the_envoys_of_all_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        two(redis_url, postgres_url) as (here, there),
        edge(here.port, option="a1"),
        edge(here.port, option="a2"),
        edge(there.port, option="b1"),
        edge(there.port, option="b2"),
    ):
        await acknowledged(here, envoys=2)
        await acknowledged(there, envoys=2)
        await names(here, "a1", "a2", "b1", "b2")
        await names(there, "a1", "a2", "b1", "b2")
        began = time.monotonic()
        updated = await update(here, new_share=0.25)
        promoted = await there.traffic.Promote(pb.PromoteRequest(service="shop", wait=LONG))
        back = await there.traffic.Rollback(pb.RollbackRequest(service="shop", wait=LONG))
        took = time.monotonic() - began
        found = await traffic(here)
        watched = await anext(aiter(here.traffic.WatchTraffic(pb.WatchTrafficRequest(service="shop"))))
        page = (await here.http.get("/", params={"service": "shop"})).text

    for one in (updated, promoted, back, found, watched):
        assert told(one.envoys) == [("a1", here.port), ("a2", here.port), ("b1", there.port), ("b2", there.port)]
        assert {envoy.acknowledged_version for envoy in one.envoys} == {one.traffic.version}
        for envoy in one.envoys:
            assert dt.timedelta(0) < envoy.acknowledged_after.ToTimedelta() < dt.timedelta(seconds=3)
        assert one.peers_error == ""
    assert took < 3 * LONG.seconds / 2, "nothing waited until its time was over"
    assert f"b1 at {found.envoys[2].sidecar}" in page


async def test_registry_lists_hanging_envoys_of_other_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        two(redis_url, postgres_url) as (here, there),
        edge(here.port, option="a1"),
        edge(there.port, option="b1") as hanging,
    ):
        await acknowledged(here)
        await acknowledged(there)
        await names(here, "a1", "b1")
        assert hanging.server.process is not None
        with frozen(hanging.server.process.pid):
            request = pb.UpdateTrafficRequest(service="shop", new_share=0.5, wait=MOMENT)
            changed = await here.traffic.UpdateTraffic(request)
        waited = await update(here, new_share=0.6)

    first, second = changed.envoys
    assert first.acknowledged_version == changed.traffic.version
    assert second.acknowledged_version == changed.traffic.version - 1
    assert not second.HasField("acknowledged_after")
    assert {envoy.acknowledged_version for envoy in waited.envoys} == {waited.traffic.version}


async def test_registry_reports_refusals_at_other_sidecars(redis_url: str, postgres_url: str) -> None:
    odd = wire.DiscoveryRequest(node=wire.Node(id="b\0" + "x" * 5000, cluster="shop"), resource_names=["abreast"])
    async with two(redis_url, postgres_url) as (here, there), stream(there, odd) as call:
        await call.write(answer(await call.read(), error="no\0such weight" + "!" * 5000))

        async def known() -> bool:
            return any(envoy.error for envoy in (await traffic(here)).envoys)

        await eventually_async(known, what="the refusal is known")
        began = time.monotonic()
        found = await update(here, sample_safe=0.2)
        took = time.monotonic() - began

    (envoy,) = found.envoys
    assert envoy.error.startswith("no␀such weight!")
    assert len(envoy.node) == len(envoy.error) == registry.MAX_ENVOY_TEXT_CHARS
    assert took < LONG.seconds / 2


async def test_registry_forgets_a_killed_sidecar_within_seconds(
    redis_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "REPLICA_EXPIRY_S", 3.0)
    async with running(redis_url, postgres_url) as here, stream(here):
        with replica(redis_url, postgres_url, tmp_path / "there") as there:
            async with edge(there.port, option="b1"):
                await names(here, "b1", "edge-1")
                os.kill(there.pid, signal.SIGKILL)
                still = await traffic(here)
                await names(here, "edge-1")

        async def dropped() -> bool:
            return here.ledger().execute("select count(*) from abreast.sidecar") == [(1,)]

        await eventually_async(dropped, what="its row is dropped")

    assert told(still.envoys)[0] == ("b1", there.port)


async def test_registry_forgets_a_stopped_sidecar_at_once(redis_url: str, postgres_url: str) -> None:
    async with two(redis_url, postgres_url) as (here, there), stream(there):
        await names(here, "edge-1")
        await there.halt()

        assert not (await traffic(here)).envoys


async def test_registry_replaces_a_restarted_sidecar(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "REPLICA_EXPIRY_S", 60.0)
    port = find_free_port()
    async with running(redis_url, postgres_url) as here:
        ledger = here.ledger()
        ledger.endpoint("shop")
        ledger.execute(
            "insert into abreast.sidecar values (gen_random_uuid(), %s, now(), "
            """'[{"service": "shop", "node": "edge-1", "peer": "", "number": 1, "error": ""}]')""",
            f"{socket.gethostname()}:{port}",
        )
        before = await traffic(here)
        async with running(redis_url, postgres_url, grpc_port=port):
            await names(here)

    assert told(before.envoys) == [("edge-1", port)]


async def test_registry_forgets_a_dead_sidecar_despite_a_clock_set_back(redis_url: str, postgres_url: str) -> None:
    """The dead sidecar leaves a heartbeat in the future."""
    async with running(redis_url, postgres_url) as here:
        ledger = here.ledger()
        ledger.endpoint("shop")
        ledger.execute(
            "insert into abreast.sidecar values (gen_random_uuid(), 'dead', now() + interval '1 hour', "
            """'[{"service": "shop", "node": "gone", "peer": "", "number": 1, "error": ""}]')"""
        )
        found = await traffic(here)

        async def dropped() -> bool:
            return not ledger.execute("select from abreast.sidecar where address = 'dead'")

        await eventually_async(dropped, what="its row is dropped")

    assert not found.envoys


async def test_unrecorded_rollback_lists_local_envoys_only(redis_url: str, postgres_url: str) -> None:
    async with two(redis_url, postgres_url) as (here, there), edge(here.port) as envoy, stream(there):
        await names(here, "edge-1", "edge-1")
        await update(here, new_share=1.0, wait=MOMENT)
        with here.ledger().locked("abreast.traffic"):
            back = await here.traffic.Rollback(pb.RollbackRequest(service="shop", wait=LONG))
            await envoy.has("abreast.weight.new_or_old", "0")

    assert told(back.envoys) == [("edge-1", here.port)]
    assert "the ledger, which lists them, can't be reached" in back.peers_error


async def test_registry_reports_a_postgres_that_hangs(redis_url: str, postgres_url: str) -> None:
    async with running(redis_url, postgres_url) as here, stream(here):
        await names(here, "edge-1")
        with here.ledger().locked("abreast.sidecar"):
            began = time.monotonic()
            found = await traffic(here)
            took = time.monotonic() - began

    assert [envoy.node for envoy in found.envoys] == ["edge-1"]
    assert found.peers_error == "postgres has not answered for 1 s"
    assert took < 5


async def test_registry_publishes_again_after_an_outage_of_postgres(redis_url: str) -> None:
    """An unlogged table is empty after a crash of Postgres."""
    with PostgresServer() as postgres:
        async with two(redis_url, postgres.url()) as (here, there), stream(there):
            await names(here, "edge-1")
            here.ledger().execute("truncate abreast.sidecar")
            await names(here, "edge-1")
            postgres.stop()
            postgres.start()
            await names(here, "edge-1")
