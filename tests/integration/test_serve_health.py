"""Health, reflection, readiness, metrics and the page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from msgspec.structs import replace
from psycopg.types.json import Jsonb

from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.app import Sidecar
from abreast_sidecar.errors import ServerError
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from captures import capture
from support import eventually_async
from support_serve import Ledger, Running, packed, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "abreast.v1.ComparisonService", "abreast.v1.TrafficService")


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url) as sidecar:
        yield sidecar


async def read_health(sidecar: Running) -> set[int]:
    stub = health_pb2_grpc.HealthStub(sidecar.channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES}


async def test_health_check_covers_server_and_each_service(sidecar: Running) -> None:
    assert await read_health(sidecar) == {SERVING}


async def test_health_check_of_unknown_service_is_not_found(sidecar: Running) -> None:
    stub = health_pb2_grpc.HealthStub(sidecar.channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="till"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_returns_services_and_descriptors(sidecar: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(sidecar.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="abreast.v1.TrafficService"),
    ]

    answers = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]

    listed = {service.name for service in answers[0].list_services_response.service}
    assert set(NAMES[1:]) < listed
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_readiness_follows_redis_and_postgres() -> None:
    with PostgresServer() as postgres, RedisServer() as redis:
        async with running(redis.url, postgres.url()) as sidecar:

            async def has_state(part: str, *, ready: bool) -> bool:
                answer = await sidecar.http.get("/readyz", timeout=20)
                state = answer.json()
                assert (answer.status_code == 200) == state["ready"]
                return bool(state["parts"][part] == "ok") == ready and bool(state["ready"]) == ready

            for server, part in ((redis, "redis"), (postgres, "postgres")):
                server.stop()
                await eventually_async(partial(has_state, part, ready=False), what=f"{part} is not ready")
                assert await read_health(sidecar) == {NOT_SERVING}
                assert (await sidecar.http.get("/healthz")).status_code == 200
                server.start()
                await eventually_async(partial(has_state, part, ready=True), what=f"{part} is ready")
                assert await read_health(sidecar) == {SERVING}


async def test_sidecar_without_postgres_listens_and_is_not_ready(redis_url: str) -> None:
    with PostgresServer() as postgres:
        postgres.stop()
        async with running(redis_url, postgres.url(), ready=False) as sidecar:
            assert await read_health(sidecar) == {NOT_SERVING}
            answer = await sidecar.http.get("/readyz")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await sidecar.comparison.ListPairs(pb.ListPairsRequest())
            page = await sidecar.http.get("/")
            postgres.start()

            async def ready() -> bool:
                return (await sidecar.http.get("/readyz")).status_code == 200

            await eventually_async(ready, what="the sidecar is ready")

    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (page.status_code, "be reached" in page.text) == (503, True)


async def test_summary_works_without_redis(postgres_url: str) -> None:
    with RedisServer() as redis:
        async with running(redis.url, postgres_url) as sidecar:
            sidecar.ledger().pair(sidecar.ledger().endpoint())
            redis.stop()
            summary = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert summary.pairs == 1
    assert not summary.HasField("pending")


@pytest.mark.parametrize(("part", "setting"), [("grpc", "ABREAST_GRPC_LISTEN"), ("http", "ABREAST_HTTP_LISTEN")])
async def test_port_in_use_error_names_the_setting(sidecar: Running, part: str, setting: str) -> None:
    taken = f"127.0.0.1:{getattr(sidecar.sidecar, part).port}"
    listen = {"grpc_listen": "127.0.0.1:0", "http_listen": "127.0.0.1:0", f"{part}_listen": taken}
    settings = Settings(
        redis_url=sidecar.sidecar.settings.redis_url,
        postgres_url=sidecar.postgres_url,
        **listen,  # type: ignore[arg-type]
    )
    with pytest.raises(ServerError, match=f"can't listen on {taken}.*{setting}"):
        await Sidecar(settings).run(asyncio.Event())


def add_reports(ledger: Ledger) -> None:
    """Add reports of Envoy, Redis and a worker. The ledger has two of nine sampled requests."""
    ledger.execute(
        "insert into abreast.envoy_report (node, service, seen, totals, last_reading) values ('edge', 'shop', now(), %s, '{}')",
        Jsonb({"sampled": 9, "not_sent": 1}),
    )
    ledger.execute(
        "insert into abreast.shard_report (service, shard, seen, report) values ('shop', 0, now(), %s)",
        Jsonb({"received": 4, "late": 3, "rejected_pairs": 4}),
    )
    ledger.execute(
        "insert into abreast.dead_letter (at, service, entry, reason, content) values (now(), 'shop', '1-1', 'a capture of format 2', '')"
    )


async def test_metrics_count_calls_pairs_and_parts(sidecar: Running) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    ledger.pair(endpoint)
    ledger.pair(endpoint, outcome="only_old")
    add_reports(ledger)
    await sidecar.comparison.ListPairs(pb.ListPairsRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        await sidecar.comparison.GetPair(pb.GetPairRequest(id="x"))

    text = (await sidecar.http.get("/metrics")).text

    for line in (
        'abreast_envoy_sampled_total{service="shop"} 9.0',
        'abreast_unaccounted{service="shop"} 7.0',
        'abreast_captures_total{result="late",service="shop"} 3.0',
        'abreast_dropped_captures_total{reason="rejected_pairs",service="shop",stage="redis"} 4.0',
        'abreast_dead_letters{service="shop"} 1.0',
        'abreast_rpcs_total{code="OK",method="abreast.v1.ComparisonService/ListPairs"} 1.0',
        'abreast_rpcs_total{code="INVALID_ARGUMENT",method="abreast.v1.ComparisonService/GetPair"} 1.0',
        'abreast_ledger_pairs_total{outcome="only_old",service="shop"} 1.0',
        'abreast_ready{part="redis"} 1.0',
    ):
        assert line in text
    assert re.search(r"^abreast_ledger_clock_ahead_seconds -?[0-9.e-]+$", text, re.MULTILINE)


HOSTILE = "<script>alert(1)</script>"


def fill_ledger(ledger: Ledger) -> tuple[int, str]:
    endpoint = ledger.endpoint(route=f"/{HOSTILE}")
    finding = ledger.finding(endpoint, f"$.{HOSTILE}")
    pair = ledger.pair(endpoint, finding, request=f"/{HOSTILE}", reason=HOSTILE)
    difference = {
        "part": "body",
        "path": f"$.{HOSTILE}",
        "exact_path": f"$.{HOSTILE}",
        "kind": "changed",
        "impact": "value",
        "old": HOSTILE,
        "new": '"b"',
    }
    effect = {"kind": HOSTILE, "key": HOSTILE, "payload": {HOSTILE: HOSTILE}, "error": HOSTILE}
    old = replace(capture("old", {"a": HOSTILE}), effects=(effect,), effects_dropped=2)
    ledger.example(pair, {finding: 1}, packed(old, capture("new", b"\xff\xfe")), [difference])
    return finding, pair


async def test_pages_escape_content(sidecar: Running) -> None:
    finding, pair = fill_ledger(sidecar.ledger())

    for path in ("/", "/?noise=1&service=shop", f"/findings/{finding}", f"/pairs/{pair}"):
        answer = await sidecar.http.get(path)

        assert answer.status_code == 200, path
        assert "<script" not in answer.text
        assert "&lt;script&gt;" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_overview_shows_verdict_and_reason(sidecar: Running) -> None:
    fill_ledger(sidecar.ledger())
    text = (await sidecar.http.get("/")).text

    section = text[text.index('title="abreast verdict"') : text.index('class="figures"')]
    assert re.search('<span class="tag breaking">FAIL</span>.*1 of 1 pairs have unexplained', section, re.DOTALL), (
        section
    )


async def test_pair_page_shows_old_first_and_exception_of_new(sidecar: Running) -> None:
    ledger = sidecar.ledger()
    finding = ledger.finding(ledger.endpoint(), "raised", part="error")
    pair = ledger.pair(ledger.endpoint(), finding)
    new = replace(capture("new", b""), exception="RuntimeError", release="2.0.0")
    old = replace(capture("old", b"{}"), release="1.4.0")
    ledger.example(pair, {finding: 1}, packed(new, replace(old, role="baseline"), old), [])

    text = (await sidecar.http.get(f"/pairs/{pair}")).text

    titles = [title.partition(" <")[0] for title in text.split("<h2>")[1:]]
    assert titles == ["old", "new", "old"]
    assert text.index("1.4.0") < text.index("2.0.0") < text.index("RuntimeError") < text.index("baseline")


async def test_overview_of_empty_ledger_explains_the_setup(sidecar: Running) -> None:
    answer = await sidecar.http.get("/")

    assert answer.status_code == 200
    assert "abreast doctor" in answer.text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/findings/999999999999999999999999", 404),
        ("/findings/7", 404),
        ("/pairs/rubbish", 400),
        ("/pairs/0d7c1e3a-0000-4000-8000-000000000001", 404),
        ("/nothing", 404),
        ("/?service=%00", 400),
    ],
)
async def test_page_errors_have_their_http_status(sidecar: Running, path: str, status: int) -> None:
    sidecar.ledger().endpoint()

    assert (await sidecar.http.get(path)).status_code == status
