"""TrafficService with a running Envoy."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator

import grpc
import psycopg
import pytest

from abreast.v1 import comparison_pb2
from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.stack.servers import PostgresServer
from support import find_free_port
from support_edge import LONG, REQUESTS, acknowledged, edge, update
from support_serve import Running, running


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url, sample_safe=0.5, baseline_share=0.2, new_share=0.0) as found:
        yield found


async def test_rollback_works_with_a_misspelt_second_service(sidecar: Running) -> None:
    sidecar.ledger().endpoint("a-typo")
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        summary = await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest())
        found = await sidecar.traffic.Rollback(pb.RollbackRequest(wait=LONG))

    assert (summary.service, found.traffic.service, found.traffic.rolled_back) == ("shop", "shop", True)
    assert found.envoys[0].acknowledged_version == found.traffic.version


async def test_first_envoy_of_a_service_gets_the_default_shares(sidecar: Running) -> None:
    async with edge(sidecar.port) as envoy:
        await envoy.has("abreast.weight.old", "10000")
        values = await envoy.runtime()
        found = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())

    assert values["abreast.weight.new_or_old"] == "0"
    assert "500000" in values["abreast.sample.safe"]
    assert "100000" in values["abreast.sample.baseline"]
    assert found.traffic.service == "shop"
    assert (found.traffic.sample_safe, found.traffic.baseline_share, found.traffic.version) == (0.5, 0.2, 1)


async def test_update_moves_requests_and_names_the_envoy(sidecar: Running) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        none_new = await update(sidecar, sample_safe=0.0)
        at_first = await envoy.ask()
        all_new = await update(sidecar, new_share=1.0, sample_safe=1.0, baseline_share=0.0)
        then = await envoy.ask()
        weights = await envoy.runtime()

    assert at_first == (REQUESTS, 0, 0)
    assert then == (0, REQUESTS, REQUESTS)
    assert (weights["abreast.weight.old"], weights["abreast.weight.new_or_old"]) == ("0", "10000")
    assert all_new.traffic.version == none_new.traffic.version + 1
    (state,) = all_new.envoys
    assert (state.node, state.acknowledged_version, state.error) == ("edge-1", all_new.traffic.version, "")
    assert state.HasField("acknowledged_after")
    assert dt.timedelta(0) < state.acknowledged_after.ToTimedelta() < dt.timedelta(seconds=5)


async def test_rollback_and_promotion_move_all_users(sidecar: Running) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        promoted = await sidecar.traffic.Promote(pb.PromoteRequest(wait=LONG))
        on_new = await envoy.ask()
        back = await sidecar.traffic.Rollback(pb.RollbackRequest(wait=LONG))
        on_old = await envoy.ask()

    assert (promoted.traffic.new_share, promoted.traffic.rolled_back) == (1.0, False)
    assert (back.traffic.new_share, back.traffic.rolled_back) == (0.0, True)
    assert on_new[:2] == (0, REQUESTS)
    assert on_old[:2] == (REQUESTS, 0)


async def test_update_reaches_envoys_of_other_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        running(redis_url, postgres_url) as first,
        running(redis_url, postgres_url) as second,
        edge(second.port) as envoy,
    ):
        await acknowledged(second)
        changed = await first.traffic.UpdateTraffic(pb.UpdateTrafficRequest(service="shop", new_share=0.25))
        await envoy.has("abreast.weight.new_or_old", "2500")
        await acknowledged(second)
        there = await second.traffic.GetTraffic(pb.GetTrafficRequest())

    assert there.traffic == changed.traffic
    assert there.envoys[0].acknowledged_after.ToTimedelta() < dt.timedelta(seconds=3)


async def test_envoys_with_one_node_id_all_get_the_values(sidecar: Running) -> None:
    async with edge(sidecar.port) as one, edge(sidecar.port) as other:
        await acknowledged(sidecar, envoys=2)
        found = await update(sidecar, new_share=0.5)
        await one.has("abreast.weight.old", "5000")
        await other.has("abreast.weight.old", "5000")

    assert [envoy.node for envoy in found.envoys] == ["edge-1", "edge-1"]
    assert len({envoy.peer for envoy in found.envoys}) == 2
    assert {envoy.acknowledged_version for envoy in found.envoys} == {found.traffic.version}


async def test_envoys_of_one_file_have_separate_names(sidecar: Running) -> None:
    async with edge(sidecar.port, option="edge-a"), edge(sidecar.port, option="edge-b"):
        await acknowledged(sidecar, envoys=2)
        found = await update(sidecar, new_share=0.5)

    assert [envoy.node for envoy in found.envoys] == ["edge-a", "edge-b"]


async def test_services_have_separate_values(sidecar: Running) -> None:
    async with edge(sidecar.port) as shop, edge(sidecar.port, service="till", node="till-1") as till:
        await till.has("abreast.weight.old", "10000")
        await shop.has("abreast.weight.old", "10000")
        await update(sidecar, new_share=1.0)
        await shop.has("abreast.weight.old", "0")

        assert (await till.runtime())["abreast.weight.old"] == "10000"
        with pytest.raises(grpc.aio.AioRpcError, match="shop, till"):
            await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())


async def test_envoy_keeps_its_values_without_a_sidecar(redis_url: str, postgres_url: str) -> None:
    port = find_free_port()
    async with running(redis_url, postgres_url, grpc_port=port) as sidecar, edge(port) as envoy:
        await acknowledged(sidecar)
        await update(sidecar, new_share=1.0)
        await sidecar.halt()
        alone = await envoy.ask()
        with psycopg.connect(postgres_url) as ledger:  # another sidecar's change, meanwhile
            ledger.execute(
                "update abreast.traffic set new_share = 7000, version = version + 1, updated_at = clock_timestamp()"
            )
        async with running(redis_url, postgres_url, grpc_port=port) as again:
            await envoy.has("abreast.weight.new_or_old", "7000")
            await acknowledged(again)

    assert alone[:2] == (0, REQUESTS)


async def test_envoy_gets_the_last_values_while_postgres_is_down(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with running(redis_url, postgres.url()) as sidecar:
            async with edge(sidecar.port):
                await acknowledged(sidecar)
                await update(sidecar, new_share=0.75)
            postgres.stop()
            async with edge(sidecar.port, node="edge-2") as late:
                await late.has("abreast.weight.new_or_old", "7500")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await update(sidecar, new_share=0.5)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "postgres can't be reached" in (caught.value.details() or "")


async def test_envoy_gets_no_values_that_were_never_known(redis_url: str) -> None:
    with PostgresServer() as postgres:
        postgres.stop()
        async with (
            running(redis_url, postgres.url(), ready=False, new_share=1.0) as sidecar,
            edge(sidecar.port) as envoy,
        ):
            served = await envoy.ask()
            runtime = await envoy.runtime()
            postgres.start()
            await envoy.has("abreast.weight.new_or_old", "10000")

    assert served[:2] == (REQUESTS, 0)
    assert runtime.get("abreast.weight.new_or_old", "0") == "0"


async def test_listener_reconnects_without_missing_changes(sidecar: Running, postgres_url: str) -> None:
    async with edge(sidecar.port) as envoy:
        await acknowledged(sidecar)
        with psycopg.connect(postgres_url, autocommit=True) as ledger:
            ledger.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'abreast control' "
                "and datname = current_database()"
            )
            ledger.execute(  # nobody listens now
                "update abreast.traffic set new_share = 4200, version = version + 1, updated_at = clock_timestamp()"
            )
        await envoy.has("abreast.weight.new_or_old", "4200")


async def test_watch_sends_the_settings_and_each_change(sidecar: Running) -> None:
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        async with asyncio.timeout(20):
            watch = aiter(sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest()))
            told = [(await anext(watch)).traffic]
            for share in (0.5, 0.0):
                await update(sidecar, new_share=share)
                told.append((await anext(watch)).traffic)

    assert [(one.version, one.new_share) for one in told] == [(1, 0.0), (2, 0.5), (3, 0.0)]
