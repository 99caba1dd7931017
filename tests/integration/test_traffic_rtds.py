"""The discovery stream with misbehaviour that a real Envoy does not show."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from abreast.v1 import traffic_pb2 as pb
from abreast_sidecar.traffic.envoys import EnvoyConnection
from abreast_sidecar.traffic.model import Traffic
from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support import eventually_async
from support_discovery import NODE, answer, stream
from support_serve import Running, refused, running


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[Running]:
    async with running(redis_url, postgres_url) as found:
        yield found


async def envoys(sidecar: Running) -> list[pb.EnvoyStatus]:
    return list((await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).envoys)


async def test_rtds_layer_is_one_resource(sidecar: Running) -> None:
    async with stream(sidecar) as call:
        response = await call.read()

    (resource,) = response.resources
    assert response.type_url == resource.type_url == "type.googleapis.com/envoy.service.runtime.v3.Runtime"
    runtime = wire.Runtime.FromString(resource.value)
    assert runtime.name == "abreast"
    assert MessageToDict(runtime.layer) == {
        "abreast.weight.old": 10_000.0,
        "abreast.weight.new_or_old": 0.0,
        "abreast.sample.baseline": {"numerator": 10_000.0, "denominator": "MILLION"},
        "abreast.sample.safe": {"numerator": 100_000.0, "denominator": "MILLION"},
        "abreast.sample.unsafe": {"numerator": 0.0, "denominator": "MILLION"},
    }


async def test_rtds_refusal_is_reported_without_waiting(sidecar: Running) -> None:
    async with stream(sidecar) as call:
        await call.write(answer(await call.read()))
        change = sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(seconds=10)))
        began = time.monotonic()
        await call.write(answer(await call.read(), error="no such weight"))
        found = await change

    assert time.monotonic() - began < 5
    (state,) = found.envoys
    assert (state.acknowledged_version, state.error) == (1, "no such weight")
    assert not state.HasField("acknowledged_after")


async def test_rtds_ignores_answers_with_another_nonce(sidecar: Running) -> None:
    async with stream(sidecar) as call:
        response = await call.read()
        await call.write(answer(response, nonce="other"))
        late = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(nanos=10**8)))
        await call.write(answer(response))
        await call.write(answer(await call.read()))

        async def acknowledged() -> bool:
            (state,) = await envoys(sidecar)
            return state.acknowledged_version == 2

        await eventually_async(acknowledged, what="the second state is acknowledged")

    assert [state.acknowledged_version for state in late.envoys] == [0]


async def test_rtds_removes_envoys_that_left(sidecar: Running) -> None:
    async with stream(sidecar) as call:
        await call.read()
        assert [state.node for state in await envoys(sidecar)] == ["edge-1"]

    async def gone() -> bool:
        return not await envoys(sidecar)

    await eventually_async(gone, what="the Envoy is not listed")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (wire.DiscoveryRequest(resource_names=["abreast"]), "node.cluster with the name of its service"),
        (wire.DiscoveryRequest(node=wire.Node(id="edge-1"), resource_names=["abreast"]), "node.cluster"),
        (wire.DiscoveryRequest(node=NODE, resource_names=["rtds"]), "must be named abreast, got rtds"),
        (wire.DiscoveryRequest(node=NODE), "got nothing"),
    ],
)
async def test_rtds_rejects_invalid_configurations(
    sidecar: Running, first: wire.DiscoveryRequest, message: str
) -> None:
    async with stream(sidecar, first) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

    found = refused(caught.value)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in found.message


async def test_rtds_accepts_answers_after_a_clock_was_set_back(sidecar: Running) -> None:
    """The settings are newer than Postgres's present time."""
    async with stream(sidecar) as call:
        await call.write(answer(await call.read()))
        ledger = sidecar.ledger()
        ledger.execute(
            "update abreast.traffic set version = version + 1, new_share = 2500, updated_at = updated_at + interval '1 hour'"
        )
        ledger.execute("notify abreast_traffic")
        await call.write(answer(await call.read()))

        async def acknowledged() -> bool:
            (state,) = await envoys(sidecar)
            return state.acknowledged_version == 2

        await eventually_async(acknowledged, what="the second state is acknowledged")
        (state,) = await envoys(sidecar)

    assert dt.timedelta(0) <= state.acknowledged_after.ToTimedelta() < dt.timedelta(seconds=20)


async def test_rtds_streams_end_when_the_sidecar_drains(sidecar: Running) -> None:
    async with stream(sidecar) as call:
        await call.read()
        began = time.monotonic()
        await sidecar.halt()

        assert await call.read() is grpc.aio.EOF
    assert time.monotonic() - began < 4


async def test_rtds_stream_ends_with_a_status_during_a_write(sidecar: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a write, grpcio can't end a stream, and its reader would wait until all calls are cancelled."""
    sending = EnvoyConnection.record_sent

    def closing(self: EnvoyConnection, traffic: Traffic, changed: float) -> None:
        sending(self, traffic, changed)
        sidecar.sidecar.control.close()

    monkeypatch.setattr(EnvoyConnection, "record_sent", closing)
    async with stream(sidecar) as call:
        assert (await call.read()).nonce
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK
