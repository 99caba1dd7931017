"""The message in which Envoy's script capture.lua sends a capture, and its conversion to a recorder of the middleware.

A log of Envoy sends the same messages, without response headers and bodies, for live requests whose client left.

The first line has fields, separated by spaces: format, service, pair id, version, role, number of captures, attempt,
state, and load. The load is the number of other requests in the same cluster and thread that waited for their response
(or `-`). Three times in µs since the epoch follow: start, first byte or 0, and end. The last fields are the captured bytes, the length and the digest
of the request body, and those of the response body. After this line come the headers of the request, those of the
response and its trailers, each with a line per header and an empty line. The captured bytes of both bodies are the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import get_args

from abreast.context import RequestContext
from abreast.errors import CaptureError
from abreast.export.exporter import ExporterPool
from abreast.protocol.capture import Body, Role, Version
from abreast.recorder import BodyBuffer, RawHeaders, RequestRecorder, RouteTags

FORMAT = b"1"
UNKNOWN = b"-"
NO_DIGEST = "-"
# left: the client left, and Envoy's log says so. times: only the times and the load, for a capture of the middleware.
STATES = {b"complete", b"truncated", b"aborted", b"left", b"times"}
MAX_PAIR_ID_CHARS = 64
AUTHORITY = b":authority"
COPIES_HEADER = b"x-abreast-copies"  # also has the time when Envoy received the request or sent the copy
OWN_PREFIX = b"x-abreast-"  # of headers that a middleware adds, although Envoy captures its version
# Headers of one connection. A middleware does not see them, because its server adds or removes them.
CONNECTION_HEADERS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
GRPC_STATUS_HEADERS = frozenset({b"grpc-status", b"grpc-message", b"grpc-status-details-bin"})


class CapturedBody(BodyBuffer):
    """A body that is complete, or cut with the digest of the whole."""

    def __init__(self, content: bytes, length: int, digest: str) -> None:
        super().__init__(len(content))
        self.length, self.buffered_bytes = length, len(content)
        self._body = Body(content, length, digest)

    def to_body(self) -> Body:
        return self._body


class EnvoyRecorder(RequestRecorder):
    """A finished recorder. The bodies of a gRPC call are converted in the thread of the export."""

    convert: Callable[[], None] | None = None  # raises nothing

    @property
    def needs_thread(self) -> bool:
        return self.convert is not None

    def finish(self) -> None:
        if self.convert is not None:
            size = self.body_bytes
            self.convert()
            self.growth_bytes = self.body_bytes - size
            self.convert = None  # it refers to this recorder


def read_service(message: bytes) -> str:
    """Return the name of the service of a message. Raise CaptureError."""
    try:
        return message[: message.index(b"\n")].split(b" ", 2)[1].decode()
    except (ValueError, IndexError):
        raise CaptureError("a message of Envoy is damaged: it has no line of fields") from None


def to_recorder(message: bytes, pool: ExporterPool) -> EnvoyRecorder:
    """Convert a message to a finished recorder. Raise CaptureError if it is damaged or of another format."""
    try:
        return _to_recorder(message, pool)
    except (ValueError, IndexError, KeyError) as error:
        raise CaptureError(f"a message of Envoy is damaged: {type(error).__name__}") from None


def _to_recorder(message: bytes, pool: ExporterPool) -> EnvoyRecorder:
    head_end = message.index(b"\n")
    fields = message[:head_end].split(b" ")
    if fields[0] != FORMAT or fields[7] not in STATES:
        raise ValueError("format")
    _format, _service, pair, version, role, expected_captures, attempt, state = fields[:8]
    is_load_known = fields[8] != UNKNOWN
    in_flight = int(fields[8]) if is_load_known else 0
    started_us, first_byte_us, finished_us = map(int, fields[9:12])
    request_headers, position = _read_headers(message, head_end + 1)
    response_headers, position = _read_headers(message, position)
    trailers, position = _read_headers(message, position)
    request_body, position = _read_body(message, position, fields[12:15])
    response_body, position = _read_body(message, position, fields[15:18])
    if position != len(message) or not 0 < len(pair) <= MAX_PAIR_ID_CHARS:
        raise ValueError("size")
    pseudo_headers = dict(request_headers)
    path, _, query = pseudo_headers[b":path"].partition(b"?")
    if not path.startswith(b"/"):
        raise ValueError("path")
    scope = {
        "method": pseudo_headers[b":method"].decode("latin-1"),
        "path": path.decode("latin-1"),
        "raw_path": path,
        "query_string": query,
        "headers": [
            (b"host" if name == AUTHORITY else name, value)
            for name, value in request_headers
            if name[:1] != b":" or name == AUTHORITY
        ]
        + [(b"x-envoy-attempt-count", attempt)],
    }
    tags, make_context = _route_tags(version.decode(), role.decode(), int(expected_captures))
    clock_offset_ns = time.perf_counter_ns() - time.time_ns()
    context = make_context(pair.decode("ascii"), started_us * 1000 + clock_offset_ns)
    recorder = EnvoyRecorder(pool, scope, pair, tags, context)
    recorder.by_envoy, recorder.in_flight = True, in_flight
    if is_load_known:
        recorder.sent_ms = pseudo_headers.get(COPIES_HEADER, b"").partition(b" ")[2]
    recorder.status = int(dict(response_headers).get(b":status", b"0"))
    recorder.headers = [
        (name, value)
        for name, value in response_headers
        if name[:1] != b":" and name not in CONNECTION_HEADERS and not name.startswith(OWN_PREFIX)
    ]
    if not trailers:  # a gRPC call that fails at once has its status in the headers
        trailers = [row for row in recorder.headers if row[0] in GRPC_STATUS_HEADERS]
        recorder.headers = [row for row in recorder.headers if row[0] not in GRPC_STATUS_HEADERS]
    recorder.trailers = trailers or None
    recorder.fast_path = False
    recorder.request_body = request_body
    recorder.response_body = response_body
    recorder.first_byte_ns = first_byte_us * 1000 + clock_offset_ns if first_byte_us else 0
    recorder.finished_ns = finished_us * 1000 + clock_offset_ns
    recorder.app_returned = True
    recorder.is_times = state == b"times"
    recorder.is_complete = recorder.response_ended = state == b"complete"
    recorder.truncated_by_deadline = state == b"truncated"
    recorder.client_left = state == b"left"
    return recorder


def _read_headers(message: bytes, start: int) -> tuple[RawHeaders, int]:
    """Return the headers up to the next empty line, and the position after it."""
    if message[start : start + 1] == b"\n":
        return [], start + 1
    end = message.index(b"\n\n", start)
    headers = []
    for line in message[start:end].split(b"\n"):
        separator = line.index(b":", 1)  # a pseudo-header begins with a colon
        headers.append((line[:separator], line[separator + 1 :]))
    return headers, end + 2


def _read_body(message: bytes, start: int, fields: list[bytes]) -> tuple[CapturedBody | None, int]:
    captured, length, digest = int(fields[0]), int(fields[1]), fields[2].decode("ascii")
    if not 0 <= captured <= length or (captured < length) != (digest != NO_DIGEST):
        raise ValueError("body")
    if not length:
        return None, start
    content = message[start : start + captured]
    return CapturedBody(content, length, "" if digest == NO_DIGEST else digest), start + captured


@lru_cache(maxsize=64)
def _route_tags(
    version: str, role: str, expected_captures: int
) -> tuple[RouteTags, Callable[[str, int], RequestContext]]:
    version_name = dict.fromkeys(get_args(Version))
    if version not in version_name or role not in get_args(Role) or expected_captures not in {2, 3}:
        raise ValueError("marks")
    known_version: Version = version  # type: ignore[assignment]  # checked above
    known_role: Role = role  # type: ignore[assignment]  # same

    def make_context(pair: str, started_ns: int) -> RequestContext:
        return RequestContext(known_version, known_role, pair, "", started_ns=started_ns)

    return (known_version, known_role, expected_captures, [], make_context), make_context
