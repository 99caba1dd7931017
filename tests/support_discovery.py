"""A hand-written client of the discovery stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from abreast_sidecar.traffic.xds import wire_pb2 as wire
from support_serve import RunningSidecar

NODE = wire.Node(id="edge-1", cluster="shop")
FIRST = wire.DiscoveryRequest(node=NODE, resource_names=["abreast"])


def open_stream(channel: grpc.aio.Channel, token: str = "") -> Any:
    return channel.stream_stream(
        "/envoy.service.runtime.v3.RuntimeDiscoveryService/StreamRuntime",
        request_serializer=wire.DiscoveryRequest.SerializeToString,
        response_deserializer=wire.DiscoveryResponse.FromString,
    )(metadata=(("authorization", f"Bearer {token}"),) if token else ())


@asynccontextmanager
async def stream(
    sidecar: RunningSidecar, first: wire.DiscoveryRequest = FIRST, *, token: str = ""
) -> AsyncIterator[Any]:
    call: Any = open_stream(sidecar.channel, token)
    await call.write(first)
    try:
        async with asyncio.timeout(20):
            yield call
    finally:
        call.cancel()


def answer(response: wire.DiscoveryResponse, *, error: str = "", nonce: str = "") -> wire.DiscoveryRequest:
    request = wire.DiscoveryRequest(version_info=response.version_info, response_nonce=nonce or response.nonce)
    if error:
        request.error_detail.message = error
    return request
