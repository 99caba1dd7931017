"""Three services of one configuration file behind two real Envoys, with a real sidecar."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
from google.protobuf.duration_pb2 import Duration

from abreast.v1 import rollout_pb2 as rollout_pb
from abreast.v1 import traffic_pb2 as pb
from abreast.v1.comparison_pb2 import Budget
from abreast_sidecar.cli.doctor.envoy import read_envoy_facts
from abreast_sidecar.cli.traffic import describe_manual_rollback
from abreast_sidecar.envoy.config import parse_config
from abreast_sidecar.envoy.render import render_config
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.jobs.reports import describe_overrides, read_envoy
from abreast_sidecar.stack.servers import EnvoyServer
from abreast_sidecar.store.records import Window
from support import eventually_async, free_ports
from support_edge import LONG
from support_serve import RunningSidecar, run_sidecar
from support_upstream import Upstream, failing
from support_users import Users, users

PATHS = {"shop": "/shop/{}", "cart": "/cart/{}", "rest": "/items/{}"}
FILE = """
envoy: {{collector: '127.0.0.1:{collector}', sidecar: '127.0.0.1:{sidecar}'}}
services:
  shop:
    prefixes: [/shop]
    old: {{endpoints: '127.0.0.1:{shop_old}'}}
    new: {{endpoints: '127.0.0.1:{shop_new}'}}
  cart:
    prefixes: [/cart, /api/cart]
    old: {{endpoints: '127.0.0.1:{cart_old}'}}
    new: {{endpoints: '127.0.0.1:{cart_new}'}}
    sample_safe: 50%
  rest:
    prefixes: [/items]
    old: {{endpoints: '127.0.0.1:{rest_old}'}}
    new: {{endpoints: '127.0.0.1:{rest_new}'}}
    sample_safe: 100%
"""


@dataclass
class Deployment:
    sidecar: RunningSidecar
    upstreams: dict[str, Upstream]  # by service and version: shop_old
    listens: list[int]  # of the Envoys
    admins: list[str]
    servers: list[EnvoyServer]

    async def set_new_share(self, service: str, share: float) -> None:
        change = pb.UpdateTrafficRequest(service=service, new_share=share, actor="ada", reason="a test", wait=LONG)
        await self.sidecar.traffic.UpdateTraffic(change)


@asynccontextmanager
async def deploy(redis_url: str, postgres_url: str) -> AsyncIterator[Deployment]:
    collector, grpc_port, *ports = free_ports(6)
    names = [f"{service}_{version}" for service in PATHS for version in ("old", "new")]
    async with AsyncExitStack() as opening:
        upstreams = {name: await opening.enter_async_context(Upstream()) for name in names}
        upstream_ports = {name: upstream.port for name, upstream in upstreams.items()}
        config = parse_config(FILE.format(collector=collector, sidecar=grpc_port, **upstream_ports))
        listens, admins = ports[:2], [f"127.0.0.1:{port}" for port in ports[2:]]
        services: tuple[EnvoySettings, ...] = ()
        servers = []
        for number, (listen, admin) in enumerate(zip(listens, admins, strict=True), 1):
            options = {"listen": f"127.0.0.1:{listen}", "admin": admin, "node_id": f"edge-{number}"}
            services = config.build_services({}, options)
            server = EnvoyServer(render_config(*services))
            servers.append(server)
            await asyncio.to_thread(server.__enter__)
            opening.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)
        sidecar = await opening.enter_async_context(
            run_sidecar(
                redis_url,
                postgres_url,
                services=services,
                grpc_port=grpc_port,
                envoy_admin=tuple(admins),
                collector_listen=f"127.0.0.1:{collector}",
            )
        )
        deployment = Deployment(sidecar, upstreams, listens, admins, servers)
        await eventually_async(lambda: _is_connected(deployment), description="the Envoys have the settings")
        yield deployment


async def _is_connected(deployment: Deployment) -> bool:
    """Each Envoy has the initial settings of each service, and finds its new version healthy."""
    for service in PATHS:
        current = deployment.sidecar.sidecar.control.current(service)
        states = deployment.sidecar.sidecar.control.connections.list_all(service)
        if current is None or sum(state.acknowledged == current.traffic.stamp for state in states) < len(
            deployment.listens
        ):
            return False
        for admin in deployment.admins:
            facts = await asyncio.to_thread(read_envoy_facts, admin, service)
            if not facts.stats.get("cluster.new.membership_healthy"):
                return False
    return True


async def has_answers_of(load: Users, version: str, count: int = 20) -> bool:
    return all(response.version == version for response in await load.wait_for(count))


async def test_rollback_of_one_service_leaves_the_others_alone(redis_url: str, postgres_url: str) -> None:
    async with deploy(redis_url, postgres_url) as deployment, AsyncExitStack() as opening:
        loads = {
            (service, listen): await opening.enter_async_context(users(listen, readers=1, writers=1, paths=(path,)))
            for service, path in PATHS.items()
            for listen in deployment.listens
        }
        for service in PATHS:
            await deployment.set_new_share(service, 1)
        assert all([await has_answers_of(load, "new") for load in loads.values()])

        answer = await deployment.sidecar.traffic.Rollback(pb.RollbackRequest(service="cart", reason="a test"))

        assert sorted(envoy.node for envoy in answer.envoys) == ["edge-1", "edge-2"]
        assert all(envoy.HasField("acknowledged_after") for envoy in answer.envoys)
        for (service, _listen), load in loads.items():
            await load.wait_for(2)  # requests in flight
            assert await has_answers_of(load, "old" if service == "cart" else "new")
        await opening.aclose()
        assert {response.trouble for load in loads.values() for response in load.responses} == {""}
        for service in PATHS:
            await eventually_async(
                lambda service=service: _is_accounted(deployment, service),  # type: ignore[misc]  # the present service
                description=f"Envoy's count of {service} equals the ledger's",
            )
            for name, upstream in deployment.upstreams.items():
                paths = {request.path.split("/")[1] for request in upstream.received}
                assert paths == {PATHS[name.split("_")[0]].split("/")[1]}


async def test_guard_rolls_back_one_service_while_the_ramps_of_the_others_go_on(
    redis_url: str, postgres_url: str
) -> None:
    lenient = Budget(max_mismatch=0.1, max_error=0.1, max_slower=9.0, min_completeness=0.8)
    blind = Budget(max_mismatch=0.99, max_error=0.99, max_slower=9.0)  # so that the guard acts before the ramp
    plans = {
        service: rollout_pb.RampPlan(steps=[0.3, 1], hold=Duration(seconds=hold_s), min_pairs=20, budget=budget)
        for service, hold_s, budget in (("shop", 1, lenient), ("cart", 600, blind), ("rest", 1, lenient))
    }
    policy = rollout_pb.GuardPolicy(mode=rollout_pb.GUARD_MODE_ACTING)
    async with deploy(redis_url, postgres_url) as deployment, AsyncExitStack() as opening:
        traffic, rollout = deployment.sidecar.traffic, deployment.sidecar.rollout
        loads = {
            (service, listen): await opening.enter_async_context(users(listen, readers=1, writers=0, paths=(path,)))
            for (service, path), listen in zip(PATHS.items(), itertools.cycle(deployment.listens), strict=False)
        }
        for service in PATHS:
            change = pb.UpdateTrafficRequest(
                service=service, sample_safe=1, baseline_share=0, reason="a test", wait=LONG
            )
            await traffic.UpdateTraffic(change)
            await rollout.SetGuard(rollout_pb.SetGuardRequest(service=service, policy=policy, reason="a test"))
        for service, plan in plans.items():
            await rollout.StartRamp(
                rollout_pb.StartRampRequest(service=service, plan=plan, reason="a test", force=True)
            )
        cart = deployment.upstreams["cart_new"]

        async def has_users() -> bool:
            return len(cart.in_role("live")) > 5

        await eventually_async(has_users, description="new of cart answers users")
        cart.answer = failing(500)

        async def get_phases() -> dict[str, str]:
            ramps = {
                service: (await rollout.GetRamp(rollout_pb.GetRampRequest(service=service))).ramp for service in PATHS
            }
            return {
                service: rollout_pb.RampPhase.Name(ramp.state.phase).removeprefix("RAMP_PHASE_").lower()
                for service, ramp in ramps.items()
            }

        async def are_over() -> bool:
            return "progressing" not in (await get_phases()).values()

        await eventually_async(are_over, within=300, description="all ramps have ended")
        assert await get_phases() == {"shop": "succeeded", "cart": "superseded", "rest": "succeeded"}
        assert all(
            [await has_answers_of(load, "old" if service == "cart" else "new") for (service, _), load in loads.items()]
        )
        for service in PATHS:
            request = pb.ListTrafficEventsRequest(service=service)
            events = (await traffic.ListTrafficEvents(request)).events
            rollbacks = [(event.actor, event.reason) for event in events if event.action == "rollback"]
            assert [actor for actor, _ in rollbacks] == (["guard"] if service == "cart" else []), rollbacks
        assert {response.trouble for load in loads.values() for response in load.responses} == {""}


async def _is_accounted(deployment: Deployment, service: str) -> bool:
    """Each sampled request has a row, all have captures of both versions, and the shares of the services apply."""
    summary = await deployment.sidecar.sidecar.reader.read_summary(service, Window(None, None))
    received = len(
        {
            request.pair
            for version in ("old", "new")
            for request in deployment.upstreams[f"{service}_{version}"].received
        }
        - {""}
    )
    outcomes = set(summary.outcomes) - {"aborted"}  # users who left when the load ended
    return summary.sampled == summary.pairs == received > 10 and outcomes == {"match"}


async def test_initial_shares_of_the_file_apply_to_each_service(redis_url: str, postgres_url: str) -> None:
    async with deploy(redis_url, postgres_url) as deployment:
        shares = {
            service: (
                await deployment.sidecar.traffic.GetTraffic(pb.GetTrafficRequest(service=service))
            ).traffic.sample_safe
            for service in PATHS
        }
        facts = [await asyncio.to_thread(read_envoy_facts, deployment.admins[0], service) for service in PATHS]

        assert shares == {"shop": 0.1, "cart": 0.5, "rest": 1.0}
        assert [fact.sampling["safe"] for fact in facts] == [0.1, 0.5, 1.0]
        assert {tuple(fact.services) for fact in facts} == {tuple(PATHS)}


async def test_counts_and_overrides_belong_to_one_service(redis_url: str, postgres_url: str) -> None:
    async with deploy(redis_url, postgres_url) as deployment:
        deployment.upstreams["cart_old"].answer = failing(500)
        url = f"http://127.0.0.1:{deployment.listens[0]}"
        async with httpx.AsyncClient(base_url=url) as client:
            statuses = [
                (await client.get(path)).status_code for path in ("/items/1", "/items/2", "/cart/1", "/none", "/")
            ]
            admin = deployment.admins[0]
            await asyncio.to_thread(
                deployment.servers[0].ask_admin, "POST", "/runtime_modify?abreast.weight.cart-new_or_old=5000"
            )
        snapshots = await read_envoy(admin)
        counts = {snapshot.service: snapshot.counts for snapshot in snapshots}

        assert statuses == [200, 200, 500, 404, 404]
        assert {service: (count["responses"], count["server_errors"]) for service, count in counts.items()} == {
            "shop": (0, 0),
            "cart": (1, 1),
            "rest": (2, 0),
        }
        assert counts["rest"]["sampled"] == 2
        assert {snapshot.service: snapshot.overrides for snapshot in snapshots} == {"shop": 0, "cart": 1, "rest": 0}
        assert await describe_overrides(admin, "shop") == ""
        assert "abreast.weight.cart-new_or_old=5000" in await describe_overrides(admin, "cart")


async def test_responses_that_a_retry_replaces_are_not_counted(redis_url: str, postgres_url: str) -> None:
    async with deploy(redis_url, postgres_url) as deployment:
        await deployment.set_new_share("rest", 1)
        deployment.upstreams["rest_new"].answer = failing(500)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{deployment.listens[0]}") as client:
            statuses = [(await client.get("/items/1")).status_code for _ in range(3)]
        [counts] = [part.counts for part in await read_envoy(deployment.admins[0]) if part.service == "rest"]

        assert statuses == [200] * 3
        assert (counts["responses"], counts["server_errors"]) == (3, 0)


async def test_printed_override_sends_users_of_one_service_to_old(redis_url: str, postgres_url: str) -> None:
    async with deploy(redis_url, postgres_url) as deployment:
        for service in PATHS:
            await deployment.set_new_share(service, 1)
        run = {"ABREAST_ENVOY_ADMIN": f"http://{deployment.admins[0]}"}
        run["ABREAST_ADMIN_SOCKET"] = deployment.servers[0].admin_socket
        command = await asyncio.to_thread(describe_manual_rollback, run, "cart")
        process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
        await process.communicate()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{deployment.listens[0]}") as client:
            versions = [(await client.get(path.format(1))).headers["x-abreast-version"] for path in PATHS.values()]

        assert (process.returncode, versions) == (0, ["new", "old", "new"])
        assert "SERVICE-old" in await asyncio.to_thread(describe_manual_rollback, run, "")
