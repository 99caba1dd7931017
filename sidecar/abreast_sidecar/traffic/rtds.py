"""Envoy's runtime discovery service (RTDS): one stream per Envoy, the whole layer at each change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf import any_pb2

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.envoys import EnvoyConnection, EnvoyStatus
from abreast_sidecar.traffic.model import build_runtime_layer
from abreast_sidecar.traffic.state import CurrentTraffic
from abreast_sidecar.traffic.xds import wire_pb2 as wire

RTDS_SERVICE = "envoy.service.runtime.v3.RuntimeDiscoveryService"
RUNTIME_TYPE_URL = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
RTDS_LAYER_NAME = "abreast"  # name of the resource

log = structlog.get_logger(__name__)

RtdsContext: TypeAlias = grpc.aio.ServicerContext[wire.DiscoveryRequest, wire.DiscoveryResponse]


def build_response(current: CurrentTraffic, nonce: str) -> wire.DiscoveryResponse:
    runtime = wire.Runtime(name=RTDS_LAYER_NAME)
    runtime.layer.update(build_runtime_layer(current.traffic.shares))
    resource = any_pb2.Any(type_url=RUNTIME_TYPE_URL, value=runtime.SerializeToString())
    return wire.DiscoveryResponse(
        version_info=str(current.traffic.version), resources=[resource], type_url=RUNTIME_TYPE_URL, nonce=nonce
    )


class RtdsServer:
    def __init__(self, control: TrafficController) -> None:
        self.control = control

    def build_handler(self) -> grpc.GenericRpcHandler:
        stream = grpc.stream_stream_rpc_method_handler(
            self.stream,
            request_deserializer=wire.DiscoveryRequest.FromString,
            response_serializer=wire.DiscoveryResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(RTDS_SERVICE, {"StreamRuntime": stream})

    async def stream(self, requests: AsyncIterator[wire.DiscoveryRequest], context: RtdsContext) -> None:
        try:
            first_request = await anext(requests)
        except StopAsyncIteration:
            return
        status = _parse_first_request(first_request, context.peer())
        envoy = EnvoyConnection(status)
        self.control.connections.add(envoy)
        log.info("envoy connected", node=status.node, service=status.service, has_version=first_request.version_info)
        stop_tasks = [
            asyncio.create_task(self._receive_answers(envoy, requests)),
            asyncio.create_task(self.control.shutdown.wait()),
        ]
        try:
            if await _run_until(stop_tasks, self.control.ensure_known(status.service)):
                await self._send_updates(envoy, context, stop_tasks)
            for task in stop_tasks:
                if task.done():
                    task.result()
        finally:
            self.control.connections.remove(envoy)
            await cancel_and_wait(*stop_tasks)
            log.info("envoy disconnected", node=status.node, service=status.service)

    async def _send_updates(
        self, envoy: EnvoyConnection, context: RtdsContext, stop_tasks: list[asyncio.Task[Any]]
    ) -> None:
        """Send the settings in force. A write is never cancelled: grpcio can't end a stream after half a write."""
        while not any(task.done() for task in stop_tasks):
            current = self.control.current(envoy.status.service)
            if current is None or current.traffic == envoy.sent_traffic:
                await _run_until(stop_tasks, self.control.change_notifier.wait())
                continue
            envoy.record_sent(current.traffic, current.changed_monotonic)
            if envoy.status.error:
                self.control.connections.notifier.notify_all()
            await context.write(build_response(current, envoy.nonce))

    async def _receive_answers(self, envoy: EnvoyConnection, requests: AsyncIterator[wire.DiscoveryRequest]) -> None:
        async for request in requests:
            error = request.error_detail.message if request.HasField("error_detail") else ""
            if not envoy.accept_answer(request.response_nonce, error):
                continue
            self.control.connections.notifier.notify_all()
            if error:
                log.error("envoy refused the traffic settings", node=envoy.status.node, error=error)


async def _run_until(stop_tasks: list[asyncio.Task[Any]], work: Coroutine[Any, Any, Any]) -> bool:
    """Run `work` until a stop task is done. Return True if the work was done first."""
    work_task = asyncio.create_task(work)
    try:
        await asyncio.wait([*stop_tasks, work_task], return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            return False
        work_task.result()
        return True
    finally:
        await cancel_and_wait(work_task)


def _parse_first_request(request: wire.DiscoveryRequest, peer: str) -> EnvoyStatus:
    if not request.node.cluster or not request.node.id:
        raise ArgumentError("the Envoy must have a node.id, and a node.cluster with the name of its service")
    if RTDS_LAYER_NAME not in request.resource_names:
        names = ", ".join(request.resource_names) or "nothing"
        raise ArgumentError(f"the rtds_layer in Envoy's configuration must be named {RTDS_LAYER_NAME}, got {names}")
    return EnvoyStatus(request.node.cluster, request.node.id, peer)
