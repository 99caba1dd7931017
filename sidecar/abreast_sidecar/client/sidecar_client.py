"""gRPC client of the sidecar, whose errors tell a person what to do."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from abreast_sidecar.errors import (
    ArgumentError,
    ForbiddenError,
    NotFoundError,
    RpcError,
    ServerError,
    SettingError,
    SidecarError,
    UnauthenticatedError,
)

if TYPE_CHECKING:
    import grpc

    from abreast.v1 import (
        access_pb2_grpc,
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
    """A response of a List method of the API."""

    next_page_token: str

    def MergeFrom(self, message: Any, /) -> None: ...  # noqa: N802  # protobuf's name


Response = TypeVar("Response")
RequestT = TypeVar("RequestT", bound=PageRequest)
PageT = TypeVar("PageT", bound=Page)


@dataclass(frozen=True, repr=False)
class Credentials:
    """The token and the TLS files of a client. `ca_file` is empty for a connection without TLS."""

    token: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def from_environment(cls) -> Credentials:
        """Read ABREAST_TOKEN and the files of TLS. Raise SettingError."""
        values = {name: os.environ.get(variable, "") for name, variable in CREDENTIAL_VARIABLES.items()}
        if not values["token"] and (path := os.environ.get("ABREAST_TOKEN_FILE")):
            values["token"] = _read_file("ABREAST_TOKEN_FILE", path).decode("utf-8", "replace").strip()
        return cls(**values)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def open_channel(self, address: str) -> grpc.aio.Channel:
        """Raise SettingError if a file can't be read."""
        import grpc.aio

        if not self.ca_file:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        roots = _read_file(CREDENTIAL_VARIABLES["ca_file"], self.ca_file)
        key, chain = (
            _read_file(CREDENTIAL_VARIABLES[name], path) if path else None
            for name, path in (("key_file", self.key_file), ("cert_file", self.cert_file))
        )
        return grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(roots, key, chain), options=CHANNEL_OPTIONS
        )


CREDENTIAL_VARIABLES = {
    "token": "ABREAST_TOKEN",
    "ca_file": "ABREAST_TLS_CA_FILE",
    "cert_file": "ABREAST_TLS_CLIENT_CERT_FILE",
    "key_file": "ABREAST_TLS_CLIENT_KEY_FILE",
}


def _read_file(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{variable} can't be read: {error.strerror}: {path}") from error


@dataclass(frozen=True)
class ClientChannel:
    """A channel whose calls send the token, and whose unary calls have a time limit."""

    channel: grpc.aio.Channel
    timeout_s: float
    credentials: Credentials

    def unary_unary(self, *args: Any, **options: Any) -> Callable[..., Any]:
        method = self.channel.unary_unary(*args, **options)
        return functools.partial(method, timeout=self.timeout_s, metadata=self.credentials.metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return functools.partial(self.channel.unary_stream(*args, **options), metadata=self.credentials.metadata)


@dataclass(frozen=True)
class Calls:
    """The sidecar's services while a channel is open. The time limit of the client applies to each unary call."""

    access: access_pb2_grpc.AccessServiceStub
    comparison: comparison_pb2_grpc.ComparisonServiceStub
    traffic: traffic_pb2_grpc.TrafficServiceStub
    latency: latency_pb2_grpc.LatencyServiceStub
    rules: rule_pb2_grpc.RuleServiceStub
    rollout: rollout_pb2_grpc.RolloutServiceStub


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

        from abreast.v1 import (
            access_pb2_grpc,
            comparison_pb2_grpc,
            latency_pb2_grpc,
            rollout_pb2_grpc,
            rule_pb2_grpc,
            traffic_pb2_grpc,
        )

        credentials = Credentials.from_environment()
        async with credentials.open_channel(self.address) as channel:
            limited_channel: Any = ClientChannel(channel, self.timeout_s, credentials)
            try:
                yield Calls(
                    access=access_pb2_grpc.AccessServiceStub(limited_channel),
                    comparison=comparison_pb2_grpc.ComparisonServiceStub(limited_channel),
                    traffic=traffic_pb2_grpc.TrafficServiceStub(limited_channel),
                    latency=latency_pb2_grpc.LatencyServiceStub(limited_channel),
                    rules=rule_pb2_grpc.RuleServiceStub(limited_channel),
                    rollout=rollout_pb2_grpc.RolloutServiceStub(limited_channel),
                )
            except grpc.aio.AioRpcError as error:
                raise to_cli_error(error, self.address, self.timeout_s) from error

    def list_rows(
        self, method: Callable[[Calls], Callable[[RequestT], Awaitable[PageT]]], request: RequestT, limit: int
    ) -> PageT:
        """Call a List method page by page, and return one response with up to `limit` rows (at least 1)."""
        return self.call(lambda calls: fetch_pages(method(calls), request, limit))


async def fetch_pages(
    method: Callable[[RequestT], Awaitable[PageT]], request: RequestT, limit: int = sys.maxsize
) -> PageT:
    """Call a List method page by page, and return one response. Set the page size and token of `request`."""
    request.page_size = min(limit, MAX_PAGE_ROWS)
    response = await method(request)
    while response.next_page_token and limit > MAX_PAGE_ROWS:
        limit -= MAX_PAGE_ROWS
        request.page_size, request.page_token = min(limit, MAX_PAGE_ROWS), response.next_page_token
        page = await method(request)
        response.MergeFrom(page)
        response.next_page_token = page.next_page_token  # merging keeps a token that the last page clears
    return response


def to_cli_error(error: grpc.aio.AioRpcError, address: str, timeout_s: float) -> SidecarError:
    import grpc

    details = error.details() or "no reason given"
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return ArgumentError(details)
        case grpc.StatusCode.NOT_FOUND:
            return NotFoundError(details.replace("ListFindings", "`abreast findings`"))
        case grpc.StatusCode.FAILED_PRECONDITION:
            return RpcError(details)
        case grpc.StatusCode.UNAUTHENTICATED:
            return UnauthenticatedError(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return ForbiddenError(details)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerError(f"the sidecar at {address} did not answer within {timeout_s:g} s (--timeout)")
        case grpc.StatusCode.UNAVAILABLE:
            return ServerError(_describe_unavailable(error, details, address))
        case grpc.StatusCode.UNIMPLEMENTED:
            return RpcError(f"{address} does not implement this call: check that it is a sidecar of the same version")
        case code:
            return RpcError(f"the sidecar at {address} failed with {code.name}: {details}")


def _describe_unavailable(error: grpc.aio.AioRpcError, details: str, address: str) -> str:
    if any(key == "grpc-status-details-bin" for key, _value in error.trailing_metadata() or ()):
        return f"the sidecar at {address} can't answer now: {details}"  # the sidecar sent this status, not gRPC
    problems = {
        ("resol", "dns"): f"the host {address.rpartition(':')[0]} can't be resolved",
        ("refused",): f"no sidecar answers at {address}",
        ("settings frame", "http1", "http2"): f"{address} does not speak gRPC (is it the sidecar's HTTP port?)",
        ("",): f"no sidecar answers at {address} ({details})",
    }
    reason = details.lower()
    problem = next(text for words, text in problems.items() if any(word in reason for word in words))
    return f"{problem}; start one with `abreast up` or `abreast sidecar`, or set its address with --address or ABREAST_SIDECAR"


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
