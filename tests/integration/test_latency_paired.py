"""Paired times of an endpoint, over gRPC and on the command line."""

from __future__ import annotations

import asyncio
import datetime as dt
import json

import grpc
import pytest
from click.testing import CliRunner, Result

from abreast.v1 import common_pb2, latency_pb2_grpc
from abreast.v1 import latency_pb2 as pb
from abreast_sidecar.cli import abreast
from support_serve import NOON, Ledger, RunningSidecar, refused

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

ROWS = """
insert into abreast.pair (day, id, at, endpoint_id, outcome, live, old_status, new_status, old_us, new_us, new_release,
                          waits_match, baseline_waits_match)
select %s, 'pair ' || %s || n, %s + n * interval '1 second', %s, 'match', 'old', 200, %s, %s, %s + n, %s, true, true
from generate_series(1, %s) as n
"""
ROUTE = "/products/{id}"


@pytest.fixture
def sidecar(query_sidecar: RunningSidecar) -> RunningSidecar:
    return query_sidecar


def add(ledger: Ledger, count: int, old: int, new: int, *, release: str = "2", status: int = 200) -> None:
    ledger.execute("select abreast.open_day(%s)", NOON.date())
    endpoint = ledger.endpoint(route=ROUTE)
    row = (NOON.date(), f"{release} {status} ", NOON, endpoint, status, old, new, release, count)
    ledger.execute(ROWS, *row)


async def ask(sidecar: RunningSidecar, route: str = ROUTE, **fields: object) -> pb.GetLatencyResponse:
    stub = latency_pb2_grpc.LatencyServiceStub(sidecar.channel)
    request = pb.GetLatencyRequest(service="shop", method="get", route=route, **fields)  # type: ignore[arg-type]
    response: pb.GetLatencyResponse = await stub.GetLatency(request)
    return response


async def test_timings_exclude_cold_pairs_of_each_release(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    add(ledger, 500, 10_000, 20_000, release="2")
    add(ledger, 300, 10_000, 30_000, release="3")
    add(ledger, 50, 10_000, 90_000, status=500)
    response = await ask(sidecar)
    middle = next(difference for difference in response.warm.differences if difference.quantile == 0.5)
    ratio = next(interval for interval in response.warm.ratios if interval.quantile == 0.5)

    assert (response.cold.pairs, response.warm.pairs, response.truncated) == (50 + 30, 450 + 270, False)
    assert response.warm.percentiles[0].old.ToMilliseconds() == 10
    assert response.warm.percentiles[-1].new.ToMilliseconds() == 30
    assert middle.low.ToMicroseconds() < middle.value.ToMicroseconds() < middle.high.ToMicroseconds()
    assert 10_000 < middle.value.ToMicroseconds() < 11_000
    assert 2 < ratio.low < ratio.value < ratio.high < 3.1


async def test_timings_compare_copies_with_enough_pairs(sidecar: RunningSidecar) -> None:
    ledger = sidecar.ledger()
    add(ledger, 400, 10_000, 30_000)
    unknown = await ask(sidecar)
    ledger.execute("update abreast.pair set baseline_us = 15000 where extract(second from at)::int %% 2 = 0")
    response = await ask(sidecar)

    assert (unknown.warm.baseline_pairs, response.warm.baseline_pairs) == (0, 180)
    assert response.warm.percentiles == unknown.warm.percentiles
    assert next(interval.value for interval in unknown.warm.ratios if interval.quantile == 0.5) == pytest.approx(
        3, abs=0.1
    )
    assert next(interval.value for interval in response.warm.ratios if interval.quantile == 0.5) == pytest.approx(
        2, abs=0.1
    )


async def test_timings_respect_window_and_confidence(sidecar: RunningSidecar) -> None:
    add(sidecar.ledger(), 400, 10_000, 20_000)
    window = common_pb2.TimeWindow()
    window.end.FromDatetime(NOON + dt.timedelta(seconds=101))
    some, sure = await ask(sidecar, window=window), await ask(sidecar, confidence=0.999)
    usual = await ask(sidecar)

    assert some.cold.pairs + some.warm.pairs == 100
    assert sure.warm.differences[1].low.ToMicroseconds() < usual.warm.differences[1].low.ToMicroseconds()


async def test_timings_reject_unknown_endpoint_and_invalid_arguments(sidecar: RunningSidecar) -> None:
    add(sidecar.ledger(), 10, 10_000, 20_000)
    with pytest.raises(grpc.aio.AioRpcError) as nothing:
        await ask(sidecar, "/elsewhere")
    with pytest.raises(grpc.aio.AioRpcError) as wrong:
        await ask(sidecar, confidence=2.0)

    assert refused(nothing.value).code is grpc.StatusCode.NOT_FOUND
    assert refused(wrong.value).message == "confidence must be above 0 and below 1, got 2"


async def test_latency_command_shows_both_versions(sidecar: RunningSidecar) -> None:
    add(sidecar.ledger(), 400, 10_000, 20_000)

    async def run(*arguments: str) -> Result:
        words = ["endpoint", "GET", ROUTE, "--service", "shop", "--address", f"127.0.0.1:{sidecar.port}", *arguments]
        return await asyncio.to_thread(CliRunner().invoke, abreast, words)

    output, machine = await run(), await run("--json")

    assert output.exit_code == machine.exit_code == 0, output.output
    assert "GET /products/{id}: 360 warm pairs" in output.output
    assert "50% within" in output.output
    assert "first 40 pairs" in output.output
    printed = machine.output[machine.output.index("{\n") :]  # the sidecar logs to the same stdout
    assert json.JSONDecoder().raw_decode(printed)[0]["warm"]["pairs"] == "360"
