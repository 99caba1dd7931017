"""The verdict as pipelines read it, and as the sidecar obeys it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree as ET

import grpc
import pytest
from click.testing import CliRunner, Result

from abreast.v1 import comparison_pb2 as pb
from abreast.v1 import rollout_pb2, traffic_pb2
from abreast_sidecar.cli import abreast
from abreast_sidecar.cli.exit_codes import ExitCode
from abreast_sidecar.stack.servers import PostgresServer
from support_serve import Ledger, QuerySidecar, RunningSidecar, refused, run_sidecar
from support_verdict import add, sampled

pytestmark = pytest.mark.postgres

URL = "/v1/services/shop/verdict"


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    """Yield a sidecar of the test's own: one that knows the settings of another test takes an empty ledger for a loss."""
    async with run_sidecar(redis_url, postgres_url, kind=QuerySidecar) as instance:
        yield instance


@pytest.fixture
def ledger(sidecar: RunningSidecar) -> Ledger:
    return sidecar.ledger()


def fill(ledger: Ledger, verdict: str) -> None:
    add(ledger, 50 if verdict == "INCONCLUSIVE" else 5000)
    if verdict == "FAIL":
        add(ledger, 500, ledger.finding(ledger.endpoint(), "$.price"))
    sampled(ledger)


async def run(sidecar: RunningSidecar, *words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, abreast, [*words, "--address", f"127.0.0.1:{sidecar.port}"])


@pytest.mark.parametrize(("verdict", "status"), [("PASS", 200), ("FAIL", 409), ("INCONCLUSIVE", 425)])
async def test_verdict_over_http(sidecar: RunningSidecar, ledger: Ledger, verdict: str, status: int) -> None:
    fill(ledger, verdict)

    response, gate = await sidecar.http.get(URL), await sidecar.http.get(URL, params={"gate": "1"})
    metrics = (await sidecar.http.get("/metrics")).text

    assert (response.status_code, response.json()["verdict"]) == (200, verdict)
    assert (gate.status_code, gate.json()["verdict"]) == (status, verdict)
    reasons = {item["subject"].removeprefix("VERDICT_SUBJECT_"): item for item in response.json()["reasons"]}
    mismatches = reasons["MISMATCHES"]
    assert mismatches["rate"]["low"] <= mismatches["rate"]["value"] <= mismatches["rate"]["high"]
    assert mismatches["limit"] == 0.001
    assert int(mismatches["total"]) == sum(row[0] for row in ledger.execute("select pairs from abreast.outcome_count"))
    assert 'abreast_verdict{service="shop"' in metrics


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [
        ("/v1/services/unknown/verdict?gate=1", 404, "no Envoy and no capture has named the service 'unknown'"),
        (f"{URL}?gate=1&release=9.9", 404, "no pair of release '9.9'"),
        (f"{URL}?gate=1&max_mismatch=0", 400, "budget.max_mismatch must be at least 1e-06, got 0: no number"),
        (f"{URL}?gate=1&max_error=1e-308", 400, "budget.max_error"),
        (f"{URL}?gate=1&confidence=1", 400, "budget.confidence must be"),
        (f"{URL}?gate=1&confidence=0.2", 400, "budget.confidence must be at least 0.5"),
        (f"{URL}?gate=1&max_mismatch=x", 400, "max_mismatch must be a number"),
        (f"{URL}?gate=1&since=2999-01-01T00:00:00Z", 400, "window.start must not be in the future"),
        (f"{URL}?gate=1&since=soon", 400, "since must be a time"),
        (f"{URL}?gaet=1", 400, "unknown parameter or value: gaet"),
        ("/v1/services/shop/causes?page_token=x", 400, "page_token must be"),
        ("/v1/services/unknown/causes", 404, "no Envoy and no capture has named the service 'unknown'"),
    ],
)
async def test_bad_input_is_never_a_verdict(
    sidecar: RunningSidecar, ledger: Ledger, url: str, status: int, text: str
) -> None:
    fill(ledger, "INCONCLUSIVE")

    response = await sidecar.http.get(url)

    assert (response.status_code, "verdict" in response.json()) == (status, False)
    assert text in response.json()["error"]["message"]


async def test_gate_without_postgres_is_no_verdict(redis_url: str) -> None:
    with PostgresServer() as postgres:
        async with run_sidecar(redis_url, postgres.url(), kind=QuerySidecar) as sidecar:
            fill(sidecar.ledger(), "FAIL")
            before = await sidecar.http.get(URL, params={"gate": "1"})
            postgres.stop()
            gate = await sidecar.http.get(URL, params={"gate": "1"})
            result = await run(sidecar, "verdict")

    assert (before.status_code, gate.status_code, "verdict" in gate.json()) == (409, 503, False)
    assert "postgres" in gate.json()["error"]["message"]
    assert result.exit_code == ExitCode.UNREACHABLE


async def test_causes_over_http(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "FAIL")

    document = (await sidecar.http.get("/v1/services/shop/causes")).json()

    assert [(cause["harm"], cause["shape"], cause["pairs"]) for cause in document["causes"]] == [
        ("HARM_CHANGED_VALUE", "price", "500")
    ]


@pytest.mark.parametrize(
    "words",
    [["promote"], ["traffic", "set", "--new", "25%"], ["ramp", "start", "--steps", "5,100"]],
    ids=["promote", "set", "ramp"],
)
async def test_more_users_on_new_need_force_at_fail(sidecar: RunningSidecar, ledger: Ledger, words: list[str]) -> None:
    fill(ledger, "FAIL")

    refusal = await run(sidecar, *words, "--reason", "r")
    before = await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service="shop"))
    forced = await run(sidecar, *words, "--reason", "r", "--force")

    assert (refusal.exit_code, before.traffic.new_share) == (5, 0), refusal.stderr
    assert "the verdict of shop is FAIL: 500 of 5,500 pairs have unexplained mismatches" in refusal.stderr
    assert "warning: the verdict of shop is FAIL" in forced.stderr
    after = await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service="shop"))
    assert after.traffic.new_share > 0


async def test_less_users_on_new_and_rollback_never_ask(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "FAIL")
    await sidecar.traffic.Promote(traffic_pb2.PromoteRequest(service="shop", force=True))

    lower = traffic_pb2.UpdateTrafficRequest(service="shop", new_share=0.5)
    assert (await sidecar.traffic.UpdateTraffic(lower)).traffic.new_share == 0.5
    assert (await sidecar.traffic.Rollback(traffic_pb2.RollbackRequest(service="shop"))).traffic.new_share == 0


async def test_calls_at_fail_have_a_reason_for_machines(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "FAIL")
    plan = rollout_pb2.RampPlan(steps=[0.1, 1.0])

    for call in (
        sidecar.traffic.Promote(traffic_pb2.PromoteRequest(service="shop")),
        sidecar.rollout.StartRamp(rollout_pb2.StartRampRequest(service="shop", plan=plan)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        refusal = refused(error.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VERDICT_FAIL")


async def test_calls_over_http_obey_the_verdict(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "FAIL")
    base = "/v1/services/shop"
    calls: dict[str, dict[str, object]] = {
        "traffic": {"new_share": 0.25},
        "promote": {"reason": "r"},
        "ramp": {"plan": {"steps": [0.1, 1.0]}},
    }
    before = (await sidecar.http.get(f"{base}/traffic")).json()["traffic"]
    for path, body in calls.items():
        response = await sidecar.http.post(f"{base}/{path}", json=body)
        assert response.status_code == 409
        assert response.json()["error"]["message"].startswith("the verdict of shop is FAIL: 500 of 5,500 pairs")
    assert (await sidecar.http.get(f"{base}/traffic")).json()["traffic"] == before

    forced = await sidecar.http.post(f"{base}/traffic", json={"new_share": 0.25, "force": True, "actor": "ci"})
    version = int(forced.json()["traffic"]["version"])
    stale = await sidecar.http.post(f"{base}/traffic", json={"new_share": 0, "expected_version": version - 1})
    ramp = await sidecar.http.post(f"{base}/ramp", json={**calls["ramp"], "force": True})
    aborted = await sidecar.http.post(f"{base}/ramp/abort", json={})
    rollback = await sidecar.http.post(f"{base}/rollback", json={})

    assert (forced.status_code, forced.json()["traffic"]["new_share"]) == (200, 0.25)
    assert (stale.status_code, ramp.status_code, aborted.status_code) == (409, 200, 200)
    assert (rollback.status_code, rollback.json()["traffic"]["new_share"]) == (200, 0.0)
    assert (await sidecar.http.get(f"{base}/ramp")).json()["ramp"]["state"] == aborted.json()["ramp"]["state"]
    events = await sidecar.traffic.ListTrafficEvents(traffic_pb2.ListTrafficEventsRequest(service="shop"))
    assert "ci" in {event.actor for event in events.events}


@pytest.mark.parametrize(
    ("content", "headers", "status", "text"),
    [
        ('{"share": 1}', {}, 400, 'no field named "share"'),
        ("{", {}, 400, "must be a UpdateTrafficRequest in JSON"),
        ('{"service": "till"}', {}, 400, "the body names the service 'till', and the path names 'shop'"),
        ('{"new_share": 2}', {}, 400, "new_share must be"),
        ("{" + " " * 20_000 + "}", {}, 400, "at most 16384 bytes"),
        ("{}", {"content-type": "text/plain"}, 403, "another site"),
        ("{}", {"origin": "http://evil.test"}, 403, "another site"),
    ],
)
async def test_calls_over_http_refuse_bad_input_and_other_sites(
    sidecar: RunningSidecar, ledger: Ledger, content: str, headers: dict[str, str], status: int, text: str
) -> None:
    ledger.endpoint()

    response = await sidecar.http.post(
        "/v1/services/shop/traffic", content=content, headers={"content-type": "application/json", **headers}
    )

    assert response.status_code == status, response.text
    assert text in (response.json()["error"]["message"] if status == 400 else response.text)
    traffic = (await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service="shop"))).traffic
    assert traffic.new_share == 0


async def test_inconclusive_verdict_warns(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "INCONCLUSIVE")

    response = await sidecar.traffic.Promote(traffic_pb2.PromoteRequest(service="shop"))

    assert response.traffic.new_share == 1
    assert response.warnings[0].startswith("the verdict of shop is INCONCLUSIVE: 0 of 50 pairs")


async def test_change_of_settings_that_changed_meanwhile_is_refused(sidecar: RunningSidecar, ledger: Ledger) -> None:
    ledger.endpoint()
    version = (await sidecar.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service="shop"))).traffic.version
    request = traffic_pb2.UpdateTrafficRequest(service="shop", sample_safe=0.5, expected_version=version)
    await sidecar.traffic.UpdateTraffic(request)

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await sidecar.traffic.UpdateTraffic(request)

    refusal = refused(error.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "STALE_VERSION")


async def test_verdict_waits_for_traffic_and_writes_junit(
    sidecar: RunningSidecar, ledger: Ledger, tmp_path: Path
) -> None:
    fill(ledger, "INCONCLUSIVE")
    unknown = await run(sidecar, "verdict", "--service", "unknown")
    waiting = asyncio.create_task(
        run(sidecar, "verdict", "--service", "shop", "--wait", "60s", "--junit", str(tmp_path / "verdict.xml"))
    )
    await asyncio.sleep(0)
    await asyncio.to_thread(fill, ledger, "FAIL")
    result = await waiting

    assert unknown.exit_code == 4
    assert (result.exit_code, "FAIL  shop" in result.stdout) == (1, True)
    suite = ET.parse(tmp_path / "verdict.xml").getroot()  # noqa: S314  # written by this test
    assert (suite.tag, suite.get("failures"), suite.get("errors")) == ("testsuite", "2", "0")
    assert ["500 of 5,550 pairs" in failure.attrib["message"] for failure in suite.iter("failure")] == [True, True]


async def test_wait_ends_with_inconclusive(sidecar: RunningSidecar, ledger: Ledger) -> None:
    fill(ledger, "INCONCLUSIVE")

    result = await run(sidecar, "verdict", "--wait", "1s")

    assert (result.exit_code, "INCONCLUSIVE  shop" in result.stdout) == (10, True)


async def test_verdict_shows_the_gravest_reasons_and_counts_the_others(sidecar: RunningSidecar, ledger: Ledger) -> None:
    for number in range(30):
        endpoint = ledger.endpoint(route=f"/r{number}")
        add(ledger, 300, ledger.finding(endpoint, "$.price"), endpoint=endpoint)
    sampled(ledger)

    result = await run(sidecar, "verdict")

    assert len(result.stdout.splitlines()) <= 40
    assert "more reasons (--json has all)" in result.stdout
    assert "and 22 more endpoints (--json has all)" in result.stdout
    assert (await sidecar.comparison.GetVerdict(pb.GetVerdictRequest())).state == pb.VERDICT_STATE_FAIL
