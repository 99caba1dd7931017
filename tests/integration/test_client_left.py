"""Users who leave before the response, through a real Envoy, to Starlette apps under uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from abreast import ParallelRunMiddleware
from abreast_sidecar.envoy.sampling import SampleRule, parse_rules
from abreast_sidecar.envoy.settings import EnvoySettings, SocketAddress
from abreast_sidecar.jobs.detectors import detect_unanswered
from abreast_sidecar.store.database import Database
from abreast_sidecar.store.reader import LedgerReader
from abreast_sidecar.store.records import Window
from support import eventually_async, free_ports
from support_envoy import started, weights
from support_middleware import serving
from support_pairs import query_value, rows
from support_rtds import RuntimeServer
from support_serve import run_sidecar

pytestmark = pytest.mark.postgres

LEAVING, HANGING = 15, 40
PAIR_TIMEOUT_S = 3.0
SHADOW_TIMEOUT_S = 8.0


def make_app(redis_url: str, version: str) -> Starlette:
    async def leave_slow(_: Request) -> JSONResponse:
        await asyncio.sleep(5)
        return JSONResponse({})

    async def leave_noticed(request: Request) -> JSONResponse:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return JSONResponse({})

    async def hang_new(_: Request) -> JSONResponse:
        if version == "new":
            await asyncio.sleep(60)
        return JSONResponse({})

    async def respond(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"data": {}})

    app = Starlette(
        routes=[
            Route("/slow", leave_slow), Route("/noticed", leave_noticed), Route("/hangs", hang_new),
            Route("/graphql", respond, methods=["POST"]),
        ]
    )  # fmt: skip
    app.add_middleware(
        ParallelRunMiddleware, service="shop", redis_url=redis_url, release=version, pair_timeout=PAIR_TIMEOUT_S
    )
    return app


def make_address(url: str) -> SocketAddress:
    return SocketAddress("127.0.0.1", int(url.rpartition(":")[2]))


@asynccontextmanager
async def edge(redis_url: str, *, sample: tuple[SampleRule, ...] = ()) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """Yield a client of Envoy, and Envoy's admin address."""
    listen, admin, control = (SocketAddress("127.0.0.1", port) for port in free_ports(3))
    async with (
        serving(make_app(redis_url, "old"), timeout_graceful_shutdown=1) as (old, _),
        serving(make_app(redis_url, "new"), timeout_graceful_shutdown=1) as (new, _),
        RuntimeServer(control.port, weights(0.0)),
        started(
            EnvoySettings(
                service="shop",
                listen=listen,
                admin=admin,
                sidecar=control,
                old=(make_address(old),),
                new=(make_address(new),),
                sample_safe=1.0,
                sample=sample,
                baseline_share=0.0,
                shadow_timeout=SHADOW_TIMEOUT_S,
            )
        ),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{listen.port}", timeout=30) as client,
    ):

        async def are_healthy() -> bool:
            stats = await client.get(f"http://127.0.0.1:{admin.port}/stats?filter=membership_healthy&format=json")
            healthy = {stat["name"]: stat["value"] for stat in stats.json()["stats"] if "value" in stat}
            return all(healthy.get(f"cluster.{version}.membership_healthy") == 1 for version in ("old", "new"))

        await eventually_async(are_healthy, description="Envoy reaches both versions")
        yield client, f"127.0.0.1:{admin.port}"


async def leave(client: httpx.AsyncClient, path: str) -> None:
    with suppress(httpx.TimeoutException):
        await client.get(path, timeout=httpx.Timeout(30, read=1.0))


async def test_users_who_leave_early_are_no_finding(redis_url: str, postgres_url: str) -> None:
    """An app that notices marks its capture. For the others, Envoy's counters show that no copy was sent."""
    findings = "select route, state from abreast.finding join abreast.endpoint on endpoint.id = endpoint_id where path = 'no capture'"
    async with (
        edge(redis_url) as (client, admin),
        run_sidecar(redis_url, postgres_url, envoy_admin=(admin,)),
        Database(postgres_url) as database,
    ):
        await asyncio.gather(*[leave(client, path) for path in ("/slow", "/noticed") for _ in range(LEAVING)])
        await asyncio.gather(*[client.get("/hangs") for _ in range(HANGING)])
        counts = "select route, outcome, count(*)::int from abreast.pair join abreast.endpoint on endpoint.id = endpoint_id group by 1, 2 order by 1"
        expected = [
            ("/hangs", "only_old", HANGING), ("/noticed", "aborted", LEAVING), ("/slow", "only_old", LEAVING)
        ]  # fmt: skip

        async def are_written() -> bool:
            sampled = query_value(
                postgres_url, "select coalesce(sum((totals->>'sampled')::int), 0) from abreast.envoy_report"
            )
            return bool(sampled == 2 * LEAVING + HANGING) and rows(postgres_url, counts) == expected

        await eventually_async(are_written, description="all pairs are in the ledger")
        known = "select outcome, left_by is not null, live from abreast.pair where outcome = 'aborted' or left_by is not null"
        assert set(rows(postgres_url, known)) == {("aborted", True, "old")}

        async def is_confirmed() -> bool:
            async with database.connection() as connection:
                await detect_unanswered(connection)
            return rows(postgres_url, findings) == [("/hangs", "real")]

        await eventually_async(is_confirmed, description="Envoy's count shows the copies without an answer")

    assert query_value(postgres_url, "select sum(without_copy)::int from abreast.envoy_count") == 2 * LEAVING


async def test_verdict_needs_no_coverage_of_mutations_that_a_rule_excludes(redis_url: str, postgres_url: str) -> None:
    """An endpoint where new hangs lacks coverage. A rule does not exclude it."""
    rules = parse_rules("POST /graphql queries 100%")
    async with (
        edge(redis_url, sample=rules) as (client, admin),
        run_sidecar(redis_url, postgres_url, envoy_admin=(admin,)),
        Database(postgres_url) as database,
    ):
        for document in ("mutation AddToCart { a }", "query Search { a }"):
            responses = await asyncio.gather(
                *[client.post("/graphql", json={"query": document}) for _ in range(LEAVING)]
            )
            assert {response.status_code for response in responses} == {200}
        await asyncio.gather(*[client.get("/hangs") for _ in range(HANGING)])

        async def read_coverage() -> dict[str, tuple[int, int, int]]:
            evidence = await LedgerReader(database).read_evidence("shop", Window(), 0.1)
            assert evidence.release == "new"
            return {item.endpoint: (item.old_requests, item.excluded, item.compared) for item in evidence.endpoints}

        expected = {
            "GET /hangs": (HANGING, 0, 0),
            "POST /graphql mutation AddToCart": (LEAVING, LEAVING, 0),
            "POST /graphql query Search": (LEAVING, 0, LEAVING),
        }

        async def is_complete() -> bool:
            return bool(rows(postgres_url, "select from abreast.pair")) and await read_coverage() == expected

        await eventually_async(is_complete, description="the verdict counts all requests")
