"""Health, reflection, readiness, metrics and the page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace as replace_fields
from functools import partial

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from msgspec.structs import replace
from psycopg.types.json import Jsonb

from abreast.protocol.join import CONSUMER_GROUP, SERVICES_KEY, Keys, reports_key
from abreast.v1 import comparison_pb2 as pb
from abreast_sidecar.app import Sidecar
from abreast_sidecar.cli.doctor.servers import check_join, read_redis_facts
from abreast_sidecar.errors import ServerError
from abreast_sidecar.settings import Settings
from abreast_sidecar.stack.servers import PostgresServer, RedisServer
from abreast_sidecar.store.catalogue import MAX_PATH_CHARS
from abreast_sidecar.store.database import sanitise_text
from support import eventually_async
from support_captures import capture
from support_pairs import add_stuck_entry
from support_serve import Ledger, RunningSidecar, packed, run_sidecar

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "abreast.v1.ComparisonService", "abreast.v1.TrafficService")


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as sidecar:
        yield sidecar


async def read_health(sidecar: RunningSidecar) -> set[int]:
    stub = health_pb2_grpc.HealthStub(sidecar.channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES}


async def test_health_check_covers_server_and_each_service(sidecar: RunningSidecar) -> None:
    assert await read_health(sidecar) == {SERVING}


async def test_health_check_of_unknown_service_is_not_found(sidecar: RunningSidecar) -> None:
    stub = health_pb2_grpc.HealthStub(sidecar.channel)

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Check(health_pb2.HealthCheckRequest(service="till"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_returns_services_and_descriptors(sidecar: RunningSidecar, version: str) -> None:
    call = sidecar.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="abreast.v1.TrafficService"),
    ]

    answers = [answer async for answer in call(iter(requests))]

    services = {service.name for service in answers[0].list_services_response.service}
    assert set(NAMES[1:]) < services
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_readiness_follows_redis_and_postgres() -> None:
    with PostgresServer() as postgres, RedisServer() as redis_server:
        async with run_sidecar(redis_server.url, postgres.url()) as sidecar:

            async def has_state(part: str, *, ready: bool) -> bool:
                answer = await sidecar.http.get("/readyz", timeout=20)
                state = answer.json()
                assert (answer.status_code == 200) == state["ready"]
                return bool(state["parts"][part] == "ok") == ready and bool(state["ready"]) == ready

            for server, part in ((redis_server, "redis"), (postgres, "postgres")):
                server.stop()
                await eventually_async(partial(has_state, part, ready=False), description=f"{part} is not ready")
                assert await read_health(sidecar) == {NOT_SERVING}
                assert (await sidecar.http.get("/healthz")).status_code == 200
                server.start()
                await eventually_async(partial(has_state, part, ready=True), description=f"{part} is ready")
                assert await read_health(sidecar) == {SERVING}


@pytest.mark.parametrize("age_s", [0.0, 31.0])
async def test_readiness_and_doctor_fail_while_a_pair_is_stuck(redis_url: str, postgres_url: str, age_s: float) -> None:
    async with run_sidecar(redis_url, postgres_url, ready=False, claim_idle=600.0) as sidecar:

        async def has_status(status: int) -> bool:
            return (await sidecar.http.get("/readyz")).status_code == status

        await eventually_async(partial(has_status, 200), description="the sidecar is ready")
        entry_id = add_stuck_entry(redis_url, age_s)
        await eventually_async(partial(has_status, 503 if age_s else 200), description="the age is checked")
        answer = (await sidecar.http.get("/readyz")).json()
        facts = await asyncio.to_thread(read_redis_facts, redis_url, ["shop"])
        with redis.Redis.from_url(redis_url) as client:
            client.xack(Keys("shop", 0).ready, CONSUMER_GROUP, entry_id)
            client.xdel(Keys("shop", 0).ready, entry_id)
        await eventually_async(partial(has_status, 200), description="the sidecar is ready again")

    ((shard,),) = facts.shards.values()
    received = replace_fields(shard, counters={"received": 1})
    (queues,) = (
        check
        for check in check_join(replace_fields(facts, shards={"shop": [received]}), "shop", 1)
        if check.name == "queues"
    )
    assert queues.state == ("fail" if age_s else "ok")
    expected = "a pair of shop has waited for more than 30 s to be written to the ledger; see the log of the workers"
    assert answer["parts"]["workers"] == (expected if age_s else "ok")


async def test_sidecar_without_postgres_listens_and_is_not_ready(redis_url: str) -> None:
    with PostgresServer() as postgres:
        postgres.stop()
        async with run_sidecar(redis_url, postgres.url(), ready=False) as sidecar:
            assert await read_health(sidecar) == {NOT_SERVING}
            answer = await sidecar.http.get("/readyz")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await sidecar.comparison.ListPairs(pb.ListPairsRequest())
            page = await sidecar.http.get("/")
            postgres.start()

            async def ready() -> bool:
                return (await sidecar.http.get("/readyz")).status_code == 200

            await eventually_async(ready, description="the sidecar is ready")

    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (page.status_code, "be reached" in page.text) == (503, True)


async def test_summary_works_without_redis(postgres_url: str) -> None:
    with RedisServer() as redis_server:
        async with run_sidecar(redis_server.url, postgres_url) as sidecar:
            sidecar.ledger().pair(sidecar.ledger().endpoint())
            redis_server.stop()
            summary = await sidecar.comparison.GetSummary(pb.GetSummaryRequest())

    assert summary.pairs == 1
    assert not summary.HasField("pending")


async def test_port_in_use_error_names_the_setting(sidecar: RunningSidecar) -> None:
    for part, setting in (
        ("grpc", "ABREAST_GRPC_LISTEN"),
        ("http", "ABREAST_HTTP_LISTEN"),
        ("collector", "ABREAST_COLLECTOR_LISTEN"),
    ):
        address = f"127.0.0.1:{getattr(sidecar.sidecar, part).port}"
        parts = ("grpc", "http", "collector")
        listen = {**{f"{name}_listen": "127.0.0.1:0" for name in parts}, f"{part}_listen": address}
        settings = Settings(
            redis_url=sidecar.sidecar.settings.redis_url,
            postgres_url=sidecar.postgres_url,
            **listen,  # type: ignore[arg-type]
        )
        with pytest.raises(ServerError, match=f"can't listen on {address}.*{setting}"):
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


async def test_metrics_count_calls_pairs_and_parts(sidecar: RunningSidecar) -> None:
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


async def test_pages_escape_content(sidecar: RunningSidecar) -> None:
    finding, pair = fill_ledger(sidecar.ledger())

    for path in ("/", "/?noise=1&service=shop", f"/findings/{finding}", f"/pairs/{pair}"):
        answer = await sidecar.http.get(path)

        assert answer.status_code == 200, path
        assert "<script" not in answer.text
        assert "&lt;script&gt;" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_overview_shows_verdict_and_reason(sidecar: RunningSidecar) -> None:
    fill_ledger(sidecar.ledger())
    text = (await sidecar.http.get("/")).text

    section = text[text.index("<h1>") : text.index('class="figures"')]
    assert re.search("<h1>.*FAIL</span> No[.] .* exceeds its limits", section), section
    assert re.search('<span class="tag breaking">FAIL</span>.*1 of 1 pairs have unexplained', section), section
    assert "Default limits: 0.1% mismatches" in section


async def test_bar_of_outcomes_separates_noise_from_mismatches(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    noise, price = ledger.finding(endpoint, "$.id", state="noise"), ledger.finding(endpoint, "$.price")
    for findings in ((), (noise,), (noise,), (noise, price)):
        ledger.pair(endpoint, *findings)
    text = (await sidecar.http.get("/")).text
    bar = text[text.index('<svg class="bar"') : text.index("</svg>")]

    assert re.findall(r'<rect class="(\w+)" x="(\d)" width="(\d)"', bar) == [
        ("mismatch", "0", "1"),
        ("explained", "1", "2"),
        ("match", "3", "1"),
    ]
    assert "<b>75.0%</b>" in text


async def test_pair_page_shows_old_first_and_exception_of_new(sidecar: RunningSidecar) -> None:
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


async def test_pair_page_shows_effects_without_a_key(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    pair = ledger.pair(ledger.endpoint())
    effects = ({"kind": "email.send", "at_us": 7}, {"kind": "sms.send", "key": None, "payload": None, "error": None})
    ledger.example(pair, {}, packed(replace(capture("old", b"{}"), effects=effects), capture("new", b"{}")), [])

    answer = await sidecar.http.get(f"/pairs/{pair}")

    assert (answer.status_code, "email.send" in answer.text) == (200, True)
    assert "sms.send: null" in answer.text


async def test_pair_page_links_findings_and_marks_invisible_characters(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    finding = ledger.finding(ledger.endpoint(), "$.a")
    pair = ledger.pair(ledger.endpoint(), finding)
    old = capture("old", '{"a\u202egnp.exe": 1, "b": "x\u2028y\u200b", "c": "\\\\u202e"}'.encode())
    difference = {"part": "body", "path": "$.a", "exact_path": "$.a", "kind": "changed", "impact": "value"}
    ledger.example(pair, {finding: 1}, packed(old, capture("new", b"{}")), [difference])

    text = (await sidecar.http.get(f"/pairs/{pair}")).text

    assert f'<a href="/findings/{finding}">{finding}</a>' in text
    assert not set(text) & set("\u202e\u2028\u200b")
    assert "a<mark>\\u202e</mark>gnp.exe" in text
    assert "x<mark>\\u2028</mark>y<mark>\\u200b</mark>" in text


async def test_finding_with_a_long_path_shows_its_example(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    path = "$." + "a" * 600
    stored = sanitise_text(path, MAX_PATH_CHARS)
    finding = ledger.finding(ledger.endpoint(), stored)
    pair = ledger.pair(ledger.endpoint(), finding)
    difference = {"part": "body", "path": path, "exact_path": path, "kind": "changed", "impact": "value", "old": "41"}
    ledger.example(pair, {finding: 1}, packed(capture("old", b"{}"), capture("new", b"{}")), [difference])

    text = (await sidecar.http.get(f"/findings/{finding}")).text

    assert "<code>41</code>" in text


async def test_latency_finding_shows_times_and_pairs(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    endpoint = ledger.endpoint()
    finding = ledger.finding(endpoint, "", part="latency", kind="slower", count=30)
    pairs = [ledger.pair(endpoint) for _ in range(30)]

    text = (await sidecar.http.get(f"/findings/{finding}")).text

    assert "Response times" in text
    assert "Pairs of this endpoint, newest first" in text
    assert f"/pairs/{pairs[0]}" in text


async def test_unknown_path_is_a_page_with_a_way_back(sidecar: RunningSidecar) -> None:
    answer = await sidecar.http.get("/nothing")

    assert answer.status_code == 404
    assert '<html lang="en">' in answer.text
    assert "<title>" in answer.text
    assert 'href="/"' in answer.text


async def test_overview_of_empty_ledger_explains_the_setup(sidecar: RunningSidecar) -> None:
    answer = await sidecar.http.get("/")

    assert answer.status_code == 200
    assert "abreast doctor" in answer.text


async def test_page_errors_have_their_http_status(sidecar: RunningSidecar) -> None:
    sidecar.ledger().endpoint()
    for path, status in (
        ("/findings/999999999999999999999999", 404),
        ("/findings/7", 404),
        ("/pairs/rubbish", 400),
        ("/pairs/0d7c1e3a-0000-4000-8000-000000000001", 404),
        ("/nothing", 404),
        ("/?service=%00", 400),
    ):
        assert (await sidecar.http.get(path)).status_code == status, path


async def test_services_beyond_the_limit_are_counted(
    redis_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abreast_sidecar.redis_client.MAX_SERVICES", 3)
    monkeypatch.setattr("abreast_sidecar.redis_client.MAX_UNCHECKED_SHARDS", 4)
    monkeypatch.setattr("abreast_sidecar.jobs.runner.SHARDS_TTL_S", 0.0)
    with redis.Redis.from_url(redis_url) as client:
        for number in range(5):
            client.hset(SERVICES_KEY, f"invented {number}", "1")
            client.hset(reports_key(f"invented {number}"), "process", "{}")
        async with run_sidecar(redis_url, postgres_url) as sidecar:

            async def shows_two() -> bool:
                return "abreast_ignored_services 2.0" in (await sidecar.http.get("/metrics")).text

            await eventually_async(shows_two, description="the metrics count the ignored services")
