"""How commands reach the sidecar: like any other client, over gRPC."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from abreast_sidecar.cli.exits import RefusedError
from abreast_sidecar.cli.parameters import SECONDS, TARGET
from abreast_sidecar.errors import ArgumentError, NotFoundError, ServerError, SidecarError

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from abreast.v1 import (
        common_pb2,
        comparison_pb2_grpc,
        latency_pb2_grpc,
        rule_pb2_grpc,
        steering_pb2_grpc,
        traffic_pb2_grpc,
    )

DEFAULT_ADDRESS = "127.0.0.1:50051"
LARGEST_MESSAGE = 64 * 1024 * 1024  # bytes; examples carry bodies
LARGEST_PAGE = 1000  # rows
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.enable_http_proxy", 0),  # a sidecar is near
)

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Calls:
    """The sidecar's services, while a channel is open. Pass `timeout` (seconds) to each call."""

    comparison: comparison_pb2_grpc.ComparisonServiceStub
    traffic: traffic_pb2_grpc.TrafficServiceStub
    latency: latency_pb2_grpc.LatencyServiceStub
    rules: rule_pb2_grpc.RuleServiceStub
    steering: steering_pb2_grpc.SteeringServiceStub
    timeout: float


@dataclass(frozen=True)
class Link:
    address: str
    timeout: float

    def run(self, ask: Callable[[Calls], Awaitable[T]]) -> T:
        """Raise a SidecarError that says in one line what a person can do."""
        return asyncio.run(self._run(ask))

    async def _run(self, ask: Callable[[Calls], Awaitable[T]]) -> T:
        import grpc.aio

        from abreast.v1 import (
            comparison_pb2_grpc,
            latency_pb2_grpc,
            rule_pb2_grpc,
            steering_pb2_grpc,
            traffic_pb2_grpc,
        )

        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            calls = Calls(
                comparison_pb2_grpc.ComparisonServiceStub(channel),
                traffic_pb2_grpc.TrafficServiceStub(channel),
                latency_pb2_grpc.LatencyServiceStub(channel),
                rule_pb2_grpc.RuleServiceStub(channel),
                steering_pb2_grpc.SteeringServiceStub(channel),
                self.timeout,
            )
            try:
                return await ask(calls)
            except grpc.aio.AioRpcError as error:
                raise in_plain_words(error, self.address, self.timeout) from error


def in_plain_words(error: grpc.aio.AioRpcError, address: str, timeout: float) -> SidecarError:
    import grpc

    said = error.details() or "no reason given"
    code = error.code()
    if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}:
        return ArgumentError(said)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFoundError(said.replace("ListFindings", "`abreast findings`"))
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return RefusedError(said)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ServerError(f"the sidecar at {address} did not answer within {timeout:g} s (--timeout)")
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerError(_unavailable(error, said, address))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return RefusedError(f"{address} does not know this call; is it a sidecar, of this version?")
    return RefusedError(f"the sidecar at {address} says {code.name}: {said}")


def _unavailable(error: grpc.aio.AioRpcError, said: str, address: str) -> str:
    if any(key == "grpc-status-details-bin" for key, _value in error.trailing_metadata() or ()):
        return f"the sidecar at {address} can't answer now: {said}"  # it spoke itself
    advice = "start one with `abreast up` or `abreast sidecar`, or say where it is with --address or ABREAST_SIDECAR"
    if "resol" in said.lower() or "dns" in said.lower():
        return f"no host {address.rpartition(':')[0]} is known; {advice}"
    if "refused" in said.lower():
        return f"no sidecar answers at {address}; {advice}"
    if "http1" in said.lower() or "settings frame" in said.lower() or "http2" in said.lower():
        return f"{address} answers, but not as a sidecar's gRPC does (is it the HTTP port?); {advice}"
    return f"no sidecar answers at {address} ({said}); {advice}"


def connected(command: Command) -> Command:
    """Options --address and --timeout, handed to the command as `link`."""

    @functools.wraps(command)
    def with_link(*args: Any, address: str, timeout: float, **kwargs: Any) -> Any:
        return command(*args, link=Link(address, timeout), **kwargs)

    click.option(
        "--timeout", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait for an answer."
    )(with_link)
    click.option(
        "--address",
        type=TARGET,
        default=DEFAULT_ADDRESS,
        envvar="ABREAST_SIDECAR",
        show_default=True,
        show_envvar=True,
        help="The sidecar's gRPC.",
    )(with_link)
    return with_link  # type: ignore[return-value]  # the same command with two options more


def window(since: dt.datetime | None, until: dt.datetime | None) -> common_pb2.TimeWindow | None:
    from abreast.v1 import common_pb2

    if since is None and until is None:
        return None
    if since and until and since > until:
        raise ArgumentError("--since must not be after --until")
    found = common_pb2.TimeWindow()
    if since:
        found.start.FromDatetime(since)
    if until:
        found.end.FromDatetime(until)
    return found


def page_sizes(limit: int) -> Iterator[int]:
    """Sizes of the pages that hold `limit` rows together."""
    while limit > 0:
        yield min(limit, LARGEST_PAGE)
        limit -= LARGEST_PAGE


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
service_option = click.option(
    "--service", default="", help="The service; may be left out where only one has an Envoy, or is known."
)


def print_json(message: Message, *, indent: int | None = 2) -> None:
    """Field names as in the protos; numbers of 64 bits are texts, as protobuf's JSON has it."""
    click.echo(as_text(message, indent=indent))


def as_text(message: Message, *, indent: int | None = 2) -> str:
    from google.protobuf import json_format

    return json_format.MessageToJson(
        message, indent=indent, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
