"""The HTTP/1.1 server that receives Envoy's captures. It keeps nothing, so any number of collectors can run."""

from __future__ import annotations

import asyncio
import dataclasses
from hmac import compare_digest
from typing import cast

import httptools
import structlog
from google.protobuf.message import DecodeError

from abreast.errors import CaptureError, ErrorReporter
from abreast.export.exporter import ExporterPool
from abreast.export.queue import CaptureQueue
from abreast.export.routes import RouteResolver
from abreast.settings import service_name
from abreast_sidecar.aio import bind_socket
from abreast_sidecar.collector.descriptors import Descriptors
from abreast_sidecar.collector.message import read_service, to_recorder
from abreast_sidecar.redis_client import MAX_SERVICES
from abreast_sidecar.settings import CollectorSettings
from abreast_sidecar.traffic.xds import wire_pb2 as wire

# Seconds of work before other tasks get their turn. No user waits for this process, and a turn is long on a busy machine.
WORK_SLICE_S = 0.02
MAX_MESSAGE_OVERHEAD = 4 * 1024 * 1024  # bytes of a message in addition to its bodies
KEY_HEADER = b"x-abreast-key"
LOGS_PATH = b"/logs"
UNCAPTURED_MARK = "\nx-abreast-pair:-\n"  # in a log message: no middleware captured the response
OFF_MARK = "\nx-abreast-capture:off\n"  # in a log message: the version must not be captured
RESPONSES = {
    status: f"HTTP/1.1 {status} {reason}\r\ncontent-length: 0\r\n\r\n".encode()
    for status, reason in (
        (200, "OK"),
        (202, "Accepted"),
        (400, "Bad Request"),
        (403, "Forbidden"),
        (413, "Content Too Large"),
    )
}

log = structlog.get_logger(__name__)


class Collector:
    """Queues captures per service. Its exporters redact them and send them to Redis, and report as service processes."""

    def __init__(self, settings: CollectorSettings) -> None:
        self.settings = settings
        self.max_message_bytes = 2 * settings.body_limit + MAX_MESSAGE_OVERHEAD
        self.descriptors = Descriptors(settings)
        self.port = 0
        self._keys = [key.encode() for key in settings.edge_key]
        self._pools: dict[str, ExporterPool] = {}
        self._report_error = ErrorReporter()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Start to listen. Raise ServerError if the port is in use."""
        listener = bind_socket(self.settings.collector_listen, "captures of Envoy", "ABREAST_COLLECTOR_LISTEN")
        self.port = listener.getsockname()[1]
        await self.descriptors.start()
        self._server = await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=listener)
        log.info("collector started", listen=self.settings.collector_listen)

    async def stop(self) -> None:
        """Refuse new captures, and send the queued ones within the flush timeout."""
        if self._server is not None:
            self._server.close()
        await self.descriptors.stop()
        await asyncio.gather(*[pool.aclose() for pool in self._pools.values()])

    def accept(self, message: bytes, key: bytes) -> int:
        """Queue a capture, or drop and count it. Return the HTTP status."""
        if self._keys and not any(compare_digest(key, expected) for expected in self._keys):
            return 403
        try:
            pool = self._get_pool(read_service(message))
            recorder = to_recorder(message, pool)
        except CaptureError as error:
            self._report_error("reading a message of Envoy", error)
            return 400
        self.descriptors.prepare(recorder, pool.queue.unconverted_counts)
        pool.enqueue(recorder)
        return 202

    def accept_logs(self, logs: bytes, key: bytes) -> int:
        """Queue the captures of live requests whose client left, which Envoy logs. Return the HTTP status."""
        try:
            request = wire.LogsRequest.FromString(logs)
        except DecodeError:
            return 400
        messages = [
            record.body.string_value
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]
        statuses = [
            self.accept(message.encode(), key)
            for message in messages
            if UNCAPTURED_MARK in message and OFF_MARK not in message
        ]
        return max([status for status in statuses if status != 202], default=200)  # to Envoy, 202 is an error

    def _get_pool(self, service: str) -> ExporterPool:
        pool = self._pools.get(service)
        if pool is None:
            try:
                settings = dataclasses.replace(self.settings, service=service_name(service))
            except ValueError as error:
                raise CaptureError(f"a service must be {error}") from None
            if len(self._pools) >= MAX_SERVICES:
                raise CaptureError(f"Envoy sends captures of more than {MAX_SERVICES} services")
            queue = CaptureQueue(settings)
            pool = self._pools[service] = ExporterPool(
                settings, queue, RouteResolver(None), self._report_error, WORK_SLICE_S
            )
        return pool


class Connection(asyncio.Protocol):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._key = self._path = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # the class of uvloop is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._respond(400)
            self._close()

    def on_message_begin(self) -> None:
        self._chunks, self._size, self._key, self._path = [], 0, b"", b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == KEY_HEADER:
            self._key = value

    def on_body(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= self._collector.max_message_bytes:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()
            self._respond(413)
            self._close()

    def on_message_complete(self) -> None:
        if self._chunks:
            accept = self._collector.accept_logs if self._path == LOGS_PATH else self._collector.accept
            self._respond(accept(b"".join(self._chunks), self._key))
        else:
            self._respond(400)

    def _respond(self, status: int) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(RESPONSES[status])

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
