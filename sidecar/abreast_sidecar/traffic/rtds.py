"""Envoy's runtime discovery service (RTDS): one stream per Envoy, the whole layer at each change."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.json_format import MessageToDict

from abreast_sidecar.aio import cancel_and_wait
from abreast_sidecar.envoy.sampling import SampleRule
from abreast_sidecar.envoy.settings import RUNTIME_LAYER, name_layer, name_scope
from abreast_sidecar.errors import ArgumentError
from abreast_sidecar.store.access import current_caller
from abreast_sidecar.traffic.control import TrafficController
from abreast_sidecar.traffic.envoys import EnvoyConnection, EnvoyStatus, read_rules
from abreast_sidecar.traffic.model import Traffic, build_runtime_layer
from abreast_sidecar.traffic.state import CurrentTraffic
from abreast_sidecar.traffic.xds import wire_pb2 as wire

RTDS_SERVICE = "envoy.service.runtime.v3.RuntimeDiscoveryService"
RUNTIME_TYPE_URL = "type.googleapis.com/envoy.service.runtime.v3.Runtime"
RESOURCE_TYPE_URL = "type.googleapis.com/envoy.service.discovery.v3.Resource"
DRILL_GRACE_S = 5.0  # after the end of a drill, until an Envoy without a sidecar drops all values: old serves all users

log = structlog.get_logger(__name__)

RtdsContext: TypeAlias = grpc.aio.ServicerContext[wire.DiscoveryRequest, wire.DiscoveryResponse]


def build_response(
    current: CurrentTraffic, nonce: str, rules: Sequence[SampleRule] = (), scope: str = ""
) -> wire.DiscoveryResponse:
    layer = name_layer(current.traffic.service if scope else "")
    runtime = wire.Runtime(name=layer)
    runtime.layer.update(build_runtime_layer(current.traffic.shares, rules, scope))
    resource = any_pb2.Any(type_url=RUNTIME_TYPE_URL, value=runtime.SerializeToString())
    if (end := current.drill_ends_monotonic) is not None:  # Envoy drops the values if no sidecar ends the drill
        limited = wire.Resource(name=layer, resource=resource)
        limited.ttl.FromMilliseconds(round((max(end - time.monotonic(), 0) + DRILL_GRACE_S) * 1000))
        resource = any_pb2.Any(type_url=RESOURCE_TYPE_URL, value=limited.SerializeToString())
    return wire.DiscoveryResponse(
        version_info=current.traffic.stamp, resources=[resource], type_url=RUNTIME_TYPE_URL, nonce=nonce
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
        current_caller.get().check_envoy(status.service, status.node)
        envoy = EnvoyConnection(status)
        self.control.connections.add(envoy)
        log.info("envoy connected", node=status.node, service=status.service, has_version=first_request.version_info)
        held = Traffic.from_stamp(status.service, first_request.version_info)  # from before the connection was lost
        stop_tasks = [
            asyncio.create_task(self._receive_answers(envoy, requests)),
            asyncio.create_task(self.control.shutdown.wait()),
        ]
        try:
            if await _run_until(stop_tasks, self.control.ensure_known(status.service, held)):
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
            if current is None or (envoy.sent_traffic and current.traffic.stamp == envoy.sent_traffic.stamp):
                await _run_until(stop_tasks, self._wait_for_change(current))
                continue
            envoy.record_sent(current.traffic, current.changed_monotonic)
            if envoy.status.error:
                self.control.connections.notifier.notify_all()
            status = envoy.status
            await context.write(build_response(current, envoy.nonce, status.rules, status.scope))

    async def _wait_for_change(self, current: CurrentTraffic | None) -> None:
        end = current.drill_ends_monotonic if current else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if end is None else max(end - time.monotonic(), 0)):
                await self.control.change_notifier.wait()

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
    node = request.node
    if RUNTIME_LAYER in request.resource_names:
        return EnvoyStatus(node.cluster, node.id, peer, rules=_read_node_rules(node, node.cluster))
    for name in request.resource_names:
        prefix, slash, service = name.partition("/")
        if prefix == RUNTIME_LAYER and slash and service:  # one of several services, each with a stream
            scope = name_scope(service)
            return EnvoyStatus(service, node.id, peer, scope=scope, rules=_read_node_rules(node, service))
    names = ", ".join(request.resource_names) or "nothing"
    raise ArgumentError(f"the rtds_layer in Envoy's configuration must be named {RUNTIME_LAYER}, got {names}")


def _read_node_rules(node: wire.Node, service: str) -> tuple[SampleRule, ...]:
    """Return the sampling rules of a service in an Envoy's file."""
    metadata = MessageToDict(node.metadata).get("abreast")
    sample = metadata.get("sample", ()) if isinstance(metadata, dict) else ()
    return read_rules(sample.get(service, ()) if isinstance(sample, dict) else sample, node.id)
