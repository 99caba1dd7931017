"""The gRPC server. An interceptor turns errors into statuses, and logs and counts the calls."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from abreast.v1 import (
    comparison_pb2,
    comparison_pb2_grpc,
    latency_pb2,
    latency_pb2_grpc,
    rollout_pb2,
    rollout_pb2_grpc,
    rule_pb2,
    rule_pb2_grpc,
    traffic_pb2,
    traffic_pb2_grpc,
)
from abreast_sidecar.errors import ServerError, SidecarError
from abreast_sidecar.serve.errors import to_error_status
from abreast_sidecar.serve.http_server import bind_socket
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.services.comparison import ComparisonServicer, LatencyServicer
from abreast_sidecar.serve.services.rollout import RolloutServicer
from abreast_sidecar.serve.services.rules import RuleServicer
from abreast_sidecar.serve.services.traffic import TrafficServicer
from abreast_sidecar.traffic.rtds import RtdsServer

log = structlog.get_logger(__name__)

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

STATUS_NAMES = {number: code.name for code in grpc.StatusCode for number in (code, code.value[0])}  # grpc.aio uses both
UNLOGGED_METHOD_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")  # probes call them all the time
GRPC_SERVICE_NAMES = (
    comparison_pb2.DESCRIPTOR.services_by_name["ComparisonService"].full_name,
    latency_pb2.DESCRIPTOR.services_by_name["LatencyService"].full_name,
    rule_pb2.DESCRIPTOR.services_by_name["RuleService"].full_name,
    traffic_pb2.DESCRIPTOR.services_by_name["TrafficService"].full_name,
    rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name,
)
GRPC_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use must be an error
    ("grpc.max_send_message_length", 64 * 1024 * 1024),  # examples contain bodies
    ("grpc.keepalive_time_ms", 10_000),  # detects an Envoy whose machine is gone
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping as often
)


class Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrap(handler, handler_call_details.method)

    def _wrap(self, handler: Any, method: str) -> Any:
        # A handler has exactly one of the four behaviours. The wrapper of an async generator must be one too.
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, kind)
            if inner is None:
                continue
            wrap_behavior = self._wrap_stream if inspect.isasyncgenfunction(inner) else self._wrap_call
            make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
            return make_handler(
                wrap_behavior(inner, method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler

    def _wrap_call(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            with RpcCall(method, context, self.metrics) as rpc:
                try:
                    return await inner(request, context)
                except Exception as error:  # noqa: BLE001  # every error becomes a status
                    await rpc.abort(error)

        return call

    def _wrap_stream(self, inner: Any, method: str) -> Any:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with RpcCall(method, context, self.metrics) as rpc:
                try:
                    async for response in inner(request, context):
                        yield response
                except Exception as error:  # noqa: BLE001  # every error becomes a status
                    await rpc.abort(error)

        return stream


class RpcCall:
    """Measures and logs one call."""

    def __init__(self, method: str, context: Any, metrics: Metrics) -> None:
        self.method = method
        self.context = context
        self.metrics = metrics
        self.started = time.perf_counter()
        self.code = "OK"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.code = "CANCELLED"
        seconds = time.perf_counter() - self.started
        self.metrics.observe_call(self.method, self.code, seconds)
        if not self.method.startswith(UNLOGGED_METHOD_PREFIXES):
            log.debug("call", method=self.method, code=self.code, ms=round(seconds * 1000, 2))

    async def abort(self, error: Exception) -> None:
        """End the call with the status of the error. Always raises."""
        if isinstance(error, grpc.aio.AbortError):
            self.code = STATUS_NAMES[self.context.code()]
            raise error
        error_status = to_error_status(error)
        self.code = error_status.code.name
        if not isinstance(error, SidecarError):
            log.error("call failed", method=self.method, exc_info=error)
        elif error_status.code is grpc.StatusCode.UNAVAILABLE:
            log.warning("call refused", method=self.method, code=self.code, error=error_status.message)
        await self.context.abort(error_status.code, error_status.message, error_status.metadata)


class GrpcServer:
    def __init__(
        self,
        listen: str,
        *,
        comparison: ComparisonServicer,
        traffic: TrafficServicer,
        latency: LatencyServicer,
        rules: RuleServicer,
        rollout: RolloutServicer,
        discovery: RtdsServer,
        interceptor: Interceptor,
    ) -> None:
        self.listen = listen
        self.port = 0
        self.health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=(interceptor,), options=GRPC_SERVER_OPTIONS)
        comparison_pb2_grpc.add_ComparisonServiceServicer_to_server(comparison, self._server)
        traffic_pb2_grpc.add_TrafficServiceServicer_to_server(traffic, self._server)
        latency_pb2_grpc.add_LatencyServiceServicer_to_server(latency, self._server)
        rule_pb2_grpc.add_RuleServiceServicer_to_server(rules, self._server)
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(rollout, self._server)
        self._server.add_generic_rpc_handlers((discovery.build_handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection(
            (*GRPC_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Start to listen, not ready yet. Raises ServerError if the port is in use."""
        await self.set_ready(False)
        bind_socket(self.listen, "gRPC", "ABREAST_GRPC_LISTEN").close()  # its error has a reason, gRPC's has none
        try:
            self.port = self._server.add_insecure_port(self.listen)
        except RuntimeError as error:
            raise ServerError(
                f"can't listen on {self.listen} for gRPC; choose another address with ABREAST_GRPC_LISTEN"
            ) from error
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        state = health_pb2.HealthCheckResponse
        for name in ("", *GRPC_SERVICE_NAMES):
            await self.health.set(name, state.SERVING if ready else state.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cancel the calls in flight after `grace_s`."""
        await self._server.stop(grace_s)
