"""A gRPC service in two versions, with the messages of `shop.proto`."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection
from grpc_tools import protoc

from abreast_sidecar.compare.messages import parse_descriptor_set

PROTO = Path(__file__).with_name("shop.proto")
SERVICE = "shop.v1.ShopService"
# Parsers of proto2 accept text that is no UTF-8.
PROTO2 = """
syntax = "proto2";
package shop.v1;
message Row { optional string name = 1; }
service ShopService { rpc GetProduct(Row) returns (Row); }
"""
Handler = Callable[[Any, Any], Any]


@functools.cache
def compile_descriptors(text: str = PROTO.read_text(), *, with_imports: bool = True) -> bytes:
    """Return the descriptor set that protoc writes."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "shop.proto"), Path(folder, "shop.pb")
        source.write_text(text)
        includes = (folder, str(resources.files("grpc_tools") / "_proto"))
        words = [
            "protoc",
            *(f"--proto_path={path}" for path in includes),
            f"--descriptor_set_out={output}",
            str(source),
        ]
        assert protoc.main(words + ["--include_imports"] * with_imports) == 0
        return output.read_bytes()


@functools.cache
def shop_pool() -> DescriptorPool:
    return parse_descriptor_set(compile_descriptors())


def message_class(name: str) -> Any:
    return message_factory.GetMessageClass(shop_pool().FindMessageTypeByName(f"shop.v1.{name}"))


def make_product(**values: Any) -> Any:
    product = message_class("Product")(name="Tea", price=7.5, labels={"a": 1, "b": 2}, kind=1, weight=0, **values)
    product.created.FromJsonString("2026-01-02T03:04:05Z")
    return product


def reorder(message: Any) -> bytes:
    """Encode a message with its fields in the opposite order, with an unknown field and with an explicit default."""
    fields, data = [], message.SerializeToString()
    position = 0
    while position < len(data):
        start = position
        kind, position = data[position] & 7, position + 1
        if kind == 0:
            while data[position] & 128:
                position += 1
            position += 1
        else:
            position += {1: 8, 5: 4}.get(kind) or data[position] + 1  # short fields have a length of one byte
        fields.append(data[start:position])
    return b"".join([b"\x9a\x06\x01x", *reversed(fields), b"\x18\x00" if not message.stock else b""])


@dataclass
class Shop:
    """A version. Handlers return a message or bytes, or raise by the context."""

    handlers: Mapping[str, Handler]
    with_reflection: bool = False
    compression: grpc.Compression = grpc.Compression.NoCompression
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def live_calls(self) -> list[str]:
        return [name for name, metadata in self.calls if metadata["x-abreast-role"] == "live"]

    def _make_handler(self, name: str) -> grpc.RpcMethodHandler[Any, Any]:
        def encode(answer: Any) -> bytes:
            return answer if isinstance(answer, bytes) else bytes(answer.SerializeToString())

        async def answer(request: Any, context: Any) -> Any:
            self.calls.append((name, dict(context.invocation_metadata())))
            return await self.handlers[name](request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self.calls.append((name, dict(context.invocation_metadata())))
            async for part in self.handlers[name](request, context):
                yield part

        read = message_class("ProductRequest").FromString
        if name == "ListProducts":
            return grpc.unary_stream_rpc_method_handler(stream, read, encode)
        return grpc.unary_unary_rpc_method_handler(answer, read, encode)

    @contextlib.asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[Shop]:
        server = grpc.aio.server(compression=self.compression, options=[("grpc.so_reuseport", 0)])
        handlers = {name: self._make_handler(name) for name in self.handlers}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if self.with_reflection:
            reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server, pool=shop_pool())
        self.port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)


class ShopClient:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def call(self, name: str, product: str = "Tea") -> Any:
        """Return the answer of a unary call."""
        call: Any = self._channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=message_class("ProductRequest").SerializeToString,
            response_deserializer=message_class("Product").FromString,
        )
        return await call(message_class("ProductRequest")(name=product), wait_for_ready=True, timeout=30)

    async def stream(self, product: str = "Tea") -> list[Any]:
        call: Any = self._channel.unary_stream(
            f"/{SERVICE}/ListProducts",
            request_serializer=message_class("ProductRequest").SerializeToString,
            response_deserializer=message_class("Product").FromString,
        )
        return [part async for part in call(message_class("ProductRequest")(name=product), timeout=30)]


def write_config(path: Path, old: int, new: int, *descriptors: str) -> Path:
    """Write an abreast.yaml for both versions."""
    lines = [
        "services:",
        "  shop:",
        f"    old: {{endpoints: ['127.0.0.1:{old}']}}",
        f"    new: {{endpoints: ['127.0.0.1:{new}']}}",
        "    upstream_http2: true",
        "    health_path: tcp",
        "    sample_unsafe: 100%",
        "    baseline_share: 0",
    ]
    if descriptors:
        lines += ["sidecar:", f"  descriptors: [{', '.join(descriptors)}]"]
    path.write_text("\n".join(lines) + "\n")
    return path


def frame(*messages: bytes, flag: int = 0) -> bytes:
    return b"".join([bytes([flag]) + len(message).to_bytes(4) + message for message in messages])
