"""How commands reach the sidecar: like any other client, over gRPC."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click

from abreast_sidecar.errors import ArgumentError, NotFoundError, RpcError, ServerError, SidecarError

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from abreast.v1 import (
        common_pb2,
        comparison_pb2_grpc,
        latency_pb2_grpc,
        rollout_pb2_grpc,
        rule_pb2_grpc,
        traffic_pb2_grpc,
    )


MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # bytes; examples carry bodies
MAX_PAGE_ROWS = 1000  # rows
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # a sidecar is near
)

Response = TypeVar("Response")


@dataclass(frozen=True)
class Calls:
    """The sidecar's services, while a channel is open. Pass `timeout` (seconds) to each call."""

    comparison: comparison_pb2_grpc.ComparisonServiceStub
    traffic: traffic_pb2_grpc.TrafficServiceStub
    latency: latency_pb2_grpc.LatencyServiceStub
    rules: rule_pb2_grpc.RuleServiceStub
    steering: rollout_pb2_grpc.RolloutServiceStub
    timeout_s: float


@dataclass(frozen=True)
class SidecarClient:
    address: str
    timeout_s: float

    def call(self, operation: Callable[[Calls], Awaitable[Response]]) -> Response:
        """Raise a SidecarError that says in one line what a person can do."""
        return asyncio.run(self._call(operation))

    async def _call(self, operation: Callable[[Calls], Awaitable[Response]]) -> Response:
        async with self.connect() as calls:
            return await operation(calls)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Calls]:
        """Open a channel for as long as the context lasts. An RPC error in it becomes a SidecarError."""
        import grpc.aio

        from abreast.v1 import comparison_pb2_grpc, latency_pb2_grpc, rollout_pb2_grpc, rule_pb2_grpc, traffic_pb2_grpc

        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            try:
                yield Calls(
                    comparison_pb2_grpc.ComparisonServiceStub(channel),
                    traffic_pb2_grpc.TrafficServiceStub(channel),
                    latency_pb2_grpc.LatencyServiceStub(channel),
                    rule_pb2_grpc.RuleServiceStub(channel),
                    rollout_pb2_grpc.RolloutServiceStub(channel),
                    self.timeout_s,
                )
            except grpc.aio.AioRpcError as error:
                raise to_cli_error(error, self.address, self.timeout_s) from error


def to_cli_error(error: grpc.aio.AioRpcError, address: str, timeout_s: float) -> SidecarError:
    import grpc

    details = error.details() or "no reason given"
    code = error.code()
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}:
        return ArgumentError(details)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFoundError(details.replace("ListFindings", "`abreast findings`"))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return RpcError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerError(f"the sidecar at {address} did not answer within {timeout_s:g} s (--timeout)")
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerError(_describe_unavailable(error, details, address))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return RpcError(f"{address} does not know this call; is it a sidecar, of this version?")
    return RpcError(f"the sidecar at {address} says {code.name}: {details}")


def _describe_unavailable(error: grpc.aio.AioRpcError, details: str, address: str) -> str:
    if any(key == "grpc-status-details-bin" for key, _value in error.trailing_metadata() or ()):
        return f"the sidecar at {address} can't answer now: {details}"  # it spoke itself
    advice = "start one with `abreast up` or `abreast sidecar`, or say where it is with --address or ABREAST_SIDECAR"
    if "resol" in details.lower() or "dns" in details.lower():
        return f"no host {address.rpartition(':')[0]} is known; {advice}"
    if "refused" in details.lower():
        return f"no sidecar answers at {address}; {advice}"
    if "http1" in details.lower() or "settings frame" in details.lower() or "http2" in details.lower():
        return f"{address} answers, but not as a sidecar's gRPC does (is it the HTTP port?); {advice}"
    return f"no sidecar answers at {address} ({details}); {advice}"


def build_time_window(since: dt.datetime | None, until: dt.datetime | None) -> common_pb2.TimeWindow | None:
    from abreast.v1 import common_pb2

    if since is None and until is None:
        return None
    if since and until and since > until:
        raise ArgumentError("--since must not be after --until")
    time_window = common_pb2.TimeWindow()
    if since:
        time_window.start.FromDatetime(since)
    if until:
        time_window.end.FromDatetime(until)
    return time_window


def split_page_sizes(limit: int) -> Iterator[int]:
    """Sizes of the pages that hold `limit` rows together."""
    while limit > 0:
        yield min(limit, MAX_PAGE_ROWS)
        limit -= MAX_PAGE_ROWS


def print_json(message: Message, *, indent: int | None = 2) -> None:
    """Field names as in the protos; numbers of 64 bits are texts, as protobuf's JSON has it."""
    click.echo(message_to_json(message, indent=indent))


def message_to_json(message: Message, *, indent: int | None = 2) -> str:
    from google.protobuf import json_format

    return json_format.MessageToJson(
        message, indent=indent, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
