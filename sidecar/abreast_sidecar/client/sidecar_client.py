"""gRPC client of the sidecar, whose errors tell a person what to do."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from abreast_sidecar.errors import ArgumentError, NotFoundError, RpcError, ServerError, SidecarError

if TYPE_CHECKING:
    import grpc

    from abreast.v1 import (
        common_pb2,
        comparison_pb2_grpc,
        latency_pb2_grpc,
        rollout_pb2_grpc,
        rule_pb2_grpc,
        traffic_pb2_grpc,
    )

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # examples carry bodies
MAX_PAGE_ROWS = 1000
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # a sidecar is in the same network
)


class PageRequest(Protocol):
    page_size: int
    page_token: str


class Page(Protocol):
    next_page_token: str

    def MergeFrom(self, message: Any, /) -> None: ...  # noqa: N802  # protobuf's name


Response = TypeVar("Response")
PageT = TypeVar("PageT", bound=Page)


@dataclass(frozen=True)
class Calls:
    """The sidecar's services while a channel is open. Pass `timeout_s` to each unary call."""

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
        """Run `operation` over a new channel. Raise SidecarError with a message of one line."""
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

    def list_rows(self, send: Callable[[Calls], Awaitable[PageT]], request: PageRequest, limit: int) -> PageT:
        """Call a List method page by page, and return one response with up to `limit` rows (at least 1).

        `send` sends `request`, whose page size and token this method sets for each page.
        """

        async def fetch_pages(calls: Calls) -> PageT:
            sizes = split_page_sizes(limit)
            request.page_size = next(sizes)
            response = await send(calls)
            for request.page_size in sizes:
                if not response.next_page_token:
                    break
                request.page_token = response.next_page_token
                page = await send(calls)
                response.MergeFrom(page)
                response.next_page_token = page.next_page_token  # merging keeps a token that the last page clears
            return response

        return self.call(fetch_pages)


def split_page_sizes(limit: int) -> Iterator[int]:
    """Yield the sizes of the pages that hold `limit` rows together."""
    while limit > 0:
        yield min(limit, MAX_PAGE_ROWS)
        limit -= MAX_PAGE_ROWS


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
        return RpcError(f"{address} does not implement this call: check that it is a sidecar of the same version")
    return RpcError(f"the sidecar at {address} failed with {code.name}: {details}")


def _describe_unavailable(error: grpc.aio.AioRpcError, details: str, address: str) -> str:
    if any(key == "grpc-status-details-bin" for key, _value in error.trailing_metadata() or ()):
        return f"the sidecar at {address} can't answer now: {details}"  # the sidecar sent this status, not gRPC
    advice = "start one with `abreast up` or `abreast sidecar`, or set its address with --address or ABREAST_SIDECAR"
    reason = details.lower()
    if "resol" in reason or "dns" in reason:
        return f"the host {address.rpartition(':')[0]} can't be resolved; {advice}"
    if "refused" in reason:
        return f"no sidecar answers at {address}; {advice}"
    if "settings frame" in reason or "http1" in reason or "http2" in reason:
        return f"{address} does not speak gRPC (is it the sidecar's HTTP port?); {advice}"
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
