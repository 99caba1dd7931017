"""TrafficService with a running Envoy."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator

import grpc
import httpx
import psycopg
import pytest

from abreast.v1 import comparison_pb2
from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.envoy.sampling import parse_rules
from abreast_sidecar.envoy.settings import SocketAddress
from abreast_sidecar.rollout.leader import LeaderLease
from abreast_sidecar.rollout.leader_tasks import SamplingController
from abreast_sidecar.stack.servers import PostgresServer
from support import eventually_async, find_free_port, free_ports, frozen
from support_edge import LONG, REQUESTS, acknowledged, edge, update
from support_serve import QuerySidecar, RunningSidecar, run_sidecar
from support_upstream import Received, ok


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url, sample_safe=0.5, baseline_share=0.2, new_share=0.0) as instance:
        yield instance


async def test_rollback_works_with_a_misspelt_second_service(sidecar: RunningSidecar) -> None:
    sidecar.ledger().endpoint("a-typo")
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        summary = await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest())
        response = await sidecar.traffic.Rollback(pb.RollbackRequest(wait=LONG))

    assert (summary.service, response.traffic.service, response.traffic.rolled_back) == ("shop", "shop", True)
    assert response.envoys[0].acknowledged_version == response.traffic.version


async def test_first_envoy_of_a_service_gets_the_default_shares(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as envoy:
        await envoy.wait_for_value("abreast.weight.old", "10000")
        values = await envoy.runtime()
        response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())

    assert values["abreast.weight.new_or_old"] == "0"
    assert "500000" in values["abreast.sample.safe"]
    assert "100000" in values["abreast.sample.baseline"]
    assert response.traffic.service == "shop"
    assert (response.traffic.sample_safe, response.traffic.baseline_share, response.traffic.version) == (0.5, 0.2, 1)


async def test_traffic_states_the_part_of_the_selected_requests_with_a_copy(redis_url: str, postgres_url: str) -> None:
    """Requests on a connection with a login are selected, but get no copy."""
    (port,) = free_ports(1)
    admin = SocketAddress("127.0.0.1", port)
    async with (
        run_sidecar(redis_url, postgres_url, sample_safe=1.0, envoy_admin=(str(admin),)) as sidecar,
        edge(sidecar.port, admin=admin, connection_per_client=True) as envoy,
    ):
        await acknowledged(sidecar)
        assert not (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).HasField("effective_sample")
        await envoy.ask(15)
        async with httpx.AsyncClient(base_url=envoy.client.base_url) as user:
            await user.get("/login", headers={"authorization": "NTLM abc"})
            for _ in range(5):
                await user.get("/products/7")

        async def is_counted() -> bool:
            sample = (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).effective_sample
            return (sample.copied, sample.selected) == (15, 20)

        await eventually_async(is_counted, description="15 of 20 requests had a copy")
        sheds = (await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest())).sheds
        page = (await sidecar.http.get("/")).text

    assert [(shed.reason, shed.count) for shed in sheds] == [("logged_in", 5)]
    assert "75.0% of the selected requests of the last 10 minutes had a copy (15 of 20)" in page


async def test_share_of_a_rule_changes_in_envoy_and_in_the_history(redis_url: str, postgres_url: str) -> None:
    """Two Envoys with different rules. GraphQL mutations have no copy, and the ledger still sums up."""
    rules = parse_rules("name:api POST /graphql queries 100%; POST /search read-only 5%; /admin/* 0%")
    headers = {"content-type": "application/json"}
    (port,) = free_ports(1)
    admin = SocketAddress("127.0.0.1", port)
    async with (
        run_sidecar(redis_url, postgres_url, sample_safe=0.0, baseline_share=0.5, envoy_admin=(str(admin),)) as sidecar,
        edge(sidecar.port, admin=admin, sample=rules) as envoy,
        edge(sidecar.port, node="edge-2", sample=parse_rules("/admin/* 1%; /reports/* 1%")) as other,
    ):
        await acknowledged(sidecar, envoys=2)
        response = await update(sidecar, rule_shares={"POST /search read-only": 1.0, "admin": 0.2})
        values, other_values = await envoy.runtime(), await other.runtime()
        await acknowledged(sidecar, envoys=2)
        for body in (b'{"query": "{ a }"}', b'{"query": "mutation { a }"}', b'{"query": "mutation { b }"}'):
            await envoy.client.post("/graphql", content=body, headers=headers)
        await envoy.client.post("/search")
        with pytest.raises(
            grpc.aio.AioRpcError, match="must name rules of the connected Envoys, got 'serach'"
        ) as error:
            await update(sidecar, rule_shares={"serach": 1.0})
        (event,) = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(page_size=1))).events

        async def is_counted() -> bool:
            traffic = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
            sample = traffic.effective_sample
            counts = {rule.name: (rule.sampled, rule.not_query) for rule in traffic.rules}
            return counts["api"] == (3, 2) and counts["post-search"] == (1, 0) and sample.copied == sample.selected == 2

        await eventually_async(is_counted, description="the requests of each rule are counted")
        traffic = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
        page = (await sidecar.http.get("/")).text
        sheds = (await sidecar.comparison.GetSummary(comparison_pb2.GetSummaryRequest())).sheds

    assert [(shed.reason, shed.count) for shed in sheds] == [("not_query", 2)]
    assert len([answer for answer in response.envoys if answer.HasField("acknowledged_after")]) == 2
    assert "1000000" in values["abreast.rule.post-search.sampled"]
    assert "500000" in values["abreast.rule.post-search.baseline"]
    assert "200000" in values["abreast.rule.admin.sampled"]
    assert "200000" in other_values["abreast.rule.admin.sampled"]
    assert "abreast.rule.post-search.sampled" not in other_values
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (event.actor, dict(event.before.rule_shares)) == ("ada", {})
    assert dict(event.after.rule_shares) == {"post-search": 1.0, "admin": 0.2}
    assert [(rule.name, rule.condition, rule.share, rule.initial_share) for rule in traffic.rules] == [
        ("api", "POST /graphql queries", 1.0, 1.0),
        ("post-search", "POST /search read-only", 1.0, 0.05),
        ("admin", "/admin/*", 0.2, 0.0),
        ("reports", "/reports/*", 0.01, 0.01),
    ]
    assert "100% of POST /graphql queries: 3 sampled, 2 of them without a copy" in page


async def test_sampling_falls_while_copies_queue_and_people_raise_it(redis_url: str, postgres_url: str) -> None:
    release = asyncio.Event()

    async def hang(request: Received, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await ok(request, writer)

    (port,) = free_ports(1)
    admin = SocketAddress("127.0.0.1", port)
    async with (
        run_sidecar(redis_url, postgres_url, sample_safe=1.0, baseline_share=0.0, envoy_admin=(str(admin),)) as sidecar,
        edge(sidecar.port, admin=admin, sample=parse_rules("/reports/* 100%; /admin/* 0%")) as envoy,
    ):
        await acknowledged(sidecar)
        await update(sidecar, rule_shares={"reports": 0.8})
        envoy.new.answer = hang

        async def is_lowered() -> bool:
            await envoy.ask(50)
            return (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).traffic.sample_safe < 1.0

        await eventually_async(is_lowered, description="the sampling is lower")
        response = await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
        (event,) = (await sidecar.traffic.ListTrafficEvents(pb.ListTrafficEventsRequest(page_size=1))).events
        await acknowledged(sidecar)
        sampled = (await envoy.ask(50))[2]
        release.set()
        raised = await update(sidecar, sample_safe=1.0)
        warnings = (await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).warnings

    assert (event.actor, event.action, event.before.sample_safe) == ("sampling", "update", 1.0)
    assert list(event.after.rule_shares) == ["reports"]
    lowered = max(0.8 * event.after.sample_safe, 0.001)
    assert event.after.rule_shares["reports"] == pytest.approx(lowered, abs=1e-5)
    assert event.after.sample_safe == response.traffic.sample_safe < 0.5
    assert (event.after.new_share, event.after.baseline_share) == (event.before.new_share, event.before.baseline_share)
    assert list(response.warnings) == [event.reason]
    assert sampled < 50
    assert (raised.traffic.sample_safe, list(warnings)) == (1.0, [])


async def test_sampling_falls_once_until_people_change_traffic(redis_url: str, postgres_url: str) -> None:
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar) as sidecar:
        sidecar.ledger().endpoint()
        lease = LeaderLease(postgres_url)
        assert await lease.acquire()
        controller = SamplingController(sidecar.sidecar.database, lease, sidecar.sidecar.control)
        shares = []
        for raised in (1.0, None, 0.8):
            if raised:
                await update(sidecar, sample_safe=raised)
            sidecar.ledger().execute(
                "insert into abreast.envoy_count (service, at, sampled, shed) values ('shop', clock_timestamp(), 1000, 500)"
            )
            await controller.reconcile()
            shares.append((await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).traffic.sample_safe)
        await lease.release()

    assert shares[0] == shares[1]
    assert [0 < share < raised / 2 for share, raised in zip(shares, (1.0, 1.0, 0.8), strict=True)] == [True] * 3


async def test_traffic_does_not_wait_for_an_envoy_that_hangs(redis_url: str, postgres_url: str) -> None:
    (port,) = free_ports(1)
    admin = SocketAddress("127.0.0.1", port)
    async with (
        run_sidecar(redis_url, postgres_url, kind=QuerySidecar, envoy_admin=(str(admin),)) as sidecar,
        edge(sidecar.port, admin=admin) as envoy,
    ):
        await acknowledged(sidecar)
        assert envoy.server.process is not None
        durations = []
        with frozen(envoy.server.process.pid):
            for _ in range(9):
                began = time.monotonic()
                await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())
                durations.append(time.monotonic() - began)

    assert sorted(durations)[4] < 0.4, durations


async def test_update_moves_requests_and_names_the_envoy(sidecar: RunningSidecar) -> None:
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


async def test_rollback_and_promotion_move_all_users(sidecar: RunningSidecar) -> None:
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


async def test_sidecars_know_the_sampling_rules_of_envoys_at_others(redis_url: str, postgres_url: str) -> None:
    async with (
        run_sidecar(redis_url, postgres_url) as first,
        run_sidecar(redis_url, postgres_url) as second,
        edge(second.port, sample=parse_rules("name:api POST /graphql header:x-a=1 queries 5%")) as envoy,
    ):
        await acknowledged(second)

        async def knows_rule() -> bool:
            rules = (await first.traffic.GetTraffic(pb.GetTrafficRequest())).rules
            return [(rule.name, rule.share) for rule in rules] == [("api", 0.05)]

        await eventually_async(knows_rule, description="the first sidecar knows the rule")
        response = await update(first, rule_shares={"api": 1.0})
        values = await envoy.runtime()

    assert response.envoys[0].HasField("acknowledged_after")
    assert "1000000" in values["abreast.rule.api.sampled"]


async def test_update_reaches_envoys_of_other_sidecars(redis_url: str, postgres_url: str) -> None:
    async with (
        run_sidecar(redis_url, postgres_url) as first,
        run_sidecar(redis_url, postgres_url) as second,
        edge(second.port) as envoy,
    ):
        await acknowledged(second)
        changed = await first.traffic.UpdateTraffic(pb.UpdateTrafficRequest(service="shop", new_share=0.25))
        await envoy.wait_for_value("abreast.weight.new_or_old", "2500")
        await acknowledged(second)
        remote = await second.traffic.GetTraffic(pb.GetTrafficRequest())

    assert remote.traffic == changed.traffic
    assert remote.envoys[0].acknowledged_after.ToTimedelta() < dt.timedelta(seconds=3)


async def test_envoys_with_one_node_id_all_get_the_values(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as first, edge(sidecar.port) as second:
        await acknowledged(sidecar, envoys=2)
        response = await update(sidecar, new_share=0.5)
        await first.wait_for_value("abreast.weight.old", "5000")
        await second.wait_for_value("abreast.weight.old", "5000")

    assert [envoy.node for envoy in response.envoys] == ["edge-1", "edge-1"]
    assert len({envoy.peer for envoy in response.envoys}) == 2
    assert {envoy.acknowledged_version for envoy in response.envoys} == {response.traffic.version}


async def test_envoys_of_one_file_have_separate_names(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port, option="edge-a"), edge(sidecar.port, option="edge-b"):
        await acknowledged(sidecar, envoys=2)
        response = await update(sidecar, new_share=0.5)

    assert [envoy.node for envoy in response.envoys] == ["edge-a", "edge-b"]


async def test_services_have_separate_values(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port) as shop, edge(sidecar.port, service="till", node="till-1") as till:
        await till.wait_for_value("abreast.weight.old", "10000")
        await shop.wait_for_value("abreast.weight.old", "10000")
        await update(sidecar, new_share=1.0)
        await shop.wait_for_value("abreast.weight.old", "0")

        assert (await till.runtime())["abreast.weight.old"] == "10000"
        with pytest.raises(grpc.aio.AioRpcError, match="shop, till"):
            await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())


async def test_envoy_keeps_its_values_without_a_sidecar(redis_url: str, postgres_url: str) -> None:
    port = find_free_port()
    async with run_sidecar(redis_url, postgres_url, grpc_port=port) as sidecar, edge(port) as envoy:
        await acknowledged(sidecar)
        await update(sidecar, new_share=1.0)
        await sidecar.halt()
        alone = await envoy.ask()
        with psycopg.connect(postgres_url) as ledger:  # another sidecar's change, meanwhile
            ledger.execute(
                "update abreast.traffic set new_share = 7000, version = version + 1, updated_at = clock_timestamp()"
            )
        async with run_sidecar(redis_url, postgres_url, grpc_port=port) as restarted:
            await envoy.wait_for_value("abreast.weight.new_or_old", "7000")
            await acknowledged(restarted)

    assert alone[:2] == (0, REQUESTS)


async def test_envoy_gets_the_last_values_while_postgres_is_down(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url()) as sidecar:
            async with edge(sidecar.port):
                await acknowledged(sidecar)
                await update(sidecar, new_share=0.75)
            postgres.stop()
            async with edge(sidecar.port, node="edge-2") as late:
                await late.wait_for_value("abreast.weight.new_or_old", "7500")
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await update(sidecar, new_share=0.5)

    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "postgres can't be reached" in (error.value.details() or "")


async def test_envoy_gets_no_values_that_were_never_known(redis_url: str) -> None:
    with PostgresServer() as postgres:
        postgres.stop()
        async with (
            run_sidecar(redis_url, postgres.url(), ready=False, new_share=1.0) as sidecar,
            edge(sidecar.port) as envoy,
        ):
            served = await envoy.ask()
            runtime = await envoy.runtime()
            postgres.start()
            await envoy.wait_for_value("abreast.weight.new_or_old", "10000")

    assert served[:2] == (REQUESTS, 0)
    assert runtime.get("abreast.weight.new_or_old", "0") == "0"


async def test_listener_reconnects_without_missing_changes(sidecar: RunningSidecar, postgres_url: str) -> None:
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
        await envoy.wait_for_value("abreast.weight.new_or_old", "4200")


async def test_watch_sends_the_settings_and_each_change(sidecar: RunningSidecar) -> None:
    async with edge(sidecar.port):
        await acknowledged(sidecar)
        async with asyncio.timeout(20):
            watch = aiter(sidecar.traffic.WatchTraffic(pb.WatchTrafficRequest()))
            messages = [(await anext(watch)).traffic]
            for share in (0.5, 0.0):
                await update(sidecar, new_share=share)
                messages.append((await anext(watch)).traffic)

    assert [(message.version, message.new_share) for message in messages] == [(1, 0.0), (2, 0.5), (3, 0.0)]
