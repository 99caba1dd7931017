"""The capture of one request by one version: the contract between services and sidecar, format 1.

An encoded capture is a JSON object on one line, a newline, and the captured bytes of the request body and of the answer
body. Services encode it and the sidecar decodes it, both with this module.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder

from abreast.errors import CaptureError

FORMAT_VERSION = 1
DIGEST_BYTES = 16

Version = Literal["old", "new"]
Role = Literal["live", "shadow", "baseline"]
SpanRow = tuple[str, str, int, int, str]  # kind, name, start in µs after the arrival, duration in µs, note
Headers = tuple[tuple[str, str], ...]  # latin-1 text, in order, with duplicates, names in lower case
BodyMetadata = tuple[int, int, str]  # captured bytes, length in bytes, digest

VERSIONS = ("old", "new")
ROLES = ("live", "shadow", "baseline")


class Body(Struct, frozen=True, gc=False):
    """The first `len(content)` bytes of a body of `length` bytes.

    `digest` is the hex digest of the whole body. It is set if bytes are missing, and empty otherwise.
    """

    content: bytes = b""
    length: int = 0
    digest: str = ""

    @property
    def is_complete(self) -> bool:
        return len(self.content) == self.length

    def fingerprint(self) -> str:
        """Return the digest of the whole body; compute it if the body is complete."""
        return self.digest or digest(self.content)


EMPTY_BODY = Body()


class Request(Struct, frozen=True, gc=False):
    method: str
    path: str  # as sent, with percent-encoding
    query: str = ""  # as sent, without the question mark
    route: str = ""  # template such as /products/{id}; empty if the framework has none
    headers: Headers = ()  # the configured ones; secrets as keyed hashes
    body: Body = EMPTY_BODY


class Answer(Struct, frozen=True, gc=False):
    """The answer of the app. `status` is 0 if the app never started one."""

    status: int
    headers: Headers = ()
    body: Body = EMPTY_BODY
    trailers: Headers = ()


class Capture(Struct, frozen=True, gc=False):
    pair: str
    service: str
    version: Version
    role: Role
    request: Request
    answer: Answer
    attempt: int = 1
    expected_captures: int = 2  # captures of the pair, including this one
    release: str = ""
    started_at: float = 0.0  # seconds since the epoch, by the clock of the service
    first_byte_us: int | None = None  # µs from the arrival of the request to the start of the answer
    total_us: int = 0  # µs from the arrival of the request to the end of the answer
    client_left: bool = False
    complete: bool = True  # the whole answer was sent
    exception: str = ""  # class name of the exception that left the app
    effects: tuple[dict[str, Any], ...] = ()  # see abreast.effect_log
    effects_dropped: int = 0  # effects above the limit
    spans: tuple[SpanRow, ...] = ()
    cache: tuple[int, int] | None = None  # hits and misses; None if no cache was used
    invalid_reason: str = ""  # why the capture of a copy says nothing about the code
    truncated_by_deadline: bool = False  # the pair had to be joined before the answer ended

    @property
    def slot(self) -> str:
        """The name of this capture in its pair. It makes sending a batch idempotent."""
        return format_slot(self.version, self.role, self.attempt)


def format_slot(version: Version, role: Role, attempt: int) -> str:
    return f"{version}:{role}:{attempt}"


def digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).hexdigest()


class RequestHead(Struct, gc=False):
    """The request in the JSON line of a capture."""

    method: str
    path: str
    query: str
    route: str
    headers: Headers
    body: BodyMetadata


class AnswerHead(Struct, gc=False):
    status: int
    headers: Headers
    trailers: Headers
    body: BodyMetadata


class CaptureHead(Struct, gc=False, omit_defaults=True):
    v: int
    pair: str
    service: str
    version: Version
    role: Role
    attempt: int
    expected_captures: int
    release: str
    started_at: float
    first_byte_us: int | None
    total_us: int
    client_left: bool
    complete: bool
    exception: str
    effects: tuple[dict[str, Any], ...]
    request: RequestHead
    answer: AnswerHead
    effects_dropped: int = 0
    spans: tuple[SpanRow, ...] = ()
    cache: tuple[int, int] | None = None
    invalid_reason: str = ""
    truncated_by_deadline: bool = False


class _FormatProbe(Struct):
    v: Any = None


_encoder = Encoder()
_head_decoder = Decoder(CaptureHead)
_format_decoder = Decoder(_FormatProbe)


def encode(capture: Capture) -> bytes:
    request, answer = capture.request, capture.answer
    head = CaptureHead(
        FORMAT_VERSION,
        capture.pair,
        capture.service,
        capture.version,
        capture.role,
        capture.attempt,
        capture.expected_captures,
        capture.release,
        capture.started_at,
        capture.first_byte_us,
        capture.total_us,
        capture.client_left,
        capture.complete,
        capture.exception,
        capture.effects,
        RequestHead(
            request.method, request.path, request.query, request.route, request.headers, body_metadata(request.body)
        ),
        AnswerHead(answer.status, answer.headers, answer.trailers, body_metadata(answer.body)),
        capture.effects_dropped,
        capture.spans,
        capture.cache,
        capture.invalid_reason,
        capture.truncated_by_deadline,
    )
    return encode_parts(head, request.body.content, answer.body.content)


def encode_parts(head: CaptureHead, request_content: bytes, response_content: bytes) -> bytes:
    """Encode a capture from its parts, without building a Capture."""
    return b"".join((_encoder.encode(head), b"\n", request_content, response_content))


def body_metadata(body: Body) -> BodyMetadata:
    return len(body.content), body.length, body.digest


def decode(blob: bytes) -> Capture:
    """Decode a capture. Raises CaptureError if it is damaged, no capture, or of another format."""
    line, newline, bodies = blob.partition(b"\n")
    try:
        head = _head_decoder.decode(line)
    except (DecodeError, UnicodeDecodeError) as error:  # includes ValidationError
        raise _make_unreadable_error(line, error) from error
    if head.v != FORMAT_VERSION or not newline:
        raise _make_unreadable_error(line, None)
    request_size, response_size = head.request.body[0], head.answer.body[0]
    if request_size < 0 or response_size < 0 or len(bodies) != request_size + response_size:
        raise CaptureError(
            f"a capture is damaged: its bodies must have {request_size + response_size} bytes, got {len(bodies)}"
        )
    return _build_capture(head, bodies[:request_size], bodies[request_size:])


def _make_unreadable_error(line: bytes, error: Exception | None) -> CaptureError:
    try:
        version = _format_decoder.decode(line).v
    except (DecodeError, UnicodeDecodeError) as problem:
        return CaptureError(f"a capture must start with a line of JSON, an object: {problem}")
    if version != FORMAT_VERSION:
        return CaptureError(
            f"a capture must have format {FORMAT_VERSION}, got format {version!r}; upgrade the sidecar before the services"
        )
    if isinstance(error, ValidationError):
        return CaptureError(f"a capture is damaged or lacks a field: {error}")
    return CaptureError("a capture must start with a JSON object on a separate line")


def _build_capture(head: CaptureHead, request_content: bytes, response_content: bytes) -> Capture:
    request, answer = head.request, head.answer
    return Capture(
        head.pair,
        head.service,
        head.version,
        head.role,
        Request(
            request.method,
            request.path,
            request.query,
            request.route,
            request.headers,
            Body(request_content, request.body[1], request.body[2]),
        ),
        Answer(answer.status, answer.headers, Body(response_content, answer.body[1], answer.body[2]), answer.trailers),
        head.attempt,
        head.expected_captures,
        head.release,
        head.started_at,
        head.first_byte_us,
        head.total_us,
        head.client_left,
        head.complete,
        head.exception,
        head.effects,
        head.effects_dropped,
        head.spans,
        head.cache,
        head.invalid_reason,
        head.truncated_by_deadline,
    )
