"""Around every call: its error becomes a status, its end a log line and a metric."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
import structlog

from abreast_sidecar.errors import SidecarError
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.status import to_error_status

log = structlog.get_logger(__name__)

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
STATUS_NAMES = {
    number: code.name for code in grpc.StatusCode for number in (code, code.value[0])
}  # aio tells either
UNLOGGED_METHOD_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")  # asked again and again


class Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrap(handler, handler_call_details.method)

    def _wrap(self, handler: Any, method: str) -> Any:
        # Of the four kinds a handler has one. A function that yields must stay one that yields.
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
    """One call, from its start to its end."""

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
        """Raises: the call ends with a status."""
        if isinstance(error, grpc.aio.AbortError):
            self.code = STATUS_NAMES[self.context.code()]
            raise error
        error_status = to_error_status(error)
        self.code = error_status.code.name
        if not isinstance(error, SidecarError):
            log.error("a call failed", method=self.method, exc_info=error)
        elif error_status.code is grpc.StatusCode.UNAVAILABLE:
            log.warning("a call was refused", method=self.method, code=self.code, error=error_status.message)
        await self.context.abort(error_status.code, error_status.message, error_status.metadata)
