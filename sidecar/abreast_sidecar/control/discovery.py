"""Envoy's runtime discovery (RTDS): one stream an Envoy, the whole layer at each change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf import any_pb2

from abreast_sidecar.control.control import Control, Held
from abreast_sidecar.control.envoys import Connected
from abreast_sidecar.control.traffic import runtime_layer
from abreast_sidecar.control.xds import wire_pb2 as wire
from abreast_sidecar.ending import ended
from abreast_sidecar.errors import ArgumentError

SERVICE = "envoy.service.runtime.v3.RuntimeDiscoveryService"
RUNTIME = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
LAYER = "abreast"  # the resource's name

log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[wire.DiscoveryRequest, wire.DiscoveryResponse]


def response(held: Held, nonce: str) -> wire.DiscoveryResponse:
    runtime = wire.Runtime(name=LAYER)
    runtime.layer.update(runtime_layer(held.traffic.shares))
    resource = any_pb2.Any(type_url=RUNTIME, value=runtime.SerializeToString())
    return wire.DiscoveryResponse(
        version_info=str(held.traffic.version), resources=[resource], type_url=RUNTIME, nonce=nonce
    )


class RuntimeDiscovery:
    def __init__(self, control: Control) -> None:
        self.control = control

    def handler(self) -> grpc.GenericRpcHandler:
        stream = grpc.stream_stream_rpc_method_handler(
            self.stream,
            request_deserializer=wire.DiscoveryRequest.FromString,
            response_serializer=wire.DiscoveryResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamRuntime": stream})

    async def stream(self, requests: AsyncIterator[wire.DiscoveryRequest], context: Context) -> None:
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            return
        envoy = _connected(first, context.peer())
        self.control.envoys.add(envoy)
        log.info("envoy connected", node=envoy.node, service=envoy.service, has_version=first.version_info)
        ends = [
            asyncio.create_task(part) for part in (self._hear(envoy, requests), self.control.closing.wait())
        ]
        try:
            if await _unless(ends, self.control.welcome(envoy.service)):
                await self._tell(envoy, context, ends)
            for part in ends:
                if part.done():
                    part.result()
        finally:
            self.control.envoys.remove(envoy)
            await ended(*ends)
            log.info("envoy left", node=envoy.node, service=envoy.service)

    async def _tell(self, envoy: Connected, context: Context, ends: list[asyncio.Task[Any]]) -> None:
        """Writing is never cancelled: after half a write, grpcio can't end the stream with its status."""
        while not any(part.done() for part in ends):
            held = self.control.held(envoy.service)
            if held is None or held.traffic == envoy.sent:
                await _unless(ends, self.control.news.wait())
                continue
            envoy.sending(held.traffic, held.changed)
            await context.write(response(held, envoy.nonce))

    async def _hear(self, envoy: Connected, requests: AsyncIterator[wire.DiscoveryRequest]) -> None:
        async for request in requests:
            error = request.error_detail.message if request.HasField("error_detail") else ""
            if not envoy.answered(request.response_nonce, error):
                continue
            self.control.envoys.bell.ring()
            if error:
                log.error("envoy refuses the traffic settings", node=envoy.node, error=error)


async def _unless(ends: list[asyncio.Task[Any]], work: Coroutine[Any, Any, Any]) -> bool:
    """Work until one of `ends` is over; whether the work was done before."""
    working = asyncio.create_task(work)
    try:
        await asyncio.wait([*ends, working], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        await ended(working)


def _connected(first: wire.DiscoveryRequest, peer: str) -> Connected:
    if not first.node.cluster or not first.node.id:
        raise ArgumentError("an Envoy must have node.id, and node.cluster with the name of its service")
    if LAYER not in first.resource_names:
        asked = ", ".join(first.resource_names) or "nothing"
        raise ArgumentError(
            f"the rtds_layer in Envoy's configuration must have the name {LAYER}, it asks for {asked}"
        )
    return Connected(node=first.node.id, service=first.node.cluster, peer=peer)
