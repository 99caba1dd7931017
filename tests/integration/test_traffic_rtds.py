"""The discovery stream with misbehaviour that a real Envoy does not show."""

from __future__ import annotations

import asyncio
import contextlib
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
from support_discovery import NODE, answer, open_stream, stream
from support_serve import RunningSidecar, refused, run_sidecar


@pytest.fixture
async def sidecar(redis_url: str, postgres_url: str) -> AsyncIterator[RunningSidecar]:
    async with run_sidecar(redis_url, postgres_url) as instance:
        yield instance


async def envoys(sidecar: RunningSidecar) -> list[pb.EnvoyStatus]:
    return list((await sidecar.traffic.GetTraffic(pb.GetTrafficRequest())).envoys)


async def test_rtds_layer_is_one_resource(sidecar: RunningSidecar) -> None:
    async with stream(sidecar) as call:
        response = await call.read()

    (resource,) = response.resources
    assert response.type_url == resource.type_url == "type.googleapis.com/envoy.service.runtime.v3.Runtime"
    runtime = wire.Runtime.FromString(resource.value)
    assert runtime.name == "abreast"
    assert MessageToDict(runtime.layer) == {
        "abreast.weight.old": 10_000.0,
        "abreast.weight.new_or_old": 0.0,
        "abreast.weight.drilled_or_old": 0.0,
        "abreast.drill.abort": 0.0,
        "abreast.drill.delay": 0.0,
        "abreast.drill.delay_ms": 0.0,
        "abreast.drill.by_header": 0.0,
        "abreast.sample.baseline": {"numerator": 10_000.0, "denominator": "MILLION"},
        "abreast.sample.safe": {"numerator": 100_000.0, "denominator": "MILLION"},
        "abreast.sample.unsafe": {"numerator": 0.0, "denominator": "MILLION"},
    }


@pytest.mark.parametrize("token", ["", "e" * 32])
async def test_fake_envoys_do_not_delay_a_change(token: str, redis_url: str, postgres_url: str) -> None:
    """300 fakes never answer. Without tokens, the sidecar accepts those that the limit of their address allows."""
    admin_token = "a" * 32 if token else ""
    metadata = (("authorization", f"Bearer {admin_token}"),) if token else ()
    async with (
        run_sidecar(redis_url, postgres_url, envoy_token=token, admin_token=admin_token) as sidecar,
        stream(sidecar, token=token) as envoy,
        grpc.aio.insecure_channel(f"127.0.0.1:{sidecar.port}") as channel,
    ):
        await envoy.write(answer(await envoy.read()))
        fakes = [open_stream(channel) for _ in range(300)]
        for number, fake in enumerate(fakes):
            node = wire.Node(id=f"fake-{number}", cluster="shop")
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # refused already
                await fake.write(wire.DiscoveryRequest(node=node, resource_names=["abreast"]))
        request = pb.GetTrafficRequest()

        async def has_handled_fakes() -> bool:
            connected = len((await sidecar.traffic.GetTraffic(request, metadata=metadata)).envoys)
            return connected == 1 if token else connected > 200

        await eventually_async(has_handled_fakes, description="the fakes are connected or refused")
        start = time.monotonic()
        change = sidecar.traffic.UpdateTraffic(
            pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(seconds=0)), metadata=metadata
        )
        response = await envoy.read()
        assert time.monotonic() - start < 5
        runtime = wire.Runtime.FromString(response.resources[0].value)
        assert MessageToDict(runtime.layer)["abreast.weight.old"] == 5000
        await change
        if token:  # the fakes hold no streams
            async with stream(sidecar, token=token) as other:
                assert await other.read()
        for fake in fakes:
            fake.cancel()


async def test_rtds_refusal_is_reported_without_waiting(sidecar: RunningSidecar) -> None:
    async with stream(sidecar) as call:
        await call.write(answer(await call.read()))
        change = sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(seconds=10)))
        start = time.monotonic()
        await call.write(answer(await call.read(), error="no such weight"))
        response = await change

    assert time.monotonic() - start < 5
    (state,) = response.envoys
    assert (state.acknowledged_version, state.error) == (1, "no such weight")
    assert not state.HasField("acknowledged_after")


async def test_rtds_ignores_answers_with_another_nonce(sidecar: RunningSidecar) -> None:
    async with stream(sidecar) as call:
        response = await call.read()
        await call.write(answer(response, nonce="other"))
        late = await sidecar.traffic.UpdateTraffic(pb.UpdateTrafficRequest(new_share=0.5, wait=Duration(nanos=10**8)))
        await call.write(answer(response))
        await call.write(answer(await call.read()))

        async def acknowledged() -> bool:
            (state,) = await envoys(sidecar)
            return state.acknowledged_version == 2

        await eventually_async(acknowledged, description="the second state is acknowledged")

    assert [state.acknowledged_version for state in late.envoys] == [0]


async def test_rtds_removes_envoys_that_left(sidecar: RunningSidecar) -> None:
    async with stream(sidecar) as call:
        await call.read()
        assert [state.node for state in await envoys(sidecar)] == ["edge-1"]

    async def is_gone() -> bool:
        return not await envoys(sidecar)

    await eventually_async(is_gone, description="the Envoy is not listed")


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
    sidecar: RunningSidecar, first: wire.DiscoveryRequest, message: str
) -> None:
    async with stream(sidecar, first) as call:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()

    refusal = refused(error.value)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in refusal.message


async def test_rtds_accepts_answers_after_a_clock_was_set_back(sidecar: RunningSidecar) -> None:
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

        await eventually_async(acknowledged, description="the second state is acknowledged")
        (state,) = await envoys(sidecar)

    assert dt.timedelta(0) <= state.acknowledged_after.ToTimedelta() < dt.timedelta(seconds=20)


async def test_rtds_streams_end_when_the_sidecar_drains(sidecar: RunningSidecar) -> None:
    async with stream(sidecar) as call:
        await call.read()
        start = time.monotonic()
        await sidecar.halt()

        assert await call.read() is grpc.aio.EOF
    assert time.monotonic() - start < 4


async def test_rtds_stream_ends_with_a_status_during_a_write(
    sidecar: RunningSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
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
