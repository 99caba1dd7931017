"""A minimal RTDS server for Envoy, independent of the sidecar's code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

RUNTIME = "type.googleapis.com/envoy.service.runtime.v3.Runtime"


class RuntimeServer:
    """Sends the layer `abreast` at each change."""

    def __init__(self, port: int, layer: dict[str, Any]) -> None:
        self.port = port
        self.layer = layer
        self.version = 0
        self.acknowledged = 0
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server()

    async def set(self, layer: dict[str, Any]) -> None:
        """Set the layer and wait until Envoy has acknowledged it."""
        async with self._changed:
            self.layer = layer
            self.version += 1
            self._changed.notify_all()
            async with asyncio.timeout(10):
                await self._changed.wait_for(lambda: self.acknowledged >= self.version)

    async def __aenter__(self) -> Self:
        handler: Any = grpc.stream_stream_rpc_method_handler(self._stream)
        service = "envoy.service.runtime.v3.RuntimeDiscoveryService"
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"StreamRuntime": handler}),)
        )
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(None)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        sent_version = -1
        await anext(requests)
        while not context.done():
            async with self._changed:
                await self._changed.wait_for(lambda sent_version=sent_version: self.version > sent_version)  # type: ignore[misc]
                sent_version = self.version
            yield _response(self.layer, sent_version)
            await anext(requests)  # acknowledged
            async with self._changed:
                self.acknowledged = sent_version
                self._changed.notify_all()


def _response(layer: dict[str, Any], version: int) -> bytes:
    """Parse a DiscoveryResponse: version_info = 1, resources = 2, type_url = 4, nonce = 5."""
    runtime = _field(1, b"abreast") + _field(2, ParseDict(layer, Struct()).SerializeToString())
    resource = AnyMessage(type_url=RUNTIME, value=runtime).SerializeToString()
    number = str(version).encode()
    return _field(1, number) + _field(2, resource) + _field(4, RUNTIME.encode()) + _field(5, number)


def _field(number: int, value: bytes) -> bytes:
    """Encode a length-delimited protobuf field."""
    length, size = bytearray(), len(value)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + value
