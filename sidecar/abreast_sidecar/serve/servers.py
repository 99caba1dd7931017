"""The gRPC server and the HTTP server. An interceptor turns errors into statuses, and logs and counts the calls."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
import uvicorn
from google.protobuf import any_pb2
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from abreast.v1 import (
    access_pb2_grpc,
    comparison_pb2_grpc,
    latency_pb2_grpc,
    rollout_pb2_grpc,
    rule_pb2_grpc,
    traffic_pb2_grpc,
)
from abreast_sidecar.aio import bind_socket
from abreast_sidecar.errors import (
    ArgumentError,
    ConflictError,
    ForbiddenError,
    LedgerError,
    NotFoundError,
    OverbroadRuleError,
    RedisError,
    SchemaError,
    ServerError,
    SidecarError,
    StaleVersionError,
    StoppingError,
    TooManyCallsError,
    UnauthenticatedError,
    VerdictError,
)
from abreast_sidecar.serve.access import CallGuard
from abreast_sidecar.serve.metrics import Metrics
from abreast_sidecar.serve.services import Servicers
from abreast_sidecar.settings import Settings
from abreast_sidecar.traffic.rtds import RTDS_SERVICE, RtdsServer
from abreast_sidecar.traffic.xds import wire_pb2 as wire

STATUS_NAMES = {number: code.name for code in grpc.StatusCode for number in (code, code.value[0])}  # grpc.aio uses both
REFLECTION_SERVICE = "grpc.reflection.v1.ServerReflection"
UNLOGGED_METHOD_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")  # probes call them all the time
GRPC_SERVICE_NAMES = tuple(
    f"abreast.v1.{name}"
    for name in (
        "ComparisonService",
        "LatencyService",
        "RuleService",
        "TrafficService",
        "RolloutService",
        "AccessService",
    )
)
GRPC_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use must be an error
    ("grpc.max_send_message_length", 64 * 1024 * 1024),  # examples contain bodies
    ("grpc.keepalive_time_ms", 10_000),  # detects an Envoy whose machine is gone
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping as often
)
ERROR_DOMAIN = "abreast.v1"
DETAIL_TYPE_URL = "type.googleapis.com/google.rpc.{}"
FIELD_PATTERN = re.compile(r"[a-z_]+(?:\.[a-z_]+)*")
STATUS_DETAILS_KEY = "grpc-status-details-bin"  # trailing metadata with a google.rpc.Status
STATUS_BY_ERROR: tuple[tuple[type[SidecarError], grpc.StatusCode, str], ...] = (
    (StoppingError, grpc.StatusCode.UNAVAILABLE, "STOPPING"),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "NO_VALID_TOKEN"),
    (TooManyCallsError, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED, "SCOPE_OR_SERVICE"),
    (ArgumentError, grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT"),
    (OverbroadRuleError, grpc.StatusCode.FAILED_PRECONDITION, "RULE_TOO_BROAD"),
    (NotFoundError, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (VerdictError, grpc.StatusCode.FAILED_PRECONDITION, "VERDICT_FAIL"),
    (StaleVersionError, grpc.StatusCode.ABORTED, "STALE_VERSION"),
    (ConflictError, grpc.StatusCode.FAILED_PRECONDITION, "CONFLICT"),
    (SchemaError, grpc.StatusCode.FAILED_PRECONDITION, "LEDGER_SCHEMA"),
    (LedgerError, grpc.StatusCode.UNAVAILABLE, "LEDGER_UNAVAILABLE"),
    (RedisError, grpc.StatusCode.UNAVAILABLE, "REDIS_UNAVAILABLE"),
)
SHUTDOWN_GRACE_S = 2  # for requests in flight
MAX_CONCURRENT_CALLS = 2000
MAX_STREAMS_PER_HOST = 256
MAX_HTTP_CONNECTIONS = 200
HEADERS_TIMEOUT_S = 10.0
STREAM_METHODS = frozenset(
    {
        "/abreast.v1.ComparisonService/WatchFindings",
        "/abreast.v1.TrafficService/WatchTraffic",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        f"/{RTDS_SERVICE}/StreamRuntime",
    }
)

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    code: grpc.StatusCode
    message: str
    reason: str  # reason of the google.rpc.ErrorInfo, in UPPER_SNAKE_CASE
    field: str = ""  # path of the invalid field of the request; empty for none

    @property
    def metadata(self) -> Iterable[tuple[str, bytes]]:
        details: list[Message] = [wire.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN)]
        if self.field:
            violation = wire.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(wire.BadRequest(field_violations=[violation]))
        packed_details = [
            any_pb2.Any(type_url=DETAIL_TYPE_URL.format(type(detail).__name__), value=detail.SerializeToString())
            for detail in details
        ]
        status = wire.Status(code=self.code.value[0], message=self.message, details=packed_details)
        return ((STATUS_DETAILS_KEY, status.SerializeToString()),)


def to_error_status(error: Exception, request: Any = None) -> ErrorStatus:
    for kind, code, reason in STATUS_BY_ERROR:
        if isinstance(error, kind):
            field = find_field(request, str(error)) if kind is ArgumentError else ""
            return ErrorStatus(code, str(error), reason, field)
    return ErrorStatus(grpc.StatusCode.INTERNAL, "internal error; see the sidecar's log", "INTERNAL")


def find_field(request: Any, message: str) -> str:
    """Return the path of the field that begins the message of an ArgumentError, or empty text.

    The message may name a field of a message in the request, such as `owner` for `rule.owner`.
    """
    match = FIELD_PATTERN.match(message)
    if match is None or not isinstance(request, Message):
        return ""
    parents = [field.name for field, _ in request.ListFields() if field.message_type and not field.is_repeated]
    candidates = (match[0], *(f"{parent}.{match[0]}" for parent in parents))
    return next((path for path in candidates if _has_field(request.DESCRIPTOR, path)), "")


def _has_field(descriptor: Any, path: str) -> bool:
    for name in path.split("."):
        field = descriptor.fields_by_name.get(name) if descriptor else None
        if field is None:
            return False
        descriptor = field.message_type
    return True


class Interceptor(grpc.aio.ServerInterceptor):
    """Checks access, and turns errors into statuses."""

    def __init__(self, metrics: Metrics, guard: CallGuard) -> None:
        self.metrics = metrics
        self.guard = guard
        self._streams = Counter[str]()  # by host

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        # A handler has exactly one of the four behaviours. The wrapper of an async generator must be one too.
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            if inner := getattr(handler, kind, None):
                wrap = self._wrap_stream if inspect.isasyncgenfunction(inner) else self._wrap_call
                return getattr(grpc, f"{kind}_rpc_method_handler")(
                    wrap(inner, handler_call_details.method),
                    request_deserializer=handler.request_deserializer,
                    response_serializer=handler.response_serializer,
                )
        return handler

    def _wrap_call(self, inner: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            async with self._observe(method, context, request):
                with self._limit_streams(method, context):
                    self.guard.authenticate(method, context)
                    return await self.guard.invoke(method, inner, request, context)

        return call

    def _wrap_stream(self, inner: Any, method: str) -> Any:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._observe(method, context, request):
                with self._limit_streams(method, context):
                    self.guard.authenticate(method, context)
                    async for response in self.guard.stream(method, inner, request, context):
                        yield response

        return stream

    @contextlib.contextmanager
    def _limit_streams(self, method: str, context: Any) -> Iterator[None]:
        """Count the streams of a host. Raise TooManyCallsError above the limit."""
        if method not in STREAM_METHODS:
            yield
            return
        host = context.peer().rpartition(":")[0]
        if self._streams[host] >= MAX_STREAMS_PER_HOST:
            raise TooManyCallsError(
                f"{host} has {MAX_STREAMS_PER_HOST} streams, the limit of one address; end some of them"
            )
        self._streams[host] += 1
        try:
            yield
        finally:
            self._streams[host] -= 1
            if not self._streams[host]:
                del self._streams[host]

    @contextlib.asynccontextmanager
    async def _observe(self, method: str, context: Any, request: Any) -> AsyncIterator[None]:
        """Measure and log a call. End it with a status if it raises an error."""
        started_at, code = time.perf_counter(), "OK"
        try:
            yield
        except grpc.aio.AbortError:
            code = STATUS_NAMES[context.code()]
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except Exception as error:  # every error becomes a status
            status = to_error_status(error, request)
            code = status.code.name
            if not isinstance(error, SidecarError):
                log.exception("call failed", method=method)
            elif status.code is grpc.StatusCode.UNAVAILABLE:
                log.warning("call refused", method=method, code=code, error=status.message)
            await context.abort(status.code, status.message, status.metadata)
        finally:
            seconds = time.perf_counter() - started_at
            self.metrics.observe_call(method, code, seconds)
            if not method.startswith(UNLOGGED_METHOD_PREFIXES):
                log.debug("call", method=method, code=code, ms=round(seconds * 1000, 2))


def load_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the certificate of the gRPC server, None without TLS. Raise ServerError."""
    if not settings.tls_cert_file:
        return None
    chain, key = (
        _read_file("ABREAST_TLS_CERT_FILE", settings.tls_cert_file),
        _read_file("ABREAST_TLS_KEY_FILE", settings.tls_key_file),
    )
    client_ca = settings.tls_client_ca_file
    roots = _read_file("ABREAST_TLS_CLIENT_CA_FILE", client_ca) if client_ca else None
    return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=bool(client_ca))


def _read_file(variable: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ServerError(f"{variable} can't be read: {error.strerror}: {path}") from error


def register_services(
    server: Any, servicers: Servicers, discovery: RtdsServer, health_servicer: health.aio.HealthServicer
) -> None:
    """Add all methods to the server. Each needs an entry in METHODS."""
    access_pb2_grpc.add_AccessServiceServicer_to_server(servicers.access, server)
    comparison_pb2_grpc.add_ComparisonServiceServicer_to_server(servicers.comparison, server)
    traffic_pb2_grpc.add_TrafficServiceServicer_to_server(servicers.traffic, server)
    latency_pb2_grpc.add_LatencyServiceServicer_to_server(servicers.latency, server)
    rule_pb2_grpc.add_RuleServiceServicer_to_server(servicers.rules, server)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicers.rollout, server)
    server.add_generic_rpc_handlers((discovery.build_handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    described = (*GRPC_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(described, server)
    # The messages of v1, which newer clients ask for first, equal those of v1alpha. The library has only the latter.
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(described).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION_SERVICE, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


class GrpcServer:
    def __init__(
        self, settings: Settings, servicers: Servicers, discovery: RtdsServer, metrics: Metrics, guard: CallGuard
    ) -> None:
        self.settings = settings
        self.listen = settings.grpc_listen
        self.servicers = servicers
        self.discovery = discovery
        self.port = 0
        self.health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=(Interceptor(metrics, guard),),
            options=GRPC_SERVER_OPTIONS,
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        register_services(self._server, servicers, discovery, self.health)

    async def start(self) -> None:
        """Start to listen, not ready yet. Raises ServerError if the port is in use."""
        await self.set_ready(False)
        bind_socket(self.listen, "gRPC", "ABREAST_GRPC_LISTEN").close()  # its error has a reason, gRPC's has none
        try:
            credentials = load_credentials(self.settings)
            self.port = (
                self._server.add_secure_port(self.listen, credentials)
                if credentials
                else self._server.add_insecure_port(self.listen)
            )
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


class NoSignalsServer(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that does not complete the headers of a request in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers_timer.cancel()
        self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._headers_timer.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_timer.cancel()
        super().connection_lost(exc)


class HttpServer:
    def __init__(self, settings: Settings, app: ASGIApp) -> None:
        self.listen = settings.http_listen
        self.port = 0
        self._settings = settings
        client_ca = settings.tls_client_ca_file or None
        config = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            proxy_headers=False,  # the address of a caller is that of its connection
            limit_concurrency=MAX_HTTP_CONNECTIONS,
            ssl_certfile=settings.tls_cert_file or None,
            ssl_keyfile=settings.tls_key_file or None,
            ssl_ca_certs=client_ca,
            ssl_cert_reqs=ssl.CERT_REQUIRED if client_ca else ssl.CERT_NONE,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            ws="none",
        )
        self._server = NoSignalsServer(config)
        self._socket: socket.socket | None = None

    def bind(self) -> None:
        """Bind the port. Raises ServerError if it is in use, or the certificate can't be read."""
        load_credentials(self._settings)
        self._socket = bind_socket(self.listen, "HTTP", "ABREAST_HTTP_LISTEN")
        self.port = self._socket.getsockname()[1]

    async def run(self) -> None:
        """Serve until `stop` is called and the last response is sent."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    async def stop(self, serve_task: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        await serve_task

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
