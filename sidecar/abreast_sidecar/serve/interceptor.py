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
from abreast_sidecar.serve.status import refusal

log = structlog.get_logger(__name__)

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
NAMES = {
    number: code.name for code in grpc.StatusCode for number in (code, code.value[0])
}  # aio tells either
QUIET = ("/grpc.health.v1.", "/grpc.reflection.")  # asked again and again


class Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def intercept_service(
        self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: Any, method: str) -> Any:
        # Of the four kinds a handler has one. A function that yields must stay one that yields.
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            inner = getattr(handler, kind)
            if inner is None:
                continue
            around = self._around_stream if inspect.isasyncgenfunction(inner) else self._around_call
            wrap = getattr(grpc, f"{kind}_rpc_method_handler")
            return wrap(
                around(inner, method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler

    def _around_call(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            with Call(method, context, self.metrics) as ended:
                try:
                    return await inner(request, context)
                except Exception as error:  # noqa: BLE001  # every error becomes a status
                    await ended.refuse(error)

        return call

    def _around_stream(self, inner: Any, method: str) -> Any:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with Call(method, context, self.metrics) as ended:
                try:
                    async for response in inner(request, context):
                        yield response
                except Exception as error:  # noqa: BLE001  # every error becomes a status
                    await ended.refuse(error)

        return stream


class Call:
    """One call, from its start to its end."""

    def __init__(self, method: str, context: Any, metrics: Metrics) -> None:
        self.method = method
        self.context = context
        self.metrics = metrics
        self.began = time.perf_counter()
        self.code = "OK"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.code = "CANCELLED"
        seconds = time.perf_counter() - self.began
        self.metrics.call(self.method, self.code, seconds)
        if not self.method.startswith(QUIET):
            log.debug("call", method=self.method, code=self.code, ms=round(seconds * 1000, 2))

    async def refuse(self, error: Exception) -> None:
        """Raises: the call ends with a status."""
        if isinstance(error, grpc.aio.AbortError):
            self.code = NAMES[self.context.code()]
            raise error
        found = refusal(error)
        self.code = found.code.name
        if not isinstance(error, SidecarError):
            log.error("a call failed", method=self.method, exc_info=error)
        elif found.code is grpc.StatusCode.UNAVAILABLE:
            log.warning("a call was refused", method=self.method, code=self.code, error=found.message)
        await self.context.abort(found.code, found.message, found.metadata)
